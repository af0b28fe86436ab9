package node

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/vm"
)

// Scripts that stand for a runner: they read the JIT config from standard input and say
// what a real one says.
const (
	jobRuns   = `read jit; test "$jit" = c2VjcmV0 || exit 9; echo "2026-01-01 00:00:00Z: Running job: build"`
	jobGood   = jobRuns + `; exit 0`
	jobBad    = jobRuns + `; exit 1`
	noJob     = `cat >/dev/null; echo cannot connect; exit 3`
	jobLasts  = jobRuns + `; exec sleep 300`
	idleLasts = `cat >/dev/null; exec sleep 300`
)

// TestOutcomes is one VM per way in which its life can end. Times are virtual, except
// that a runner's process takes its own.
func TestOutcomes(t *testing.T) {
	for _, tt := range []struct {
		name    string
		prepare func(*stand, *api.VMOrder)
		script  string
		runner  bool // the controller has a runner for it
		then    func(*testing.T, *stand)
		reason  string
		failed  bool
		busy    bool
	}{
		{name: "runner exits 0", script: jobGood, runner: true, reason: "runner exited 0", busy: true},
		{name: "runner exits 1 after a job", script: jobBad, runner: true, reason: "runner exited 1", busy: true},
		{name: "runner exits without a job", script: noJob, runner: true, reason: "runner exited 3 before it had a job: \"cannot connect", failed: true},
		{name: "runner cannot be started", runner: true, reason: "starting runner", failed: true,
			prepare: func(_ *stand, o *api.VMOrder) { o.Runner = []string{"/nowhere/run.sh"} }},
		{name: "image is not here", reason: "is not ready on this node", failed: true,
			prepare: func(s *stand, _ *api.VMOrder) { delete(s.shelf.images, base) }},
		{name: "clone fails", reason: "cloning image 111111111111: disk full", failed: true,
			prepare: func(s *stand, _ *api.VMOrder) { s.shelf.cloneErr = errors.New("disk full") }},
		{name: "boot fails", reason: "booting: machine did not boot: no kernel", failed: true,
			prepare: func(s *stand, _ *api.VMOrder) { s.yard.bootErr = &vm.BootError{Err: errors.New("no kernel")} }},
		{name: "no slot on the host", reason: "no free machine slot", failed: true,
			prepare: func(s *stand, _ *api.VMOrder) { s.yard.bootErr = vm.ErrAtCapacity }},
		{name: "a slot that is freed a moment later", script: jobGood, runner: true, reason: "runner exited 0", busy: true,
			prepare: func(s *stand, _ *api.VMOrder) { s.yard.full = slotTries - 1 }},
		{name: "boot hangs", reason: "its guest did not answer within 10m0s", failed: true,
			prepare: func(s *stand, _ *api.VMOrder) { s.yard.hang = true }},
		{name: "guest never answers", reason: "its guest did not answer within 2m0s", failed: true,
			prepare: func(s *stand, o *api.VMOrder) { s.yard.silent, o.Deadlines.Boot = true, 2*time.Minute }},
		{name: "a way in that nobody knows", reason: "bootstrap \"magic\" is not known here", failed: true,
			prepare: func(_ *stand, o *api.VMOrder) { o.Bootstrap = "magic" }},
		{name: "lives too long", reason: "its maximum lifetime of 1h0m0s is over",
			prepare: func(_ *stand, o *api.VMOrder) { o.Deadlines.Life = time.Hour }},
		{name: "destroyed while it boots", reason: "destroyed: the job was cancelled",
			prepare: func(s *stand, _ *api.VMOrder) { s.yard.silent = true },
			then:    func(t *testing.T, s *stand) { s.destroyIn(t, fleet.VMBooting) }},
		{name: "destroyed while Boot hangs", reason: "destroyed: the job was cancelled",
			prepare: func(s *stand, _ *api.VMOrder) { s.yard.hang = true },
			then:    func(t *testing.T, s *stand) { s.destroyIn(t, fleet.VMBooting) }},
		{name: "destroyed while warm", reason: "destroyed: the job was cancelled",
			then: func(t *testing.T, s *stand) { s.destroyIn(t, fleet.VMWarm) }},
		{name: "destroyed before it began", reason: "destroyed: the job was cancelled",
			prepare: func(s *stand, o *api.VMOrder) { s.office.destroy[o.ID] = "the job was cancelled" }},
		{name: "destroyed while registered", script: idleLasts, runner: true, reason: "destroyed: the job was cancelled",
			then: func(t *testing.T, s *stand) { s.destroyIn(t, fleet.VMRegistered) }},
		{name: "destroyed while busy", script: jobLasts, runner: true, busy: true, reason: "destroyed: the job was cancelled",
			then: func(t *testing.T, s *stand) { s.destroyIn(t, fleet.VMBusy) }},
		{name: "machine dies while warm", reason: "the machine ended: kernel panic", failed: true,
			then: func(t *testing.T, s *stand) { s.dieIn(t, fleet.VMWarm) }},
		{name: "machine dies while busy", script: jobLasts, runner: true, busy: true, reason: "the machine ended: kernel panic", failed: true,
			then: func(t *testing.T, s *stand) { s.dieIn(t, fleet.VMBusy) }},
		{name: "machine will not go at first", reason: "destroyed: the job was cancelled",
			prepare: func(s *stand, _ *api.VMOrder) { s.yard.stubborn = 3 },
			then:    func(t *testing.T, s *stand) { s.destroyIn(t, fleet.VMWarm) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newStand(t)
				order := s.order("aaaaaaaa", tt.script)
				if tt.prepare != nil {
					tt.prepare(s, &order)
				}
				if tt.runner {
					s.office.start[order.ID] = runnerOrder(order.ID)
				}
				s.office.place(order)
				stop := s.agent(t)
				if tt.then != nil {
					tt.then(t, s)
				}
				s.office.awaitDone(t, order.ID)
				r := s.office.report(order.ID)
				if !strings.Contains(r.Reason, tt.reason) || r.Failed != tt.failed {
					t.Errorf("done because %q, failed %v; want %q, %v", r.Reason, r.Failed, tt.reason, tt.failed)
				}
				if busy := !r.BusyAt.IsZero(); busy != tt.busy {
					t.Errorf("was busy: %v; want %v", busy, tt.busy)
				}
				if r.BootingAt.IsZero() || r.DoneAt.IsZero() {
					t.Errorf("times missing in %+v", r)
				}
				s.office.await(t, "the VM leaves the journal", func() bool { return s.office.gone[order.ID] })
				stop()
				s.checkEmpty(t)
				if left, _ := filepath.Glob(filepath.Join(s.dir, "journal", "*")); len(left) > 0 {
					t.Errorf("journal left: %v", left)
				}
			})
		})
	}
}

// awaitDone waits as long as the longest deadline.
func (o *office) awaitDone(t *testing.T, id fleet.VMID) {
	t.Helper()
	late := time.After(24 * time.Hour)
	for o.report(id).State != fleet.VMDone {
		o.mu.Lock()
		changed := o.changed
		o.mu.Unlock()
		select {
		case <-changed:
		case <-late:
			t.Fatalf("VM %s is %q after a day", id, o.report(id).State)
		}
	}
}

func (s *stand) destroyIn(t *testing.T, state fleet.VMState) {
	t.Helper()
	s.office.awaitState(t, "aaaaaaaa", state)
	s.office.order(func() { s.office.destroy["aaaaaaaa"] = "the job was cancelled" })
}

func (s *stand) dieIn(t *testing.T, state fleet.VMState) {
	t.Helper()
	s.office.awaitState(t, "aaaaaaaa", state)
	for {
		s.yard.mu.Lock()
		m := s.yard.machines["aaaaaaaa"]
		s.yard.mu.Unlock()
		if m != nil {
			m.die("kernel panic")
			return
		}
		time.Sleep(time.Millisecond) // a VM that boots may not have one yet
	}
}

// TestStop: a stopped agent destroys its VMs and says so, with no slots left; with Keep
// it leaves them, and the next agent goes on with the job that runs.
func TestStop(t *testing.T) {
	t.Run("destroys", func(t *testing.T) {
		s := newStand(t)
		s.office.start["aaaaaaaa"] = runnerOrder("aaaaaaaa")
		s.office.place(s.order("aaaaaaaa", jobLasts))
		stop := s.agent(t)
		s.office.awaitState(t, "aaaaaaaa", fleet.VMBusy)
		stop()
		r := s.office.report("aaaaaaaa")
		if r.State != fleet.VMDone || r.Reason != "the node's agent was stopped" || r.Failed {
			t.Errorf("reported %+v", r)
		}
		if s.office.latest().Node.Slots != 0 {
			t.Errorf("a stopped node offers %d slots", s.office.latest().Node.Slots)
		}
		s.checkEmpty(t)
	})
	t.Run("keeps", func(t *testing.T) {
		s := newStand(t)
		s.keep = true
		done := filepath.Join(t.TempDir(), "done")
		s.office.start["aaaaaaaa"] = runnerOrder("aaaaaaaa")
		s.office.place(s.order("aaaaaaaa", jobRuns+`; until test -e `+done+`; do sleep 0.02; done`))
		s.office.place(s.order("bbbbbbbb", jobGood))
		stop := s.agent(t)
		s.office.awaitState(t, "aaaaaaaa", fleet.VMBusy)
		s.office.awaitState(t, "bbbbbbbb", fleet.VMWarm)
		first := s.office.latest().Session
		stop()
		if ids, _ := s.yard.List(); len(ids) != 2 {
			t.Fatalf("machines after the stop: %v", ids)
		}
		s.office.order(func() { s.office.start["bbbbbbbb"] = runnerOrder("bbbbbbbb") })
		if err := os.WriteFile(done, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		stop = s.agent(t)
		for _, id := range []fleet.VMID{"aaaaaaaa", "bbbbbbbb"} {
			if r := s.office.awaitState(t, id, fleet.VMDone); r.Reason != "runner exited 0" || r.BusyAt.IsZero() {
				t.Errorf("VM %s: %+v", id, r)
			}
			if n := s.yard.boots[id]; n != 1 {
				t.Errorf("VM %s was booted %d times", id, n)
			}
		}
		if s.office.latest().Session == first {
			t.Error("both agents have the same session")
		}
		stop()
		s.checkEmpty(t)
	})
}
