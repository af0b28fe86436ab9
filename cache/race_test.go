package cache

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"

	"github.com/paddock-ci/paddock/fleet"
)

// begin is the first half of a pull of h: it has a turn, and fetched what there is.
func (s *Store) begin(t *testing.T, h fleet.Hold) *turn {
	t.Helper()
	e := s.call(h)
	if _, mine, err := s.claim(e, h); err != nil || !mine {
		t.Fatalf("claimed: %v, %v; want a pull of our own", mine, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.take(e)
}

// A pull has all its bytes when a more urgent one takes the turn, just before or just
// after the first is verified: it becomes ready all the same.
func TestFinishedPullIsPausedByAnotherAndLost(t *testing.T) {
	for name, interrupt := range map[string]bool{"before it is verified": true, "after": false} {
		t.Run(name, func(t *testing.T) {
			shelf := newShelf()
			store := openShelf(t, shelf)
			first, m := shelf.put(t, "A")
			urgent, _ := shelf.put(t, "B")
			urgent.Demand = true
			if err := store.Pull(t.Context(), first); err != nil {
				t.Fatal(err)
			}
			// The image is on disk; its entry goes through the pull's end once more.
			store.mu.Lock()
			delete(store.images, first.Digest)
			store.mu.Unlock()
			mine := store.begin(t, first)
			if interrupt {
				store.begin(t, urgent)
			}
			store.verifying(mine)
			if !interrupt {
				store.begin(t, urgent)
			}
			if got := store.state(first.Digest); got != fleet.ImageVerifying {
				t.Errorf("the finished pull is %q; want verifying", got)
			}
			if err := store.arrived(mine.entry, m); err != nil || store.state(first.Digest) != fleet.ImageReady {
				t.Errorf("arrived: %v, state %q; want ready", err, store.state(first.Digest))
			}
		})
	}
}

// An image that cannot become ready is no success of its pull.
func TestRefusedArrivalIsAnError(t *testing.T) {
	shelf := newShelf()
	store := openShelf(t, shelf)
	h, m := shelf.put(t, "A")
	if err := store.Pull(t.Context(), h); err != nil {
		t.Fatal(err)
	}
	store.mu.Lock()
	e := store.images[h.Digest]
	e.State = fleet.ImagePaused
	store.mu.Unlock()
	if err := store.arrived(e, m); err == nil {
		t.Error("an arrival out of \"paused\" went through")
	}
}

// A pull failed after its image was in place: the next one takes what is there, without
// a request; and if what is there is no image, it is replaced.
func TestPullFindsItsImageInPlace(t *testing.T) {
	for name, whole := range map[string]bool{"whole": true, "not whole": false} {
		t.Run(name, func(t *testing.T) {
			shelf := newShelf()
			store := openShelf(t, shelf)
			h, _ := shelf.put(t, "AB")
			if err := store.Pull(t.Context(), h); err != nil {
				t.Fatal(err)
			}
			if !whole {
				if err := writeFile(store.dir.image(h.Digest)+"/"+manifestFile, []byte("{}")); err != nil {
					t.Fatal(err)
				}
			}
			store.mu.Lock()
			delete(store.images, h.Digest)
			store.mu.Unlock()
			shelf.asked = nil
			if err := store.Pull(t.Context(), h); err != nil {
				t.Fatal(err)
			}
			if got := store.state(h.Digest); got != fleet.ImageReady || (len(shelf.asked) == 0) != whole {
				t.Errorf("state %q after requests for %v; want ready, without requests: %v", got, shelf.asked, whole)
			}
			if _, err := store.inspect(h.Digest); err != nil {
				t.Error(err)
			}
		})
	}
}

// Eight pre-warms are under way while callers with jobs come and go: whatever Pull
// reports as done is ready.
func TestPullsAmongHastyCallersEndReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		shelf := newShelf()
		store := openShelf(t, shelf)
		var holds []fleet.Hold
		for _, p := range []string{"A", "B", "C", "D", "E", "F", "G", "H"} {
			h, _ := shelf.put(t, p)
			holds = append(holds, h)
		}
		done := make(chan error)
		for _, h := range holds {
			go func() { done <- store.Pull(t.Context(), h) }()
			urgent := h
			urgent.Demand = true
			for range 3 {
				ctx, cancel := context.WithCancel(t.Context())
				go func() {
					err := store.Pull(ctx, urgent)
					if errors.Is(err, context.Canceled) {
						err = nil
					}
					done <- err
				}()
				go cancel()
			}
		}
		for range 4 * len(holds) {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
		for _, h := range holds {
			if got := store.state(h.Digest); got != fleet.ImageReady {
				t.Errorf("%s is %q; want ready", h.Ref, got)
			}
		}
	})
}
