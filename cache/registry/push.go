package registry

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"golang.org/x/sync/errgroup"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

const (
	// pushStreams is how many blobs are sent at a time.
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

// PushRequest is an image to be pushed.
type PushRequest struct {
	Ref      string // host/repository:tag; with a digest, it must be the manifest's
	Manifest []byte
	// Blobs are those that are here. Others that the manifest names must be at the
	// registry already, or at the Parent's.
	Blobs []Blob
	// Parent is the image (host/repository, with or without a tag) that the rest comes
	// from: mounted if it is at the same registry and that allows it, else copied
	// through this process. Empty: there is none.
	Parent string
	// Progress is told of bytes that are at the registry, of how many; from several
	// goroutines, one at a time. nil: nobody is.
	Progress func(done, total int64)
}

// Push sends an image to a registry: the blobs that are missing there, none of them held
// in memory, then the manifest. It can be done again; what is there is not sent again.
func (c *Client) Push(ctx context.Context, p PushRequest) (fleet.Digest, error) {
	r, err := c.place(p.Ref)
	if err != nil {
		return "", err
	}
	doc, err := image.ParseDocument(p.Manifest)
	if err != nil {
		return "", &cache.Error{Class: cache.ClassFormat, Err: err}
	}
	if r.Digest() != "" && r.Digest() != doc.Digest {
		return "", &cache.Error{Class: cache.ClassFormat, Err: fmt.Errorf("pushing to %s: the manifest's digest is %s", r, doc.Digest)}
	}
	layers, err := c.layers(ctx, p, doc, r.Repository())
	if err != nil {
		return "", fmt.Errorf("pushing %s: %w", r, err)
	}
	pusher, err := c.pusher(ctx, r.Repository())
	if err != nil {
		return "", fmt.Errorf("pushing %s: %w", r, classify(r.Repository(), "", err))
	}
	group, inner := errgroup.WithContext(ctx)
	group.SetLimit(pushStreams)
	for _, l := range layers {
		group.Go(func() error { return c.upload(inner, pusher, r.Repository(), l) })
	}
	if err := group.Wait(); err != nil {
		return "", fmt.Errorf("pushing %s: %w", r, err)
	}
	var ref name.Reference = r.Repository().Digest(string(doc.Digest))
	if r.Tag() != "" {
		ref = r.Repository().Tag(r.Tag())
	}
	if err := pusher.Put(ctx, ref, manifest{doc}); err != nil {
		return "", fmt.Errorf("pushing %s: %w", r, classify(r.Repository(), "manifests/"+ref.Identifier(), err))
	}
	return doc.Digest, nil
}

// pusher is go-containerregistry's, with our transport and retries.
func (c *Client) pusher(ctx context.Context, repository name.Repository) (*remote.Pusher, error) {
	options, err := c.remote(ctx, repository)
	if err != nil {
		return nil, err
	}
	return remote.NewPusher(options...)
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
