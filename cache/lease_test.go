package cache

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// Leases: none before the image is ready; the same for the same holder, also after a
// restart; a stale release does not end a newer lease.
func TestLeases(t *testing.T) {
	shelf := newShelf()
	store := openShelf(t, shelf)
	h, _ := shelf.put(t, "A")
	if _, err := store.Lease(h.Digest, "vm1"); !errors.Is(err, ErrNotReady) {
		t.Errorf("before the pull: %v; want %v", err, ErrNotReady)
	}
	if err := store.Pull(t.Context(), h); err != nil {
		t.Fatal(err)
	}
	lease := func(s *Store, holder string) func() error {
		t.Helper()
		release, err := s.Lease(h.Digest, holder)
		if err != nil {
			t.Fatal(err)
		}
		return release
	}
	count := func(s *Store, want int) {
		t.Helper()
		if got := s.List()[0].Leases; got != want {
			t.Errorf("%d leases; want %d", got, want)
		}
	}
	stale := lease(store, "vm1")
	lease(store, "vm1")
	lease(store, "../../vm2")
	count(store, 2)
	for range 2 {
		if err := stale(); err != nil {
			t.Fatal(err)
		}
	}
	count(store, 1)
	lease(store, "vm1")
	if err := stale(); err != nil {
		t.Fatal(err)
	}
	count(store, 2)
	if err := store.Evict(h.Digest); !errors.Is(err, ErrLeased) {
		t.Errorf("evicting a leased image: %v; want %v", err, ErrLeased)
	}
	used := store.List()[0].UsedAt

	dir := string(store.dir)
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
	store, err := Open(Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = store.Close() }()
	count(store, 2)
	if got := store.List()[0].UsedAt; got.Sub(used).Abs() > time.Second {
		t.Errorf("last used at %s; want %s", got, used)
	}
	if err := store.Sweep([]string{"../../vm2", "vm3"}); err != nil {
		t.Fatal(err)
	}
	count(store, 1)
	if err := lease(store, "../../vm2")(); err != nil {
		t.Fatal(err)
	}
	count(store, 0)
	if err := store.Evict(h.Digest); err != nil {
		t.Fatal(err)
	}
	if len(store.List()) != 0 {
		t.Errorf("listed after its eviction: %+v", store.List())
	}
	for _, kind := range []string{"images", "partial", "leases", "trash"} {
		names, err := os.ReadDir(filepath.Join(dir, kind))
		if err != nil || len(names) != 0 {
			t.Errorf("%s holds %v after the eviction (%v)", kind, names, err)
		}
	}
}

// Leases and clones race with evictions and pulls: a lease that was given keeps its
// image, and a clone under it never fails.
func TestLeaseEvictRace(t *testing.T) {
	shelf := newShelf()
	store := openShelf(t, shelf)
	h, _ := shelf.put(t, "A0B")
	root := t.TempDir()
	var workers sync.WaitGroup
	for w := range 4 {
		workers.Go(func() {
			for i := range 25 {
				if err := store.Pull(t.Context(), h); err != nil {
					t.Errorf("pull: %v", err)
					return
				}
				release, err := store.Lease(h.Digest, fmt.Sprintf("vm-%d", w))
				if errors.Is(err, ErrNotReady) {
					continue // evicted in between, which is fair
				}
				if err != nil {
					t.Errorf("lease: %v", err)
					return
				}
				dir := filepath.Join(root, fmt.Sprintf("%d-%d", w, i))
				if err := store.Clone(t.Context(), h.Digest, dir, 0); err != nil {
					t.Errorf("clone of a leased image: %v", err)
				}
				if err := release(); err != nil {
					t.Errorf("release: %v", err)
				}
			}
		})
	}
	stop := make(chan struct{})
	evictor := make(chan struct{})
	go func() {
		defer close(evictor)
		for {
			select {
			case <-stop:
				return
			case <-store.Changed():
			}
			if err := store.Evict(h.Digest); err != nil && !errors.Is(err, ErrLeased) {
				t.Errorf("evict: %v", err)
			}
		}
	}()
	workers.Wait()
	close(stop)
	<-evictor
	if err := store.Pull(t.Context(), h); err != nil {
		t.Fatal(err)
	}
}

// A failed image can be evicted, and with it goes its back-off: another order for it is
// a new one.
func TestEvictFailed(t *testing.T) {
	shelf := newShelf()
	store := openShelf(t, shelf)
	h, m := shelf.put(t, "AB")
	spoilt := shelf.blobs[m.Chunks[1].Blob]
	shelf.blobs[m.Chunks[1].Blob] = spoilt[1:]
	if err := store.Pull(t.Context(), h); ClassOf(err) != ClassDigest {
		t.Fatalf("got %v; want class digest", err)
	}
	if err := store.Evict(h.Digest); err != nil {
		t.Fatal(err)
	}
	if len(store.List()) != 0 {
		t.Errorf("listed: %+v", store.List())
	}
	shelf.blobs[m.Chunks[1].Blob] = spoilt
	if err := store.Pull(t.Context(), h); err != nil {
		t.Fatal(err)
	}
	if err := store.Evict("sha256:" + fleet.Digest(strings.Repeat("0", 64))); err != nil {
		t.Errorf("evicting what is not here: %v", err)
	}
}

// An eviction that fails leaves the image as it was.
func TestEvictFails(t *testing.T) {
	shelf := newShelf()
	store := openShelf(t, shelf)
	h, _ := shelf.put(t, "A")
	if err := store.Pull(t.Context(), h); err != nil {
		t.Fatal(err)
	}
	trash := filepath.Join(string(store.dir), "trash")
	if err := os.Remove(trash); err != nil {
		t.Fatal(err)
	}
	if err := store.Evict(h.Digest); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without a trash directory: %v; want %v", err, os.ErrNotExist)
	}
	if got := store.state(h.Digest); got != fleet.ImageReady {
		t.Errorf("the image is %q; want ready", got)
	}
	if err := os.Mkdir(trash, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := store.Evict(h.Digest); err != nil {
		t.Error(err)
	}
}
