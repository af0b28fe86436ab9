//go:build (darwin && arm64 && cgo) || vzstandin

package vz

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime"
	"sync"
	"time"

	"github.com/Code-Hex/vz/v3"

	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/vm"
)

// machine is one machine of the framework's.
//
// Its goroutine live is the only one that reads the changes of state (they come by one
// channel, from which readers steal) and the only one that stops it.
type machine struct {
	framework  *vz.VirtualMachine // losing the last reference would release the machine
	hardware   *hardware
	dir        string
	leases     string
	cloneFile  func(ctx context.Context, src, dst string) error
	log        *slog.Logger
	saved      *state // what a state of it is bound to
	unsaveable error  // nil: it can be saved

	line     *guest.Line
	device   func() *vz.VirtioSocketDevice
	connects chan struct{} // one for each outstanding connect

	// Verbs are one after the other: the framework refuses a second, and what a verb that
	// nobody waits for any more makes of the machine must be known before the next.
	verb chan struct{} // held by the one outstanding verb
	save chan struct{} // held by the one who saves

	ending chan struct{} // closed: somebody wants its end
	done   chan struct{} // closed: it has ended; exit is set

	mu          sync.Mutex
	wanted      bool          // ending is closed; no verb begins any more
	outstanding bool          // a verb has not answered
	stream      net.Conn      // the line's raw one, the last that was made; nil: none yet
	shut        chan struct{} // not nil: no stream may be made until it is closed

	exit vm.Exit // readable once done is closed
}

var (
	_ vm.Machine    = (*machine)(nil)
	_ vm.Saver      = (*machine)(nil)
	_ vm.Addresser  = (*machine)(nil)
	_ vm.PortDialer = (*machine)(nil)
)

// newMachine makes a machine of what was configured; nothing runs yet.
func newMachine(d *Driver, spec vm.Spec, h *hardware, framework *vz.VirtualMachine, s *state, unsaveable error) (*machine, error) {
	m := &machine{
		framework: framework, hardware: h, dir: spec.Dir, leases: d.config.Leases,
		cloneFile: d.config.CloneFile, log: d.log.With("vm", spec.ID),
		saved: s, unsaveable: unsaveable,
		connects: make(chan struct{}, maxConnects),
		verb:     make(chan struct{}, 1),
		save:     make(chan struct{}, 1),
		ending:   make(chan struct{}),
		done:     make(chan struct{}),
	}
	m.line = guest.NewLine(m.open)
	// Once: each asking makes another foreign object. It belongs to the machine and dies
	// with it, so it is used only while the machine is held.
	m.device = sync.OnceValue(func() *vz.VirtioSocketDevice {
		devices := m.framework.SocketDevices()
		if len(devices) == 0 {
			return nil
		}
		return devices[0]
	})
	return m, nil
}

// call has the framework do one thing and waits for its answer, at most until ctx ends.
// What has not answered then goes on, and the next call waits for it.
func (m *machine) call(ctx context.Context, verb func() error) error {
	select {
	case m.verb <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("the framework has not answered yet: %w", ctx.Err())
	case <-m.done:
		return vm.ErrEnded
	}
	if !m.begin() {
		<-m.verb
		return vm.ErrEnded
	}
	answer := make(chan error, 1) // has room: nobody may be left to take it
	go func() {
		err := verb()
		m.mu.Lock()
		m.outstanding = false
		m.mu.Unlock()
		<-m.verb
		answer <- err
	}()
	select {
	case err := <-answer:
		return err
	case <-ctx.Done():
		return fmt.Errorf("the framework has not answered: %w", ctx.Err())
	case <-m.done:
	}
	// The end is told before the answer that explains it, by which callers decide.
	select {
	case err := <-answer:
		if err != nil {
			return err
		}
	case <-ctx.Done():
	case <-time.After(answerTime):
	}
	return vm.ErrEnded
}

// answerTime is how long a verb may answer after the machine has ended.
const answerTime = 5 * time.Second

// begin reports whether a verb may begin: never once the end is wanted, so that a Start
// cannot overtake a Stop.
func (m *machine) begin() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.outstanding = !m.wanted
	return m.outstanding
}

// live sees the machine's end, or brings it about when it is wanted, at whatever state
// the machine is in: Stop is tried until the framework takes it.
func (m *machine) live() {
	const first, most = 20 * time.Millisecond, time.Second
	states, ending, pause := m.framework.StateChangedNotify(), m.ending, first
	var stopped <-chan error
	var again <-chan time.Time
	for {
		select {
		case s := <-states:
			if over(s) {
				m.finish(s)
				return
			}
		case <-ending:
			ending = nil // it is closed and would be chosen for ever
			stopped = m.stop()
		case err := <-stopped:
			stopped = nil
			if err == nil || m.idle() {
				m.finish(vz.VirtualMachineStateStopped)
				return
			}
			m.log.Debug("the framework does not stop the machine yet", "error", err)
			again = time.After(pause)
			pause = min(2*pause, most)
		case <-again:
			stopped = m.stop()
		}
	}
}

// over reports whether a machine in that state has ended. All machines begin as stopped,
// but only changes are told.
func over(s vz.VirtualMachineState) bool {
	return s == vz.VirtualMachineStateStopped || s == vz.VirtualMachineStateError
}

// idle reports whether the machine does not run and nothing is outstanding that could
// make it run.
func (m *machine) idle() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return !m.outstanding && over(m.framework.State())
}

// stop asks the framework for the machine's end: at once, since a macOS guest ignores a
// request, and nothing in an ephemeral guest is worth waiting for.
func (m *machine) stop() <-chan error {
	answer := make(chan error, 1)
	go func() {
		if !m.framework.CanStop() {
			answer <- fmt.Errorf("a machine that is %s cannot be stopped", m.framework.State())
			return
		}
		answer <- m.framework.Stop()
	}()
	return answer
}

// finish closes what belongs to a machine that has ended.
func (m *machine) finish(s vz.VirtualMachineState) {
	m.exit = vm.Exit{At: time.Now().UTC(), Reason: "the guest stopped"}
	m.mu.Lock()
	switch {
	case m.wanted:
		m.exit.Reason = "destroyed"
	case s == vz.VirtualMachineStateError:
		m.exit.Reason = "the framework ended the machine after an error of its own"
	}
	m.wanted = true // no verb begins any more
	m.mu.Unlock()
	_ = m.line.Close() // it only closes streams that are dead
	m.hardware.console.close()
	runtime.KeepAlive(m.hardware.held) // until now the framework may have used any part
	close(m.done)
}

// Wait returns when the machine has ended.
func (m *machine) Wait(ctx context.Context) (vm.Exit, error) {
	select {
	case <-m.done:
		return m.exit, nil
	case <-ctx.Done():
		return vm.Exit{}, ctx.Err()
	}
}

// Destroy stops the machine. If ctx ends first, the stopping goes on.
func (m *machine) Destroy(ctx context.Context) error {
	m.mu.Lock()
	select {
	case <-m.ending: // somebody was faster
	default:
		m.wanted = true
		close(m.ending)
	}
	m.mu.Unlock()
	select {
	case <-m.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("the framework has not stopped the machine; it ends with this process at the latest: %w", ctx.Err())
	}
}

// gone reports whether the machine has ended or is about to.
func (m *machine) gone() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.wanted
}

// whileAlive is ctx, ended also by the end of the machine.
func (m *machine) whileAlive(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		select {
		case <-m.ending:
		case <-m.done:
		case <-ctx.Done():
		}
		cancel()
	}()
	return ctx, cancel
}

// errNoAnswer: one connect was given up.
var errNoAnswer = errors.New("the framework does not answer")
