package node

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/vm"
)

const (
	// saveTime bounds saving: 16 GB of memory at 200 MB/s.
	saveTime = 80 * time.Second
	// restoreTime is how long a guest may take to answer after a start from a saved state,
	// or after it was saved, which takes a second: one that is silent longer is broken.
	restoreTime = time.Minute
	// wakeTries bounds how often a woken guest is asked over a new connection.
	wakeTries = 3
	// entropyBytes is what a guest's random pool is stirred with: twice what it holds.
	entropyBytes = 64
	// cloneGrowth is kept free on disk for each slot when a state is saved: what a clone may
	// grow by (the default of a pool's growth), in bytes.
	cloneGrowth = 40e9
	// idleFloor is the free disk in bytes below which a node without VMs gives up its states.
	idleFloor = 5e9
	// unknownMemory stands for a memory that neither pool nor image names: the most that a
	// driver gives such a machine, in bytes.
	unknownMemory = 8 << 30
	// blockSize is the unit of stat's count of blocks, in bytes, whatever the file system's.
	blockSize = 512
)

// usesStates reports whether VMs of an order may start from saved states. Only Paddock's
// agent can wake a guest, without which two machines of one state would draw the same
// random numbers, and so the same keys.
func (a *Agent) usesStates(l *life) bool {
	return a.c.SaveStates && a.c.CloneFile != nil && bootstrapOf(l.order) == fleet.BootstrapAgent
}

// sit finds a VM its seat among the saved states, if there is one for it, and reports
// whether that has a state to start from. The journal knows the seat before the machine
// exists, so that an agent that is started again keeps others away from it.
func (a *Agent) sit(l *life) (p seat, saved bool) {
	if !a.usesStates(l) {
		return seat{}, false
	}
	if had := a.recordOf(l).Seat; had != nil { // in a life that a crash interrupted
		p, saved = *had, a.states.hold(l.order.ID, *had)
	} else {
		key, err := stateKey(l.order, a.c.Driver)
		if err != nil {
			a.log.Warn("the VM boots cold", "vm", l.order.ID, "error", err)
			return seat{}, false
		}
		var ok bool
		if p, saved, ok = a.states.take(l.order.ID, l.order.Image, key, !l.resumed); !ok {
			return seat{}, false
		}
	}
	tier := fleet.TierCold
	if saved {
		tier = fleet.TierSaved
	}
	if err := a.update(l, func(r *record) { r.Seat, r.Report.Tier = &p, tier }); err != nil {
		a.log.Warn("the journal was not written; the VM boots cold", "vm", l.order.ID, "error", err)
		a.states.release(l.order.ID, p)
		a.note(l, func(r *record) { r.Seat, r.Report.Tier = nil, fleet.TierCold })
		return seat{}, false
	}
	return p, saved
}

// unseat frees the VM's seat, once neither its machine nor its clone is left.
func (a *Agent) unseat(_ context.Context, l *life) error {
	if p := a.recordOf(l).Seat; p != nil {
		a.states.release(l.order.ID, *p)
	}
	return nil
}

// awaken brings a guest that was started from a saved state into its own time, before it
// counts as warm. Without it the machine is of no use: another one from this state would
// have the same random numbers.
func (a *Agent) awaken(ctx context.Context, l *life) error {
	for n := 1; ; n++ {
		err := a.wake(ctx, l)
		if err == nil || n == wakeTries || ctx.Err() != nil || !errors.Is(err, guest.ErrLost) {
			return err
		}
		if err := a.reach(ctx, l); err != nil {
			return err
		}
	}
}

func (a *Agent) wake(ctx context.Context, l *life) error {
	client, ok := l.guest.(interface {
		Wake(ctx context.Context, w guest.Wake) error
	})
	if !ok {
		return guest.ErrUnsupported
	}
	ctx, cancel := context.WithTimeout(ctx, helloTime)
	defer cancel()
	entropy := make([]byte, entropyBytes)
	rand.Read(entropy) // never fails: crypto/rand aborts the program instead
	defer clear(entropy)
	if err := client.Wake(ctx, guest.Wake{Now: a.c.Now(), Entropy: entropy}); err != nil {
		return fmt.Errorf("waking the guest: %w", err)
	}
	return nil
}

// save keeps the state of a machine that has just booted cold, for later VMs. It is done
// before the VM is warm, never later: then it may get a runner at any moment, and a
// runner's JIT config is in its memory; nor does a person get in before (contactOf). So
// the first VM of a seat waits for it (0.1 s on QEMU, seconds for a Mac's 8 GB), and each
// later one gains more than that.
func (a *Agent) save(ctx context.Context, l *life) error {
	p := a.recordOf(l).Seat
	saver, ok := l.machine.(vm.Saver)
	if p == nil || !ok || l.resumed || l.status.State != guest.Idle || !a.roomForState(l) {
		return nil
	}
	if !a.saving.TryLock() {
		return nil // one at a time: another VM's is being written
	}
	defer a.saving.Unlock()
	dir, err := a.states.begin(*p)
	if err != nil {
		a.unsaved(ctx, l, *p, err)
		return nil
	}
	err = a.saveInto(ctx, saver, dir)
	// Saving has cut the connection, and the guest's clock stood still, unless the driver
	// did nothing at all; a guest that cannot be woken is not saved.
	again, cancel := context.WithTimeoutCause(ctx, restoreTime, &ending{
		Reason: fmt.Sprintf("its guest did not answer within %v after its state was saved", restoreTime), Failed: true})
	defer cancel()
	lost := a.reach(again, l)
	if lost == nil && !errors.Is(err, vm.ErrUnsupported) {
		err = errors.Join(err, a.awaken(again, l))
	}
	if err := errors.Join(err, lost); err != nil {
		a.unsaved(ctx, l, *p, err)
		return because(again, lost)
	}
	l.writing.Go(func() { a.finishState(l, *p) })
	return nil
}

// unsaved removes what was written of a state, and counts that it failed unless somebody
// ended the VM meanwhile.
func (a *Agent) unsaved(ctx context.Context, l *life, p seat, err error) {
	a.states.drop(p)
	if wasEnded(ctx) {
		return
	}
	a.states.fail(p, errors.Is(err, vm.ErrUnsupported) || errors.Is(err, guest.ErrUnsupported))
	a.log.Warn("the machine's state was not saved", "vm", l.order.ID, "image", l.order.Image.Short(), "error", err)
}

func (a *Agent) saveInto(ctx context.Context, saver vm.Saver, dir string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, saveTime, fmt.Errorf("saving took longer than %v", saveTime))
	defer cancel()
	return because(ctx, saver.Save(ctx, dir))
}

// finishState brings a saved state to disk while its VM is warm already.
func (a *Agent) finishState(l *life, p seat) {
	if err := a.states.finish(p); err != nil {
		a.log.Warn("the machine's state was not saved", "vm", l.order.ID, "image", p.Image.Short(), "error", err)
		a.states.drop(p)
		a.states.fail(p, false)
		return
	}
	a.log.Info("a machine's state was saved", "vm", l.order.ID, "image", p.Image.Short())
	a.states.prune(a.c.Images.List())
}

// stateMargin is what must stay free on disk for a state to be saved, in bytes.
func (a *Agent) stateMargin() int64 {
	if a.c.StateMargin > 0 {
		return a.c.StateMargin
	}
	return a.growthRoom()
}

// growthRoom is what the clones of all slots may grow by together, in bytes.
func (a *Agent) growthRoom() int64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	var growth int64
	for _, l := range a.vms {
		growth = max(growth, cmp.Or(l.order.Growth, cloneGrowth))
	}
	return int64(a.c.Slots) * cmp.Or(growth, cloneGrowth)
}

// roomForState reports whether the disk has room for what a state of the VM takes, beside
// what the clones may grow by.
func (a *Agent) roomForState(l *life) bool {
	if a.c.Free == nil {
		return true
	}
	free, err := a.c.Free()
	takes := int64(0)
	if err == nil {
		takes, err = a.stateSize(l)
	}
	if err != nil || free-takes < a.stateMargin() {
		a.log.Info("no state is saved: too little disk space is free", "vm", l.order.ID, "free", free, "takes", takes, "kept_free", a.stateMargin(), "error", err)
		return false
	}
	return true
}

// stateSize is what a state of the VM takes on disk, in bytes: its memory and, where files
// cannot share blocks, its disk.
func (a *Agent) stateSize(l *life) (int64, error) {
	dir, size := a.cloneDir(l.order.ID), l.order.Memory
	if size == 0 {
		c, err := vm.ReadConfig(dir)
		if err != nil {
			return 0, err
		}
		size = cmp.Or(c.MemorySize, max(c.MemorySizeMin, unknownMemory))
	}
	if a.c.CanShare != nil {
		shared, err := a.c.CanShare()
		if err == nil && shared {
			return size, nil
		}
	}
	var disk unix.Stat_t
	if err := unix.Stat(filepath.Join(dir, vm.DiskFile), &disk); err != nil {
		return 0, fmt.Errorf("measuring the disk: %w", err)
	}
	return size + disk.Blocks*blockSize, nil
}

// relieve gives the room of saved states back when the disk fills up, before VMs have to
// wait for it: a quarter below where states are saved, so that it does not go to and fro.
// Without VMs nothing grows, and nobody says by how much it would: only a disk that is
// nearly full counts then.
func (a *Agent) relieve(free int64) {
	floor := a.stateMargin() / 4 * 3
	if !a.hasVMs() {
		floor = min(floor, idleFloor)
	}
	if free < floor {
		a.states.sweep("the disk fills up", func(seat) bool { return true })
	}
}

func (a *Agent) hasVMs() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.vms) > 0
}
