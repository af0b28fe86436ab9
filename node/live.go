package node

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/vm"
)

// life is one VM of this node. What stands before record is set once; record, begun,
// handed, told, address and the writing of machine are guarded by Agent.mu; what stands after
// belongs to the goroutine of live, and it alone sets machine.
type life struct {
	order   api.VMOrder
	resumed bool                    // read from the journal: an agent before this one began it
	end     context.CancelCauseFunc // ends it with an *ending, or with errKept
	start   chan api.RunnerOrder    // the runner to start, at most one ever

	record  record
	begun   bool   // the journal knows it
	handed  string // the runner's name that went into start
	told    int64  // the sequence in which it was first reported done
	address string // the guest's, "" until it is known; not the VM's goroutine's to write

	machine vm.Machine // see setMachine

	watching sync.WaitGroup  // goroutines beside the VM's own, until conclude
	writing  sync.WaitGroup  // brings its saved state to disk, until the seat is freed
	guest    bootstrap       // nil: not connected
	status   guest.Status    // the guest's word when it was last dialled
	lastTry  error           // why it could not be dialled, the last time
	clonedAt time.Time       // when this agent began to boot it
	asked    <-chan struct{} // closed when the guest was asked for its address once
	release  func() error    // of the image's lease
	kept     bool            // it outlives the agent: no teardown
	stuck    bool            // a step of the teardown did not succeed: none after it may run
}

func newLife(r record) *life {
	return &life{order: r.Report.Order, record: r, address: r.Report.Address, start: make(chan api.RunnerOrder, 1)}
}

// live lives one VM, from the lease of its image to its end. Its defers are the
// teardown, and run last to first. Every step may have been done by an agent that
// crashed, and every step of the teardown may find nothing to do: so the same lines
// serve a new VM, one from the journal, and one that was ending when the agent died.
func (a *Agent) live(ctx context.Context, l *life) {
	var err error
	defer a.settle(l)
	defer a.undo(ctx, l, "release the image", a.unlease)
	defer a.undo(ctx, l, "free the saved state", a.unseat)
	defer l.writing.Wait() // which no machine waits for to go
	defer a.undo(ctx, l, "remove the clone", a.unclone)
	defer a.undo(ctx, l, "destroy the machine", a.unboot)
	defer func() { a.conclude(ctx, l, err) }()

	if err = a.open(l); err != nil {
		return
	}
	ctx, over := a.lifetime(ctx, l)
	defer over()
	if err = a.rise(ctx, l); err != nil {
		return
	}
	if err = a.greet(ctx, l); err != nil {
		return
	}
	a.askAddress(ctx, l)
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
	return context.WithTimeoutCause(ctx, left, &ending{Reason: fmt.Sprintf("its guest did not answer within %v", d), Failed: true, late: true})
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
	err := a.update(l, func(r *record) { r.Report.BootingAt, r.Report.Tier = a.c.Now(), fleet.TierCold })
	if err != nil {
		return err
	}
	return checkBootstrap(l.order)
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
	return &ending{Reason: "the machine ended: " + exit.Reason, Failed: true, crashed: true}
}

// greet makes a VM warm whose guest has just answered for the first time. The boot's time
// is over by then: saving a machine has its own.
func (a *Agent) greet(ctx context.Context, l *life) error {
	r := a.recordOf(l)
	if stage(r.Report.State) >= stage(fleet.VMWarm) {
		return nil
	}
	if !l.clonedAt.IsZero() {
		a.starts.add(l.order.Image, r.Report.Tier, a.c.Now().Sub(l.clonedAt))
	}
	if r.Report.Tier != fleet.TierSaved {
		if err := a.save(ctx, l); err != nil {
			return err
		}
	}
	a.note(l, func(r *record) { r.Report.State, r.Report.WarmAt = fleet.VMWarm, a.c.Now() })
	return nil
}
