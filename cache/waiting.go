package cache

import (
	"cmp"
	"context"
	"slices"
	"time"
)

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
	// doubted: it is insisted on because no node came to have it, not because those failed.
	doubted bool
	first   bool // it is claimed for this node, so that others wait for it
	since   time.Time
	got     chan chosen
}

// chosen is what a waiter gets.
type chosen struct {
	supply *supply
	err    error
}

// queue is the pieces that wait. There may be thousands, and something happens with each of
// them, so that none is looked at for what cannot concern it: who is ready waits for no
// more than a stream, and is looked at when one is free; who is parked was looked at, and
// waits for news of sources. supplies.mu guards it.
type queue struct {
	ready  []*waiter // in order
	parked []*waiter // in none
}

// order is that of the queue: in which pieces begin to move.
func order(a, b *waiter) int {
	if a.first != b.first {
		return sign(a.first)
	}
	return cmp.Compare(a.rank, b.rank)
}

// insert puts a waiter to its place.
func (q *queue) insert(x *waiter) {
	i, _ := slices.BinarySearchFunc(q.ready, x, order)
	q.ready = slices.Insert(q.ready, i, x)
}

// remove takes a waiter out; false: it is not here any more.
func (q *queue) remove(x *waiter) bool {
	for _, list := range []*[]*waiter{&q.ready, &q.parked} {
		if i := slices.Index(*list, x); i >= 0 {
			*list = slices.Delete(*list, i, i+1)
			return true
		}
	}
	return false
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

// wait queues a piece up, or serves it at once: in disk order if there is no site, else in
// an order of this pull's own, so that nodes which pull together fetch different pieces.
func (p *supplies) wait(f *fetch, w Want, tried map[string]error) *waiter {
	n := p.numbers[w.Chunk.Content]
	x := &waiter{fetch: f, want: w, piece: n, rank: uint64(n), tried: tried, since: time.Now(), got: make(chan chosen, 1)}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.claims != nil {
		x.rank, x.first = p.claims.rank(n), p.claims.holds(x)
	}
	if p.free() && len(p.queue.ready) == 0 {
		p.serve(p.sights(), x)
		return x
	}
	if p.claims != nil { // what it wishes is to be told soon
		if at, _, err := p.pick(p.sights(), x); at == nil && err == nil {
			p.park(x)
			return x
		}
	}
	p.queue.insert(x)
	return x
}

// withdraw takes a waiter back; false: it got its supply already.
func (p *supplies) withdraw(x *waiter) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.queue.remove(x)
}

// free reports whether one more stream may be open; p.mu is held.
func (p *supplies) free() bool { return len(p.open) < p.store.allowed() }

// schedule gives supplies to those who wait, as far as streams are free. It is called when
// one has become free, and after news. Pieces that are claimed for this node go first:
// others wait for them.
func (p *supplies) schedule() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.free() || len(p.queue.ready) == 0 {
		return
	}
	sights, done := p.sights(), 0
	for ; done < len(p.queue.ready) && p.free(); done++ {
		p.serve(sights, p.queue.ready[done])
	}
	p.queue.ready = slices.Delete(p.queue.ready, 0, done)
}

// news lets the parked ones be looked at again: there are other sources or grants, or a
// source failed or is well again. p.mu is held.
func (p *supplies) news() {
	all := append(p.queue.ready, p.queue.parked...)
	if p.claims != nil {
		for _, x := range all {
			x.first = p.claims.holds(x)
		}
	}
	slices.SortFunc(all, order)
	p.queue.ready, p.queue.parked = all, nil
}

// park puts a waiter aside until there is news; p.mu is held.
func (p *supplies) park(x *waiter) {
	p.queue.parked = append(p.queue.parked, x)
	if x.wish != x.told && x.wish != wishNone && !p.claims.held { // else the turn's return stirs
		p.claims.stir()
	}
}

// wishes are the waiters that wish to fetch from outside, the most wanted first; p.mu is
// held.
func (p *supplies) wishes() []*waiter {
	var sights []*sight
	if len(p.queue.ready) > 0 {
		sights = p.sights()
	}
	for _, x := range p.queue.ready {
		_, _, _ = p.pick(sights, x) // for its wish
	}
	all := slices.Concat(p.queue.ready, p.queue.parked)
	all = slices.DeleteFunc(all, func(x *waiter) bool { return x.wish == wishNone })
	slices.SortFunc(all, order)
	return all
}

// serve gives a waiter its supply or its error, or parks it; a stream is free and p.mu is
// held.
func (p *supplies) serve(sights []*sight, x *waiter) {
	at, wire, err := p.pick(sights, x)
	switch {
	case err != nil:
		x.got <- chosen{err: err}
		return
	case at == nil:
		p.park(x)
		return
	}
	s := &supply{fetch: x.fetch, supplies: p, source: at.source, want: x.want, piece: x.piece, left: wire, wire: wire, last: time.Now()}
	p.open = append(p.open, s)
	p.inflight[at.name] += wire
	p.store.tracks.with(at.source, func(t *track, now time.Time) {
		t.users++
		at.awake = t.awake(now)
	})
	x.got <- chosen{supply: s}
}

// sight is a source as it is while a few waiters are looked at.
type sight struct {
	source Source
	name   string
	kind   Kind
	rate   float64 // bytes per second
	awake  bool
}

// sights are the sources that have not refused the image; p.mu is held.
func (p *supplies) sights() []*sight {
	sources := p.sources()
	sights := make([]*sight, 0, len(sources))
	for _, src := range sources {
		s := &sight{source: src, name: src.Name(), kind: src.Kind()}
		if p.out[s.name] == nil {
			s.rate, s.awake = p.store.tracks.look(src)
			sights = append(sights, s)
		}
	}
	return sights
}

// option is a source that could give a piece.
type option struct {
	*sight
	wire    int64
	seconds float64
}

// pick chooses for one waiter: a source, or an error if none is left, or neither while it
// has to wait for the site; p.mu is held. The least estimated seconds win, queue included.
// A source that rests is taken only if no other is there.
func (p *supplies) pick(sights []*sight, x *waiter) (*sight, int64, error) {
	var best, outside option // outside: what the site would have to grant first
	near := false            // some node of the site is said to have it
	mayFetch := p.mayFetch(x)
	for _, s := range sights {
		o, ok := p.option(s, x)
		if !ok {
			continue
		}
		near = near || s.kind == KindPeer
		if s.kind == KindRegistry && !mayFetch {
			if o.better(outside) {
				outside = o
			}
		} else if o.better(best) {
			best = o
		}
	}
	x.wish = wishNone
	switch {
	case best.sight == nil && outside.sight == nil:
		if p.claims != nil && p.claims.patient() {
			return nil, 0, nil
		}
		return nil, 0, p.exhausted(x)
	case outside.sight == nil || best.sight != nil && best.awake && (x.denied || !outside.better(best)):
		return best.sight, best.wire, nil
	}
	x.wish = wishWant
	failed := p.claims.nearby(x) && (best.sight == nil || !best.awake || !near)
	waited := time.Since(x.since)
	if x.doubted = false; failed || best.sight == nil && waited > insistAfter || waited > insistAnyway {
		x.wish, x.doubted = wishInsist, !failed && waited <= insistAnyway
	}
	return nil, 0, nil
}

// option is what a source is for a piece; false: it cannot give it.
func (p *supplies) option(s *sight, x *waiter) (option, bool) {
	// The content of a legacy disk has no digest, so nothing but its blobs can be verified.
	if x.tried[s.name] != nil || s.kind == KindPeer && x.want.Chunk.Legacy() {
		return option{}, false
	}
	wire, ok := s.source.Has(x.want)
	return option{s, wire, float64(wire+p.inflight[s.name]) / s.rate}, ok
}

// better reports whether a source is to be taken rather than another, or none.
func (o option) better(than option) bool {
	if than.sight == nil {
		return true
	}
	if o.awake != than.awake {
		return o.awake
	}
	return o.seconds < than.seconds
}
