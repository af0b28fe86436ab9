package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// layer is one blob on its way, as go-containerregistry wants it.
type layer struct {
	blob  image.Blob
	hash  v1.Hash
	read  func() (io.ReadCloser, error)
	from  *name.Digest // where it may be mounted from; nil: nowhere
	tally *tally
	told  int64 // of its bytes, what the tally has
	stall time.Duration
	timer *time.Timer // ends the upload when nothing moves
}

var _ v1.Layer = (*layer)(nil)

func (l *layer) Digest() (v1.Hash, error)             { return l.hash, nil }
func (l *layer) DiffID() (v1.Hash, error)             { return l.hash, nil }
func (l *layer) Uncompressed() (io.ReadCloser, error) { return l.Compressed() }
func (l *layer) Size() (int64, error)                 { return l.blob.Size, nil }
func (l *layer) MediaType() (types.MediaType, error)  { return types.MediaType(l.blob.MediaType), nil }

// Compressed opens the blob, for one try.
func (l *layer) Compressed() (io.ReadCloser, error) {
	l.tell(0)
	in, err := l.read()
	if err != nil {
		return nil, err
	}
	left := l.blob.Size
	return body{
		read: func(p []byte) (int, error) {
			n, err := in.Read(p)
			if left -= int64(n); left < 0 {
				return 0, &cache.Error{Class: cache.ClassDigest, Err: fmt.Errorf("blob %s has more than the %d bytes that the manifest says", l.blob.Digest, l.blob.Size)}
			}
			l.tell(l.blob.Size - left)
			l.timer.Reset(l.patience(left))
			return n, err
		},
		close: in.Close,
	}, nil
}

// patience is how long nothing may move, with so much of the blob left to send.
func (l *layer) patience(left int64) time.Duration {
	if left == 0 {
		return settleTime
	}
	return l.stall
}

// tell tells the tally how much of the blob is at the registry.
func (l *layer) tell(sent int64) {
	l.tally.add(sent - l.told)
	l.told = sent
}

// tally adds up what blobs tell.
type tally struct {
	mu    sync.Mutex
	done  int64
	total int64
	each  func(done, total int64) // nil: nobody listens
}

func (t *tally) add(n int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.done += n
	if t.each != nil && n != 0 {
		t.each(t.done, t.total)
	}
}

// layers are the distinct blobs that a manifest names, each with where its bytes are.
func (c *Client) layers(ctx context.Context, p PushRequest, doc *image.Document, to name.Repository) ([]*layer, error) {
	here := make(map[fleet.Digest]Blob, len(p.Blobs))
	for _, b := range p.Blobs {
		here[b.Digest] = b
	}
	parent := to
	if p.Parent != "" {
		r, err := c.place(p.Parent)
		if err != nil {
			return nil, fmt.Errorf("its parent: %w", err)
		}
		parent = r.Repository()
	}
	tally := &tally{each: p.Progress}
	var layers []*layer
	seen := make(map[fleet.Digest]bool)
	for _, d := range append([]image.Descriptor{doc.Config}, doc.Layers...) {
		if seen[d.Digest] {
			continue
		}
		seen[d.Digest] = true
		if err := d.Blob().Check(image.MaxDiskBytes); err != nil {
			return nil, &cache.Error{Class: cache.ClassFormat, Err: err}
		}
		hash, err := v1.NewHash(string(d.Digest))
		if err != nil {
			return nil, &cache.Error{Class: cache.ClassFormat, Err: err}
		}
		l := &layer{blob: d.Blob(), hash: hash, tally: tally, stall: c.stall}
		switch b, ok := here[d.Digest]; {
		case ok && b.Size != d.Size:
			return nil, &cache.Error{Class: cache.ClassFormat, Err: fmt.Errorf("blob %s has %d bytes here, the manifest says %d", d.Digest, b.Size, d.Size)}
		case ok:
			l.read = b.Open
		case parent != to:
			l.read = func() (io.ReadCloser, error) { return c.blob(ctx, parent, d.Blob(), 0) }
			if parent.RegistryStr() == to.RegistryStr() {
				from := parent.Digest(string(d.Digest))
				l.from = &from
			}
		default:
			l.read = func() (io.ReadCloser, error) {
				return nil, &cache.Error{Class: cache.ClassNotFound, Err: fmt.Errorf("blob %s is neither here nor at %s; name the image's parent", d.Digest, to.Name())}
			}
		}
		layers = append(layers, l)
		tally.total += d.Size
	}
	return layers, nil
}

// upload brings one blob to the registry, unless it has it or mounts it.
func (c *Client) upload(ctx context.Context, pusher *remote.Pusher, to name.Repository, l *layer) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	l.timer = time.AfterFunc(settleTime, func() { cancel(fmt.Errorf("%w: nothing moves", errSlow)) })
	defer l.timer.Stop()
	var source v1.Layer = l
	if l.from != nil {
		source = &remote.MountableLayer{Layer: l, Reference: *l.from}
	}
	err := pusher.Upload(ctx, to, source)
	if cause := context.Cause(ctx); err != nil && errors.Is(cause, errSlow) {
		err = cause
	}
	if err != nil {
		return classify(to, "blobs/"+string(l.blob.Digest), err)
	}
	l.tell(l.blob.Size) // it was there, or mounted
	return nil
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
