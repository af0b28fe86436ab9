package cache

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// supplies hands out the sources of one pull: which piece moves next, and where it comes
// from. All its fields but the first ones are guarded by mu.
type supplies struct {
	store  *Store
	turn   *turn
	image  *image.Manifest
	claims *claims // nil: there is no site

	numbers map[fleet.Digest]int // of the pieces

	mu       sync.Mutex
	queue    queue
	open     []*supply
	inflight map[string]int64 // by source: bytes chosen there that have not come
	out      map[string]error // sources that refused this image
}

// supply is one source, chosen for one piece.
type supply struct {
	fetch    *fetch
	supplies *supplies
	source   Source
	want     Want
	piece    int

	once     sync.Once
	left     int64     // bytes to come, as far as is known; guarded by supplies.mu
	last     time.Time // when bytes moved; guarded by supplies.mu
	wire     int64     // of the whole piece
	credited int64     // of the image's progress; guarded by supplies.mu
	pace     pace      // guarded by supplies.mu
}

// newSupplies is called at the beginning of each pull, when its manifest is known.
func (f *fetch) newSupplies() *supplies {
	p := &supplies{
		store: f.store, turn: f.turn, image: f.image,
		inflight: make(map[string]int64), out: make(map[string]error),
		numbers: make(map[fleet.Digest]int),
	}
	for content, at := range newHolding(f.image).places {
		p.numbers[content] = at.number
	}
	if f.store.site != nil {
		p.claims = newClaims(f)
	}
	return p
}

// begin is called when the manifest is known and the journal is open, before the first
// choose; the returned function is called at the end of the pull.
func (f *fetch) begin(ctx context.Context) (end func()) {
	p := f.newSupplies()
	f.turn.supplies.Store(p)
	f.store.hold(f)
	f.store.studyAll()
	if p.claims == nil {
		return func() {}
	}
	for _, n := range f.store.held(f.entry) {
		p.claims.have[n] = true
	}
	return p.talk(ctx)
}

// sources are the configured ones and the peers; p.mu is held.
func (p *supplies) sources() []Source {
	if p.claims == nil {
		return p.store.sources
	}
	return slices.Concat(p.store.sources, p.claims.peers)
}

// exhausted is the error for a piece that nobody is left to give; p.mu is held.
func (p *supplies) exhausted(x *waiter) error {
	var all refusals
	for _, src := range p.sources() {
		err := x.tried[src.Name()]
		if err == nil {
			err = p.out[src.Name()]
		}
		if err != nil {
			all.add(src, err)
		}
	}
	if err := all.join(); err != nil {
		return err
	}
	return &Error{Class: ClassNotFound, Err: fmt.Errorf("no source has %s", x.want.Chunk.Content.Short())}
}

// refusals are what several sources said. What the registry said comes first, since it is
// what people can mend.
type refusals struct{ first, rest []error }

func (r *refusals) add(src Source, err error) {
	if src.Kind() == KindRegistry {
		r.first = append(r.first, err)
	} else {
		r.rest = append(r.rest, fmt.Errorf("%s: %w", src.Name(), err))
	}
}

func (r *refusals) join() error { return errors.Join(append(r.first, r.rest...)...) }

// raw reports whether the source gives content, rather than blobs.
func (s *supply) raw() bool { return s.source.Kind() == KindPeer }

// ended is the end of what choose began, called once; err is how it went: nil when the
// piece is here and verified. After an error the progress of this supply is taken back;
// the next one's open counts what is before its first byte as done.
func (s *supply) ended(err error) {
	s.once.Do(func() {
		s.settle(err)
		s.supplies.schedule()
	})
}

// settle frees the stream and notes how the source did.
func (s *supply) settle(err error) {
	p, name := s.supplies, s.source.Name()
	ours := errors.Is(err, context.Canceled)
	class := ClassNetwork
	if err != nil {
		class = ClassOf(err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.inflight[name] -= max(s.left, 0)
	if i := slices.Index(p.open, s); i >= 0 {
		p.open = slices.Delete(p.open, i, i+1)
	}
	if err == nil {
		s.credit(s.whole())
	} else {
		s.credit(0)
	}
	// A peer that has not got one piece may have the others.
	refused := !ours && (class == ClassAuth || class == ClassNotFound && s.source.Kind() != KindPeer)
	if refused {
		p.out[name] = err
	}
	news := err != nil
	p.store.tracks.with(s.source, func(t *track, now time.Time) {
		t.users--
		news = news || t.failures > 0 // one that was tried is well
		switch {
		case err == nil:
			t.failures = 0
		case !ours && (class == ClassNetwork || class == ClassDigest):
			t.failed(now, err)
		}
	})
	if news {
		p.news()
	}
	if refused {
		p.store.log.Info("a source refuses an image, so it is left out", "image", s.want.Image, "source", name, "class", class, "error", err)
	}
}

// whole is what the piece counts in the image's progress: its bytes at a registry,
// wherever it comes from. VM config and NVRAM do not count.
func (s *supply) whole() int64 {
	if s.want.Chunk.Index < 0 {
		return 0
	}
	return s.want.Chunk.BlobSize
}

// credit makes bytes the supply's share of the progress; supplies.mu is held.
func (s *supply) credit(bytes int64) {
	s.fetch.entry.done.Add(bytes - s.credited)
	s.credited = bytes
}
