package node

import (
	"context"
	"errors"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/vm"
)

// Durations of a teardown.
const (
	undoTime  = 2 * time.Minute  // one try of one step; a helper that hangs takes 30 s to be killed
	undoPause = time.Second      // before the second try
	undoMost  = 30 * time.Second // between later ones
	// undoLast is how often a stopping agent tries a step; the next start goes on.
	undoLast = 3
)

// conclude writes down why the VM's life ends, before anything of it is taken away, and
// joins what was started for it. If it goes on without us, nothing is written.
func (a *Agent) conclude(ctx context.Context, l *life, err error) {
	why := whyEnded(ctx, err)
	if why == nil {
		l.kept = true
		l.end(errKept)
	} else {
		why = a.explain(l, why)
		l.end(why)
		a.note(l, func(r *record) { r.End = why })
		r := a.recordOf(l).Report
		a.log.Info("a VM ends", "vm", r.ID, "pool", r.Order.Pool, "was", r.State, "why", why.Reason, "failed", why.Failed)
	}
	l.hangUp()
	l.watching.Wait()
}

// whyEnded puts together what a step said and why its context ended: a step that knows
// the ending by itself (the runner exited) goes first. It is nil if the VM goes on.
func whyEnded(ctx context.Context, err error) *ending {
	var e *ending
	cause := context.Cause(ctx)
	switch {
	case errors.As(err, &e):
		return e
	case errors.As(cause, &e):
		return e
	case errors.Is(cause, errKept):
		return nil
	case err != nil:
		return &ending{Reason: err.Error(), Failed: true}
	}
	return &ending{Reason: "it ended without a reason, which is a mistake in Paddock", Failed: true}
}

// undo does one step of the teardown until it succeeds; while it does not, the VM is
// not done and its slot not free. A stopping agent gives up after a few tries and
// leaves the rest to its next start, which finds the ending in the journal.
func (a *Agent) undo(ctx context.Context, l *life, what string, step func(context.Context, *life) error) {
	ctx = context.WithoutCancel(ctx)
	last := 0
	for n := 1; !l.kept && !l.stuck; n++ {
		try, cancel := context.WithTimeout(ctx, undoTime)
		err := step(try, l)
		cancel()
		if err == nil {
			return
		}
		a.log.Error("a step of a teardown failed and is tried again", "step", what, "vm", l.order.ID, "tries", n, "error", err)
		if a.isStopping() {
			last++
		}
		if last == undoLast {
			l.stuck = true
			return
		}
		a.rest(backoff(n, undoPause, undoMost))
	}
}

// rest waits for d, and a second at most once the agent is stopping.
func (a *Agent) rest(d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	stopping := a.stopping
	if a.isStopping() {
		t.Reset(min(d, time.Second))
		stopping = nil
	}
	select {
	case <-t.C:
	case <-stopping:
	}
}

// unboot destroys the machine, also one that an agent before this one booted.
func (a *Agent) unboot(ctx context.Context, l *life) error {
	if l.machine == nil {
		m, err := a.c.Machines.Adopt(ctx, l.order.ID)
		if errors.Is(err, vm.ErrUnknown) {
			return nil
		}
		if err != nil {
			return err
		}
		a.setMachine(l, m)
	}
	return l.machine.Destroy(ctx)
}

// unclone removes the clone with whatever the driver put beside it.
func (a *Agent) unclone(_ context.Context, l *life) error {
	return removeTree(a.cloneDir(l.order.ID))
}

// unlease releases the image. A VM from the journal takes its lease again to release
// it: if that fails, there is none.
func (a *Agent) unlease(_ context.Context, l *life) error {
	if l.release == nil && l.resumed {
		if release, err := a.c.Images.Lease(l.order.Image, string(l.order.ID)); err == nil {
			l.release = release
		}
	}
	if l.release == nil {
		return nil
	}
	return l.release()
}

// settle says that the VM is done: all of it is gone.
func (a *Agent) settle(l *life) {
	if l.kept || l.stuck {
		return
	}
	a.note(l, func(r *record) {
		r.Report.State, r.Report.DoneAt = fleet.VMDone, a.c.Now()
		r.Report.Reason, r.Report.Failed = r.End.Reason, r.End.Failed
		r.Starting, r.Seat = nil, nil
	})
}

// update changes a VM's record: first in the journal, then in what is reported. If the
// journal cannot be written, the change is reported all the same.
func (a *Agent) update(l *life, change func(*record)) error {
	r := a.recordOf(l)
	was := r.Report
	change(&r)
	err := a.journal.put(r)
	a.mu.Lock()
	first := !l.begun
	r.Report.Address = l.address // which may have come meanwhile
	l.record, l.begun = r, true
	a.mu.Unlock()
	if first || r.Report.State != was.State || r.Report.Runner != was.Runner {
		a.tell()
	}
	return err
}

// note is update where the VM goes on without the journal: after a crash the guest, the
// machine or the controller says again what the journal did not learn.
func (a *Agent) note(l *life, change func(*record)) {
	if err := a.update(l, change); err != nil {
		a.log.Error("the journal was not written; the VM goes on", "vm", l.order.ID, "error", err)
	}
}

// recordOf copies a VM's record. What it points to is replaced, never changed.
func (a *Agent) recordOf(l *life) record {
	a.mu.Lock()
	defer a.mu.Unlock()
	return l.record
}
