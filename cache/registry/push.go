package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"golang.org/x/sync/errgroup"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

const (
	// pushStreams is how many blobs Push sends at a time.
	pushStreams = 4
	// settleTime is how long a registry may take over a blob that it has: some copy it
	// to another place before they answer.
	settleTime = 5 * time.Minute
	// listStalls is how many stalls a list of tags may take: it comes in pages of 1000.
	listStalls = 4
)

// Blob is one blob of an image that is pushed. It has the shape of tart.Layer.
type Blob struct {
	image.Blob
	Open func() (io.ReadCloser, error) // called again for each further try
}

// Upload is an image on its way to a registry: Put or Take for each of its blobs, from
// several goroutines if need be, then Finish. It can be begun again; what is at the
// registry is not sent again. Nothing has to be closed.
type Upload struct {
	client *Client
	ref    image.Reference
	pusher *remote.Pusher
	tally  tally
}

// Upload begins to push an image to host/repository:tag; with a digest instead of a tag,
// Finish wants that one. Progress is told of bytes that are at the registry, one call at
// a time; nil: nobody is.
func (c *Client) Upload(ctx context.Context, ref string, progress func(done int64)) (*Upload, error) {
	r, err := c.place(ref)
	if err != nil {
		return nil, err
	}
	options, err := c.remote(ctx, r.Repository())
	if err != nil {
		return nil, fmt.Errorf("pushing %s: %w", r, classify(r.Repository(), "", err))
	}
	pusher, err := remote.NewPusher(options...)
	if err != nil {
		return nil, fmt.Errorf("pushing %s: %w", r, err)
	}
	return &Upload{client: c, ref: r, pusher: pusher, tally: tally{tell: progress}}, nil
}

// remote is how go-containerregistry's own requests are made.
func (c *Client) remote(ctx context.Context, repository name.Repository) ([]remote.Option, error) {
	auth, err := within(ctx, c.stall, func(ctx context.Context) (authn.Authenticator, error) {
		return c.credentials(ctx, repository)
	})
	return []remote.Option{
		remote.WithAuth(auth), remote.WithTransport(patient{c, c.outward}),
		remote.WithRetryBackoff(remote.Backoff{Duration: c.pause, Factor: 2, Jitter: 0.5, Steps: c.tries}),
	}, err
}

// Put sends a blob, unless the registry has it; it is not held in memory.
func (u *Upload) Put(ctx context.Context, b Blob) error { return u.send(ctx, b, nil) }

// Take brings a blob from another image (host/repository, with or without a tag): it is
// mounted if both are at one registry that allows it, else copied through this process.
// It reports false if there is no such blob.
func (u *Upload) Take(ctx context.Context, b image.Blob, from string) (bool, error) {
	r, err := u.client.place(from)
	if err != nil {
		return false, err
	}
	there := r.Repository()
	source := Blob{Blob: b, Open: func() (io.ReadCloser, error) { return u.client.blob(ctx, there, b, 0) }}
	var mount *name.Digest
	if there.RegistryStr() == u.ref.Host() && there != u.ref.Repository() {
		d := there.Digest(string(b.Digest))
		mount = &d
	}
	err = u.send(ctx, source, mount)
	var failed *cache.Error
	if errors.As(err, &failed) && failed.Class == cache.ClassNotFound {
		return false, nil
	}
	return err == nil, err
}

// send brings one blob to the registry, unless it has it or mounts it.
func (u *Upload) send(ctx context.Context, b Blob, mount *name.Digest) error {
	if err := b.Check(image.MaxDiskBytes); err != nil {
		return &cache.Error{Class: cache.ClassFormat, Err: err}
	}
	hash, err := v1.NewHash(string(b.Digest))
	if err != nil {
		return &cache.Error{Class: cache.ClassFormat, Err: err}
	}
	l := &layer{Blob: b.Blob, hash: hash, open: b.Open, tally: &u.tally, stall: u.client.stall}
	for try := 1; ; try++ {
		err := u.once(ctx, l, mount)
		if err == nil {
			u.tally.sent(l, -1, b.Size) // it was there, or mounted
			return nil
		}
		u.tally.sent(l, -1, 0)
		err = fmt.Errorf("pushing %s: %w", u.ref, classify(u.ref.Repository(), "blobs/"+string(b.Digest), err))
		if try >= u.client.tries || ctx.Err() != nil || cache.ClassOf(err) != cache.ClassNetwork {
			return err
		}
		u.client.log.Info("a blob will be sent again", "blob", b.Digest, "error", err)
		if err := sleep(ctx, u.client.pause<<(try-1)); err != nil {
			return err
		}
	}
}

// once tries to send a blob, for as long as bytes move.
func (u *Upload) once(ctx context.Context, l *layer, mount *name.Digest) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	l.timer = time.AfterFunc(settleTime, func() { cancel(fmt.Errorf("%w: nothing moves", errSlow)) })
	defer l.timer.Stop()
	var source v1.Layer = view{l}
	if mount != nil {
		source = &remote.MountableLayer{Layer: source, Reference: *mount}
	}
	err := u.pusher.Upload(ctx, u.ref.Repository(), source)
	if cause := context.Cause(ctx); err != nil && errors.Is(cause, errSlow) {
		return cause
	}
	return err
}

// Finish sends the manifest, which makes the image. Its blobs must be at the registry.
func (u *Upload) Finish(ctx context.Context, raw []byte) (fleet.Digest, error) {
	doc, err := image.ParseDocument(raw)
	if err != nil {
		return "", &cache.Error{Class: cache.ClassFormat, Err: err}
	}
	if want := u.ref.Digest(); want != "" && want != doc.Digest {
		return "", &cache.Error{Class: cache.ClassFormat, Err: fmt.Errorf("pushing %s: the manifest's digest is %s", u.ref, doc.Digest)}
	}
	var ref name.Reference = u.ref.Repository().Digest(string(doc.Digest))
	if u.ref.Tag() != "" {
		ref = u.ref.Repository().Tag(u.ref.Tag())
	}
	if err := u.pusher.Put(ctx, ref, manifest{doc}); err != nil {
		return "", fmt.Errorf("pushing %s: %w", u.ref, classify(u.ref.Repository(), "manifests/"+ref.Identifier(), err))
	}
	return doc.Digest, nil
}

// PushRequest is an image that is here in full.
type PushRequest struct {
	Ref      string // host/repository:tag
	Manifest []byte
	// Blobs are those that are here. Others that the manifest names must be at the
	// registry already, or at the Parent's.
	Blobs []Blob
	// Parent is the image that the rest is taken from; see Upload.Take. Empty: none is.
	Parent string
	// Progress is told of bytes that are at the registry, of how many, one call at a time;
	// nil: nobody is.
	Progress func(done, total int64)
}

// Push sends a whole image: the blobs that are missing at the registry, then the
// manifest.
func (c *Client) Push(ctx context.Context, p PushRequest) (fleet.Digest, error) {
	doc, err := image.ParseDocument(p.Manifest)
	if err != nil {
		return "", &cache.Error{Class: cache.ClassFormat, Err: err}
	}
	distinct, total := distinctBlobs(doc)
	u, err := c.Upload(ctx, p.Ref, func(done int64) {
		if p.Progress != nil {
			p.Progress(done, total)
		}
	})
	if err != nil {
		return "", err
	}
	here := make(map[fleet.Digest]Blob, len(p.Blobs))
	for _, b := range p.Blobs {
		here[b.Digest] = b
	}
	group, inner := errgroup.WithContext(ctx)
	group.SetLimit(pushStreams)
	for _, b := range distinct {
		group.Go(func() error {
			if at, ok := here[b.Digest]; ok && at.Size == b.Size {
				return u.Put(inner, at)
			}
			return u.rest(inner, b, p.Parent)
		})
	}
	if err := group.Wait(); err != nil {
		return "", err
	}
	return u.Finish(ctx, p.Manifest)
}

// rest brings a blob that is not here.
func (u *Upload) rest(ctx context.Context, b image.Blob, parent string) error {
	missing := &cache.Error{Class: cache.ClassNotFound, Err: fmt.Errorf("blob %s (%d bytes) is neither here nor at the registry; name the image's parent", b.Digest, b.Size)}
	if parent == "" {
		return u.Put(ctx, Blob{b, func() (io.ReadCloser, error) { return nil, missing }})
	}
	taken, err := u.Take(ctx, b, parent)
	if err == nil && !taken {
		return missing
	}
	return err
}

// distinctBlobs are what a manifest names, each once, and their bytes in all.
func distinctBlobs(doc *image.Document) (distinct []image.Blob, total int64) {
	seen := make(map[fleet.Digest]bool)
	for _, d := range append([]image.Descriptor{doc.Config}, doc.Layers...) {
		if !seen[d.Digest] {
			seen[d.Digest] = true
			distinct = append(distinct, d.Blob())
			total += d.Size
		}
	}
	return distinct, total
}

// Tags lists the tags of a repository (host/name), as the registry sorts them.
func (c *Client) Tags(ctx context.Context, repository string) ([]string, error) {
	r, err := c.place(repository)
	if err != nil {
		return nil, err
	}
	tags, err := within(ctx, listStalls*c.stall, func(ctx context.Context) ([]string, error) {
		options, err := c.remote(ctx, r.Repository())
		if err != nil {
			return nil, err
		}
		return remote.List(r.Repository(), append(options, remote.WithContext(ctx))...)
	})
	if err != nil {
		return nil, fmt.Errorf("listing the tags of %s: %w", r.Repository().Name(), classify(r.Repository(), "tags/list", err))
	}
	return tags, nil
}
