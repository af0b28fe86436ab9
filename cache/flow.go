package cache

import (
	"context"
	"io"
	"sync"
	"time"
)

// open opens the piece from a byte on, and counts what is read as the image's progress
// and for limits and rates: it waits for the pull's turn, and so does every Read.
func (s *supply) open(ctx context.Context, w Want, from int64) (io.ReadCloser, error) {
	if err := s.fetch.await(ctx); err != nil {
		return nil, err
	}
	s.begun(from)
	r := &flow{supply: s}
	r.clock(true)
	body, err := s.source.Open(ctx, w, from)
	if err != nil {
		r.clock(false)
		return nil, err
	}
	r.body = body
	r.await = func() error { return s.fetch.await(ctx) }
	r.pay = func(n int) error { return s.fetch.store.limits.pay(ctx, s.source.Kind(), n) }
	return r, nil
}

// begun counts what is before the first byte as done.
func (s *supply) begun(from int64) {
	p := s.supplies
	p.mu.Lock()
	defer p.mu.Unlock()
	left := max(s.wire-from, 0)
	p.inflight[s.source.Name()] += left - s.left
	s.left, s.last = left, time.Now()
	s.pace = pace{since: s.last}
	s.credit(s.share(left))
}

// share is the progress when that many bytes are to come.
func (s *supply) share(left int64) int64 {
	if s.wire <= 0 {
		return 0
	}
	return int64(float64(s.whole()) * (1 - float64(left)/float64(s.wire)))
}

// moved counts bytes of the piece.
func (s *supply) moved(n int64) {
	p := s.supplies
	p.mu.Lock()
	took := min(n, s.left) // a source may send more than it said
	p.inflight[s.source.Name()] -= took
	s.left -= took
	s.last = time.Now()
	s.pace.bytes += n
	s.credit(s.share(s.left))
	p.mu.Unlock()
	p.store.tracks.add(s.source, n)
	p.store.progress(p.turn, n)
}

// flow is a body that is read only in its turn and within the limits, and counted.
type flow struct {
	supply *supply
	body   io.ReadCloser
	await  func() error      // for the turn
	pay    func(n int) error // for the limits

	mu      sync.Mutex // Close may come during a Read
	running bool
	closed  bool
}

func (r *flow) Read(b []byte) (int, error) {
	s := r.supply
	if err := r.turn(); err != nil {
		return 0, err
	}
	n, err := r.body.Read(b[:min(len(b), s.fetch.store.limits.most(s.source.Kind()))])
	if n == 0 {
		return 0, err
	}
	s.moved(int64(n))
	if err := r.pay(n); err != nil {
		return n, err
	}
	// The turn may have gone while the source was waited for.
	if err := r.turn(); err != nil {
		return n, err
	}
	return n, err
}

// turn waits for the pull's turn. What is held back is no slow source.
func (r *flow) turn() error {
	if s := r.supply; s.fetch.store.isFirst(s.fetch.turn) {
		return nil
	}
	r.clock(false)
	if err := r.await(); err != nil {
		return err
	}
	r.clock(true)
	return nil
}

func (r *flow) Close() error {
	r.clock(false)
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	return r.body.Close()
}

// clock says whether the source may be judged by the time that passes.
func (r *flow) clock(run bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if run == r.running || run && r.closed {
		return
	}
	r.running = run
	r.supply.fetch.store.tracks.with(r.supply.source, func(t *track, now time.Time) {
		if run {
			t.start(now)
		} else {
			t.stop(now)
		}
	})
}
