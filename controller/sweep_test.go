package controller

import (
	"bytes"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/demand"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/runner"
)

// A job of two hours is completed, and GitHub gives no time for it or one long past: its
// record stays until the VM that ran it is done with, and is shown a while after that.
func TestJobCompletedAtAnUnknownTime(t *testing.T) {
	for name, at := range map[string]func(*world) time.Time{
		"null":      func(*world) time.Time { return time.Time{} },
		"long past": func(w *world) time.Time { return w.now.Add(-90 * time.Minute) },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			vm, job := w.registered()
			job.Status, job.RunnerName, job.StartedAt = fleet.JobInProgress, vm.Claim.Runner, w.now
			w.tell(job)
			w.move(vm.ID, runner.TookJob)
			w.now = w.now.Add(2 * time.Hour)
			w.report("mac-1", fleet.ImageReady)
			w.pass(0)
			job.Status, job.Conclusion, job.CompletedAt = fleet.JobCompleted, "success", at(w)
			w.tell(job)
			w.pass(0)
			if w.view().Jobs[job.ID] == nil {
				t.Fatal("the job's record is dropped while its VM lives")
			}
			w.move(vm.ID, runner.Ended)
			calls := len(w.github.calls)
			w.pass(0)
			if claim := w.view().VMs[vm.ID].Claim; claim != nil || len(w.github.calls) != calls {
				t.Errorf("claim %+v, GitHub asked %v; want the claim forgotten without asking", claim, w.github.calls[calls:])
			}
			w.report("mac-1", fleet.ImageReady)
			w.pass(doneKept + time.Second)
			w.pass(0)
			if w.view().VMs[vm.ID] != nil || w.view().Jobs[job.ID] != nil {
				t.Error("the VM's or the job's record is still there")
			}
		})
	}
}

// A controller starts with a saved history while the last hour's jobs are still in the
// store: none is counted twice, and those that end from now on are counted.
func TestSavedHistoryCountsJobsOnce(t *testing.T) {
	w := newWorld(t)
	job := w.queue()
	job.Status, job.Conclusion, job.RunnerName = fleet.JobCompleted, "success", "somebody"
	job.StartedAt, job.CompletedAt = w.now.Add(-time.Minute), w.now
	w.tell(job)
	w.pass(0)
	var saved bytes.Buffer
	if err := w.c.SaveHistory(&saved); err != nil {
		t.Fatal(err)
	}
	history := demand.New(demand.Config{})
	if err := history.Load(&saved, demand.NewImages()); err != nil {
		t.Fatal(err)
	}
	c := w.c.c
	c.Who, c.Durations = "two", history
	next, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	w.c = next
	w.pass(lease + time.Second)
	if e, _ := history.Estimate("acme/app", "build"); e.Runs != 1 {
		t.Errorf("%d runs are counted; want 1", e.Runs)
	}
	job.ID, job.CompletedAt = job.ID+1, w.now
	w.tell(job)
	w.pass(time.Second)
	if e, _ := history.Estimate("acme/app", "build"); e.Runs != 2 {
		t.Errorf("%d runs are counted after another one; want 2", e.Runs)
	}
}
