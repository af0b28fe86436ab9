package conformance

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github/githubtest"
)

// A job that is cancelled gives back what it had, whenever it happens.

// Cancelled while it is queued behind others: nothing is started for it.
func TestCancelledWhileQueued(t *testing.T) {
	h := open(t, plan{slots: 1})
	ids := h.run("acme/app", githubtest.JobSpec{Name: "build", Labels: mac, Seconds: 0.5, Matrix: 3})
	h.waitJob(ids[0], fleet.JobInProgress)
	h.cancel(ids[1])
	h.succeeded(ids[0], ids[2])
	h.accepted()
	h.empty()
	if placed := h.placedFor(ids[1]); len(placed) > 0 {
		t.Errorf("VMs %v were placed for the cancelled job", placed)
	}
}

// Cancelled while its VM boots: the VM serves the next job without a runner having been
// registered in vain.
func TestCancelledWhileBooting(t *testing.T) {
	gate := filepath.Join(t.TempDir(), "open")
	h := open(t, plan{slots: 1, deadlines: soon, self: []string{self(t), gatedRole, gate}})
	first := h.queue(1)[0]
	h.untilView("no VM boots", func(v *viewOf) bool {
		for _, vm := range v.VMs {
			if vm.State == fleet.VMBooting && vm.Job == first {
				return true
			}
		}
		return false
	})
	h.cancel(first)
	h.waitDelivered()
	h.untilView("the VM is not free of its job", func(v *viewOf) bool {
		for _, vm := range v.VMs {
			if vm.Job == first {
				return false
			}
		}
		return true
	})
	if err := os.WriteFile(gate, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	next := h.queue(1)
	h.succeeded(next...)
	h.accepted()
	h.empty()
	if n := h.requests(mints); n != 1 {
		t.Errorf("%d runners were registered for one job", n)
	}
	if n := len(h.placedFor(append(next, first)...)); n != 1 {
		t.Errorf("%d VMs were placed, want the one to serve both", n)
	}
}

// Cancelled while its VM boots and nobody else needs that: it goes by itself.
func TestCancelledAndNotNeeded(t *testing.T) {
	h := open(t, plan{deadlines: soon})
	id := h.queue(1)[0]
	h.untilView("no VM is placed", func(v *viewOf) bool { return len(v.VMs) > 0 })
	if err := h.github.Cancel(id); err != nil {
		t.Logf("it was faster: %v", err)
	}
	h.waitJob(id, fleet.JobCompleted)
	h.accepted()
	h.empty()
}

// Cancelled while it runs: the runner stops it and says so, and all is taken down.
func TestCancelledWhileRunning(t *testing.T) {
	h := open(t, plan{})
	// By exec, so that the step ends with its shell and not 10 s after it.
	id := h.run("acme/app", githubtest.JobSpec{Name: "build", Labels: mac, Steps: []string{"exec sleep 120"}})[0]
	h.waitJob(id, fleet.JobInProgress)
	h.cancel(id)
	if job := h.waitJob(id, fleet.JobCompleted); job.Conclusion != "cancelled" || job.Starts != 1 {
		t.Errorf("the job was started %d times and ended as %q", job.Starts, job.Conclusion)
	}
	h.accepted()
	h.empty()
}
