// Package vmtest is the contract of vm.Driver as a test, which every driver passes:
// vm/process directly, vm/helper over it, vm/qemu and vm/vz.
//
// It checks what a caller relies on: a machine boots, is dialled, runs a command, ends,
// is destroyed, at any moment and from many goroutines, and leaves nothing. What only
// one driver promises is tested beside that driver.
//
// Called by the tests of the drivers.
package vmtest

import (
	"cmp"
	"context"
	"errors"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/vm"
)

// Fixture is a driver and what the suite must know of it. The guests in its machines
// serve the protocol of runner/guest.
type Fixture struct {
	Driver vm.Driver
	// Spec is a new machine that boots, with a clone in a directory of its own.
	Spec func(t *testing.T) vm.Spec
	// Broken is a new machine that does not boot, for a reason the console shows.
	Broken func(t *testing.T) vm.Spec
	// Console is what a broken machine's console says.
	Console string
	// Hanging is a new machine whose boot does not end by itself.
	Hanging func(t *testing.T) vm.Spec
	// Slots is how many machines the driver runs at once: as many as the test asked
	// for, or at least 2 where the driver cannot have more.
	Slots int
	// Kill makes a running machine end without the driver being asked.
	Kill func(t *testing.T, spec vm.Spec)
	// Leftovers names what exists of a machine outside of its directory: processes
	// (zombies, too), sockets, folders. Empty after Destroy and after a failed Boot.
	Leftovers func(t *testing.T, spec vm.Spec) []string
	// Runner is the argv, inside the guest, of a program that copies its standard input
	// to its output and exits with status 7; nil: a shell does.
	Runner []string
	// Crowd is how many machines the test of many at once boots; 0: 8. Emulated ones
	// share the CPUs of a small host, where 8 take most of the suite's patience.
	Crowd int
}

// crowd is the test that wants more than a few slots.
const crowd = "many machines at once"

// patience bounds every wait of the suite: far above what the slowest driver needs.
const patience = 60 * time.Second

// Run runs the suite; fixture is called for each test in it, with the number of slots
// that the driver should have.
func Run(t *testing.T, fixture func(t *testing.T, slots int) Fixture) {
	for name, test := range map[string]func(*testing.T, *suite){
		"boot, hello and a command with input": bootAndRun,
		"wait from several goroutines":         waitFromMany,
		"destroy while dialling":               destroyWhileDialling,
		"destroy twice and at once":            destroyTwice,
		"dial and wait after the end":          afterTheEnd,
		"an open stream ends with the machine": streamEnds,
		"capacity":                             capacity,
		"a boot that fails":                    bootFails,
		"a boot that is cancelled":             bootCancelled,
		crowd:                                  manyMachines,
		"a machine that dies by itself":        diesByItself,
		"a call whose context ends":            contextEnds,
	} {
		t.Run(name, func(t *testing.T) {
			before := goroutines()
			f := fixture(t, 2) // enough slots to be full and not full
			if name == crowd {
				f = fixture(t, cmp.Or(f.Crowd, 8))
			}
			test(t, &suite{f})
			Eventually(t, "goroutines left", func() string {
				if now := goroutines(); len(now) > len(before) {
					return strings.Join(now, "\n\n")
				}
				return ""
			})
		})
	}
}

// suite is one test's fixture.
type suite struct{ Fixture }

// bounded is a context for one call of the test.
func bounded(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// boot boots a new machine; the test destroys it.
func (s *suite) boot(t *testing.T) (vm.Machine, vm.Spec) {
	t.Helper()
	spec := s.Spec(t)
	m, err := s.Driver.Boot(bounded(t), spec)
	if err != nil {
		t.Fatalf("booting %s: %v", spec.ID, err)
	}
	return m, spec
}

// destroy destroys a machine and checks that nothing is left of it.
func (s *suite) destroy(t *testing.T, m vm.Machine, spec vm.Spec) {
	t.Helper()
	if err := m.Destroy(bounded(t)); err != nil {
		t.Errorf("destroying %s: %v", spec.ID, err)
	}
	s.nothingLeft(t, spec)
}

func (s *suite) nothingLeft(t *testing.T, spec vm.Spec) {
	t.Helper()
	if left := s.Leftovers(t, spec); len(left) > 0 {
		t.Errorf("left of %s: %q", spec.ID, left)
	}
}

func (s *suite) dial(t *testing.T, m vm.Machine) *guest.Client {
	t.Helper()
	conn, err := m.Dial(bounded(t))
	if err != nil {
		t.Fatalf("dialling: %v", err)
	}
	return guest.New(conn)
}

// runner copies its input to its output and exits with status 7.
func (s *suite) runner(input string) guest.Run {
	argv := s.Runner
	if argv == nil {
		argv = []string{"sh", "-c", "cat; exit 7"}
	}
	return guest.Run{Name: "conformance", Argv: argv, Input: []byte(input)}
}

// runThrough says hello, runs a command and checks its output and exit.
func (s *suite) runThrough(t *testing.T, m vm.Machine, input string) {
	t.Helper()
	c := s.dial(t, m)
	defer func() { _ = c.Close() }()
	h, err := c.Hello(bounded(t))
	if err != nil || h.Status.State != guest.Idle {
		t.Errorf("hello: %+v, %v; want an idle guest", h, err)
	}
	if err := c.Start(bounded(t), s.runner(input)); err != nil {
		t.Errorf("start: %v", err)
		return
	}
	status, err := c.Watch(bounded(t), nil)
	if err != nil || status.ExitCode != 7 || status.Tail != input {
		t.Errorf("watch: %+v, %v; want exit 7 and %q", status, err, input)
	}
}

func bootAndRun(t *testing.T, s *suite) {
	m, spec := s.boot(t)
	s.runThrough(t, m, "config of the runner\n")
	// A second stream sees the same guest.
	c := s.dial(t, m)
	if h, err := c.Hello(bounded(t)); err != nil || h.Status.State != guest.Exited {
		t.Errorf("hello on a second stream: %+v, %v; want exited", h, err)
	}
	_ = c.Close()
	s.destroy(t, m, spec)
}

// Everyone who waits is told, and told the same.
func waitFromMany(t *testing.T, s *suite) {
	m, spec := s.boot(t)
	const waiters = 5
	exits := make(chan vm.Exit, waiters)
	var wg sync.WaitGroup
	for range waiters {
		wg.Go(func() {
			exit, err := m.Wait(bounded(t))
			if err != nil {
				t.Errorf("wait: %v", err)
			}
			exits <- exit
		})
	}
	s.destroy(t, m, spec)
	wg.Wait()
	first := <-exits
	if first.At.IsZero() || first.Reason == "" {
		t.Errorf("exit %+v has no time or no reason", first)
	}
	for range waiters - 1 {
		if exit := <-exits; !exit.At.Equal(first.At) || exit.Reason != first.Reason {
			t.Errorf("one goroutine got %+v, another %+v", first, exit)
		}
	}
}

// Nobody hangs in Dial while the machine goes away, and afterwards it is ErrEnded.
func destroyWhileDialling(t *testing.T, s *suite) {
	m, spec := s.boot(t)
	ctx := bounded(t)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				conn, err := m.Dial(ctx)
				if err == nil {
					_ = conn.Close()
					continue
				}
				select {
				case <-stop: // destroyed: from now on it must be ErrEnded
				default:
					if errors.Is(err, vm.ErrEnded) {
						return
					}
					continue // cut off in the middle of being destroyed
				}
				if _, err = m.Dial(ctx); !errors.Is(err, vm.ErrEnded) {
					t.Errorf("dial after destroy: %v, want ErrEnded", err)
				}
				return
			}
		})
	}
	s.destroy(t, m, spec)
	close(stop)
	wg.Wait()
}

func destroyTwice(t *testing.T, s *suite) {
	m, spec := s.boot(t)
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			if err := m.Destroy(bounded(t)); err != nil {
				t.Errorf("destroy at once with others: %v", err)
			}
		})
	}
	wg.Wait()
	s.destroy(t, m, spec)
}

func afterTheEnd(t *testing.T, s *suite) {
	m, spec := s.boot(t)
	s.destroy(t, m, spec)
	if _, err := m.Dial(bounded(t)); !errors.Is(err, vm.ErrEnded) {
		t.Errorf("dial: %v, want ErrEnded", err)
	}
	for range 2 {
		if exit, err := m.Wait(bounded(t)); err != nil || exit.Reason == "" {
			t.Errorf("wait: %+v, %v", exit, err)
		}
	}
}

// A watch on a destroyed machine does not hang.
func streamEnds(t *testing.T, s *suite) {
	m, spec := s.boot(t)
	c := s.dial(t, m)
	defer func() { _ = c.Close() }()
	watching := make(chan struct{})
	ended := make(chan error, 1)
	go func() {
		_, err := c.Watch(bounded(t), func(guest.Status) { close(watching) })
		ended <- err
	}()
	<-watching
	s.destroy(t, m, spec)
	if err := <-ended; !errors.Is(err, guest.ErrLost) {
		t.Errorf("the stream ended with %v, want ErrLost", err)
	}
}

// A machine too many is told so, and a freed slot can be taken at once.
func capacity(t *testing.T, s *suite) {
	machines := map[vm.Machine]vm.Spec{}
	for range s.Slots {
		m, spec := s.boot(t)
		machines[m] = spec
	}
	extra := s.Spec(t)
	if _, err := s.Driver.Boot(bounded(t), extra); !errors.Is(err, vm.ErrAtCapacity) {
		t.Errorf("machine %d of %d: %v, want ErrAtCapacity", s.Slots+1, s.Slots, err)
	}
	s.nothingLeft(t, extra)
	for m, spec := range machines {
		s.destroy(t, m, spec)
		delete(machines, m)
		break
	}
	m, err := s.Driver.Boot(bounded(t), extra) // a slot is free again
	if err != nil {
		t.Fatalf("booting into the freed slot: %v", err)
	}
	machines[m] = extra
	for m, spec := range machines {
		s.destroy(t, m, spec)
	}
}

// A boot that fails says what the console said, and gives its slot back.
func bootFails(t *testing.T, s *suite) {
	for range s.Slots + 1 { // a failed boot keeps no slot
		spec := s.Broken(t)
		_, err := s.Driver.Boot(bounded(t), spec)
		var boot *vm.BootError
		if !errors.As(err, &boot) {
			t.Fatalf("a broken machine: %v, want a BootError", err)
		}
		if !strings.Contains(boot.Console, s.Console) || len(boot.Console) > 4<<10 {
			t.Errorf("console %.5000q, want at most 4 KiB with %q", boot.Console, s.Console)
		}
		s.nothingLeft(t, spec)
	}
}

// A boot that is given up, in the middle or before it began, leaves nothing.
func bootCancelled(t *testing.T, s *suite) {
	for range s.Slots + 1 {
		spec := s.Hanging(t)
		ctx, cancel := context.WithTimeout(bounded(t), 150*time.Millisecond) // enough to be in the middle of it
		_, err := s.Driver.Boot(ctx, spec)
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("a boot whose context ended: %v", err)
		}
		s.nothingLeft(t, spec)
	}
	ctx, cancel := context.WithCancel(bounded(t))
	cancel()
	spec := s.Spec(t)
	if _, err := s.Driver.Boot(ctx, spec); !errors.Is(err, context.Canceled) {
		t.Errorf("a boot under an ended context: %v", err)
	}
	s.nothingLeft(t, spec)
}

func manyMachines(t *testing.T, s *suite) {
	var wg sync.WaitGroup
	specs := make([]vm.Spec, s.Slots)
	for i := range specs {
		specs[i] = s.Spec(t)
		wg.Go(func() {
			spec := specs[i]
			m, err := s.Driver.Boot(bounded(t), spec)
			if err != nil {
				t.Errorf("booting %s: %v", spec.ID, err)
				return
			}
			s.runThrough(t, m, strings.Repeat("x", i)+"\n")
			if err := m.Destroy(bounded(t)); err != nil {
				t.Errorf("destroying %s: %v", spec.ID, err)
			}
		})
	}
	wg.Wait()
	for _, spec := range specs { // not earlier: a zombie does not say whose it was
		s.nothingLeft(t, spec)
	}
}

// A guest that powers off or crashes is noticed, and its reason outlives Destroy.
func diesByItself(t *testing.T, s *suite) {
	m, spec := s.boot(t)
	s.Kill(t, spec)
	exit, err := m.Wait(bounded(t))
	if err != nil || exit.Reason == "" || exit.Reason == "destroyed" {
		t.Errorf("wait: %+v, %v", exit, err)
	}
	if _, err := m.Dial(bounded(t)); !errors.Is(err, vm.ErrEnded) {
		t.Errorf("dial: %v, want ErrEnded", err)
	}
	s.destroy(t, m, spec)
	if again, err := m.Wait(bounded(t)); err != nil || again.Reason != exit.Reason {
		t.Errorf("wait after destroy: %+v, %v; before it was %+v", again, err, exit)
	}
}

// A caller that gives up waiting does the machine no harm.
func contextEnds(t *testing.T, s *suite) {
	m, spec := s.boot(t)
	ctx, cancel := context.WithCancel(bounded(t))
	cancel()
	if _, err := m.Wait(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("wait under an ended context: %v", err)
	}
	s.runThrough(t, m, "it lives\n")
	s.destroy(t, m, spec)
}

// Eventually polls until check returns "", and fails the test with what it last said.
func Eventually(t *testing.T, what string, check func() string) {
	t.Helper()
	const every, limit = 5 * time.Millisecond, 30 * time.Second
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	deadline := time.Now().Add(limit)
	for {
		said := check()
		if said == "" {
			return
		}
		if time.Now().After(deadline) {
			t.Errorf("%s: %s", what, said)
			return
		}
		<-ticker.C
	}
}

// goroutines returns the stacks of all goroutines but this one.
func goroutines() []string {
	buf := make([]byte, 1<<20)
	stacks := strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n")
	return stacks[1:]
}
