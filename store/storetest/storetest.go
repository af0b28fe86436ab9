package storetest

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
)

// Run holds a way of opening an empty store to the contract. open must register the
// end of the store with t.Cleanup; every case opens its own.
func Run(t *testing.T, open func(t *testing.T) *store.Store) {
	cases := []struct {
		name string
		test func(*testing.T, *store.Store)
	}{
		{"merge in every order, doubled", mergeOrders},
		{"merge 32 times at once", mergeConcurrently},
		{"a job read back is the job merged", mergeRoundTrip},
		{"refused news", mergeRefused},
		{"late news makes no ghost", tombstones},
		{"only the leader writes", fences},
		{"the lease is taken over", takeover},
		{"stale reports", staleReports},
		{"conflicting writes", conflicts},
		{"all or nothing", allOrNothing},
		{"a unit of demand is claimed once", claimOnce},
		{"a unit is given back", unitReturns},
		{"a view includes what was written", viewReadsWrites},
		{"a view without a change is the same", viewSame},
		{"a view shares what did not change", viewShares},
		{"open jobs in order", openJobs},
		{"VMs by node", vmsOn},
		{"deleted records disappear", deletions},
		{"notify wakes and misses nothing", notify},
		{"quiet writes wake nobody", quiet},
		{"events", events},
		{"cursors", cursors},
		{"sessions wait for their node", pendings},
		{"sessions that wait are bounded", pendingLimits},
		{"a session past its deadline is forgotten", pendingDeadline},
		{"a session is answered once", pendingOnce},
		{"a piece is claimed by one node", chunkClaims},
		{"a piece is claimed once by many at once", chunkRush},
		{"claims lapse unless they are renewed", chunkLapse},
		{"claims that others wish for do not stand for ever", chunkStand},
		{"what is fetched without a claim", chunkTaken},
		{"what a node has is not claimed but fetched from it", chunkPeers},
		{"peers for the rarest pieces first", chunkRarest},
		{"who leaves is remembered for what it has", chunkLeave},
		{"who falls silent is no peer", chunkSilence},
		{"claims are bounded", chunkBounds},
		{"images that are pulled are bounded", chunkSwarms},
		{"who falls silent is forgotten bit by bit", chunkForgotten},
		{"claims are swept", chunkSweep},
		{"random histories of claims", chunkHistories},
		{"the ledger", ledger},
		{"12,000 jobs", manyJobs},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) { c.test(t, open(t)) })
	}
}

// The cast: job 81 of octo/app, created at noon; node mac-1 and its VM.
const jobID fleet.JobID = 81_234_567_890

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// news is a delivery about the cast's job. Gates count in seconds after noon; 0 is unknown.
func news(status fleet.JobStatus, gate int64) store.Delivery {
	return newsOf(jobID, status, gate)
}

func newsOf(id fleet.JobID, status fleet.JobStatus, gate int64) store.Delivery {
	if gate != 0 {
		gate += noon.UnixMilli()
	}
	return store.Delivery{
		ID: fmt.Sprintf("guid-%s-%d", status, gate), At: noon,
		Job: fleet.Job{
			ID: id, RunID: 9_876_543_210, Repository: "octo/app", Name: "build",
			Labels: fleet.NewLabels("self-hosted", "macOS"), Status: status, Gate: gate,
			CreatedAt: noon, Feed: fleet.FeedWebhook,
		},
	}
}

func newVM(id fleet.VMID) fleet.VM {
	return fleet.VM{ID: id, Node: "mac-1", Pool: "default", State: fleet.VMPlaced, PlacedAt: noon}
}

// claimed is a VM with a runner's registration under way for a job.
func claimed(vm fleet.VM, job fleet.JobID) fleet.VM {
	vm.Job = job
	vm.Claim = &fleet.Claim{Scope: "octo", Labels: fleet.NewLabels("macos"), At: noon}
	return vm
}

// merge merges and expects success.
func merge(t *testing.T, s *store.Store, d store.Delivery) store.Merged {
	t.Helper()
	m, err := s.MergeJob(t.Context(), d)
	if err != nil {
		t.Fatalf("MergeJob: %v", err)
	}
	return m
}

// commit commits and expects an error: nil or one of the sentinels.
func commit(t *testing.T, s *store.Store, txn store.Txn, want error) {
	t.Helper()
	if err := s.Commit(t.Context(), txn); !errors.Is(err, want) {
		t.Fatalf("Commit: %v, want %v", err, want)
	}
}

// view reads a view and expects success.
func view(t *testing.T, s *store.Store) *store.View {
	t.Helper()
	v, err := s.View(t.Context())
	if err != nil {
		t.Fatalf("View: %v", err)
	}
	return v
}

// lead takes the lead and expects to get it.
func lead(t *testing.T, s *store.Store, who string) store.Term {
	t.Helper()
	term, leader, err := s.Lead(t.Context(), who, time.Minute)
	if err != nil || !leader {
		t.Fatalf("Lead(%s): leader %v, %v", who, leader, err)
	}
	return term
}

// running runs the store's Run until the test ends.
func running(t *testing.T, s *store.Store) {
	t.Helper()
	done := make(chan error, 1)
	up := s.Notify(store.Anything) // taken before: the subscription may stand at once
	// t.Context ends just before the cleanups, which wait for Run.
	go func() { done <- s.Run(t.Context()) }()
	t.Cleanup(func() {
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	// The first wake-up says that the subscription stands.
	wait(t, up)
}

func wait(t *testing.T, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(patience):
		t.Fatal("not woken")
	}
}
