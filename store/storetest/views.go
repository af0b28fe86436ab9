package storetest

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
)

func viewReadsWrites(t *testing.T, s *store.Store) {
	var group sync.WaitGroup
	for w := range 8 {
		group.Go(func() {
			for i := range 25 {
				id := jobID + fleet.JobID(1000*w+i)
				if _, err := s.MergeJob(t.Context(), newsOf(id, fleet.JobQueued, 1)); err != nil {
					t.Error(err)
					return
				}
				if v, err := s.View(t.Context()); err != nil || v.Jobs[id] == nil {
					t.Errorf("job %d is not in the view after it was merged (%v)", id, err)
					return
				}
			}
		})
	}
	group.Wait()
	if n := len(view(t, s).Jobs); n != 200 {
		t.Errorf("%d jobs, want 200", n)
	}
}

func viewSame(t *testing.T, s *store.Store) {
	empty := view(t, s)
	if again := view(t, s); again != empty {
		t.Error("two views of an empty store differ")
	}
	if empty.Jobs == nil || empty.VMs == nil || empty.Nodes == nil || empty.Images == nil || empty.Orders == nil {
		t.Error("an empty view has nil maps")
	}
	if empty.Incarnation == "" || empty.Born.IsZero() || len(empty.OpenJobs()) != 0 || len(empty.VMsOn("mac-1")) != 0 {
		t.Errorf("an empty view: %+v", empty)
	}
	merge(t, s, news(fleet.JobQueued, 1))
	full := view(t, s)
	merge(t, s, news(fleet.JobQueued, 1)) // doubled: no change
	if full == empty || view(t, s) != full {
		t.Error("a view is the same exactly if nothing changed")
	}
	if full.Incarnation != empty.Incarnation || !full.Born.Equal(empty.Born) || full.Revision <= empty.Revision {
		t.Errorf("from %+v to %+v", empty, full)
	}
}

func viewShares(t *testing.T, s *store.Store) {
	merge(t, s, news(fleet.JobQueued, 1))
	commit(t, s, store.Txn{VMs: []fleet.VM{newVM("vm000001"), newVM("vm000002")}}, nil)
	before := view(t, s)
	merge(t, s, news(fleet.JobInProgress, 2))
	commit(t, s, store.Txn{VMs: []fleet.VM{newVM("vm000003")}, DropVMs: []fleet.VMID{"vm000002"}}, nil)
	after := view(t, s)
	if before.Jobs[jobID].Status != fleet.JobQueued || len(before.VMs) != 2 || len(before.VMsOn("mac-1")) != 2 {
		t.Error("an old view changed")
	}
	if after.Jobs[jobID].Status != fleet.JobInProgress || len(after.VMs) != 2 || after.VMs["vm000002"] != nil {
		t.Errorf("the new view: %v %v", after.Jobs, after.VMs)
	}
	if before.VMs["vm000001"] != after.VMs["vm000001"] {
		t.Error("a record that did not change was decoded again")
	}
}

// openJobs compares the list that is kept up to date with one sorted anew.
func openJobs(t *testing.T, s *store.Store) {
	random := rand.New(rand.NewPCG(1, 2))
	statuses := []fleet.JobStatus{fleet.JobQueued, fleet.JobInProgress, fleet.JobCompleted}
	for range 30 {
		for range 1 + random.IntN(6)*random.IntN(20) { // at times more than are moved one by one
			d := newsOf(jobID+fleet.JobID(random.IntN(120)), statuses[random.IntN(3)], 1)
			d.Job.CreatedAt = noon.Add(time.Duration(random.IntN(9)) * time.Second)
			merge(t, s, d)
		}
		v := view(t, s)
		var want []*fleet.Job
		for _, j := range v.Jobs {
			if j.Status != fleet.JobCompleted {
				want = append(want, j)
			}
		}
		slices.SortFunc(want, func(a, b *fleet.Job) int {
			if c := a.CreatedAt.Compare(b.CreatedAt); c != 0 {
				return c
			}
			return int(a.ID - b.ID)
		})
		if !slices.Equal(v.OpenJobs(), want) {
			t.Fatalf("%d open jobs, want %d in order", len(v.OpenJobs()), len(want))
		}
	}
}

func vmsOn(t *testing.T, s *store.Store) {
	var txn store.Txn
	for i := range 10 {
		vm := newVM(fleet.VMID(fmt.Sprintf("vm%06d", 9-i)))
		vm.Node = fleet.NodeID(fmt.Sprintf("mac-%d", i%2))
		txn.VMs = append(txn.VMs, vm)
	}
	commit(t, s, txn, nil)
	v := view(t, s)
	var got []string
	for _, vm := range v.VMsOn("mac-1") {
		got = append(got, string(vm.ID))
	}
	if want := "vm000000 vm000002 vm000004 vm000006 vm000008"; strings.Join(got, " ") != want {
		t.Errorf("VMs on mac-1: %v, want %s", got, want)
	}
}

func deletions(t *testing.T, s *store.Store) {
	merge(t, s, news(fleet.JobCompleted, 1))
	commit(t, s, store.Txn{
		VMs: []fleet.VM{newVM("vm000001"), newVM("vm000002")}, Nodes: []fleet.Node{{ID: "mac-1"}, {ID: "mac-2"}},
	}, nil)
	view(t, s)
	commit(t, s, store.Txn{DropVMs: []fleet.VMID{"vm000001", "never"}, DropNodes: []fleet.NodeID{"mac-2"}, DropJobs: []fleet.JobID{jobID}}, nil)
	v := view(t, s)
	if len(v.VMs) != 1 || len(v.Nodes) != 1 || len(v.Jobs) != 0 {
		t.Errorf("after dropping: %v %v %v", v.VMs, v.Nodes, v.Jobs)
	}
}

func notify(t *testing.T, s *store.Store) {
	running(t, s)
	anything, mine, other := s.Notify(store.Anything), s.Notify(store.NodeTopic("mac-1")), s.Notify(store.NodeTopic("mac-2"))
	commit(t, s, store.Txn{VMs: []fleet.VM{newVM("vm000001")}}, nil)
	wait(t, anything)
	wait(t, mine)
	select {
	case <-other:
		t.Error("mac-2 was woken by mac-1's VM")
	default:
	}
	// A node's own report does not wake its parked call.
	anything, mine = s.Notify(store.Anything), s.Notify(store.NodeTopic("mac-1"))
	commit(t, s, store.Txn{
		Report: &store.Report{Node: "mac-1", Session: "one", Sequence: 1}, Nodes: []fleet.Node{{ID: "mac-1"}},
		Orders: []fleet.Orders{{Node: "mac-2"}},
	}, nil)
	wait(t, anything)
	wait(t, other)
	select {
	case <-mine:
		t.Error("mac-1 was woken by its own report")
	default:
	}
	// Taken before the view, nothing is missed: one writes, the other waits until it has
	// seen everything, by wake-ups alone.
	const jobs = 200
	written := make(chan error, 1)
	go func() {
		for i := range jobs {
			if _, err := s.MergeJob(t.Context(), newsOf(jobID+fleet.JobID(i), fleet.JobQueued, 1)); err != nil {
				written <- err
				return
			}
		}
		written <- nil
	}()
	for {
		woken := s.Notify(store.Anything)
		if len(view(t, s).Jobs) == jobs {
			break
		}
		wait(t, woken)
	}
	if err := <-written; err != nil {
		t.Error(err)
	}
}

func quiet(t *testing.T, s *store.Store) {
	running(t, s)
	heard := s.Notify(store.Anything)
	node := s.Notify(store.NodeTopic("mac-1"))
	commit(t, s, store.Txn{Nodes: []fleet.Node{{ID: "mac-1"}}, Quiet: true}, nil)
	// Messages arrive in order: this one is behind a message that there must not be.
	commit(t, s, store.Txn{Nodes: []fleet.Node{{ID: "mac-2"}}}, nil)
	wait(t, heard)
	select {
	case <-node:
		t.Error("a quiet write woke its node")
	default:
	}
	if len(view(t, s).Nodes) != 2 {
		t.Error("a quiet write was not written")
	}
}

func events(t *testing.T, s *store.Store) {
	merge(t, s, news(fleet.JobQueued, 1))
	merge(t, s, news(fleet.JobQueued, 1))
	var txn store.Txn
	for i := range 150 {
		txn.Events = append(txn.Events, fleet.Event{At: noon, Kind: "vm.placed", VM: "vm000001", Node: "mac-1", Text: fmt.Sprint(i)})
	}
	commit(t, s, txn, nil)
	for _, c := range []struct {
		filter store.EventFilter
		count  int
		first  string
	}{
		{store.EventFilter{}, 100, "149"},
		{store.EventFilter{Limit: 3}, 3, "149"},
		{store.EventFilter{Job: jobID}, 1, "webhook " + news(fleet.JobQueued, 1).ID},
		{store.EventFilter{VM: "vm000001", Limit: 500}, 150, "149"},
		{store.EventFilter{Node: "mac-1", VM: "vm000001"}, 100, "149"},
		{store.EventFilter{Node: "mac-2"}, 0, ""},
	} {
		got, err := s.Events(t.Context(), c.filter)
		if err != nil || len(got) != c.count || len(got) > 0 && got[0].Text != c.first {
			t.Errorf("Events(%+v): %d of them, %v, want %d from %q on", c.filter, len(got), err, c.count, c.first)
		}
	}
}

func cursors(t *testing.T, s *store.Store) {
	for _, want := range []string{"", "one", "two"} {
		if got, err := s.Cursor(t.Context(), "sweep"); got != want || err != nil {
			t.Fatalf("Cursor: %q, %v, want %q", got, err, want)
		}
		next := map[string]string{"": "one", "one": "two", "two": "three"}[want]
		if err := s.SetCursor(t.Context(), "sweep", next); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := s.Cursor(t.Context(), "other"); got != "" || err != nil {
		t.Errorf("another cursor: %q, %v", got, err)
	}
}

func ledger(t *testing.T, s *store.Store) {
	if l, err := s.ReadLedger(t.Context()); err != nil || l.Version != 0 {
		t.Fatalf("an empty ledger: %+v, %v", l, err)
	}
	var group sync.WaitGroup
	for i := range 8 {
		group.Go(func() {
			_, err := s.UpdateLedger(t.Context(), func(l *store.Ledger) error {
				l.Tokens = append(l.Tokens, store.TokenRecord{ID: fmt.Sprint("t", i), Role: "viewer", CreatedAt: noon})
				return nil
			})
			if err != nil {
				t.Errorf("UpdateLedger: %v", err)
			}
		})
	}
	group.Wait()
	no := errors.New("no")
	if _, err := s.UpdateLedger(t.Context(), func(l *store.Ledger) error {
		l.Tokens = nil
		return no
	}); !errors.Is(err, no) {
		t.Errorf("a change that refuses itself: %v", err)
	}
	want, err := s.UpdateLedger(t.Context(), func(l *store.Ledger) error {
		l.Nodes = map[fleet.NodeID]time.Time{"mac-1": noon}
		l.Cordons = map[fleet.NodeID]string{"mac-1": "ann"}
		l.Joins = []store.JoinRecord{{Hash: "ab", Node: "mac-2", ExpiresAt: noon}}
		l.Revoked = map[string]time.Time{"t1": noon}
		l.Policies = []fleet.Policy{{Name: "p", Image: "r/i:1", Min: 2}}
		return nil
	})
	if err != nil || want.Version != 9 || len(want.Tokens) != 8 {
		t.Fatalf("after 9 changes: %+v, %v", want, err)
	}
	got, err := s.ReadLedger(t.Context())
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Errorf("%v -written +read:\n%s", err, diff)
	}
}
