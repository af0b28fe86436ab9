package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/paddock-ci/paddock/cache"
)

// errWaste ends a body that could only go on by fetching again what is here.
var errWaste = errors.New("the registry answers no ranges of bytes")

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
	if d.ranged() {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", d.at, d.size-1))
	}
	d.cancel, d.gained, d.late, d.window = cancel, 0, false, window{}
	d.timer = time.AfterFunc(d.client.stall, cancel)
	resp, err := p.client.Do(req)
	stalled := !d.timer.Stop()
	if err != nil {
		cancel()
		if stalled {
			err = fmt.Errorf("%w: no answer for %s", errSlow, d.client.stall)
		}
		return 0, d.classify(err)
	}
	d.resp = resp
	d.timer.Reset(d.client.stall) // of the text of an error
	err = d.accept()
	d.timer.Stop()
	if err != nil {
		retryAfter = parseRetryAfter(resp.Header.Get("Retry-After"), time.Now())
		d.drop()
		return retryAfter, err
	}
	return 0, nil
}

// ranged reports whether to ask for a closed range: always, so that a registry that
// sends too much is found out at once, unless this one is known not to answer any.
func (d *download) ranged() bool { return d.size >= 0 && !d.whole && !d.host.whole() }

// accept checks that the response is the bytes from d.at on, of as many as there should
// be, and skips what comes too much.
func (d *download) accept() error {
	resp := d.resp
	if elsewhere := resp.Request.URL.Host; elsewhere != d.repository.RegistryStr() && resp.StatusCode/100 == 4 {
		// Links to storage are signed, with a time. The next request gets another one.
		return d.network(fmt.Errorf("the registry sends us to %s, which answers %s: the link has expired or was never good; if this goes on, compare the clocks", elsewhere, resp.Status))
	}
	if resp.StatusCode == http.StatusRequestedRangeNotSatisfiable && d.ranged() {
		return d.network(errWhole)
	}
	if err := transport.CheckError(resp, http.StatusOK, http.StatusPartialContent); err != nil {
		return d.classify(err)
	}
	if d.until = -1; d.size < 0 {
		return nil
	}
	if resp.StatusCode == http.StatusPartialContent {
		return d.part()
	}
	if got := resp.ContentLength; got >= 0 && got != d.size {
		return d.wrongLength(got)
	}
	if d.whole {
		d.host.answersNoRanges()
	}
	d.until = d.size
	return d.skip()
}

// part checks a partial answer. It may be shorter than what was asked for.
func (d *download) part() error {
	first, last, total, ok := parseContentRange(d.resp.Header.Get("Content-Range"))
	switch {
	case !ok && d.at == 0 && d.resp.ContentLength == d.size:
		d.until = d.size // careless, and right
		return nil
	case !ok || first != d.at || last >= d.size && total < 0:
		return &cache.Error{Class: cache.ClassDigest, Err: fmt.Errorf("%s: asked for bytes %d-%d, the registry sends range %.80q", d.what(), d.at, d.size-1, d.resp.Header.Get("Content-Range"))}
	case total >= 0 && total != d.size:
		return d.wrongLength(total)
	case d.resp.ContentLength >= 0 && d.resp.ContentLength != last-first+1:
		return &cache.Error{Class: cache.ClassDigest, Err: fmt.Errorf("%s: the registry sends %d bytes as range %.80q", d.what(), d.resp.ContentLength, d.resp.Header.Get("Content-Range"))}
	}
	d.until = last + 1
	return nil
}

// waste ends a body that could only go on by fetching more once more than it is long: on
// a bad line that would grow with the square. Once is always granted.
func (d *download) waste() error {
	if d.skipped == 0 || d.ranged() || d.skipped+d.at <= d.size {
		return nil
	}
	return d.network(fmt.Errorf("%w, and %d bytes have come twice already", errWaste, d.skipped))
}

// skip reads over what is here already, when the whole comes although a part was asked
// for.
func (d *download) skip() error {
	if d.at == 0 {
		return nil
	}
	d.host.answersNoRanges()
	buffer := make([]byte, 32<<10)
	for left := d.at; left > 0; {
		n, err := d.take(buffer[:min(left, int64(len(buffer)))])
		left -= int64(n)
		d.skipped += int64(n)
		if err != nil && left > 0 {
			if errors.Is(err, io.EOF) {
				err = errCut
			}
			return d.network(fmt.Errorf("skipping %d bytes that are here already: %w", d.at, err))
		}
	}
	return nil
}

func (d *download) wrongLength(got int64) error {
	return &cache.Error{Class: cache.ClassDigest, Err: fmt.Errorf("%s: truncated or wrong layer: the registry has %d bytes of it, the manifest says %d; push the image again", d.what(), got, d.size)}
}

func (d *download) overlong() error {
	return &cache.Error{Class: cache.ClassDigest, Err: fmt.Errorf("%s: the registry sends more than the %d bytes that the manifest says", d.what(), d.size)}
}

// what names the body for people.
func (d *download) what() string { return d.repository.Name() + "/" + d.path }

// network marks an error that another try may mend.
func (d *download) network(err error) error {
	return &cache.Error{Class: cache.ClassNetwork, Err: fmt.Errorf("%s: %w", d.what(), err)}
}

// classify finds out what an error of go-containerregistry or net/http means.
func (d *download) classify(err error) error { return classify(d.repository, d.path, err) }

// parseContentRange reads "bytes first-last/total"; total is negative if it is "*".
func parseContentRange(header string) (first, last, total int64, ok bool) {
	span, size, ok := strings.Cut(strings.TrimPrefix(header, "bytes "), "/")
	if !ok || !strings.HasPrefix(header, "bytes ") {
		return 0, 0, 0, false
	}
	from, to, ok := strings.Cut(span, "-")
	if !ok {
		return 0, 0, 0, false
	}
	first, ok1 := parseCount(from)
	last, ok2 := parseCount(to)
	total, ok3 := int64(-1), true
	if size != "*" {
		total, ok3 = parseCount(size)
	}
	if !ok1 || !ok2 || !ok3 || last < first || total >= 0 && last >= total {
		return 0, 0, 0, false
	}
	return first, last, total, true
}

// parseCount reads a number of bytes: digits only, not so many that sums overflow.
func parseCount(s string) (int64, bool) {
	n, err := strconv.ParseUint(s, 10, 62)
	return int64(n), err == nil
}

// parseRetryAfter reads seconds or an HTTP date; 0: neither, or in the past.
func parseRetryAfter(header string, now time.Time) time.Duration {
	if seconds, err := strconv.ParseUint(header, 10, 31); err == nil {
		return time.Duration(seconds) * time.Second
	}
	if at, err := http.ParseTime(header); err == nil {
		return max(0, at.Sub(now))
	}
	return 0
}
