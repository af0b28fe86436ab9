package server

import (
	"context"
	"sync"
	"time"

	"github.com/paddock-ci/paddock/store"
)

// ledgerAge is how old a copy of the ledger may be: a revocation made at another
// replica is obeyed after it, at the latest.
const ledgerAge = 2 * time.Second

// ledgerCache saves a round trip per request.
type ledgerCache struct {
	read func(context.Context) (store.Ledger, error)
	turn chan struct{} // one reads, the others wait for it, each as long as its caller does

	mu   sync.Mutex
	copy store.Ledger
	err  error     // of the last read
	at   time.Time // of the last read; zero: none yet
}

func newLedgerCache(read func(context.Context) (store.Ledger, error)) *ledgerCache {
	return &ledgerCache{read: read, turn: make(chan struct{}, 1)}
}

// get returns a copy at most ledgerAge old; it must not be modified. A failure is
// remembered as long, so that a store that is away is not knocked at by every request.
func (l *ledgerCache) get(ctx context.Context, now time.Time) (store.Ledger, error) {
	if kept, fresh, err := l.kept(now); fresh {
		return kept, err
	}
	select {
	case l.turn <- struct{}{}:
		defer func() { <-l.turn }()
	case <-ctx.Done():
		return store.Ledger{}, ctx.Err()
	}
	if kept, fresh, err := l.kept(now); fresh {
		return kept, err // whoever had the turn before has read it
	}
	fresh, err := l.read(ctx)
	if ctx.Err() != nil {
		return store.Ledger{}, ctx.Err() // says nothing about the store
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err == nil && fresh.Version >= l.copy.Version {
		l.copy = fresh
	}
	l.err, l.at = err, now
	return l.copy, err
}

func (l *ledgerCache) kept(now time.Time) (ledger store.Ledger, fresh bool, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	age := now.Sub(l.at)
	return l.copy, !l.at.IsZero() && age >= 0 && age < ledgerAge, l.err
}

// set takes a ledger that was just written here.
func (l *ledgerCache) set(fresh store.Ledger, now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if fresh.Version >= l.copy.Version {
		l.copy, l.err, l.at = fresh, nil, now
	}
}

// amend changes the ledger; what has run out is dropped from it on the way.
func (s *Server) amend(ctx context.Context, now time.Time, change func(*store.Ledger) error) error {
	fresh, err := s.c.Store.UpdateLedger(ctx, func(l *store.Ledger) error {
		prune(l, now)
		return change(l)
	})
	if err != nil {
		return err
	}
	s.ledger.set(fresh, now)
	return nil
}

// pruneAfter keeps what has run out for a while, for people to see.
const pruneAfter = 24 * time.Hour

func prune(l *store.Ledger, now time.Time) {
	over := now.Add(-pruneAfter)
	tokens := l.Tokens[:0]
	for _, t := range l.Tokens {
		if t.ExpiresAt.IsZero() || t.ExpiresAt.After(over) {
			tokens = append(tokens, t)
		}
	}
	l.Tokens = tokens
	joins := l.Joins[:0]
	for _, j := range l.Joins {
		if j.ExpiresAt.After(over) {
			joins = append(joins, j)
		}
	}
	l.Joins = joins
	for id, until := range l.Revoked {
		if until.Before(over) {
			delete(l.Revoked, id)
		}
	}
}
