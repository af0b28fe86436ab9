package registry

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// Name is what logs and metrics call these registries.
func (c *Client) Name() string {
	switch {
	case c.mirror == "":
		return "registry"
	case c.only != "":
		return "mirror " + c.mirror + " for " + c.only
	default:
		return "mirror " + c.mirror
	}
}

// Kind says whether these bytes come from outside.
func (c *Client) Kind() cache.Kind {
	if c.mirror == "" {
		return cache.KindRegistry
	}
	return cache.KindMirror
}

// Has says that a registry has all of an image, as blobs, and a mirror all of what it
// mirrors.
func (c *Client) Has(w cache.Want) (wire int64, ok bool) {
	_, err := c.place(w.Ref)
	return w.Chunk.BlobSize, err == nil
}

// Manifest returns the manifest with digest d; see cache.Source.
func (c *Client) Manifest(ctx context.Context, ref string, d fleet.Digest) ([]byte, error) {
	r, err := c.place(ref)
	if err != nil {
		return nil, err
	}
	return c.manifest(ctx, r.At(d))
}

// Open opens a blob from a byte on; see cache.Source.
func (c *Client) Open(ctx context.Context, w cache.Want, from int64) (io.ReadCloser, error) {
	r, err := c.place(w.Ref)
	if err != nil {
		return nil, err
	}
	if w.Chunk.Legacy() {
		return cache.OpenParts(w.Chunk.Parts, from, func(b image.Blob, from int64) (io.ReadCloser, error) {
			return c.blob(ctx, r.Repository(), b, from)
		})
	}
	return c.blob(ctx, r.Repository(), image.Blob{Digest: w.Chunk.Blob, Size: w.Chunk.BlobSize}, from)
}

// blob opens a blob of a repository that is asked itself.
func (c *Client) blob(ctx context.Context, repository name.Repository, b image.Blob, from int64) (io.ReadCloser, error) {
	if err := fleet.CheckDigest(b.Digest); err != nil {
		return nil, &cache.Error{Class: cache.ClassFormat, Err: err}
	}
	return c.open(ctx, repository, "blobs/"+string(b.Digest), from, b.Size, func(*http.Request) {})
}

// setMirror checks and sets what Config says about a mirror.
func (c *Client) setMirror(mirror, only string) error {
	if mirror == "" {
		if only != "" {
			return fmt.Errorf("registry client: a mirror is for %s, but none is named", only)
		}
		return nil
	}
	mirror = strings.TrimSuffix(mirror, "/")
	if _, err := image.ParseReference(mirror + "/x"); err != nil {
		return fmt.Errorf("registry client: mirror %q: %w; write host or host/prefix", mirror, err)
	}
	if only != "" {
		r, err := image.ParseReference(only + "/x")
		if err != nil {
			return fmt.Errorf("registry client: mirror for %q: %w; write a host", only, err)
		}
		only = r.Host()
	}
	c.mirror, c.only = mirror, only
	return nil
}

// placed is a reference that was read: the pieces of an image are asked for by the same one,
// thousands of times.
type placed struct {
	ref       string
	own, here image.Reference // at its registry, and where this client asks for it
	err       error           // why it is not asked for here
}

// place is where a reference is asked for: at its own registry, or at the mirror. What
// must not be asked for at all is an error.
func (c *Client) place(ref string) (image.Reference, error) {
	at := c.last.Load()
	if at == nil || at.ref != ref {
		own, err := image.ParseReference(ref)
		if err != nil {
			return own, &cache.Error{Class: cache.ClassFormat, Err: err}
		}
		at = &placed{ref: ref, own: own}
		at.here, at.err = c.reroute(own)
		c.last.Store(at)
	}
	if c.allow != nil {
		if err := c.allow(at.own.Repository().Name()); err != nil {
			return at.own, &cache.Error{Class: cache.ClassAuth, Err: err}
		}
	}
	return at.here, at.err
}

// reroute finds what a reference is called at the mirror, if there is one.
func (c *Client) reroute(r image.Reference) (image.Reference, error) {
	if c.mirror == "" {
		return r, nil
	}
	if c.only != "" && c.only != r.Host() {
		return r, &cache.Error{Class: cache.ClassNotFound, Err: fmt.Errorf("mirror %s is for %s only, not for %s", c.mirror, c.only, r.Host())}
	}
	there := c.mirror + "/" + r.Repository().RepositoryStr()
	if r.Tag() != "" {
		there += ":" + r.Tag()
	}
	if r.Digest() != "" {
		there += "@" + string(r.Digest())
	}
	here, err := image.ParseReference(there)
	if err != nil {
		return r, &cache.Error{Class: cache.ClassFormat, Err: fmt.Errorf("at mirror %s: %w", c.mirror, err)}
	}
	return here, nil
}
