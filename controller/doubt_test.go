package controller

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github"
	"github.com/paddock-ci/paddock/runner"
)

// serve plays mac-1 for a while: every VM that is placed comes up, starts its runner and
// goes when it is told to, and no runner ever gets a job. It returns how many came up.
func (w *world) serve(lasts time.Duration) (booted int) {
	w.t.Helper()
	for until := w.now.Add(lasts); w.now.Before(until); {
		w.now = w.now.Add(10 * time.Second)
		w.report("mac-1", fleet.ImageReady)
		w.pass(0)
		for _, vm := range w.live() {
			switch {
			case vm.Destroy:
				w.move(vm.ID, runner.Ended)
			case vm.State == fleet.VMPlaced:
				booted++
				w.move(vm.ID, runner.Accepted, runner.Answered)
			case vm.State == fleet.VMWarm && vm.Claim != nil && vm.Claim.RunnerID != 0:
				w.move(vm.ID, runner.Started)
			}
		}
	}
	return booted
}

func (w *world) asked() int {
	n := 0
	for _, call := range w.github.calls {
		if strings.HasPrefix(call, "job ") {
			n++
		}
	}
	return n
}

// A job's "completed" never came and GitHub knows the job no more: after one runner has
// waited in vain, GitHub is asked once, the job is over, and no VM is made for it.
func TestForgottenJobBootsOneVM(t *testing.T) {
	w := newWorld(t)
	w.image()
	w.report("mac-1", fleet.ImageReady)
	job := w.queue()
	booted := w.serve(30 * time.Minute)
	if booted != 1 || w.asked() != 1 {
		t.Errorf("%d VMs were booted and GitHub was asked %d times; want 1 and 1", booted, w.asked())
	}
	if got := w.view().Jobs[job.ID]; got == nil || got.Status != fleet.JobCompleted || got.Conclusion != "cancelled" {
		t.Errorf("job %+v; want it completed, as cancelled", got)
	}
	if names := w.github.names(); len(names) != 0 {
		t.Errorf("runners left at GitHub: %v", names)
	}
}

// GitHub says that the job ran elsewhere and succeeded: that is what is written down.
func TestForgottenJobThatRanElsewhere(t *testing.T) {
	w := newWorld(t)
	w.image()
	w.report("mac-1", fleet.ImageReady)
	job := w.queue()
	ran := job
	ran.Status, ran.Conclusion, ran.RunnerName = fleet.JobCompleted, "success", "somebody"
	ran.StartedAt, ran.CompletedAt = w.now, w.now
	w.github.jobs = map[fleet.JobID]fleet.Job{job.ID: ran}
	if booted := w.serve(10 * time.Minute); booted != 1 {
		t.Errorf("%d VMs were booted; want 1", booted)
	}
	if got := w.view().Jobs[job.ID]; got.Conclusion != "success" || got.RunnerName != "somebody" {
		t.Errorf("job %+v; want GitHub's own word", got)
	}
}

// The job does wait, GitHub says: it gets another VM. While GitHub cannot say, nothing is
// placed for it, and Explain says why; where the App may not ask, the job is believed.
func TestDoubtedJobStillWaits(t *testing.T) {
	w := newWorld(t)
	w.image()
	w.report("mac-1", fleet.ImageReady)
	job := w.queue()
	w.github.jobs = map[fleet.JobID]fleet.Job{job.ID: job}
	w.github.jobErr = errors.New("502 Bad Gateway")
	if booted := w.serve(7 * time.Minute); booted != 1 {
		t.Fatalf("%d VMs were booted while GitHub could not say whether the job waits; want 1", booted)
	}
	e, err := w.c.explain(t.Context(), w.now, job.ID)
	if err != nil || !strings.Contains(e.Wait, "GitHub is being asked") {
		t.Errorf("explain says %q, %v; want that GitHub is being asked", e.Wait, err)
	}
	if asked := w.asked(); asked < 2 {
		t.Errorf("GitHub was asked %d times; want it repeated", asked)
	}
	w.github.jobErr = nil
	if booted := w.serve(time.Minute); booted != 1 {
		t.Errorf("%d VMs were booted after GitHub said that the job waits; want 1", booted)
	}
	w.github.jobErr = &github.Refused{Status: 403, Message: "Resource not accessible by integration"}
	w.github.calls = nil
	if booted := w.serve(6 * time.Minute); booted != 1 || w.asked() != 1 {
		t.Errorf("%d VMs were booted and GitHub asked %d times where the App may not ask; want 1 and 1", booted, w.asked())
	}
}
