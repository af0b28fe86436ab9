package node

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/vm"
)

// shelf is an image store of one file per image.
type shelf struct {
	mu       sync.Mutex
	images   map[fleet.Digest]*fleet.NodeImage
	leases   map[string]fleet.Digest // by holder
	files    map[string]string       // executables in each clone, beside the disk
	cloneErr error
	pullErr  error
	pulls    []fleet.Digest // in the order they began
	gate     chan struct{}  // if set, a pull takes until it is closed or its context ends
	pulling  chan struct{}  // one value per pull that has begun
	changed  chan struct{}
}

func newShelf(ready ...fleet.Digest) *shelf {
	s := &shelf{
		images: map[fleet.Digest]*fleet.NodeImage{}, leases: map[string]fleet.Digest{},
		changed: make(chan struct{}), pulling: make(chan struct{}, 100),
	}
	for _, d := range ready {
		s.images[d] = &fleet.NodeImage{Digest: d, State: fleet.ImageReady}
	}
	return s
}

func (s *shelf) set(d fleet.Digest, state fleet.ImageState) {
	s.images[d] = &fleet.NodeImage{Digest: d, State: state}
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *shelf) Changed() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

func (s *shelf) Pull(ctx context.Context, h fleet.Hold) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pulls = append(s.pulls, h.Digest)
	s.set(h.Digest, fleet.ImageCaching)
	s.pulling <- struct{}{}
	if gate := s.gate; gate != nil {
		s.mu.Unlock()
		select {
		case <-gate:
		case <-ctx.Done():
		}
		s.mu.Lock()
	}
	if err := errors.Join(s.pullErr, ctx.Err()); err != nil {
		s.set(h.Digest, fleet.ImageFailed)
		return err
	}
	s.set(h.Digest, fleet.ImageReady)
	return nil
}

func (s *shelf) Lease(d fleet.Digest, holder string) (func() error, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := s.images[d]; i == nil || i.State != fleet.ImageReady {
		return nil, errors.New("no such image")
	}
	s.leases[holder] = d
	return func() error {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.leases, holder)
		return nil
	}, nil
}

// Clone names the image in its errors, as the real store does.
func (s *shelf) Clone(_ context.Context, d fleet.Digest, dir string, _ int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cloneErr != nil {
		return fmt.Errorf("cloning image %s: %w", d.Short(), s.cloneErr)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	for name, text := range s.files {
		if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(name)), 0o700); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o700); err != nil {
			return err
		}
	}
	err := os.WriteFile(filepath.Join(dir, vm.ConfigFile), []byte(`{"version":1,"os":"linux","arch":"amd64"}`), 0o600)
	return errors.Join(err, os.WriteFile(filepath.Join(dir, vm.DiskFile), []byte("disk"), 0o600))
}

func (s *shelf) List() []fleet.NodeImage {
	s.mu.Lock()
	defer s.mu.Unlock()
	var list []fleet.NodeImage
	for _, d := range slices.Sorted(maps.Keys(s.images)) {
		i := *s.images[d]
		for _, leased := range s.leases {
			if leased == d {
				i.Leases++
			}
		}
		list = append(list, i)
	}
	return list
}

func (s *shelf) Evict(d fleet.Digest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, leased := range s.leases {
		if leased == d {
			return errors.New("leased")
		}
	}
	delete(s.images, d)
	return nil
}

func (s *shelf) Sweep(holders []string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	maps.DeleteFunc(s.leases, func(holder string, _ fleet.Digest) bool { return !slices.Contains(holders, holder) })
	return nil
}
