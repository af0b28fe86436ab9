package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/vm"
)

// boot finds the machine that an agent before this one booted, or boots one: from a
// saved state if there is one for it, else, or if that one is broken, from the image.
func (a *Agent) boot(ctx context.Context, l *life) error {
	if l.resumed {
		found, err := a.find(ctx, l)
		if found || err != nil {
			return err
		}
	}
	l.clonedAt = a.c.Now()
	if p, saved := a.sit(l); saved {
		err := a.bootSaved(ctx, l, p)
		if !errors.Is(err, vm.ErrState) || ctx.Err() != nil {
			return err
		}
		a.log.Warn("a saved state cannot be started from and was removed; the VM boots cold", "vm", l.order.ID, "image", l.order.Image.Short(), "error", err)
		a.note(l, func(r *record) { r.Report.Tier = fleet.TierCold })
		l.clonedAt = a.c.Now()
	}
	return a.bootCold(ctx, l)
}

// find adopts the machine of a VM from the journal. A VM whose machine is gone is booted
// again only if it never answered: a disk that was used is not used twice.
func (a *Agent) find(ctx context.Context, l *life) (found bool, err error) {
	m, err := a.adopt(ctx, l)
	answered := a.recordOf(l).Report.State != fleet.VMBooting
	switch {
	case err == nil && (answered || !hasEnded(ctx, m)):
		a.setMachine(l, m)
		return true, nil
	case err == nil: // it went with the agent in the middle of its boot
		if err := m.Destroy(ctx); err != nil {
			return false, fmt.Errorf("removing what is left of its first boot: %w", err)
		}
	case !errors.Is(err, vm.ErrUnknown):
		return false, fmt.Errorf("adopting its machine: %w", err)
	case answered:
		return false, &ending{Reason: "the VM did not survive the restart of its node's agent: its machine is gone", Failed: true}
	}
	return false, nil
}

// bootCold makes a clone of the image and boots it.
func (a *Agent) bootCold(ctx context.Context, l *life) error {
	dir := a.cloneDir(l.order.ID)
	if err := removeTree(dir); err != nil { // what a crash left of a clone
		return fmt.Errorf("making room for the clone: %w", err)
	}
	if err := a.c.Images.Clone(ctx, l.order.Image, dir, l.order.Disk); err != nil {
		return fmt.Errorf("cloning image %s: %w", l.order.Image.Short(), err)
	}
	if err := a.bootDir(ctx, l, ""); err != nil {
		return fmt.Errorf("booting: %w", err)
	}
	return nil
}

// bootSaved makes clones of a saved state's files and starts from it. Whatever goes
// wrong with the machine then, the state goes with it: the next VM shall not meet it.
func (a *Agent) bootSaved(ctx context.Context, l *life, p seat) error {
	from, dir := a.states.path(p), a.cloneDir(l.order.ID)
	if err := removeTree(dir); err != nil {
		return fmt.Errorf("making room for the clone: %w", err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return fmt.Errorf("making the clone of a saved state: %w", err)
	}
	for _, name := range vm.SavedFiles {
		if _, err := os.Lstat(filepath.Join(from, name)); errors.Is(err, os.ErrNotExist) {
			continue // not needed
		}
		if err := a.c.CloneFile(ctx, filepath.Join(from, name), filepath.Join(dir, name)); err != nil {
			return fmt.Errorf("cloning a saved state: %w", err)
		}
	}
	err := a.bootDir(ctx, l, from)
	if err == nil {
		a.states.used(p)
		return nil
	}
	if !errors.Is(err, vm.ErrAtCapacity) && !wasEnded(ctx) {
		a.spoil(p)
	}
	return fmt.Errorf("booting from a saved state: %w", err)
}

// spoil removes a state from which no good start was to be had.
func (a *Agent) spoil(p seat) {
	a.states.drop(p)
	a.states.fail(p, false)
}

// wasEnded reports whether ctx was ended by somebody: what failed then says nothing about
// the machine, other than after its silence or its own end.
func wasEnded(ctx context.Context) bool {
	var e *ending
	if errors.As(context.Cause(ctx), &e) && (e.late || e.crashed) {
		return false
	}
	return ctx.Err() != nil
}

// bootDir boots the VM's clone, from a saved state if there is one.
func (a *Agent) bootDir(ctx context.Context, l *life, state string) error {
	dir := a.cloneDir(l.order.ID)
	spec := vm.Spec{
		ID: l.order.ID, Dir: dir, CPU: l.order.CPU, Memory: l.order.Memory, Mounts: l.order.Mounts,
		Agent: bootstrapOf(l.order) == fleet.BootstrapAgent, State: state,
	}
	if bootstrapOf(l.order) == fleet.BootstrapSelf {
		shares, err := prepareShare(dir)
		if err != nil {
			return fmt.Errorf("preparing the share with the guest: %w", err)
		}
		spec.Mounts = append(slices.Clone(l.order.Mounts), shares...)
	}
	m, err := a.bootSpec(ctx, spec)
	if err != nil {
		return err
	}
	a.setMachine(l, m)
	return nil
}

// A host may free a machine's slot a moment after the machine is gone: macOS does.
const (
	slotTries = 6
	slotPause = 500 * time.Millisecond
)

// bootSpec boots a machine, and waits a little for a slot of a machine that has just gone.
func (a *Agent) bootSpec(ctx context.Context, spec vm.Spec) (vm.Machine, error) {
	for n := 1; ; n++ {
		m, err := a.c.Machines.Boot(ctx, spec)
		if n == slotTries || !errors.Is(err, vm.ErrAtCapacity) {
			return m, err
		}
		pause(ctx, slotPause)
	}
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
