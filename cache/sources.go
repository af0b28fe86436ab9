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

// choose picks the source for a piece, and returns when one of the pull's streams is free
// for it. It is called for all missing pieces at once, each in a goroutine of its own: how
// many move bytes at a time, and in which order, is decided here, since a piece that
// another node fetches must not keep one waiting that can move. It fails when no source
// is left, with what was tried (by the source's Name).
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

// open opens the piece from a byte on, and counts what is read as the image's progress
// and for limits and rates: it waits for the pull's turn, and so does every Read.
func (s *supply) open(ctx context.Context, w Want, from int64) (io.ReadCloser, error) {
	return s.source.Open(ctx, w, from)
}

// ended is the end of what choose began, called once; err is how it went: nil when the
// piece is here and verified. After an error the progress of this supply is taken back;
// the next one's open counts what is before its first byte as done.
func (s *supply) ended(error) {}

// raw reports whether the source gives content, rather than blobs.
func (s *supply) raw() bool { return s.source.Kind() == KindPeer }

// begin is called when the manifest is known and the journal is open, before the first
// choose; the returned function is called at the end of the pull.
func (f *fetch) begin(context.Context) (end func()) { return func() {} }

// has notes that a piece is here, verified and in the journal, wherever it came from.
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
