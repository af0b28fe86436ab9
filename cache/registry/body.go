package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"time"

	"github.com/google/go-containerregistry/pkg/name"

	"github.com/paddock-ci/paddock/cache"
)

// maxRetryAfter bounds what a registry may ask us to wait; a pull that would wait longer
// fails here, and goes on from another source or later.
const maxRetryAfter = time.Minute

// maxLeave bounds what is believed of such a wish: a date in another year is a mistake.
const maxLeave = time.Hour

var (
	// errCut is not io's, which a decoder would take for the end of the content.
	errCut = errors.New("the connection was cut")
	// errWhole is an answer to a range that shows that ranges are not understood.
	errWhole = errors.New("the registry refuses ranges of bytes")
)

// body is the content of one path, read through as many requests as it takes.
type body struct {
	read  func([]byte) (int, error)
	close func() error
}

func (b body) Read(p []byte) (int, error) { return b.read(p) }
func (b body) Close() error               { return b.close() }

// download is the state of one body.
type download struct {
	client     *Client
	repository name.Repository
	host       *host
	path       string // below /v2/<repository>/
	size       int64  // bytes in all; negative: whatever the registry says
	prepare    func(*http.Request)

	at      int64 // bytes delivered, and where the next request begins
	gained  int64 // of those, since the last request
	skipped int64 // bytes that came once more, and were thrown away
	whole   bool  // ask without a range
	err     error // that ended it; it comes again with every further read
	failed  int   // tries in a row that gained nothing to speak of

	port   *port // that the last request went through; nil: none did
	fresh  bool  // its credentials were read for that request
	resp   *http.Response
	until  int64              // where resp ends; negative: it does not say
	cancel context.CancelFunc // of resp's request
	timer  *time.Timer        // cancels it when it stalls
	late   bool               // it has, although a byte came after all
	window window             // of resp
}

// open asks for a path from a byte on and returns its body once the registry has begun to
// answer. A body of known size that is cut off is picked up where it broke.
func (c *Client) open(ctx context.Context, repository name.Repository, path string, from, size int64, prepare func(*http.Request)) (io.ReadCloser, error) {
	if size >= 0 && from >= size {
		return http.NoBody, nil
	}
	d := &download{
		client: c, repository: repository, host: c.host(repository.RegistryStr()), path: path,
		at: from, size: size, prepare: prepare,
	}
	if err := d.connect(ctx); err != nil {
		return nil, err
	}
	return body{
		read: func(p []byte) (int, error) {
			if d.err != nil || len(p) == 0 {
				return 0, d.err
			}
			var n int
			n, d.err = d.read(ctx, p)
			return n, d.err
		},
		close: func() error { d.drop(); return nil },
	}, nil
}

// read reads from the current response and replaces it when it breaks, or when it ends
// before the body does.
func (d *download) read(ctx context.Context, p []byte) (int, error) {
	for {
		if d.size >= 0 && d.at == d.size {
			return 0, d.end()
		}
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		n, err := d.take(p)
		if d.size >= 0 && d.at+int64(n) > d.size {
			return 0, d.overlong()
		}
		d.at += int64(n)
		d.gained += int64(n)
		if d.gained >= d.client.progress() {
			d.failed = 0
		}
		if n > 0 {
			return n, nil // an error comes again with the next read
		}
		if err == nil {
			continue
		}
		if ctx.Err() != nil {
			return 0, ctx.Err()
		}
		if d.size < 0 {
			if errors.Is(err, io.EOF) {
				return 0, io.EOF
			}
			return 0, d.network(err)
		}
		if err := d.replace(ctx, err); err != nil {
			return 0, err
		}
	}
}

// replace goes on by another request after the current one ended as err says.
func (d *download) replace(ctx context.Context, err error) error {
	d.drop()
	switch {
	case !errors.Is(err, io.EOF):
	case d.at < d.until || d.until < 0:
		err = errCut
	case d.gained >= d.client.progress():
		return d.connect(ctx) // all of the part that the registry wanted to send at once
	default:
		err = fmt.Errorf("the registry sends %d bytes at a time", d.gained)
	}
	if err := d.again(ctx, d.network(fmt.Errorf("after %d of %d bytes: %w", d.at, d.size, err)), 0); err != nil {
		return err
	}
	return d.connect(ctx)
}

// take reads once from the response, for as long as bytes move.
func (d *download) take(p []byte) (int, error) {
	if d.window.slow {
		return 0, fmt.Errorf("%w: less than %d bytes per second for %s", errSlow, d.client.floor, d.client.stall)
	}
	d.timer.Reset(d.client.stall)
	began := time.Now()
	n, err := d.resp.Body.Read(p)
	// Between reads the clock stands still: a reader that waits is no stall.
	stalled := !d.timer.Stop()
	d.late = d.late || stalled
	if err != nil && d.late && n == 0 {
		return 0, fmt.Errorf("%w: no byte came for %s", errSlow, d.client.stall)
	}
	d.window.add(n, time.Since(began), d.client.stall, d.client.floor)
	return n, err
}

// end is reached with the last byte. Whether there are more is known from the answer's
// length, or by looking.
func (d *download) end() error {
	if d.resp == nil || d.resp.ContentLength >= 0 {
		return io.EOF
	}
	if n, _ := d.take(make([]byte, 1)); n > 0 {
		return d.overlong()
	}
	return io.EOF
}

// connect sends requests until one is answered with the bytes from d.at on.
func (d *download) connect(ctx context.Context) error {
	for {
		if err := d.host.wait(ctx); err != nil {
			return err
		}
		if err := d.waste(); err != nil {
			return err
		}
		retryAfter, err := d.request(ctx)
		if err == nil || ctx.Err() != nil {
			return errors.Join(err, ctx.Err())
		}
		if d.refused(err) {
			continue
		}
		if errors.Is(err, errWhole) && !d.whole {
			d.whole = true
			continue
		}
		if cache.ClassOf(err) != cache.ClassNetwork || errors.Is(err, errPlain) {
			return err
		}
		if err := d.again(ctx, err, retryAfter); err != nil {
			return err
		}
	}
}

// refused reports whether to try once more with credentials read anew: those that were
// refused were read for an earlier request, and may have been replaced since.
func (d *download) refused(err error) bool {
	if cache.ClassOf(err) != cache.ClassAuth || d.port == nil {
		return false
	}
	d.client.forget(d.port, d.repository)
	d.port = nil
	return !d.fresh
}

// again waits before the next try, or gives the error back when there have been enough.
func (d *download) again(ctx context.Context, err error, retryAfter time.Duration) error {
	d.failed++
	if retryAfter > maxRetryAfter {
		d.host.leave(min(retryAfter, maxLeave)) // the other streams too, and the next pulls
		return retryLater(err, retryAfter)
	}
	if d.failed >= d.client.tries {
		return err
	}
	// Half of the pause is jitter, so that nodes that were refused together do not come
	// back together.
	pause := d.client.pause << (d.failed - 1)
	pause = pause/2 + rand.N(pause/2+1)
	if retryAfter > 0 {
		d.host.leave(retryAfter) // the other streams too
		pause += retryAfter
	}
	d.client.log.Info("registry request will be tried again", "host", d.repository.RegistryStr(), "path", d.path, "at", d.at, "in", pause, "error", err)
	return sleep(ctx, pause)
}

// retryLater says when a registry wants to be asked again, of an error that ends here.
func retryLater(err error, after time.Duration) error {
	return &cache.Error{
		Class: cache.ClassNetwork, RetryAt: time.Now().Add(min(after, maxLeave)),
		Err: fmt.Errorf("%w; the registry wants to be asked again in %s", err, after.Round(time.Second)),
	}
}

// sleep waits, for as long as the context lasts.
func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// drop ends the current request.
func (d *download) drop() {
	if d.resp != nil {
		_ = d.resp.Body.Close() // nothing is lost that is needed
		d.resp = nil
	}
	if d.cancel != nil {
		d.cancel()
		d.timer.Stop()
	}
}
