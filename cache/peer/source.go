package peer

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
	"github.com/paddock-ci/paddock/image/tart"
)

// source is one peer as a cache.Source.
type source struct {
	client *Client
	id     fleet.NodeID
	at     fleet.NodePeer
	token  access.Token
	has    func(cache.Want) bool
}

var _ cache.Source = (*source)(nil)

// Name is what logs, metrics and measured rates call it.
func (s *source) Name() string { return "peer " + string(s.id) }

// Kind says that it gives content.
func (s *source) Kind() cache.Kind { return cache.KindPeer }

// Has goes by what the site said. A legacy image's disk has no digest of its content, so
// peers cannot share it. What moves counts as content, encoded or not: that is what Open
// gives, so that is what the store measures this source's rate by.
func (s *source) Has(w cache.Want) (wire int64, ok bool) {
	if w.Chunk.Legacy() || s.has == nil || !s.has(w) {
		return 0, false
	}
	return w.Chunk.Size, true
}

// encodes reports whether to ask for the piece encoded. NVRAM and config are not worth it.
func (s *source) encodes(w cache.Want) bool { return w.Chunk.Index >= 0 && s.client.encoded() }

// Manifest returns the manifest as the peer has it.
func (s *source) Manifest(ctx context.Context, _ string, d fleet.Digest) ([]byte, error) {
	b, err := s.open(ctx, target{image: d}, 0, false)
	if err != nil {
		return nil, err
	}
	defer func() { _ = b.Close() }()
	raw, err := io.ReadAll(io.LimitReader(b, image.MaxManifestBytes+1))
	if err != nil {
		return nil, err
	}
	if len(raw) > image.MaxManifestBytes {
		return nil, s.wrong("its manifest has more than %d bytes", image.MaxManifestBytes)
	}
	return raw, nil
}

// Open opens a piece's content from a byte on.
func (s *source) Open(ctx context.Context, w cache.Want, from int64) (io.ReadCloser, error) {
	size := w.Chunk.Size
	if from < 0 || from > size {
		return nil, fmt.Errorf("%s: asked for byte %d of a piece of %d", s.Name(), from, size)
	}
	if from == size {
		return http.NoBody, nil
	}
	b, err := s.open(ctx, target{w.Image, w.Chunk.Content}, from, s.encodes(w))
	if err != nil {
		return nil, err
	}
	r, err := s.content(b, from, size)
	if err != nil {
		return nil, errors.Join(err, b.Close())
	}
	return r, nil
}

// content is the content in an answer, from a byte on.
func (s *source) content(b *body, from, size int64) (io.ReadCloser, error) {
	encoded, err := s.accept(b.resp, from, size)
	if err != nil {
		return nil, err
	}
	if !encoded {
		b.left = size - from
		return b, nil
	}
	in := bufio.NewReaderSize(b, 64<<10)
	decoder, err := tart.Codec{}.NewDecoder(in, image.Chunk{MediaType: tart.MediaTypeDisk, Size: size - from}, image.Mark{})
	if err != nil {
		return nil, err
	}
	return &decoded{body: b, decoder: decoder}, nil
}

// open sends a request and returns the body of an answer that is one.
func (s *source) open(ctx context.Context, t target, from int64, encoded bool) (*body, error) {
	transport, err := s.client.line(s.at)
	if err != nil {
		return nil, s.failed(ctx, err)
	}
	request, cancel := context.WithCancel(ctx)
	address := url.URL{Scheme: "https", Host: s.at.Address, Path: t.path()}
	req, err := http.NewRequestWithContext(request, http.MethodGet, address.String(), nil)
	if err != nil {
		cancel()
		return nil, s.failed(ctx, err)
	}
	req.Header.Set("Authorization", bearer+string(s.token))
	if from > 0 {
		req.Header.Set("Range", "bytes="+strconv.FormatInt(from, 10)+"-")
	}
	if encoded {
		req.Header.Set(EncodingHeader, appleLZ4)
	}
	resp, err := transport.RoundTrip(req) // redirects are answers like others, and no good
	if err != nil {
		cancel()
		return nil, s.failed(ctx, err)
	}
	if err := s.status(resp); err != nil {
		_, _ = io.CopyN(io.Discard, resp.Body, maxHead) // a line of words: then the connection serves on
		_ = resp.Body.Close()
		cancel()
		return nil, err
	}
	b := &body{source: s, resp: resp, cancel: cancel, left: -1}
	b.timer = time.AfterFunc(s.client.c.Stall, cancel)
	b.timer.Stop() // it runs during reads only
	return b, nil
}

// status finds out what an answer means that is not the content.
func (s *source) status(resp *http.Response) error {
	e := &cache.Error{Class: cache.ClassNetwork, Err: fmt.Errorf("%s answers %s", s.Name(), resp.Status)}
	switch resp.StatusCode {
	case http.StatusOK, http.StatusPartialContent:
		return nil
	case http.StatusUnauthorized:
		// No class for people to mend: the next answer of the site brings another token.
	case http.StatusNotFound:
		e.Class = cache.ClassNotFound
	case http.StatusServiceUnavailable:
		if seconds, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && seconds >= 0 && seconds <= 60 {
			e.RetryAt = time.Now().Add(time.Duration(seconds) * time.Second)
		}
	}
	return e
}

// accept checks that an answer is the content from a byte on, and says if it is encoded.
func (s *source) accept(resp *http.Response, from, size int64) (encoded bool, err error) {
	want := ""
	if from > 0 {
		want = contentRange(from, size)
	}
	if got := resp.Header.Get("Content-Range"); got != want || (resp.StatusCode == http.StatusPartialContent) != (from > 0) {
		return false, s.wrong("asked for byte %d of %d, it sends %s, range %.80q", from, size, resp.Status, got)
	}
	switch encoding := resp.Header.Get(EncodingHeader); {
	case encoding == appleLZ4:
		return true, nil
	case encoding != "":
		return false, s.wrong("it sends an encoding that is not known here: %.80q", encoding)
	case resp.ContentLength != size-from:
		return false, s.wrong("it sends %d bytes where %d are left", resp.ContentLength, size-from)
	}
	return false, nil
}

// wrong is an error about what a peer sends: it is not what was asked for.
func (s *source) wrong(format string, args ...any) error {
	return &cache.Error{Class: cache.ClassDigest, Err: fmt.Errorf("%s: "+format, append([]any{s.Name()}, args...)...)}
}

// failed is an error on the way to or from a peer.
func (s *source) failed(ctx context.Context, err error) error {
	return ended(ctx, fmt.Errorf("%s at %s: %w", s.Name(), s.at.Address, err))
}

// body is an answer as it comes over the wire.
type body struct {
	source *source
	resp   *http.Response
	cancel context.CancelFunc // of the request
	timer  *time.Timer        // cancels it when it stalls
	left   int64              // bytes still to come; negative: until it ends
	moved  int64

	waited time.Duration // for bytes, since the floor was last looked at
	came   int64         // in that time
}

// Read reads on; each read has Stall to bring a byte, and all of them together the floor.
func (b *body) Read(p []byte) (int, error) {
	b.timer.Reset(b.source.client.c.Stall)
	b.source.client.meter.begin()
	began := time.Now()
	n, err := b.resp.Body.Read(p)
	b.source.client.meter.end(n)
	stalled := !b.timer.Stop()
	slow := b.slow(n, time.Since(began))
	b.moved += int64(n)
	if b.left >= 0 {
		b.left -= int64(n) // HTTP keeps it at the length that accept compared
	}
	c := b.source.client.c
	switch {
	case errors.Is(err, io.EOF) && b.left <= 0, err == nil && (!slow || b.left == 0):
		return n, err
	case err != nil && stalled:
		err = fmt.Errorf("no byte came for %s", c.Stall)
	case err == nil: // it trickles, and would for hours
		err = fmt.Errorf("less than %d bytes per second came for %s", c.Floor, c.Stall)
	}
	err = fmt.Errorf("%s: after %d bytes: %w", b.source.Name(), b.moved, err)
	return n, &cache.Error{Class: cache.ClassNetwork, Err: err}
}

// slow counts one read, and reports whether less than the floor came in the span of a stall
// that it ends. Time in which nobody reads does not count.
func (b *body) slow(n int, waited time.Duration) bool {
	b.waited += waited
	b.came += int64(n)
	if b.waited < b.source.client.c.Stall {
		return false
	}
	slow := float64(b.came) < float64(b.source.client.c.Floor)*b.waited.Seconds()
	b.waited, b.came = 0, 0
	return slow
}

// Close ends the request. What was not read of it ends its connection.
func (b *body) Close() error {
	b.timer.Stop()
	err := b.resp.Body.Close()
	b.cancel()
	return err
}

// decoded is the content of an encoded answer.
type decoded struct {
	*body
	decoder image.Decoder
	block   []byte // not read yet
}

// Read decodes a block when the last one is read up.
func (d *decoded) Read(p []byte) (int, error) {
	for len(d.block) == 0 {
		block, err := d.decoder.Next()
		var bad *tart.DecodeError
		switch {
		case errors.As(err, &bad):
			return 0, d.source.wrong("its encoding is broken: %w", err) // it, not the image
		case err != nil:
			return 0, err
		}
		d.block = block
	}
	n := copy(p, d.block)
	d.block = d.block[n:]
	return n, nil
}
