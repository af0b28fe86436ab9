package cache

import (
	"context"
	"slices"
	"sync/atomic"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// turn is a pull's place in the order in which pulls may move bytes: those that a job
// waits for first, then by priority, then as they came. Only the first moves bytes; it
// has all the bandwidth, so that it is ready soonest. The others are queued if they
// have not begun, else paused in the middle of a read, with their connections open.
// A pull that moves nothing for a while (its sources hang, or it waits for other nodes)
// is overtaken, and takes its turn back when there is something to move.
type turn struct {
	entry    *entry
	ref      string
	arrival  int64
	open     chan struct{} // closed while it is this pull's turn
	first    bool          // it is
	stuck    bool          // it was first, and moved nothing for idleTurn
	last     time.Time     // when it moved something, or came to
	timer    *time.Timer   // looks whether it is stuck, while it is first
	supplies atomic.Pointer[supplies]
}

// idleTurn is how long the first pull may move no byte before another goes ahead: the
// time of a few round trips and a disk's worst sync, and much less than a stall.
const idleTurn = 5 * time.Second

// take queues up; s.mu is held.
func (s *Store) take(e *entry) *turn {
	s.arrivals++
	t := &turn{entry: e, ref: e.Ref, arrival: s.arrivals, open: make(chan struct{})}
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
		s.yield(t)
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
		case a.stuck != b.stuck:
			return sign(b.stuck)
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
			t.open = make(chan struct{})
			s.yield(t)
			s.move(t.entry, fleet.ImagePaused)
		case i == 0 && !t.first:
			t.first, t.last = true, time.Now()
			t.timer = time.AfterFunc(idleTurn, func() { s.idle(t) })
			close(t.open)
			if p := t.supplies.Load(); p != nil && p.claims != nil {
				p.claims.stir() // what it wishes was not told out of turn
			}
			s.move(t.entry, fleet.ImageCaching)
		}
	}
	s.meter.run(len(s.turns) > 0)
}

// yield ends being first; s.mu is held.
func (s *Store) yield(t *turn) {
	if t.first = false; t.timer != nil {
		t.timer.Stop()
	}
}

// idle lets others go ahead of a pull that moves nothing.
func (s *Store) idle(t *turn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !t.first || t.stuck {
		return
	}
	if left := idleTurn - time.Since(t.last); left > 0 {
		t.timer.Reset(left)
		return
	}
	t.stuck = true
	if s.reorder(); !t.first {
		s.log.Info("a pull that moves nothing is overtaken", "image", t.entry.Digest, "idle", idleTurn)
	}
}

// useful says that a pull moves bytes, or could; s.mu is held.
func (s *Store) useful(t *turn) {
	t.last = time.Now()
	if !t.stuck || !slices.Contains(s.turns, t) {
		return
	}
	t.stuck = false
	if t.first {
		t.timer.Reset(idleTurn)
	}
	s.reorder()
}

// isFirst reports whether it is a pull's turn.
func (s *Store) isFirst(t *turn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return t.first
}

// canMove reports whether a pull would move bytes if it had some: it is its turn, or it
// is behind others only because it had none.
func (s *Store) canMove(t *turn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return t.first || t.stuck
}

// sign is -1 if a goes before b.
func sign(before bool) int {
	if before {
		return -1
	}
	return 1
}

// await returns when it is the turn of t, which has something to move.
func (s *Store) await(ctx context.Context, t *turn) error {
	for {
		s.mu.Lock()
		s.useful(t)
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
