package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/vm"
)

// rise brings a VM to where its guest answers, within the boot deadline. It finds the
// machine that an agent before this one booted, or boots one: from a saved state if there
// is one for it, else, or if that comes to nothing, from the image.
func (a *Agent) rise(ctx context.Context, l *life) error {
	boot, up := a.boottime(ctx, l)
	defer up()
	if err := a.lease(boot, l); err != nil {
		return because(boot, err)
	}
	found, err := a.find(boot, l)
	if err != nil {
		return because(boot, err)
	}
	p, saved := a.startOf(l, found)
	if saved {
		err := a.startSaved(boot, l, p, found)
		if err == nil {
			a.watchMachine(ctx, l)
			return nil
		}
		if errors.Is(err, vm.ErrAtCapacity) || wasEnded(boot) { // which says nothing of the state
			return because(boot, fmt.Errorf("booting from a saved state: %w", err))
		}
		if err := a.giveUp(boot, l, p, err); err != nil {
			return err
		}
	}
	if saved || !found {
		if err := a.bootCold(boot, l); err != nil {
			return because(boot, err)
		}
	}
	a.watchMachine(ctx, l)
	return because(boot, a.reach(boot, l))
}

// startOf says from which saved state the VM starts, or the machine that was found has
// started without having been woken yet, if from one.
func (a *Agent) startOf(l *life, found bool) (p seat, saved bool) {
	if !found {
		l.clonedAt = a.c.Now()
		return a.sit(l)
	}
	r := a.recordOf(l)
	if r.Report.Tier != fleet.TierSaved || r.Seat == nil || r.Report.State != fleet.VMBooting {
		return seat{}, false
	}
	return *r.Seat, true
}

// savedShare is the part of the boot's time that a start from a saved state may take, as a
// divisor: what is left serves the cold boot after one that hangs.
const savedShare = 3

// startSaved starts the VM from a saved state, unless its machine was found, up to where
// it could be called warm.
func (a *Agent) startSaved(ctx context.Context, l *life, p seat, found bool) error {
	if until, ok := ctx.Deadline(); ok {
		most := time.Until(until) / savedShare
		shared, cancel := context.WithTimeoutCause(ctx, most, fmt.Errorf("it took longer than %v", most))
		defer cancel()
		ctx = shared
	}
	if !found {
		if err := a.bootSaved(ctx, l, p); err != nil {
			return because(ctx, err)
		}
	}
	bounded, cancel := context.WithTimeoutCause(ctx, restoreTime, fmt.Errorf("its guest did not answer within %v", restoreTime))
	defer cancel()
	err := a.reach(bounded, l)
	if err == nil {
		err = a.awaken(bounded, l)
	}
	return because(bounded, err)
}

// giveUp makes way for a cold boot after a start from a saved state that failed. Nobody
// has been in the guest, and it has had no runner: another machine may take its place.
// The state goes, so that the next VM does not meet it.
func (a *Agent) giveUp(ctx context.Context, l *life, p seat, why error) error {
	a.log.Warn("a saved state cannot be started from and was removed; the VM boots cold", "vm", l.order.ID, "image", l.order.Image.Short(), "error", why)
	a.spoil(p)
	l.hangUp()
	a.undo(ctx, l, "destroy the machine from a saved state", a.unboot)
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case l.stuck:
		return fmt.Errorf("the machine from a saved state could not be removed: %w", why)
	}
	a.setMachine(l, nil)
	l.lastTry, l.clonedAt = nil, a.c.Now()
	a.note(l, func(r *record) { r.Report.Tier = fleet.TierCold })
	return nil
}

// find adopts the machine of a VM from the journal. A VM whose machine is gone is booted
// again only if it never answered: a disk that was used is not used twice.
func (a *Agent) find(ctx context.Context, l *life) (found bool, err error) {
	if !l.resumed {
		return false, nil
	}
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
		return err // which names the image
	}
	if err := a.bootDir(ctx, l, ""); err != nil {
		return fmt.Errorf("booting: %w", err)
	}
	return nil
}

// bootSaved makes clones of a saved state's files and starts from it.
func (a *Agent) bootSaved(ctx context.Context, l *life, p seat) error {
	from, dir := a.states.path(p), a.cloneDir(l.order.ID)
	if err := removeTree(dir); err != nil {
		return fmt.Errorf("making room for the clone: %w", err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return fmt.Errorf("making the clone of a saved state: %w", err)
	}
	for _, name := range vm.SavedFiles {
		_, err := os.Lstat(filepath.Join(from, name))
		if errors.Is(err, fs.ErrNotExist) && name != vm.DiskFile && name != vm.ConfigFile {
			continue // the driver did not need it
		}
		if err == nil {
			err = a.c.CloneFile(ctx, filepath.Join(from, name), filepath.Join(dir, name))
		}
		if err != nil {
			return fmt.Errorf("cloning a saved state: %w", err)
		}
	}
	if err := a.bootDir(ctx, l, from); err != nil {
		return err
	}
	a.states.used(p)
	return nil
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
	if errors.Is(err, vm.ErrUnsupported) && bootstrapOf(l.order) == fleet.BootstrapSelf {
		return a.noShares(err)
	}
	if err != nil {
		return err
	}
	a.setMachine(l, m)
	return nil
}

// noShares says what helps where a driver refuses what bootstrap self asks for: a share
// that the guest only reads, and one to which it writes.
func (a *Agent) noShares(err error) error {
	return fmt.Errorf("%w; bootstrap %q needs a driver that shares directories with its guests, one of them read-only, and this node's (%q) does not: give the pool bootstrap %q or %q, or nodes with driver vz",
		err, fleet.BootstrapSelf, a.c.Driver, fleet.BootstrapAgent, fleet.BootstrapSSH)
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
