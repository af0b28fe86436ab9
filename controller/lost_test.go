package controller

import (
	"strings"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/runner"
)

// A Mac dies with a claimed VM: its job is released after 45 s and claimed by the next
// warm VM at once, not after the 15 minutes in which the dead one becomes lost. What
// Explain says is about the VM that is alive.
func TestDeadNodeHoldsNoJob(t *testing.T) {
	w := newWorld(t)
	dead, job := w.registered()
	died := w.now
	for w.now.Sub(died) < 2*unreachableAfter {
		w.now = w.now.Add(5 * time.Second)
		w.report("mac-2", fleet.ImageReady)
		w.pass(0)
		for _, vm := range w.live() {
			if vm.Node != "mac-2" || vm.State != fleet.VMPlaced {
				continue
			}
			w.move(vm.ID, runner.Accepted, runner.Answered)
			w.pass(0)
			if claim := w.view().VMs[vm.ID].Claim; claim == nil || claim.RunnerID == 0 {
				t.Fatalf("the warm VM on mac-2 has claim %+v; want a runner for job %d", claim, job.ID)
			}
			for range 8 { // maps have no order
				e, err := w.c.explain(t.Context(), w.now, job.ID)
				if err != nil || !strings.Contains(e.Wait, "mac-2") {
					t.Fatalf("explain says %q, %v; want it to speak of mac-2", e.Wait, err)
				}
			}
			if kept := w.view().VMs[dead.ID]; kept.State != fleet.VMRegistered || kept.Claim == nil || kept.Destroy {
				t.Errorf("the silent node's VM was touched: %+v", kept)
			}
			return
		}
	}
	t.Fatal("no VM was placed elsewhere")
}

// The job of a silent node's runner is in progress, says GitHub: it stays there.
func TestSilentNodeKeepsARunningJob(t *testing.T) {
	w := newWorld(t)
	vm, job := w.registered()
	job.Status, job.RunnerName, job.StartedAt = fleet.JobInProgress, vm.Claim.Runner, w.now
	w.tell(job)
	w.now = w.now.Add(time.Minute)
	w.report("mac-2", fleet.ImageReady)
	w.pass(0)
	if got := w.only(); got.ID != vm.ID || got.Job != job.ID {
		t.Errorf("VM %+v; want only the silent node's, with job %d", got, job.ID)
	}
}

// A claimed VM whose node never starts the runner is over its deadline although a job is
// matched with it, and the job gets another VM.
func TestClaimedDeadline(t *testing.T) {
	w := newWorld(t)
	w.image()
	w.report("mac-1", fleet.ImageReady)
	w.queue()
	w.pass(0)
	first := w.only().ID
	w.move(first, runner.Accepted, runner.Answered)
	w.pass(0)
	if claim := w.only().Claim; claim == nil || claim.RunnerID == 0 {
		t.Fatalf("claim %+v; want a registered runner", claim)
	}
	until := w.now.Add(fleet.Deadlines{}.WithDefaults().Registered + 10*time.Second)
	for w.now.Before(until) {
		w.now = w.now.Add(5 * time.Second)
		w.report("mac-1", fleet.ImageReady)
		w.pass(0)
	}
	if vm := w.view().VMs[first]; !vm.Destroy || vm.Claim != nil {
		t.Errorf("VM %+v; want it destroyed and without a runner", vm)
	}
	if n := len(w.live()); n != 2 {
		t.Errorf("%d live VMs; want the one that goes and its replacement", n)
	}
}
