package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/paddock-ci/paddock/cache"
)

// maxRetryAfter bounds what a registry may ask us to wait; a pull that waits longer
// fails, and the store tries again later.
const maxRetryAfter = time.Minute

// errCut is not io's, which a decoder would take for the end of the content.
var errCut = errors.New("the connection was cut")

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
	path       string // below /v2/<repository>/
	size       int64  // bytes in all; negative: whatever the registry says
	prepare    func(*http.Request)

	at     int64 // bytes delivered
	err    error // that ended it; it comes again with every further read
	failed int   // tries in a row without a byte
	port   *port // that the last request went through; nil: none did
	fresh  bool  // its credentials were read for that request
	resp   *http.Response
	cancel context.CancelFunc // of resp's request
	timer  *time.Timer        // cancels it when it stalls
}

// open asks for a path from a byte on and returns its body once the registry has begun to answer. A
// body of known size that is cut off is picked up where it broke.
func (c *Client) open(ctx context.Context, repository name.Repository, path string, from, size int64, prepare func(*http.Request)) (io.ReadCloser, error) {
	d := &download{client: c, repository: repository, path: path, at: from, size: size, prepare: prepare}
	if size >= 0 && from >= size {
		return http.NoBody, nil
	}
	if err := d.connect(ctx); err != nil {
		return nil, err
	}
	return body{
		read: func(p []byte) (int, error) {
			if d.err == nil {
				var n int
				n, d.err = d.read(ctx, p)
				return n, d.err
			}
			return 0, d.err
		},
		close: func() error { d.drop(); return nil },
	}, nil
}

// read reads from the current response and replaces it when it breaks.
func (d *download) read(ctx context.Context, p []byte) (int, error) {
	for {
		if d.size >= 0 && d.at == d.size {
			return 0, io.EOF
		}
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		d.timer.Reset(d.client.stall)
		n, err := d.resp.Body.Read(p)
		// Between reads the clock stands still: a reader that waits is no stall.
		stalled := !d.timer.Stop()
		if d.size >= 0 && d.at+int64(n) > d.size {
			return 0, &cache.Error{Class: cache.ClassDigest, Err: fmt.Errorf("the registry sends more than the %d bytes that the manifest says", d.size)}
		}
		d.at += int64(n)
		if n > 0 {
			d.failed = 0
			return n, nil // an error comes again with the next read
		}
		switch {
		case err == nil:
			continue
		case ctx.Err() != nil:
			return 0, ctx.Err()
		case errors.Is(err, io.EOF) && (d.size < 0 || d.at == d.size):
			return 0, io.EOF
		case d.size < 0:
			return 0, d.network(err)
		case stalled:
			err = fmt.Errorf("no byte came for %s", d.client.stall)
		case errors.Is(err, io.EOF):
			err = errCut
		}
		d.drop()
		if err := d.again(ctx, d.network(fmt.Errorf("after %d of %d bytes: %w", d.at, d.size, err)), 0); err != nil {
			return 0, err
		}
		if err := d.connect(ctx); err != nil {
			return 0, err
		}
	}
}

// connect sends requests until one is answered with the bytes from d.at on.
func (d *download) connect(ctx context.Context) error {
	for {
		retryAfter, err := d.request(ctx)
		if err == nil || ctx.Err() != nil {
			return errors.Join(err, ctx.Err())
		}
		if d.refused(err) {
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
	if d.failed >= d.client.tries || retryAfter > maxRetryAfter {
		return err
	}
	// Half of the pause is jitter, so that nodes that were refused together do not come
	// back together.
	pause := d.client.pause << (d.failed - 1)
	pause = max(retryAfter, pause/2+rand.N(pause/2+1))
	d.client.log.Info("registry request will be tried again", "path", d.path, "at", d.at, "in", pause, "error", err)
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// request sends one request and keeps its response, if it is one that can be read on.
func (d *download) request(ctx context.Context) (retryAfter time.Duration, err error) {
	p, fresh, err := d.client.enter(ctx, d.repository)
	if err != nil {
		return 0, d.classify(err)
	}
	d.port, d.fresh = p, fresh
	ctx, cancel := context.WithCancel(ctx)
	url := fmt.Sprintf("%s://%s/v2/%s/%s", p.scheme, d.repository.RegistryStr(), d.repository.RepositoryStr(), d.path)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		cancel()
		return 0, err
	}
	d.prepare(req)
	if d.at > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", d.at, d.size-1))
	}
	d.cancel = cancel
	d.timer = time.AfterFunc(d.client.stall, cancel)
	resp, err := p.client.Do(req)
	stalled := !d.timer.Stop()
	if err != nil {
		cancel()
		if stalled {
			err = fmt.Errorf("no answer for %s: %w", d.client.stall, err)
		}
		return 0, d.classify(err)
	}
	d.resp = resp
	d.timer.Reset(d.client.stall)
	err = d.accept()
	d.timer.Stop()
	if err != nil {
		retryAfter = parseRetryAfter(resp.Header.Get("Retry-After"), time.Now())
		d.drop()
		return retryAfter, err
	}
	return 0, nil
}

// accept checks that the response is the bytes from d.at on, of as many as there should
// be, and skips what comes too much.
func (d *download) accept() error {
	resp := d.resp
	if err := transport.CheckError(resp, http.StatusOK, http.StatusPartialContent); err != nil {
		return d.classify(err)
	}
	if d.size < 0 {
		return nil
	}
	left := d.size - d.at
	if resp.StatusCode == http.StatusOK {
		left = d.size // the whole, although a part was asked for
	} else if sent := resp.Header.Get("Content-Range"); d.at > 0 && !strings.HasPrefix(sent, fmt.Sprintf("bytes %d-", d.at)) {
		return &cache.Error{Class: cache.ClassDigest, Err: fmt.Errorf("asked for bytes from %d on, the registry sends range %.80q", d.at, sent)}
	}
	if got := resp.ContentLength; got >= 0 && got != left {
		return &cache.Error{Class: cache.ClassDigest, Err: fmt.Errorf("truncated or wrong layer: the registry has %d bytes of %s, the manifest says %d", got, d.path, left)}
	}
	if resp.StatusCode == http.StatusOK {
		return d.skip()
	}
	return nil
}

// skip reads over what is here already, a piece at a time: bytes that move are no stall.
func (d *download) skip() error {
	for left := d.at; left > 0; {
		n, err := io.CopyN(io.Discard, d.resp.Body, min(left, 1<<20))
		if err != nil {
			return d.network(fmt.Errorf("skipping %d bytes that are here already: %w", d.at, err))
		}
		d.timer.Reset(d.client.stall)
		left -= n
	}
	return nil
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

// network marks an error that another try may mend.
func (d *download) network(err error) error {
	return &cache.Error{Class: cache.ClassNetwork, Err: fmt.Errorf("%s/%s: %w", d.repository.Name(), d.path, err)}
}

// classify finds out what an error of go-containerregistry or net/http means.
func (d *download) classify(err error) error {
	var known *cache.Error
	if errors.As(err, &known) {
		return err
	}
	var refused *transport.Error
	if !errors.As(err, &refused) {
		return d.network(err)
	}
	host := d.repository.RegistryStr()
	switch refused.StatusCode {
	case http.StatusUnauthorized, http.StatusForbidden:
		return &cache.Error{Class: cache.ClassAuth, Err: fmt.Errorf("%s refuses access to %s: %w; log in with \"docker login %s\" or check the credentials' scope", host, d.repository.RepositoryStr(), err, host)}
	case http.StatusNotFound:
		return &cache.Error{Class: cache.ClassNotFound, Err: fmt.Errorf("%s is not at %s: %w; check the name, and whether the registry hides it for lack of credentials", d.path, d.repository.Name(), err)}
	case http.StatusTooManyRequests, http.StatusRequestTimeout:
		return d.network(err)
	}
	if refused.StatusCode/100 == 5 {
		return d.network(err)
	}
	return &cache.Error{Class: cache.ClassFormat, Err: fmt.Errorf("%s/%s: %w", d.repository.Name(), d.path, err)}
}

// parseRetryAfter reads seconds or an HTTP date; 0: neither, or in the past.
func parseRetryAfter(header string, now time.Time) time.Duration {
	if seconds, err := strconv.ParseInt(header, 10, 32); err == nil {
		return max(0, time.Duration(seconds)*time.Second)
	}
	if at, err := http.ParseTime(header); err == nil {
		return max(0, at.Sub(now))
	}
	return 0
}
