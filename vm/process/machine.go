package process

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"github.com/paddock-ci/paddock/vm"
)

// machine is one guest process with all that descends from it.
type machine struct {
	socket  string
	ending  chan struct{} // closed when Destroy was called
	destroy func()        // closes it, once

	done     chan struct{} // closed when nothing is left
	exit     vm.Exit       // set before done is closed
	leftover error         // what could not be killed; set before done is closed
}

func newMachine(socket string) *machine {
	m := &machine{socket: socket, ending: make(chan struct{}), done: make(chan struct{})}
	m.destroy = sync.OnceFunc(func() { close(m.ending) })
	return m
}

// live waits for the guest's end or for Destroy, and then for the end of everything in
// the machine. The caller closes done; ctx is never cancelled, the killing is bounded.
func (m *machine) live(ctx context.Context, cmd *exec.Cmd, t tree) {
	exited := make(chan struct{})
	go func() {
		_ = cmd.Wait() // says no more than ProcessState
		close(exited)
	}()
	select {
	case <-exited:
		m.exit = vm.Exit{At: time.Now().UTC(), Reason: reasonOf(cmd.ProcessState)}
	case <-m.ending:
		m.exit = vm.Exit{At: time.Now().UTC(), Reason: "destroyed"}
		// Stopped, the guest starts nothing more and still inherits what is orphaned,
		// so that the others can be found below it until they are all dead.
		_ = cmd.Process.Signal(syscall.SIGSTOP)
		t.endBelow(ctx)
		_ = cmd.Process.Kill()
		<-exited
	}
	m.leftover = t.end(ctx)
}

// Dial connects to the guest. It is patient with a guest that does not listen yet.
func (m *machine) Dial(ctx context.Context) (net.Conn, error) {
	const retry = 5 * time.Millisecond
	for {
		select {
		case <-m.ending:
			return nil, vm.ErrEnded
		case <-m.done:
			return nil, vm.ErrEnded
		default:
		}
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", m.socket)
		if err == nil {
			return conn, nil
		}
		select {
		case <-m.ending:
		case <-m.done:
		case <-time.After(retry):
		case <-ctx.Done():
			return nil, fmt.Errorf("dialling the guest: %w", ctx.Err())
		}
	}
}

// Wait returns when nothing of the machine runs.
func (m *machine) Wait(ctx context.Context) (vm.Exit, error) {
	select {
	case <-m.done:
		return m.exit, nil
	case <-ctx.Done():
		return vm.Exit{}, ctx.Err()
	}
}

// Destroy kills everything in the machine; if ctx ends first, the killing goes on.
func (m *machine) Destroy(ctx context.Context) error {
	m.destroy()
	select {
	case <-m.done:
		return m.leftover
	case <-ctx.Done():
		return fmt.Errorf("destroying the machine: %w", ctx.Err())
	}
}

// stolen is the reason of a guest whose exit status another driver in this process took,
// while it reaped.
const stolen = "killed, and reaped by another driver"

func reasonOf(s *os.ProcessState) string {
	if s == nil {
		return stolen
	}
	return s.String()
}
