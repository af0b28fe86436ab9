package store

import (
	"context"
	"fmt"
	"time"
)

// Term is a leader's time in office. Writes fenced by it fail with ErrFenced as soon
// as the store was emptied, somebody else leads or the lease ran out.
type Term struct {
	Incarnation string // of the store; random, made when it is found empty
	Epoch       int64  // counts leaders within the incarnation
}

// Lead takes or renews the leader's lease. who must be unique to the process; the
// deadline is compared with the store's own clock. If somebody else holds it, leader is
// false and term is the holder's.
func (s *Store) Lead(ctx context.Context, who string, lease time.Duration) (term Term, leader bool, err error) {
	answer, err := s.run(ctx, "take the lead", leadScript, who, lease.Milliseconds())
	if err != nil {
		return Term{}, false, err
	}
	return Term{Incarnation: text(answer, 0), Epoch: number(answer, 1)}, number(answer, 2) == 1, nil
}

// Resign gives the lease back, if who holds it, and wakes the others.
func (s *Store) Resign(ctx context.Context, who string) error {
	_, err := s.run(ctx, "resign", resignScript, who)
	return err
}

// SweepTombstones forgets the jobs that completed before a time and returns their
// number; afterwards late news would make a ghost of them.
func (s *Store) SweepTombstones(ctx context.Context, term Term, before time.Time) (int, error) {
	answer, err := s.run(ctx, "sweep tombstones", sweepScript, term.Incarnation, term.Epoch, before.UnixMilli())
	if err != nil {
		return 0, err
	}
	if err := refusal("sweep tombstones", answer); err != nil {
		return 0, err
	}
	return int(number(answer, 0)), nil
}

// Cursor returns a feed's cursor, "" if there is none: then the feed begins anew.
func (s *Store) Cursor(ctx context.Context, name string) (string, error) {
	answer, err := s.run(ctx, "read cursor "+name, cursorScript, name)
	if err != nil {
		return "", err
	}
	s.cursorMu.Lock()
	s.cursorHome[name] = text(answer, 0)
	s.cursorMu.Unlock()
	return text(answer, 1), nil
}

// SetCursor moves a cursor. It fails with ErrFenced if the store was emptied since this
// Store last read the cursor: what was swept then is lost and must be swept again.
func (s *Store) SetCursor(ctx context.Context, name, value string) error {
	s.cursorMu.Lock()
	home := s.cursorHome[name]
	s.cursorMu.Unlock()
	doing := fmt.Sprintf("set cursor %s", name)
	answer, err := s.run(ctx, doing, setCursorScript, home, name, value)
	if err != nil {
		return err
	}
	return refusal(doing, answer)
}
