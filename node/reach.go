package node

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/runner/guest/self"
	"github.com/paddock-ci/paddock/runner/guest/ssh"
	"github.com/paddock-ci/paddock/vm"
)

// Durations of reaching a guest.
const (
	// helloTime bounds one try: a dial may hang where the guest's end is gone.
	helloTime = 10 * time.Second
	// sshTime is helloTime where a login comes first, of which an emulated guest makes a
	// second and a loaded one ten: more than the login's own limit, whose error says more.
	sshTime = 40 * time.Second
	// dialPause and dialMost bound the pause between tries; the first is short, since a
	// warm-up counts in the start delay.
	dialPause = 50 * time.Millisecond
	dialMost  = 2 * time.Second
	// loginTries is how often a guest that has not answered yet may refuse a login: while it
	// boots, an account may not be ready. loginPause stands between: a newer sshd shuts out,
	// for a while, who is refused more often.
	loginTries = 3
	loginPause = 5 * time.Second
)

// reach dials the guest until it answers, and leaves the connection in l.guest and its
// word in l.status. It fails only if the machine has ended, ctx ends, or no further try
// will help.
func (a *Agent) reach(ctx context.Context, l *life) error {
	refused := 0
	for n := 1; ; n++ {
		err := a.hello(ctx, l)
		var final *ending
		switch {
		case err == nil:
			return nil
		case errors.Is(err, ssh.ErrLogin) && a.recordOf(l).Report.State == fleet.VMBooting:
			if refused++; refused == loginTries {
				return &ending{Reason: err.Error(), Failed: true}
			}
			pause(ctx, loginPause)
			continue
		case errors.As(err, &final):
			return final
		case errors.Is(err, self.ErrMisuse):
			return misused(err)
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, vm.ErrEnded):
			exit, err := l.machine.Wait(ctx)
			if err != nil {
				return fmt.Errorf("asking how the machine ended: %w", err)
			}
			return machineEnded(exit)
		}
		a.log.Debug("guest does not answer yet", "vm", l.order.ID, "tries", n, "error", err)
		pause(ctx, backoff(n, dialPause, dialMost))
	}
}

// misused is the ending of a VM whose guest does harm to this host through its share:
// every further moment it may fill the disk.
func misused(err error) *ending { return &ending{Reason: err.Error(), Failed: true} }

// hello makes one connection and asks for the guest's status.
func (a *Agent) hello(ctx context.Context, l *life) (err error) {
	l.hangUp()
	limit := helloTime
	if bootstrapOf(l.order) == fleet.BootstrapSSH {
		limit = sshTime
	}
	try, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	defer func() {
		if err != nil && (ctx.Err() == nil || l.lastTry == nil) {
			l.lastTry = err
		}
	}()
	client, err := a.connect(try, contact{order: l.order, machine: l.machine, dir: a.cloneDir(l.order.ID)})
	if err != nil {
		return err
	}
	hello, err := client.Hello(try)
	if err != nil {
		_ = client.Close()
		return err
	}
	l.guest, l.status = client, hello.Status
	return nil
}

// hangUp closes the connection, if there is one; the guest does not mind.
func (l *life) hangUp() {
	if l.guest != nil {
		_ = l.guest.Close()
		l.guest = nil
	}
}

// hasRunner reports an error if the guest no longer has the runner that was started.
func (l *life) hasRunner(name string) error {
	if l.status.State == guest.Idle || l.status.Name != name {
		return &ending{Reason: "the runner did not survive: its guest was started anew", Failed: true}
	}
	return nil
}
