package storetest

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
)

// The cast: ann, who wants to see VMs of mac-1 and mac-2.
var few = store.PendingLimits{Node: 3, Actor: 4}

func pending(id string, node fleet.NodeID, actor string) store.Pending {
	return store.Pending{ID: id, Node: node, VM: "vm000001", Kind: "port", Port: 22, Actor: actor}
}

// pend notes a session and expects an error: nil or ErrFull.
func pend(t *testing.T, s *store.Store, p store.Pending, life time.Duration, want error) {
	t.Helper()
	if err := s.Pend(t.Context(), p, life, few); !errors.Is(err, want) {
		t.Fatalf("Pend(%s): %v, want %v", p.ID, err, want)
	}
}

func unpend(t *testing.T, s *store.Store, id string, want bool) {
	t.Helper()
	if waited, err := s.Unpend(t.Context(), id); err != nil || waited != want {
		t.Fatalf("Unpend(%s): %t, %v, want %t", id, waited, err, want)
	}
}

func pendings(t *testing.T, s *store.Store) {
	running(t, s)
	before := view(t, s)
	mine, other := s.Notify(store.NodeTopic("mac-1")), s.Notify(store.NodeTopic("mac-2"))
	want := pending("one", "mac-1", "ann (operator)\nx")
	pend(t, s, want, time.Minute, nil)
	wait(t, mine)
	select {
	case <-other:
		t.Error("another node is woken")
	default:
	}
	if diff := cmp.Diff(map[string]*store.Pending{"one": &want}, view(t, s).Pending); diff != "" {
		t.Error(diff)
	}
	if len(before.Pending) != 0 {
		t.Errorf("a view from before has %v", before.Pending)
	}
	unpend(t, s, "one", true)
	unpend(t, s, "one", false)
	unpend(t, s, "never", false)
	if v := view(t, s); len(v.Pending) != 0 {
		t.Errorf("answered, and still %v", v.Pending)
	}
	pend(t, s, want, time.Minute, nil) // the id may come again
	if v := view(t, s); len(v.Pending) != 1 {
		t.Errorf("%v", v.Pending)
	}
}

func pendingLimits(t *testing.T, s *store.Store) {
	for i := range few.Node {
		pend(t, s, pending(fmt.Sprint(i), "mac-1", fmt.Sprint("ann", i)), time.Minute, nil)
	}
	pend(t, s, pending("3", "mac-1", "bob"), time.Minute, store.ErrFull)
	pend(t, s, pending("3", "mac-2", "bob"), time.Minute, nil)
	unpend(t, s, "0", true)
	pend(t, s, pending("4", "mac-1", "bob"), time.Minute, nil)
	for i := range few.Actor - 2 {
		pend(t, s, pending(fmt.Sprint("b", i), fleet.NodeID(fmt.Sprint("mac-", 10+i)), "bob"), time.Minute, nil)
	}
	pend(t, s, pending("5", "mac-3", "bob"), time.Minute, store.ErrFull)
	pend(t, s, pending("5", "mac-3", "ann0"), time.Minute, nil)
}

// Deadlines are the store's clock's: nobody has to be there for them to count.
func pendingDeadline(t *testing.T, s *store.Store) {
	for i := range few.Node {
		pend(t, s, pending(fmt.Sprint(i), "mac-1", "ann"), 20*time.Millisecond, nil)
	}
	eventually(t, func() bool {
		return s.Pend(t.Context(), pending("next", "mac-1", "ann"), time.Minute, few) == nil
	})
	eventually(t, func() bool { // on a slow machine the first has run out long before the last
		pending := view(t, s).Pending
		return s.SweepPending(t.Context()) == nil && len(pending) == 1 && pending["next"] != nil
	})
	pend(t, s, pending("late", "mac-1", "ann"), 5*time.Millisecond, nil)
	eventually(t, func() bool {
		return s.SweepPending(t.Context()) == nil && view(t, s).Pending["late"] == nil
	})
	unpend(t, s, "late", false)
	unpend(t, s, "next", true)
}

func pendingOnce(t *testing.T, s *store.Store) {
	pend(t, s, pending("one", "mac-1", "ann"), time.Minute, nil)
	var won atomic.Int32
	var group sync.WaitGroup
	for range 16 {
		group.Go(func() {
			waited, err := s.Unpend(t.Context(), "one")
			if err != nil {
				t.Error(err)
			}
			if waited {
				won.Add(1)
			}
		})
	}
	group.Wait()
	if won.Load() != 1 {
		t.Errorf("%d of 16 answered it", won.Load())
	}
}
