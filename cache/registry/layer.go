package registry

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/image"
)

// layer is one blob on its way.
type layer struct {
	image.Blob
	hash  v1.Hash
	open  func() (io.ReadCloser, error)
	tally *tally
	told  int64 // of its bytes, what the tally has; the tally guards it
	try   int   // how often it was opened; as told
	stall time.Duration
	timer *time.Timer // ends the upload when nothing moves
}

// patience is how long nothing may move, with so much of the blob left to send.
func (l *layer) patience(left int64) time.Duration {
	if left == 0 {
		return settleTime
	}
	return l.stall
}

// view is a layer as go-containerregistry wants it.
type view struct{ *layer }

var _ v1.Layer = view{}

func (v view) Digest() (v1.Hash, error)             { return v.hash, nil }
func (v view) DiffID() (v1.Hash, error)             { return v.hash, nil }
func (v view) Uncompressed() (io.ReadCloser, error) { return v.Compressed() }
func (v view) Size() (int64, error)                 { return v.layer.Size, nil }
func (v view) MediaType() (types.MediaType, error)  { return types.MediaType(v.layer.MediaType), nil }

// Compressed opens the blob, for one try.
func (v view) Compressed() (io.ReadCloser, error) {
	l := v.layer
	in, err := l.open()
	if err != nil {
		return nil, ours(err)
	}
	try := l.tally.begin(l)
	left := l.Size
	return body{
		read: func(p []byte) (int, error) {
			n, err := in.Read(p)
			if left -= int64(n); left < 0 {
				return 0, &cache.Error{Class: cache.ClassDigest, Err: fmt.Errorf("blob %s has more than its %d bytes", l.Digest, l.Size)}
			}
			l.tally.sent(l, try, l.Size-left)
			l.timer.Reset(l.patience(left))
			if err != nil && !errors.Is(err, io.EOF) {
				err = ours(err)
			}
			return n, err
		},
		close: in.Close,
	}, nil
}

// ours keeps an error of reading a blob from being taken for one of the network.
func ours(err error) error {
	return &cache.Error{Class: cache.ClassOf(err), Err: fmt.Errorf("reading a blob to push it: %w", err)}
}

// tally adds up what blobs tell.
type tally struct {
	mu   sync.Mutex
	done int64
	tell func(done int64) // nil: nobody listens
}

// begin begins a try to send a layer: what was sent of it counts no longer.
func (t *tally) begin(l *layer) (try int) {
	t.mu.Lock()
	l.try++
	try = l.try
	t.mu.Unlock()
	t.sent(l, try, 0)
	return try
}

// sent is told how much of a layer is at the registry, by its last try or, as try -1, by
// who knows. Of an earlier try the transport may still be reading.
func (t *tally) sent(l *layer, try int, n int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if try >= 0 && try != l.try || n == l.told {
		return
	}
	if try < 0 {
		l.try++
	}
	t.done += n - l.told
	l.told = n
	if t.tell != nil {
		t.tell(t.done)
	}
}

// manifest is what go-containerregistry needs to know of one.
type manifest struct{ doc *image.Document }

func (m manifest) RawManifest() ([]byte, error) { return m.doc.Raw, nil }
func (m manifest) MediaType() (types.MediaType, error) {
	if m.doc.MediaType == "" {
		return image.MediaTypeManifest, nil
	}
	return types.MediaType(m.doc.MediaType), nil
}

// patient makes go-containerregistry's requests wait when a registry wants to be left
// alone; that they are made again is its own affair.
type patient struct {
	client *Client
	inner  http.RoundTripper
}

func (p patient) RoundTrip(req *http.Request) (*http.Response, error) {
	h := p.client.host(req.URL.Host)
	if err := h.wait(req.Context()); err != nil {
		return nil, err
	}
	resp, err := p.inner.RoundTrip(req)
	if err == nil && (resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode == http.StatusServiceUnavailable) {
		h.leave(min(parseRetryAfter(resp.Header.Get("Retry-After"), time.Now()), maxRetryAfter))
	}
	return resp, err
}
