package process

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/paddock-ci/paddock/vm"
)

// slots counts machines, in this process or, by locks on files, on this host. A lock
// goes with its process, so a killed one leaks no slot.
type slots struct {
	limit int
	dir   string

	mu   sync.Mutex
	used int
}

// take takes a slot or fails with vm.ErrAtCapacity; release gives it back, once.
func (s *slots) take() (release func(), err error) {
	if s.limit == 0 {
		return func() {}, nil
	}
	if s.dir == "" {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.used >= s.limit {
			return nil, s.full()
		}
		s.used++
		return sync.OnceFunc(func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.used--
		}), nil
	}
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return nil, fmt.Errorf("making the slot directory: %w", err)
	}
	for i := range s.limit {
		f, err := os.OpenFile(filepath.Join(s.dir, fmt.Sprintf("slot-%d", i)), os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return nil, fmt.Errorf("opening a slot's lock: %w", err)
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return sync.OnceFunc(func() {
				// Unlocked by word: a child that is being forked may hold a copy of f.
				_ = unix.Flock(int(f.Fd()), unix.LOCK_UN)
				_ = f.Close()
			}), nil
		}
		_ = f.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("locking a slot: %w", err)
		}
	}
	return nil, s.full()
}

func (s *slots) full() error {
	return fmt.Errorf("%w: all %d are taken", vm.ErrAtCapacity, s.limit)
}
