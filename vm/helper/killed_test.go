package helper_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/vm"
	"github.com/paddock-ci/paddock/vm/helper"
	"github.com/paddock-ci/paddock/vm/process/processtest"
	"github.com/paddock-ci/paddock/vm/vmtest"
)

// The agent is killed with a job running; the next one finds machine and runner.
func TestAgentKilledThenAdopted(t *testing.T) {
	f := newFixture(t, "good", 0)
	spec := processtest.Spec(t)
	spec.ID = "adoptme1"
	kill := startAgent(t, f, spec, "jit-config")
	kill()

	if ids, err := f.driver.List(); err != nil || !slices.Equal(ids, []fleet.VMID{spec.ID}) {
		t.Errorf("list: %v, %v", ids, err)
	}
	m, err := f.driver.Adopt(t.Context(), spec.ID)
	if err != nil {
		t.Fatal(err)
	}
	c := dial(t, m)
	if h, err := c.Hello(t.Context()); err != nil || h.Status.State != guest.Busy || h.Status.Job != "gated" {
		t.Fatalf("hello after adoption: %+v, %v; want busy", h, err)
	}
	openGate(t, spec)
	s, err := c.Watch(t.Context(), nil)
	if err != nil || s.ExitCode != 4 || !strings.HasSuffix(s.Tail, "went on\n") {
		t.Errorf("watch after adoption: %+v, %v", s, err)
	}
	if err := m.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	vmtest.Eventually(t, "left", func() string { return strings.Join(f.leftovers(t, spec), "; ") })
	if _, err := f.driver.Adopt(t.Context(), spec.ID); !errors.Is(err, vm.ErrUnknown) {
		t.Errorf("adopting a destroyed machine: %v, want ErrUnknown", err)
	}
	if exit, err := m.Wait(t.Context()); err != nil || exit.Reason != "destroyed" {
		t.Errorf("wait: %+v, %v", exit, err)
	}
}

// The agent is killed, and the machine ends before the next one comes: its result was kept.
func TestEndedWhileNobodyLooked(t *testing.T) {
	f := newFixture(t, "good", 0)
	spec := processtest.Spec(t)
	spec.ID = "adoptme1"
	kill := startAgent(t, f, spec, "jit-config")
	kill()
	processtest.Kill(t, spec.Dir, "guest-agent")
	result := filepath.Join(f.dir, string(spec.ID), "result.json")
	vmtest.Eventually(t, "result", func() string {
		if _, err := os.Stat(result); err != nil {
			return err.Error()
		}
		return ""
	})
	for range 2 { // until Destroy it stays
		m, err := f.driver.Adopt(t.Context(), spec.ID)
		if err != nil {
			t.Fatal(err)
		}
		if exit, err := m.Wait(t.Context()); err != nil || exit.Reason != "signal: killed" || exit.At.IsZero() {
			t.Errorf("wait: %+v, %v", exit, err)
		}
		if _, err := m.Dial(t.Context()); !errors.Is(err, vm.ErrEnded) {
			t.Errorf("dial: %v", err)
		}
	}
	m, err := f.driver.Adopt(t.Context(), spec.ID)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	vmtest.Eventually(t, "left", func() string { return strings.Join(f.leftovers(t, spec), "; ") })
}

// helperPID reads the pid that the driver noted.
func helperPID(t *testing.T, f *fixture, spec vm.Spec) int {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(f.dir, string(spec.ID), "helper.pid"))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(string(b))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

// A killed helper takes its machine down, without anyone's help, and the agent notices.
func TestHelperKilled(t *testing.T) {
	f := newFixture(t, "good", 0)
	spec := processtest.Spec(t)
	m, err := startGated(t.Context(), f.driver, spec, []byte("jit"))
	if err != nil {
		t.Fatal(err)
	}
	waited := make(chan vm.Exit, 1)
	go func() {
		exit, err := m.Wait(t.Context())
		if err != nil {
			t.Errorf("wait: %v", err)
		}
		waited <- exit
	}()
	if err := syscall.Kill(helperPID(t, f, spec), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if exit := <-waited; exit.Reason != "the vm helper was killed" {
		t.Errorf("exit %+v", exit)
	}
	vmtest.Eventually(t, "processes left", func() string { return strings.Join(processtest.Leftovers(t, spec.Dir), "; ") })
	again, err := f.driver.Adopt(t.Context(), spec.ID) // by the next agent
	if err != nil {
		t.Fatal(err)
	}
	if exit, err := again.Wait(t.Context()); err != nil || exit.Reason != "the vm helper was killed" {
		t.Errorf("wait after adoption: %+v, %v", exit, err)
	}
	if err := m.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left := f.leftovers(t, spec); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

// The guest's own lifeline, proven apart from the reaping that Wait and Destroy do.
func TestHelperKilledWithNobodyLooking(t *testing.T) {
	f := newFixture(t, "good", 0)
	spec := processtest.Spec(t)
	m, err := startGated(t.Context(), f.driver, spec, []byte("jit"))
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(helperPID(t, f, spec), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	vmtest.Eventually(t, "processes left", func() string { return strings.Join(processtest.Leftovers(t, spec.Dir), "; ") })
	if err := m.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left := f.leftovers(t, spec); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

// Helper and guest hang, both: the helper is killed when patience ends, and the guest,
// which cannot notice, is reaped.
func TestHungHelperIsKilled(t *testing.T) {
	f := newFixture(t, "good", 0)
	var err error
	f.driver, err = helper.New(helper.Config{Command: f.command, Dir: f.dir, Env: processtest.Env, Patience: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	spec := processtest.Spec(t)
	m, err := startGated(t.Context(), f.driver, spec, []byte("jit"))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range processtest.Find(t, spec.Dir) {
		if err := syscall.Kill(p.PID, syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Kill(helperPID(t, f, spec), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if err := m.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	vmtest.Eventually(t, "left", func() string { return strings.Join(f.leftovers(t, spec), "; ") })
}

// A driver that crashes takes its machine down, not the agent, and the reason is told.
func TestDriverPanics(t *testing.T) {
	t.Run("in boot", func(t *testing.T) {
		f := newFixture(t, "panic-in-boot", 0)
		spec := processtest.Spec(t)
		_, err := f.driver.Boot(t.Context(), spec)
		if err == nil || !strings.Contains(err.Error(), "NSInvalidArgumentException") {
			t.Errorf("boot: %v, want the panic's text", err)
		}
		vmtest.Eventually(t, "left", func() string { return strings.Join(f.leftovers(t, spec), "; ") })
	})
	t.Run("later", func(t *testing.T) {
		f := newFixture(t, "panic-in-dial", 0)
		spec := processtest.Spec(t)
		m, err := f.driver.Boot(t.Context(), spec)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := m.Dial(t.Context()); !errors.Is(err, vm.ErrEnded) {
			t.Errorf("dial: %v, want ErrEnded", err)
		}
		if exit, err := m.Wait(t.Context()); err != nil || !strings.Contains(exit.Reason, "crash in dial") {
			t.Errorf("wait: %+v, %v", exit, err)
		}
		if err := m.Destroy(t.Context()); err != nil {
			t.Fatal(err)
		}
		vmtest.Eventually(t, "left", func() string { return strings.Join(f.leftovers(t, spec), "; ") })
	})
}
