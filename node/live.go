package node

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/vm"
)

// life is one VM of this node. What stands before record is set once; record, begun,
// handed, told and the writing of machine are guarded by Agent.mu; what stands after
// belongs to the goroutine of live, and it alone sets machine.
type life struct {
	order   api.VMOrder
	resumed bool                    // read from the journal: an agent before this one began it
	end     context.CancelCauseFunc // ends it with an *ending, or with errKept
	start   chan api.RunnerOrder    // the runner to start, at most one ever

	record record
	begun  bool   // the journal knows it
	handed string // the runner's name that went into start
	told   int64  // the sequence in which it was first reported done

	machine vm.Machine // see setMachine

	watching sync.WaitGroup // the goroutine that waits for the machine's end
	guest    *guest.Client  // nil: not connected
	status   guest.Status   // the guest's word when it was last dialled
	release  func() error   // of the image's lease
	kept     bool           // it outlives the agent: no teardown
	stuck    bool           // a step of the teardown did not succeed: none after it may run
}

func newLife(r record) *life {
	return &life{order: r.Report.Order, record: r, start: make(chan api.RunnerOrder, 1)}
}

// live lives one VM, from the lease of its image to its end. Its defers are the
// teardown, and run last to first. Every step may have been done by an agent that
// crashed, and every step of the teardown may find nothing to do: so the same lines
// serve a new VM, one from the journal, and one that was ending when the agent died.
func (a *Agent) live(ctx context.Context, l *life) {
	var err error
	defer a.settle(l)
	defer a.undo(ctx, l, "release the image", a.unlease)
	defer a.undo(ctx, l, "remove the clone", a.unclone)
	defer a.undo(ctx, l, "destroy the machine", a.unboot)
	defer func() { a.conclude(ctx, l, err) }()

	if err = a.open(l); err != nil {
		return
	}
	ctx, over := a.lifetime(ctx, l)
	defer over()
	boot, up := a.boottime(ctx, l)
	defer up()
	if err = because(boot, a.lease(boot, l)); err != nil {
		return
	}
	if err = because(boot, a.boot(boot, l)); err != nil {
		return
	}
	a.watchMachine(ctx, l)
	if err = because(boot, a.greet(boot, l)); err != nil {
		return
	}
	up()
	if err = a.register(ctx, l); err != nil {
		return
	}
	err = a.watch(ctx, l)
}

// lifetime ends a VM at its maximum lifetime, counted by this node's clock from when
// it took the order, even if it is busy.
func (a *Agent) lifetime(ctx context.Context, l *life) (context.Context, context.CancelFunc) {
	d := l.order.Deadlines.WithDefaults().Life
	left := a.recordOf(l).Report.BootingAt.Add(d).Sub(a.c.Now())
	return context.WithTimeoutCause(ctx, left, &ending{Reason: fmt.Sprintf("its maximum lifetime of %v is over", d)})
}

// boottime bounds the way to a guest that answers. One that had answered an agent
// before this one gets the time anew; one with a runner is not ended by silence, for
// its job may well go on.
func (a *Agent) boottime(ctx context.Context, l *life) (context.Context, context.CancelFunc) {
	r, d := a.recordOf(l).Report, l.order.Deadlines.WithDefaults().Boot
	left := d
	switch {
	case r.Runner != nil:
		return context.WithCancel(ctx)
	case r.State == fleet.VMBooting:
		left = r.BootingAt.Add(d).Sub(a.c.Now())
	}
	return context.WithTimeoutCause(ctx, left, &ending{Reason: fmt.Sprintf("its guest did not answer within %v", d), Failed: true})
}

// because gives the cause for which ctx ended instead of the error that followed it.
func because(ctx context.Context, err error) error {
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// open writes a new VM into the journal, before anything of it exists.
func (a *Agent) open(l *life) error {
	if l.resumed {
		return nil
	}
	err := a.update(l, func(r *record) { r.Report.BootingAt = a.c.Now() })
	if err != nil {
		return err
	}
	if b := l.order.Bootstrap; b != "" && b != fleet.BootstrapAgent {
		return fmt.Errorf("bootstrap %q is not available in this version: use %q, with an image that carries Paddock's guest agent", b, fleet.BootstrapAgent)
	}
	return nil
}

// lease pins the image, so that no eviction races the clone.
func (a *Agent) lease(ctx context.Context, l *life) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	release, err := a.c.Images.Lease(l.order.Image, string(l.order.ID))
	switch {
	case err == nil:
		l.release = release
	case l.resumed: // its machine may well run: the clone does not need the image
		a.log.Warn("image of a VM from the journal is not leased again", "vm", l.order.ID, "image", l.order.Image.Short(), "error", err)
	default:
		return fmt.Errorf("image %s is not ready on this node: %w", l.order.Image.Short(), err)
	}
	return nil
}

// boot finds the machine that an agent before this one booted, or makes a clone and
// boots it. A VM whose machine is gone is booted again only if it never answered: a
// disk that was used is not used twice.
func (a *Agent) boot(ctx context.Context, l *life) error {
	if l.resumed {
		m, err := a.adopt(ctx, l)
		answered := a.recordOf(l).Report.State != fleet.VMBooting
		switch {
		case err == nil && (answered || !hasEnded(ctx, m)):
			a.setMachine(l, m)
			return nil
		case err == nil: // it went with the agent in the middle of its boot
			if err := m.Destroy(ctx); err != nil {
				return fmt.Errorf("removing what is left of its first boot: %w", err)
			}
		case !errors.Is(err, vm.ErrUnknown):
			return fmt.Errorf("adopting its machine: %w", err)
		case answered:
			return &ending{Reason: "the VM did not survive the restart of its node's agent: its machine is gone", Failed: true}
		}
	}
	dir := a.cloneDir(l.order.ID)
	if err := removeTree(dir); err != nil { // what a crash left of a clone
		return fmt.Errorf("making room for the clone: %w", err)
	}
	if err := a.c.Images.Clone(ctx, l.order.Image, dir, l.order.Disk); err != nil {
		return fmt.Errorf("cloning image %s: %w", l.order.Image.Short(), err)
	}
	m, err := a.c.Machines.Boot(ctx, vm.Spec{
		ID: l.order.ID, Dir: dir, CPU: l.order.CPU, Memory: l.order.Memory, Mounts: l.order.Mounts,
	})
	if err != nil {
		return fmt.Errorf("booting: %w", err)
	}
	a.setMachine(l, m)
	return nil
}

// adoptTries bounds how often a machine is asked for that is there and cannot be had:
// about ten seconds, for one slow answer must not end a job.
const adoptTries = 8

func (a *Agent) adopt(ctx context.Context, l *life) (vm.Machine, error) {
	for n := 1; ; n++ {
		m, err := a.c.Machines.Adopt(ctx, l.order.ID)
		if err == nil || n == adoptTries || errors.Is(err, vm.ErrUnknown) || ctx.Err() != nil {
			return m, err
		}
		a.log.Warn("a machine of ours could not be adopted; it is tried again", "vm", l.order.ID, "tries", n, "error", err)
		pause(ctx, backoff(n, dialPause, dialMost))
	}
}

// endedTime is how long a machine is given to say that it has ended, which one that has
// does at once.
const endedTime = time.Second

func hasEnded(ctx context.Context, m vm.Machine) bool {
	ctx, cancel := context.WithTimeout(ctx, endedTime)
	defer cancel()
	_, err := m.Wait(ctx)
	return err == nil
}

func (a *Agent) cloneDir(id fleet.VMID) string { return filepath.Join(a.clones(), string(id)) }

// watchMachine ends the VM's life when its machine ends by itself.
func (a *Agent) watchMachine(ctx context.Context, l *life) {
	l.watching.Go(func() {
		for n := 1; ctx.Err() == nil; n++ {
			exit, err := l.machine.Wait(ctx)
			if err == nil {
				l.end(machineEnded(exit))
				return
			}
			pause(ctx, backoff(n, dialPause, dialMost))
		}
	})
}

func machineEnded(exit vm.Exit) *ending {
	return &ending{Reason: "the machine ended: " + exit.Reason, Failed: true}
}

// greet waits until the guest answers: the VM is warm.
func (a *Agent) greet(ctx context.Context, l *life) error {
	if err := a.reach(ctx, l); err != nil {
		return err
	}
	if stage(a.recordOf(l).Report.State) < stage(fleet.VMWarm) {
		a.note(l, func(r *record) { r.Report.State, r.Report.WarmAt = fleet.VMWarm, a.c.Now() })
	}
	return nil
}
