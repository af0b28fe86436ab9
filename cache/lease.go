package cache

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// maxHolder keeps an escaped holder within the 255 bytes of a file name.
const maxHolder = 80

// Lease pins a ready image for a holder: it is not evicted until release, which may be
// called more than once. A lease is also on disk: after a restart, the same holder's
// Lease is the same lease. It fails with ErrNotReady.
func (s *Store) Lease(d fleet.Digest, holder string) (release func() error, err error) {
	if holder == "" || len(holder) > maxHolder {
		return nil, fmt.Errorf("lease holder %.100q: want 1 to %d bytes", holder, maxHolder)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.images[d]
	if e == nil || e.State != fleet.ImageReady {
		return nil, fmt.Errorf("leasing image %s: %w", d.Short(), ErrNotReady)
	}
	if err := s.writeLease(d, holder); err != nil {
		return nil, fmt.Errorf("leasing image %s: %w", d.Short(), err)
	}
	number, again := e.leases[holder]
	if !again {
		s.leases++
		number = s.leases
		e.leases[holder] = number
	}
	e.UsedAt = time.Now()
	// Only for eviction by age after a restart; the lease does not depend on it.
	_ = os.Chtimes(filepath.Join(s.dir.image(d), metaFile), e.UsedAt, e.UsedAt)
	s.notify()
	return func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		if e.leases[holder] != number {
			return nil // released already, and perhaps taken anew since
		}
		return s.drop(e, holder)
	}, nil
}

// writeLease makes the lease's file. It is not synced: what a loss of power takes, it
// takes from the VMs too.
func (s *Store) writeLease(d fleet.Digest, holder string) error {
	if err := os.MkdirAll(s.dir.leases(d), 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(s.dir.lease(d, holder), os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	return f.Close()
}

// drop ends a lease; s.mu is held.
func (s *Store) drop(e *entry, holder string) error {
	if err := os.Remove(s.dir.lease(e.Digest, holder)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("releasing image %s: %w", e.Digest.Short(), err)
	}
	delete(e.leases, holder)
	s.notify()
	return nil
}

// Sweep drops every lease whose holder is not among holders: those of VMs that a
// restarted agent does not have any more.
func (s *Store) Sweep(holders []string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, e := range s.images {
		for holder := range e.leases {
			if slices.Contains(holders, holder) {
				continue
			}
			s.log.Info("dropping the lease of a holder that is no more", "image", e.Digest, "holder", holder)
			errs = append(errs, s.drop(e, holder))
		}
	}
	return errors.Join(errs...)
}

// Evict removes an image, ready or partial, and returns when its disk space is free. An
// image that is not here is evicted already. It fails with ErrLeased while the image is
// leased, pulled, served, reused or being evicted.
func (s *Store) Evict(d fleet.Digest) error {
	s.mu.Lock()
	e := s.images[d]
	if e == nil {
		s.mu.Unlock()
		return nil
	}
	if len(e.leases) > 0 || e.pins > 0 || e.work != nil || e.State == gone {
		defer s.mu.Unlock()
		return fmt.Errorf("evicting image %s (%s, %d leases, %d other uses): %w", d.Short(), e.State, len(e.leases), e.pins, ErrLeased)
	}
	before := e.State
	w := &work{done: make(chan struct{}), err: errAgain}
	e.work = w
	s.move(e, fleet.ImageEvicting)
	s.mu.Unlock()

	err := s.remove(d)

	s.mu.Lock()
	defer s.mu.Unlock()
	e.work = nil
	close(w.done)
	if err != nil {
		s.move(e, s.leftover(d, before))
		return fmt.Errorf("evicting image %s: %w", d.Short(), err)
	}
	e.failures, e.DiskBytes, e.Total, e.UsedAt, e.ReadyAt = 0, 0, 0, time.Time{}, time.Time{}
	e.done.Store(0)
	e.holding, e.have = nil, nil
	s.move(e, gone)
	s.log.Info("image evicted", "image", d, "ref", e.Ref)
	return nil
}

// remove takes an image's directories away, ready and partial.
func (s *Store) remove(d fleet.Digest) error {
	if err := s.dir.discard(s.dir.image(d)); err != nil {
		return err
	}
	if err := s.dir.discard(s.dir.partial(d)); err != nil {
		return err
	}
	return os.RemoveAll(s.dir.leases(d))
}

// leftover is the state after an eviction that failed: as before, unless the image has
// left its directory already and only its trash remains for the next start.
func (s *Store) leftover(d fleet.Digest, before fleet.ImageState) fleet.ImageState {
	for _, dir := range []string{s.dir.image(d), s.dir.partial(d)} {
		if _, err := os.Stat(dir); err == nil {
			return before
		}
	}
	return gone
}
