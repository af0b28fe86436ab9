package controller

import (
	"testing"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/runner"
)

// A job of a few milliseconds: GitHub says that it is completed while the store still
// has its VM as registered. The VM has had its job: it keeps it, no other job waits for
// it, and GitHub, which has removed the runner, is not asked to remove it again.
func TestJobCompletedBeforeItsNodeSaysBusy(t *testing.T) {
	w := newWorld(t)
	vm, job := w.registered()
	job.Status, job.Conclusion, job.RunnerName = fleet.JobCompleted, "success", vm.Claim.Runner
	job.CompletedAt = w.now
	w.tell(job)
	next := w.queue()
	w.pass(0)
	if got := w.view().VMs[vm.ID].Job; got != job.ID {
		t.Errorf("the VM's job is %d, want the completed %d", got, job.ID)
	}
	if vms := w.live(); len(vms) != 2 || vms[0].Job != next.ID && vms[1].Job != next.ID {
		t.Errorf("the next job has no VM of its own: %d VMs live", len(vms))
	}

	calls := len(w.github.calls)
	w.move(vm.ID, runner.TookJob, runner.Ended)
	w.pass(0)
	if claim := w.view().VMs[vm.ID].Claim; claim != nil {
		t.Errorf("the finished VM still has its claim: %+v", claim)
	}
	if len(w.github.calls) != calls {
		t.Errorf("GitHub was asked %v", w.github.calls[calls:])
	}
}
