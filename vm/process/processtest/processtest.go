// Package processtest makes a test binary its own guest, and looks at the host's
// processes from outside of the driver, so that the driver's word is not its proof.
//
// A test calls Guest first in its TestMain and gives Command to process.New.
//
// Called by the tests of vm/process, vm/helper and node.
package processtest

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/vm"
	"github.com/paddock-ci/paddock/vm/process"
	"github.com/paddock-ci/paddock/vm/vmtest"
)

// guestArg is the first argument by which a test binary knows that it is the guest.
const guestArg = "guest-agent"

// What a machine's disk may hold to make its boot go wrong.
const (
	diskGood    = "bootable"
	diskBroken  = "broken"
	diskHanging = "hanging"
)

// Console is what a machine with a broken disk prints.
const Console = "Kernel panic - not syncing: no working init found"

// Guest does nothing in a test; in a test binary that was started by Command it is the
// guest, and does not return.
func Guest() {
	if len(os.Args) < 2 || os.Args[1] != guestArg {
		return
	}
	disk, err := os.ReadFile(vm.DiskFile)
	switch {
	case err != nil:
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	case string(disk) == diskBroken:
		fmt.Fprintln(os.Stderr, strings.Repeat("booting\n", 2000)+Console)
		os.Exit(1)
	case string(disk) == diskHanging:
		// A child that waits forever too, so that a cancelled boot has something to leave.
		_ = exec.CommandContext(context.Background(), "sleep", "600").Run()
		os.Exit(1)
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	if err := process.GuestMain(context.Background(), guest.AgentConfig{Version: "test", Log: log}); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// Env is for processes that are this test binary (process.Config.Env, helper.Config.Env):
// one built with -race otherwise sleeps for a second before it exits.
var Env = []string{"GORACE=atexit_sleep_ms=0"}

// Command is the argv of this test binary as a guest.
func Command(t *testing.T) []string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return []string{self, guestArg}
}

// Fixture is driver as the suite of vmtest takes it; the driver boots processes by
// Command, directly or through others.
func Fixture(driver vm.Driver, slots int) vmtest.Fixture {
	return vmtest.Fixture{
		Driver:    driver,
		Spec:      Spec,
		Broken:    func(t *testing.T) vm.Spec { return specOf(t, diskBroken) },
		Hanging:   func(t *testing.T) vm.Spec { return specOf(t, diskHanging) },
		Console:   Console,
		Slots:     slots,
		Kill:      func(t *testing.T, spec vm.Spec) { Kill(t, spec.Dir, guestArg) },
		Leftovers: func(t *testing.T, spec vm.Spec) []string { return Leftovers(t, spec.Dir) },
	}
}

var specs atomic.Int64

// Spec is a machine that boots, in a directory of its own.
func Spec(t *testing.T) vm.Spec {
	t.Helper()
	return specOf(t, diskGood)
}

func specOf(t *testing.T, disk string) vm.Spec {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, vm.DiskFile), []byte(disk), 0o600); err != nil {
		t.Fatal(err)
	}
	return vm.Spec{ID: fleet.VMID(fmt.Sprintf("test%04d", specs.Add(1))), Dir: dir}
}

// Process is one process that has to do with a machine.
type Process struct {
	PID  int
	Args string // "" for a zombie
}

// Find lists the processes that live in a machine's directory or have it in their
// environment or arguments, and the zombies that are children of this process.
func Find(t *testing.T, dir string) []Process {
	t.Helper()
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	if len(stats) == 0 {
		return findByPS(t, dir)
	}
	var found []Process
	for _, path := range stats {
		proc := filepath.Dir(path)
		pid, err := strconv.Atoi(filepath.Base(proc))
		if err != nil || pid == os.Getpid() {
			continue
		}
		stat, err := os.ReadFile(path)
		if err != nil {
			continue // ended since
		}
		fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		if fields[0] == "Z" {
			if fields[1] == strconv.Itoa(os.Getpid()) {
				found = append(found, Process{PID: pid})
			}
			continue
		}
		args, _ := os.ReadFile(filepath.Join(proc, "cmdline"))
		env, _ := os.ReadFile(filepath.Join(proc, "environ"))
		cwd, _ := os.Readlink(filepath.Join(proc, "cwd"))
		if bytes.Contains(args, []byte(dir)) || bytes.Contains(env, []byte(dir)) || strings.HasPrefix(cwd, dir) {
			found = append(found, Process{PID: pid, Args: string(bytes.ReplaceAll(args, []byte{0}, []byte{' '}))})
		}
	}
	return found
}

// findByPS is Find without /proc: ps shows the environment after the arguments.
func findByPS(t *testing.T, dir string) []Process {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "ps", "-axwwE", "-o", "pid=,ppid=,stat=,command=").Output()
	if err != nil {
		t.Fatalf("ps: %v", err)
	}
	var found []Process
	for line := range strings.Lines(string(out)) {
		fields := strings.Fields(line)
		if len(fields) < 3 {
			continue
		}
		pid, err := strconv.Atoi(fields[0])
		if err != nil || pid == os.Getpid() {
			continue
		}
		switch {
		case strings.HasPrefix(fields[2], "Z"):
			if fields[1] == strconv.Itoa(os.Getpid()) {
				found = append(found, Process{PID: pid})
			}
		case strings.Contains(line, dir):
			found = append(found, Process{PID: pid, Args: strings.Join(fields[3:], " ")})
		}
	}
	return found
}

// Leftovers is Find in words.
func Leftovers(t *testing.T, dir string) []string {
	t.Helper()
	var left []string
	for _, p := range Find(t, dir) {
		left = append(left, fmt.Sprintf("process %d %s", p.PID, p.Args))
	}
	return left
}

// Kill kills, with -9, the processes of the machine in dir whose arguments contain arg,
// and returns their pids; none is a failure.
func Kill(t *testing.T, dir, arg string) []int {
	t.Helper()
	var killed []int
	for _, p := range Find(t, dir) {
		if !strings.Contains(p.Args, arg) {
			continue
		}
		if err := syscall.Kill(p.PID, syscall.SIGKILL); err != nil {
			t.Fatalf("killing %d: %v", p.PID, err)
		}
		killed = append(killed, p.PID)
	}
	if len(killed) == 0 {
		t.Fatalf("no process %q of the machine in %s", arg, dir)
	}
	return killed
}
