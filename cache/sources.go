package cache

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/paddock-ci/paddock/fleet"
)

// supply is one source, chosen for one piece.
type supply struct {
	fetch  *fetch
	source Source
}

// choose picks the source for a piece. It fails when none is left, with what was tried.
func (f *fetch) choose(_ context.Context, w Want, tried map[string]error) (*supply, error) {
	var errs []error
	for _, src := range f.store.sources {
		if err := tried[src.Name()]; err != nil {
			errs = append(errs, err)
			continue
		}
		if _, ok := src.Has(w); ok {
			return &supply{fetch: f, source: src}, nil
		}
	}
	if len(errs) == 0 {
		errs = append(errs, &Error{Class: ClassNotFound, Err: fmt.Errorf("no source has %s", w.Chunk.Content.Short())})
	}
	return nil, errors.Join(errs...)
}

// open opens the piece from a byte on.
func (s *supply) open(ctx context.Context, w Want, from int64) (io.ReadCloser, error) {
	return s.source.Open(ctx, w, from)
}

// ended is the end of what choose began; err is how it went.
func (s *supply) ended(error) {}

// raw reports whether the source gives content, rather than blobs.
func (s *supply) raw() bool { return s.source.Kind() == KindPeer }

// has notes that a piece is here, verified.
func (f *fetch) has(fleet.Digest) {}

// fetchManifest asks the sources for the manifest, one after the other.
func (f *fetch) fetchManifest(ctx context.Context) ([]byte, error) {
	var errs []error
	for _, src := range f.store.sources {
		raw, err := src.Manifest(ctx, f.ref, f.entry.Digest)
		if err == nil {
			return raw, nil
		}
		errs = append(errs, err)
	}
	return nil, errors.Join(errs...)
}
