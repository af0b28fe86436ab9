package node

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/runner/guest/ssh"
	"github.com/paddock-ci/paddock/vm"
)

// bootstrap is a way into a guest, whichever the pool uses. The runner's state is the
// guest's: a way that was lost is opened again, and the runner goes on meanwhile.
// *guest.Client, *ssh.Client and *self.Client are the three.
type bootstrap interface {
	Hello(ctx context.Context) (guest.Hello, error)
	Start(ctx context.Context, r guest.Run) error
	Watch(ctx context.Context, changed func(guest.Status)) (guest.Status, error)
	Close() error
}

var (
	_ bootstrap = (*guest.Client)(nil)
	_ bootstrap = (*ssh.Client)(nil)
)

// bootstrapOf is the order's, by default the agent.
func bootstrapOf(o api.VMOrder) fleet.Bootstrap {
	if o.Bootstrap == "" {
		return fleet.BootstrapAgent
	}
	return o.Bootstrap
}

// checkBootstrap refuses what this program does not know.
func checkBootstrap(o api.VMOrder) error {
	switch bootstrapOf(o) {
	case fleet.BootstrapAgent, fleet.BootstrapSSH, fleet.BootstrapSelf:
		return nil
	}
	return fmt.Errorf("bootstrap %q is not known here: use %q, %q or %q", o.Bootstrap, fleet.BootstrapAgent, fleet.BootstrapSSH, fleet.BootstrapSelf)
}

// sshPort is where stock images listen.
const sshPort = 22

// connect opens a way of the caller's own into a guest; Close it. An *ending says that
// no further try will help.
func (a *Agent) connect(ctx context.Context, c contact) (bootstrap, error) {
	switch bootstrapOf(c.order) {
	case fleet.BootstrapSelf:
		return openShare(c.dir), nil
	case fleet.BootstrapSSH:
		return a.connectSSH(ctx, c)
	default:
		return dialAgent(ctx, c.machine)
	}
}

func dialAgent(ctx context.Context, m vm.Machine) (*guest.Client, error) {
	conn, err := m.Dial(ctx)
	if err != nil {
		return nil, fmt.Errorf("dialling the guest: %w", err)
	}
	return guest.New(conn), nil
}

func (a *Agent) connectSSH(ctx context.Context, c contact) (bootstrap, error) {
	ports, ok := c.machine.(vm.PortDialer)
	if !ok {
		return nil, a.noPorts()
	}
	login, err := a.login(ctx, c.order.Pool)
	if err != nil {
		return nil, err
	}
	conn, err := ports.DialPort(ctx, sshPort)
	if errors.Is(err, vm.ErrUnsupported) {
		return nil, a.noPorts()
	}
	if err != nil {
		return nil, fmt.Errorf("dialling the guest's port %d: %w", sshPort, err)
	}
	client, err := ssh.Dial(ctx, conn, ssh.Config{
		Login: login, HostKey: a.hostKeys, Key: string(c.order.Image), Log: a.log.With("vm", c.order.ID),
	})
	if errors.Is(err, ssh.ErrHostKey) {
		return nil, &ending{Reason: err.Error(), Failed: true}
	}
	if err != nil {
		return nil, err
	}
	return client, nil
}

func (a *Agent) noPorts() *ending {
	return &ending{Failed: true, Reason: fmt.Sprintf(
		"bootstrap %q needs a driver that reaches the guest's ports, and this node's (%q) does not: give the pool bootstrap %q, or nodes with driver vz or qemu",
		fleet.BootstrapSSH, a.c.Driver, fleet.BootstrapAgent)}
}

// login is how to log into a pool's guests: by the controller's last word, which is in
// memory only, so that an agent that was just started waits for its first.
func (a *Agent) login(ctx context.Context, pool fleet.PoolName) (fleet.Login, error) {
	for {
		a.mu.Lock()
		applied := a.applied
		for _, l := range a.will.Logins {
			if l.Pool == pool {
				a.mu.Unlock()
				return fleet.Login{User: l.User, Password: l.Password, Key: l.Key}, nil
			}
		}
		a.mu.Unlock()
		select {
		case <-applied:
		case <-ctx.Done():
			return fleet.Login{}, fmt.Errorf("the controller has named no login for pool %s yet: %w", pool, ctx.Err())
		}
	}
}

// hints say, for a guest that did not answer, what its pool's bootstrap asks of an image.
var hints = map[fleet.Bootstrap]string{
	fleet.BootstrapAgent: "this pool's bootstrap is agent, which needs an image with Paddock's guest agent; stock images want bootstrap: ssh",
	fleet.BootstrapSSH:   "this pool's bootstrap is ssh, which needs a guest with an SSH server and the pool's login; images with Paddock's guest agent want bootstrap: agent",
	fleet.BootstrapSelf:  "this pool's bootstrap is self, which needs an image whose launcher writes ready into its share; images with Paddock's guest agent want bootstrap: agent, stock images ssh",
}

// Bounds of what goes into a reason, in bytes.
const (
	maxReasonConsole = 1 << 10
	maxReasonError   = 300
)

// explain adds to an ending what helps a person: what the bootstrap needs, the last try,
// and what the machine printed. Once the VM had a runner nothing is added, since a
// console may repeat a job's output.
func (a *Agent) explain(l *life, why *ending) *ending {
	r := a.recordOf(l)
	if !why.late && !why.crashed || r.Report.Runner != nil || r.Starting != nil {
		return why
	}
	said := *why
	tail := vm.ConsoleTail(a.cloneDir(l.order.ID))
	switch {
	// A driver may wait for the guest's agent before it calls a machine up.
	case why.late && l.machine == nil && tail == "":
		said.Reason += ": its machine was not up yet"
	case why.late && r.Report.State == fleet.VMBooting && r.Report.Tier != fleet.TierSaved:
		said.Reason += ": " + hints[bootstrapOf(l.order)]
		if l.lastTry != nil {
			said.Reason += "; last try: " + clip(l.lastTry.Error(), maxReasonError)
		}
	}
	if tail != "" {
		tail = strings.ToValidUTF8(tail[max(0, len(tail)-maxReasonConsole):], "")
		said.Reason += fmt.Sprintf("; console ends: %q", tail)
	}
	return &said
}

// clip is the beginning of a text, at most most bytes.
func clip(s string, most int) string {
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "…"
}
