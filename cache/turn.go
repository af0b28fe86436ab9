package cache

import (
	"context"
	"io"
	"slices"

	"github.com/paddock-ci/paddock/fleet"
)

// turn is a pull's place in the order in which pulls may move bytes: those that a job
// waits for first, then by priority, then as they came. Only the first moves bytes; it
// has all the bandwidth, so that it is ready soonest. The others are queued if they
// have not begun, else paused in the middle of a read, with their connections open.
type turn struct {
	entry   *entry
	arrival int64
	open    chan struct{} // closed while it is this pull's turn
	first   bool          // it is
}

// take queues up; s.mu is held.
func (s *Store) take(e *entry) *turn {
	s.arrivals++
	t := &turn{entry: e, arrival: s.arrivals, open: make(chan struct{})}
	e.turn = t
	s.turns = append(s.turns, t)
	s.reorder()
	return t
}

// leave gives the turn up.
func (s *Store) leave(t *turn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.giveUp(t)
}

// giveUp is leave; s.mu is held.
func (s *Store) giveUp(t *turn) {
	if i := slices.Index(s.turns, t); i >= 0 {
		s.turns = slices.Delete(s.turns, i, i+1)
		t.entry.turn = nil
		s.reorder()
	}
}

// verifying ends the part of a pull that needs a turn, so that the next pull may begin.
// Both happen under one lock: a pull that is verified and has a turn could be paused.
func (s *Store) verifying(t *turn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.giveUp(t)
	s.move(t.entry, fleet.ImageVerifying)
}

// reorder sorts the turns and opens the first; s.mu is held. It is called whenever a
// pull comes, goes, or is wanted more or less urgently.
func (s *Store) reorder() {
	slices.SortStableFunc(s.turns, func(a, b *turn) int {
		switch x, y := a.entry, b.entry; {
		case (x.demand > 0) != (y.demand > 0):
			return sign(x.demand > 0)
		case x.priority != y.priority:
			return y.priority - x.priority
		default:
			return int(a.arrival - b.arrival)
		}
	})
	for i, t := range s.turns {
		switch {
		case i > 0 && t.first:
			t.first, t.open = false, make(chan struct{})
			s.move(t.entry, fleet.ImagePaused)
		case i == 0 && !t.first:
			t.first = true
			close(t.open)
			s.move(t.entry, fleet.ImageCaching)
		}
	}
	s.meter.run(len(s.turns) > 0)
}

// sign is -1 if a goes before b.
func sign(before bool) int {
	if before {
		return -1
	}
	return 1
}

// await returns when it is the turn of t.
func (s *Store) await(ctx context.Context, t *turn) error {
	for {
		s.mu.Lock()
		open, first := t.open, t.first
		s.mu.Unlock()
		if first {
			return ctx.Err()
		}
		select {
		case <-open:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// metered is a body that is read only in its turn, and counted.
type metered struct {
	await func() error // for the turn
	store *Store
	entry *entry
	body  io.Reader
	moved int64
}

func (m *metered) Read(b []byte) (int, error) {
	if err := m.await(); err != nil {
		return 0, err
	}
	n, err := m.body.Read(b)
	m.moved += int64(n)
	m.entry.done.Add(int64(n))
	m.store.progress(n)
	return n, err
}

// takeBack uncounts what was read, when it turned out to be no good.
func (m *metered) takeBack() { m.entry.done.Add(-m.moved) }
