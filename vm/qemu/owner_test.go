package qemu_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/vm"
	"github.com/paddock-ci/paddock/vm/process/processtest"
	"github.com/paddock-ci/paddock/vm/qemu"
	"github.com/paddock-ci/paddock/vm/vmtest"
)

// ownerEnv makes this test binary the owner of a machine: it boots the one of which the
// variable holds the spec, says so, and waits to be killed.
const ownerEnv = "PADDOCK_TEST_OWNER"

func TestMain(m *testing.M) {
	raw := os.Getenv(ownerEnv)
	if raw == "" {
		os.Exit(m.Run())
	}
	var s vm.Spec
	if err := json.Unmarshal([]byte(raw), &s); err != nil {
		panic(err)
	}
	d, err := qemu.New(qemu.Config{Network: os.Getenv(networkEnv)})
	if err != nil {
		panic(err)
	}
	if _, err := d.Boot(context.Background(), s); err != nil {
		panic(err)
	}
	fmt.Println("booted")
	time.Sleep(time.Hour)
}

// A process that is killed takes its machine with it, at once and without Reap; a
// machine that the kernel forgot is found by Reap.
func TestOwnerKilled(t *testing.T) {
	t.Parallel()
	s := good(t)
	raw, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	owner := exec.CommandContext(t.Context(), self)
	// Its own environment does not name the machine, or it would pass for a part of it.
	owner.Env = append(vm.ChildEnv(), ownerEnv+"="+string(raw), networkEnv+"="+os.Getenv(networkEnv))
	owner.Stderr = os.Stderr
	out, err := owner.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := owner.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "booted\n" {
		t.Fatalf("the owner said %q, %v", line, err)
	}
	if err := owner.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = owner.Wait()
	vmtest.Eventually(t, "QEMU outlives its owner", func() string { return strings.Join(processtest.Leftovers(t, s.Dir), "\n") })
}

func TestReap(t *testing.T) {
	t.Parallel()
	d := newDriver(t, qemu.Config{})
	s, other := good(t), good(t)
	m, neighbour := boot(t, d, s), boot(t, d, other)
	if err := newDriver(t, qemu.Config{}).Reap(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	if exit, err := m.Wait(t.Context()); err != nil || !strings.Contains(exit.Reason, "signal: killed") {
		t.Errorf("wait: %+v, %v", exit, err)
	}
	nothingLeft(t, s)
	if err := d.Reap(t.Context(), s); err != nil {
		t.Errorf("reaping what is not there: %v", err)
	}
	dial(t, neighbour) // lives
}

// A thread that ends does not take a machine with it: the runtime ends threads as it
// likes, and the kernel's "killed with its parent" means the thread.
func TestThreadsEnd(t *testing.T) {
	t.Parallel()
	m := boot(t, newDriver(t, qemu.Config{}), good(t))
	for range 50 {
		ended := make(chan struct{})
		go func() {
			runtime.LockOSThread() // and never unlocks it: the thread ends with the goroutine
			close(ended)
		}()
		<-ended
	}
	dial(t, m)
}
