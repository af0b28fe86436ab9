package storetest

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
)

func fences(t *testing.T, s *store.Store) {
	term := lead(t, s, "a")
	if again := lead(t, s, "a"); again != term {
		t.Fatalf("a renewed lease is of term %+v, was %+v", again, term)
	}
	if v := view(t, s); v.Incarnation != term.Incarnation || term.Incarnation == "" {
		t.Fatalf("a view of incarnation %q, a term of %q", v.Incarnation, term.Incarnation)
	}
	commit(t, s, store.Txn{Term: &term, VMs: []fleet.VM{newVM("vm000001")}}, nil)
	for name, wrong := range map[string]store.Term{
		"an older epoch":      {Incarnation: term.Incarnation, Epoch: term.Epoch - 1},
		"a later epoch":       {Incarnation: term.Incarnation, Epoch: term.Epoch + 1},
		"another incarnation": {Incarnation: "other", Epoch: term.Epoch},
	} {
		if err := s.Commit(t.Context(), store.Txn{Term: &wrong, VMs: []fleet.VM{newVM("vm000002")}}); !errors.Is(err, store.ErrFenced) {
			t.Errorf("a write of %s: %v, want ErrFenced", name, err)
		}
	}
	commit(t, s, store.Txn{Incarnation: "other", VMs: []fleet.VM{newVM("vm000002")}}, store.ErrFenced)
	commit(t, s, store.Txn{Incarnation: term.Incarnation, VMs: []fleet.VM{newVM("vm000003")}}, nil)
	if v := view(t, s); len(v.VMs) != 2 || v.VMs["vm000002"] != nil {
		t.Errorf("VMs after refused writes: %v", v.VMs)
	}
}

func takeover(t *testing.T, s *store.Store) {
	first := lead(t, s, "a")
	if term, leader, err := s.Lead(t.Context(), "b", time.Minute); leader || err != nil || term != first {
		t.Fatalf("b beside a: %+v, %v, %v", term, leader, err)
	}
	if err := s.Resign(t.Context(), "b"); err != nil {
		t.Fatal(err)
	}
	commit(t, s, store.Txn{Term: &first}, nil) // b had nothing to resign
	if err := s.Resign(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	commit(t, s, store.Txn{Term: &first}, store.ErrFenced)
	second := lead(t, s, "b")
	if second.Epoch != first.Epoch+1 || second.Incarnation != first.Incarnation {
		t.Errorf("terms %+v then %+v", first, second)
	}
	commit(t, s, store.Txn{Term: &first}, store.ErrFenced)

	// A lease that runs out by the store's clock: nobody renews, somebody takes over.
	if _, leader, err := s.Lead(t.Context(), "b", 50*time.Millisecond); !leader || err != nil {
		t.Fatalf("renew for 50 ms: %v, %v", leader, err)
	}
	var third store.Term
	eventually(t, func() bool {
		term, leader, err := s.Lead(t.Context(), "c", 50*time.Millisecond)
		third = term
		return leader && err == nil
	})
	if third.Epoch != second.Epoch+1 {
		t.Errorf("terms %+v then %+v", second, third)
	}
	// The holder itself is fenced when its lease is over, even if nobody else came.
	eventually(t, func() bool {
		return errors.Is(s.Commit(t.Context(), store.Txn{Term: &third}), store.ErrFenced)
	})
	if fourth := lead(t, s, "c"); fourth.Epoch != third.Epoch+1 {
		t.Errorf("a lease that ran out came back as term %+v after %+v", fourth, third)
	}
}

// eventually polls for something that only the store's clock decides.
func eventually(t *testing.T, met func() bool) {
	t.Helper()
	deadline := time.After(patience)
	for tick := time.NewTicker(5 * time.Millisecond); !met(); {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatal("it never came to be")
		}
	}
}

func staleReports(t *testing.T, s *store.Store) {
	report := func(session string, sequence int64, want error) {
		t.Helper()
		commit(t, s, store.Txn{Report: &store.Report{Node: "mac-1", Session: session, Sequence: sequence}}, want)
	}
	report("one", 1, nil)
	report("one", 2, nil)
	report("one", 2, store.ErrStale)
	report("one", 1, store.ErrStale)
	report("two |x", 1, nil) // the agent was restarted
	report("one", 3, store.ErrStale)
	report("two |x", 2, nil)
	for i := range 8 {
		report(fmt.Sprint("restart ", i), 1, nil)
	}
	report("two |x", 99, store.ErrStale)
	// Another node has its own order; a dropped node begins again.
	commit(t, s, store.Txn{Report: &store.Report{Node: "mac-2", Session: "one", Sequence: 1}}, nil)
	commit(t, s, store.Txn{DropNodes: []fleet.NodeID{"mac-2"}}, nil)
	commit(t, s, store.Txn{Report: &store.Report{Node: "mac-2", Session: "one", Sequence: 1}}, nil)
	// A stale report writes nothing.
	commit(t, s, store.Txn{
		Report: &store.Report{Node: "mac-1", Session: "two |x", Sequence: 9},
		Nodes:  []fleet.Node{{ID: "mac-1"}},
	}, store.ErrStale)
	if v := view(t, s); len(v.Nodes) != 0 {
		t.Errorf("a stale report wrote %v", v.Nodes)
	}
}

func conflicts(t *testing.T, s *store.Store) {
	commit(t, s, store.Txn{
		VMs: []fleet.VM{newVM("vm000001")}, Nodes: []fleet.Node{{ID: "mac-1"}},
		Orders: []fleet.Orders{{Node: "mac-1"}}, Images: []fleet.Image{{Ref: "r/i:1"}},
	}, nil)
	v := view(t, s)
	vm, node, orders := *v.VMs["vm000001"], *v.Nodes["mac-1"], *v.Orders["mac-1"]
	if vm.Rev == 0 || node.Rev == 0 || orders.Rev == 0 || vm.Rev > v.Revision {
		t.Fatalf("revisions %d, %d, %d of a view of %d", vm.Rev, node.Rev, orders.Rev, v.Revision)
	}
	vm.State = fleet.VMBooting
	for range 2 { // the second time on an old revision
		txn := store.Txn{VMs: []fleet.VM{vm}}
		if view(t, s).VMs[vm.ID].Rev == vm.Rev {
			commit(t, s, txn, nil)
		} else {
			commit(t, s, txn, store.ErrConflict)
		}
	}
	node.Slots, orders.Evict = 2, []fleet.Digest{"sha256:a"}
	commit(t, s, store.Txn{Nodes: []fleet.Node{node}, Orders: []fleet.Orders{orders}}, nil)
	commit(t, s, store.Txn{Nodes: []fleet.Node{node}}, store.ErrConflict)
	commit(t, s, store.Txn{Orders: []fleet.Orders{orders}}, store.ErrConflict)
	commit(t, s, store.Txn{VMs: []fleet.VM{newVM("vm000001")}}, store.ErrConflict)        // exists
	commit(t, s, store.Txn{VMs: []fleet.VM{{ID: "vm000009", Rev: 7}}}, store.ErrConflict) // does not
	commit(t, s, store.Txn{Images: []fleet.Image{{Ref: "r/i:1", Bytes: 5}}}, nil)         // last writer wins
	commit(t, s, store.Txn{Queued: []fleet.JobID{jobID}}, store.ErrConflict)              // not known
	// A dropped record does not come back by an update.
	dropped := *view(t, s).VMs["vm000001"]
	commit(t, s, store.Txn{DropVMs: []fleet.VMID{dropped.ID}}, nil)
	commit(t, s, store.Txn{VMs: []fleet.VM{dropped}}, store.ErrConflict)
	commit(t, s, store.Txn{VMs: []fleet.VM{newVM("vm000001")}}, nil)
}

func allOrNothing(t *testing.T, s *store.Store) {
	merge(t, s, news(fleet.JobInProgress, 1))
	before := view(t, s)
	commit(t, s, store.Txn{
		VMs: []fleet.VM{newVM("vm000001")}, Nodes: []fleet.Node{{ID: "mac-1"}}, Images: []fleet.Image{{Ref: "i"}},
		Report: &store.Report{Node: "mac-1", Session: "one", Sequence: 1},
		Events: []fleet.Event{{Kind: "vm.placed"}}, DropJobs: []fleet.JobID{jobID},
		Queued: []fleet.JobID{jobID}, // it runs already: refused, and everything with it
	}, store.ErrConflict)
	if after := view(t, s); after != before {
		t.Errorf("a refused write left revision %d, was %d", after.Revision, before.Revision)
	}
	events, err := s.Events(t.Context(), store.EventFilter{})
	if err != nil || len(events) != 1 {
		t.Errorf("events %v, %v: want the job's alone", events, err)
	}
	commit(t, s, store.Txn{Report: &store.Report{Node: "mac-1", Session: "one", Sequence: 1}}, nil)
}

func claimOnce(t *testing.T, s *store.Store) {
	merge(t, s, news(fleet.JobQueued, 1))
	txn := store.Txn{}
	for i := range 16 {
		txn.VMs = append(txn.VMs, newVM(fleet.VMID(fmt.Sprintf("vm%06d", i))))
	}
	commit(t, s, txn, nil)
	v := view(t, s)
	var won, lost atomic.Int32
	var group sync.WaitGroup
	for id, vm := range v.VMs {
		for range 2 { // two replicas for each VM
			group.Go(func() {
				err := s.Commit(t.Context(), store.Txn{
					Incarnation: v.Incarnation, VMs: []fleet.VM{claimed(*vm, jobID)}, Queued: []fleet.JobID{jobID},
				})
				switch {
				case err == nil:
					won.Add(1)
				case errors.Is(err, store.ErrConflict):
					lost.Add(1)
				default:
					t.Errorf("claim of %s: %v", id, err)
				}
			})
		}
	}
	group.Wait()
	if won.Load() != 1 || lost.Load() != 31 {
		t.Errorf("%d claims won and %d lost, want 1 and 31", won.Load(), lost.Load())
	}
	// One transaction cannot take a unit twice, either.
	merge(t, s, newsOf(jobID+1, fleet.JobQueued, 1))
	commit(t, s, store.Txn{
		VMs:    []fleet.VM{claimed(newVM("vm000098"), jobID+1), claimed(newVM("vm000099"), jobID+1)},
		Queued: []fleet.JobID{jobID + 1},
	}, store.ErrConflict)
}

func unitReturns(t *testing.T, s *store.Store) {
	merge(t, s, news(fleet.JobQueued, 1))
	merge(t, s, newsOf(jobID+1, fleet.JobQueued, 1))
	claim := func(id fleet.VMID, job fleet.JobID, want error) {
		t.Helper()
		vm := newVM(id)
		if known := view(t, s).VMs[id]; known != nil {
			vm = *known
		}
		commit(t, s, store.Txn{VMs: []fleet.VM{claimed(vm, job)}, Queued: []fleet.JobID{job}}, want)
	}
	update := func(id fleet.VMID, change func(*fleet.VM)) {
		t.Helper()
		vm := *view(t, s).VMs[id]
		change(&vm)
		commit(t, s, store.Txn{VMs: []fleet.VM{vm}}, nil)
	}
	claim("vm000001", jobID, nil)
	claim("vm000002", jobID, store.ErrConflict)
	update("vm000001", func(vm *fleet.VM) { vm.State = fleet.VMBusy }) // keeps it
	claim("vm000002", jobID, store.ErrConflict)
	update("vm000001", func(vm *fleet.VM) { vm.State = fleet.VMDone }) // final: gives it back
	claim("vm000002", jobID, nil)
	update("vm000002", func(vm *fleet.VM) { vm.Claim = nil })
	claim("vm000003", jobID, nil)
	commit(t, s, store.Txn{DropVMs: []fleet.VMID{"vm000003"}}, nil)
	claim("vm000004", jobID, nil)
	claim("vm000005", jobID+1, nil)
	// GitHub gave each the other's job: the leader swaps the match.
	four, five := *view(t, s).VMs["vm000004"], *view(t, s).VMs["vm000005"]
	four.Job, five.Job = five.Job, four.Job
	commit(t, s, store.Txn{VMs: []fleet.VM{four, five}}, nil)
	update("vm000004", func(vm *fleet.VM) { vm.State = fleet.VMDone })
	claim("vm000006", jobID, store.ErrConflict) // five's now
	claim("vm000006", jobID+1, nil)
}
