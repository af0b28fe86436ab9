package controller

import (
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/placement"
	"github.com/paddock-ci/paddock/runner"
	"github.com/paddock-ci/paddock/store"
)

// VMs on mac-1 fail for five minutes while mac-2 is full. The moment that mac-2 has a
// free slot, the job starts there: mac-1's failures are nobody else's.
func TestBrokenMacHoldsNobodyBack(t *testing.T) {
	w := newWorld(t)
	w.image()
	w.report("mac-2", fleet.ImageReady)
	w.queue()
	w.queue()
	w.pass(0)
	full := w.live()
	for _, vm := range full {
		w.move(vm.ID, runner.Accepted, runner.Answered)
	}
	w.pass(0)
	for _, vm := range full {
		w.move(vm.ID, runner.Started, runner.TookJob)
		vm = w.view().VMs[vm.ID]
		job := *w.view().Jobs[vm.Job]
		job.Status, job.RunnerName, job.StartedAt = fleet.JobInProgress, vm.Claim.Runner, w.now
		w.tell(job)
	}
	waiting := w.queue()
	failures := 0
	pass := func() {
		w.now = w.now.Add(time.Second)
		w.report("mac-1", fleet.ImageReady)
		w.report("mac-2", fleet.ImageReady)
		w.pass(0)
		for _, vm := range w.live() {
			if vm.Node == "mac-1" {
				broken, _ := runner.Apply(*vm, runner.Accepted, w.now)
				broken, _ = runner.Apply(broken, runner.Ended, w.now)
				broken.Failed = true
				w.commit(store.Txn{VMs: []fleet.VM{broken}})
				failures++
			}
		}
	}
	for range 300 {
		pass()
	}
	if failures == 0 || failures > 10 {
		t.Errorf("%d VMs failed on mac-1 in 5 min; want a few, each later than the one before", failures)
	}
	e, err := w.c.explain(t.Context(), w.now, waiting.ID)
	if err != nil || len(e.Options) != 2 || e.Options[1].Node != "mac-1" || e.Options[1].Refusal != placement.ReasonFailing {
		t.Errorf("explained as %+v, %v; want mac-1 refused as failing", e, err)
	}
	for _, vm := range full {
		vm = w.view().VMs[vm.ID]
		job := *w.view().Jobs[vm.Job]
		job.Status, job.Conclusion, job.CompletedAt = fleet.JobCompleted, "success", w.now
		w.tell(job)
		w.move(vm.ID, runner.Ended)
	}
	pass()
	if vm := w.only(); vm.Node != "mac-2" || vm.Job != waiting.ID {
		t.Errorf("VM %+v; want one on mac-2 for job %d at once", vm, waiting.ID)
	}
}
