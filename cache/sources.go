package cache

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/paddock-ci/paddock/image"
)

// supplies hands out the sources of one pull: which piece moves next, and where it comes
// from. All its fields but the first ones are guarded by mu.
type supplies struct {
	store  *Store
	turn   *turn
	image  *image.Manifest
	claims *claims // nil: there is no site

	mu       sync.Mutex
	waiting  []*waiter
	open     []*supply
	inflight map[string]int64 // by source: bytes chosen there that have not come
	out      map[string]error // sources that refused this image
}

// waiter is a piece that waits for a supply.
type waiter struct {
	fetch  *fetch
	want   Want
	piece  int
	rank   uint64
	tried  map[string]error
	wish   wish
	told   wish // what of it was offered to the site
	denied bool // it was not granted when it was last offered
	since  time.Time
	got    chan chosen
}

// chosen is what a waiter gets.
type chosen struct {
	supply *supply
	err    error
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
}

// newSupplies is called at the beginning of each pull, when its manifest is known.
func (f *fetch) newSupplies() *supplies {
	p := &supplies{
		store: f.store, turn: f.turn, image: f.image,
		inflight: make(map[string]int64), out: make(map[string]error),
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

// choose picks the source for a piece, and returns when one of the pull's streams is free
// for it. It is called for all missing pieces at once, each in a goroutine of its own: how
// many move bytes at a time, and in which order, is decided here, since a piece that
// another node fetches must not keep one waiting that can move. It fails when no source
// is left, with what was tried (by the source's Name).
func (f *fetch) choose(ctx context.Context, w Want, tried map[string]error) (*supply, error) {
	if err := f.await(ctx); err != nil {
		return nil, err
	}
	p := f.turn.supplies.Load()
	x := p.wait(f, w, tried)
	p.schedule()
	select {
	case c := <-x.got:
		return c.supply, c.err
	case <-ctx.Done():
		if !p.withdraw(x) {
			if c := <-x.got; c.supply != nil {
				c.supply.ended(ctx.Err())
			}
		}
		return nil, ctx.Err()
	}
}

// wait queues a piece up: in disk order if there is no site, else in an order of this
// pull's own, so that nodes which pull together fetch different pieces.
func (p *supplies) wait(f *fetch, w Want, tried map[string]error) *waiter {
	n, _ := p.image.Piece(w.Chunk.Content)
	x := &waiter{fetch: f, want: w, piece: n, rank: uint64(n), tried: tried, since: time.Now(), got: make(chan chosen, 1)}
	if p.claims != nil {
		x.rank = p.claims.rank(n)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	i, _ := slices.BinarySearchFunc(p.waiting, x.rank, func(a *waiter, rank uint64) int {
		if a.rank < rank {
			return -1
		}
		return 1
	})
	p.waiting = slices.Insert(p.waiting, i, x)
	return x
}

// withdraw takes a waiter back; false: it got its supply already.
func (p *supplies) withdraw(x *waiter) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	i := slices.Index(p.waiting, x)
	if i >= 0 {
		p.waiting = slices.Delete(p.waiting, i, i+1)
	}
	return i >= 0
}

// schedule gives supplies to those who wait, as far as streams are free. It is called
// whenever something has changed that could let a piece move. Pieces that are claimed for
// this node go first: others wait for them.
func (p *supplies) schedule() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.claims != nil {
		p.waiting = slices.DeleteFunc(p.waiting, func(x *waiter) bool { return p.claims.holds(x) && p.serve(x) })
	}
	p.waiting = slices.DeleteFunc(p.waiting, p.serve)
	if slices.ContainsFunc(p.waiting, func(x *waiter) bool { return x.wish != x.told && x.wish != wishNone }) {
		p.claims.stir()
	}
}

// serve gives a waiter its supply or its error, if it can; p.mu is held.
func (p *supplies) serve(x *waiter) bool {
	full := len(p.open) >= p.store.allowed()
	if full && p.claims == nil {
		return false // there is no wish to find out
	}
	src, wire, err := p.pick(x)
	switch {
	case err != nil:
		x.got <- chosen{err: err}
		return true
	case src == nil, full:
		return false
	}
	s := &supply{fetch: x.fetch, supplies: p, source: src, want: x.want, piece: x.piece, left: wire, wire: wire, last: time.Now()}
	p.open = append(p.open, s)
	p.inflight[src.Name()] += wire
	p.store.tracks.with(src, func(t *track, _ time.Time) { t.users++ })
	x.got <- chosen{supply: s}
	return true
}

// option is a source that could give a piece.
type option struct {
	source  Source
	wire    int64
	seconds float64
	awake   bool
}

// pick chooses for one waiter: a source, or an error if none is left, or neither while it
// has to wait for the site; p.mu is held. The least estimated seconds win, queue included.
// A source that rests is taken only if no other is there.
func (p *supplies) pick(x *waiter) (Source, int64, error) {
	options := p.options(x)
	x.wish = wishNone
	if len(options) == 0 {
		if p.claims != nil && p.claims.patient() {
			return nil, 0, nil
		}
		return nil, 0, p.exhausted(x)
	}
	var best, outside option // outside: what the site would have to grant first
	near := false            // some node of the site is said to have it
	for _, o := range options {
		near = near || o.source.Kind() == KindPeer
		if o.source.Kind() == KindRegistry && !p.mayFetch(x) {
			if outside.source == nil || o.better(outside) {
				outside = o
			}
		} else if best.source == nil || o.better(best) {
			best = o
		}
	}
	if outside.source == nil || best.source != nil && best.awake && (x.denied || !outside.better(best)) {
		return best.source, best.wire, nil
	}
	x.wish = wishWant
	failed := p.claims.nearby(x) && (best.source == nil || !best.awake || !near)
	if failed || best.source == nil && time.Since(x.since) > insistAfter {
		x.wish = wishInsist
	}
	return nil, 0, nil
}

// better reports whether a source is to be taken rather than another.
func (o option) better(than option) bool {
	if o.awake != than.awake {
		return o.awake
	}
	return o.seconds < than.seconds
}

// options are the sources that could give a piece; p.mu is held.
func (p *supplies) options(x *waiter) []option {
	var options []option
	for _, src := range p.sources() {
		name := src.Name()
		if x.tried[name] != nil || p.out[name] != nil {
			continue
		}
		// The content of a legacy disk has no digest, so nothing but its blobs can be verified.
		if src.Kind() == KindPeer && x.want.Chunk.Legacy() {
			continue
		}
		wire, ok := src.Has(x.want)
		if !ok {
			continue
		}
		rate, awake := p.store.tracks.look(src)
		seconds := float64(wire+p.inflight[name]) / rate
		options = append(options, option{src, wire, seconds, awake})
	}
	return options
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
	p.store.tracks.with(s.source, func(t *track, now time.Time) {
		t.users--
		switch {
		case err == nil:
			t.failures = 0
		case !ours && (class == ClassNetwork || class == ClassDigest):
			t.failed(now)
		}
	})
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

// fetchManifest asks the sources for the manifest, one after the other, those that rest
// at last.
func (f *fetch) fetchManifest(ctx context.Context) ([]byte, error) {
	awake, resting := []Source(nil), []Source(nil)
	for _, src := range f.store.sources {
		if _, ok := f.store.tracks.look(src); ok {
			awake = append(awake, src)
		} else {
			resting = append(resting, src)
		}
	}
	var all refusals
	for _, src := range append(awake, resting...) {
		raw, err := f.manifestFrom(ctx, src)
		if err == nil || ctx.Err() != nil {
			return raw, errors.Join(err, ctx.Err())
		}
		if ClassOf(err) == ClassNetwork {
			f.store.tracks.with(src, (*track).failed)
		}
		all.add(src, err)
	}
	return nil, all.join()
}

// manifestFrom asks one source; one that sends something else has not got it.
func (f *fetch) manifestFrom(ctx context.Context, src Source) ([]byte, error) {
	raw, err := src.Manifest(ctx, f.ref, f.entry.Digest)
	if err != nil {
		return nil, err
	}
	if got := image.DigestOf(raw); got != f.entry.Digest {
		return nil, &Error{Class: ClassDigest, Err: fmt.Errorf("the registry answered with another manifest: its digest is %s", got)}
	}
	return raw, nil
}
