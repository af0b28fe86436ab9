package node

import (
	"context"
	"errors"
	"fmt"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/runner/guest/self"
)

// register starts the runner that the controller hands over, whenever that is; there is
// no deadline here, since a warm VM without a job is the leader's to retire. A runner
// that an agent before this one started is found again by its name.
func (a *Agent) register(ctx context.Context, l *life) error {
	r := a.recordOf(l)
	switch {
	case r.Report.Runner != nil:
		return l.hasRunner(r.Report.Runner.Name)
	case r.Starting != nil && r.Starting.Name == l.status.Name:
		a.registered(l, r.Starting)
		return nil
	case l.status.State != guest.Idle:
		return fmt.Errorf("the guest has a runner %q that this node did not start", l.status.Name)
	}
	var order api.RunnerOrder
	select {
	case order = <-l.start:
	case <-ctx.Done():
		return ctx.Err()
	}
	runner := order.Runner
	a.note(l, func(r *record) { r.Starting = &runner })
	if err := a.startRunner(ctx, l, order); err != nil {
		return err
	}
	a.registered(l, &runner)
	return nil
}

// registered says that the guest has the runner.
func (a *Agent) registered(l *life, r *api.RunnerReport) {
	a.note(l, func(rec *record) {
		rec.Report.State, rec.Report.RegisteredAt = fleet.VMRegistered, a.c.Now()
		rec.Report.Runner, rec.Starting = r, nil
	})
}

// watch follows the runner to its end, which is how a good life ends. A connection that
// breaks is made again; only the machine's end ends the VM.
func (a *Agent) watch(ctx context.Context, l *life) error {
	for n := 1; ; n++ {
		last, err := l.guest.Watch(ctx, func(s guest.Status) {
			if s.State == guest.Busy || !s.BusyAt.IsZero() {
				a.busy(l)
			}
		})
		if err == nil {
			return exited(last)
		}
		if errors.Is(err, self.ErrMisuse) {
			return misused(err)
		}
		pause(ctx, backoff(n, dialPause, dialMost))
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err := a.reach(ctx, l); err != nil {
			return err
		}
		if err := l.hasRunner(a.recordOf(l).Report.Runner.Name); err != nil {
			return err
		}
	}
}

// busy notes the runner's word that it has a job, once.
func (a *Agent) busy(l *life) {
	if a.recordOf(l).Report.State == fleet.VMRegistered {
		a.note(l, func(r *record) { r.Report.State, r.Report.BusyAt = fleet.VMBusy, a.c.Now() })
	}
}

// maxTail bounds the runner's last output in a reason, in bytes.
const maxTail = 300

// exited is the ending of a VM whose runner has ended. Without a job and with an error
// the node has not served; then the end of its output says why. A job's own output is
// never repeated.
func exited(s guest.Status) *ending {
	e := &ending{Reason: fmt.Sprintf("runner exited %d", s.ExitCode)}
	if s.ExitCode != 0 && s.BusyAt.IsZero() {
		e.Failed = true
		e.Reason += fmt.Sprintf(" before it had a job: %q", s.Tail[max(0, len(s.Tail)-maxTail):])
	}
	return e
}
