// Package qemu is a driver whose machines are real ones, emulated by QEMU: the way in
// which Paddock runs, and is tested, on Linux.
//
//  1. Boot reads the clone's config, checks it against the host, and starts QEMU with
//     the guest's kernel, or with firmware where the disk has a boot loader. It returns
//     when the guest's agent has opened its port.
//  2. Everything between QEMU and us goes over sockets that it inherits: its monitor
//     (QMP), the guest's console, which we keep within bounds, and the port of the
//     guest's agent. There is no path that somebody else could connect to.
//  3. Destroy asks QEMU to quit and kills it if it does not; a QEMU whose owner was
//     killed is killed by the kernel, and Reap finds what that missed.
//  4. Save writes a paused machine's memory and devices into a file, beside clones of its
//     disk; Boot with that state goes on from there.
//
// By default the CPU is emulated too (TCG), which works everywhere and takes its time:
// that is for tests and for trying Paddock out, not for building software at speed. It
// is no image tool, keeps no state between machines, and knows no jobs. The guest is not
// trusted, QEMU with a seccomp filter is what holds it, but QEMU's user network lets it
// connect to whatever this host can, its loopback included: a host for guests of
// strangers has Config.Network "passt" or "none".
//
// Called by cmd, inside the vm-helper process, and by tests.
package qemu

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"

	"github.com/paddock-ci/paddock/vm"
)

// Config makes a driver.
type Config struct {
	// Accel is what runs the guest's CPU: "tcg" (emulation), "kvm", or "auto", which
	// takes KVM where a virtual CPU really ran by it; see also Driver.Accel. "": tcg.
	Accel string
	// Network is "user" (QEMU's own network behind this host's addresses: the guest
	// reaches all that this host does, its loopback too), "passt" (the program of that
	// name, Linux: without the loopback) or "none". "": user.
	Network string
	// Slots is how many machines this driver runs at once; 0: no limit.
	Slots int
	// CloneFile clones a file for a saved state; nil: an ordinary copy.
	CloneFile func(ctx context.Context, src, dst string) error
	Log       *slog.Logger // nil: no log
}

// Driver boots machines.
type Driver struct {
	config Config
	log    *slog.Logger

	mu       sync.Mutex
	used     int                  // slots
	programs map[string]program   // by guest's architecture
	trials   map[string]chan bool // by program: whether KVM works; holds the answer
}

var (
	_ vm.Driver     = (*Driver)(nil)
	_ vm.Reaper     = (*Driver)(nil)
	_ vm.Machine    = (*machine)(nil)
	_ vm.Saver      = (*machine)(nil)
	_ vm.Addresser  = (*machine)(nil)
	_ vm.PortDialer = (*machine)(nil)
)

// New makes a driver. It starts nothing: a QEMU that is not installed is the error of
// the first Boot.
func New(c Config) (*Driver, error) {
	switch c.Accel {
	case "":
		c.Accel = accelTCG
	case accelTCG, accelKVM, accelAuto, accelNative:
	default:
		return nil, fmt.Errorf("qemu driver: accelerator %q, want tcg, kvm or auto", c.Accel)
	}
	switch c.Network {
	case "":
		c.Network = networkUser
	case networkUser, networkPasst, networkNone:
	default:
		return nil, fmt.Errorf("qemu driver: network %q, want user, passt or none", c.Network)
	}
	if c.CloneFile == nil {
		c.CloneFile = vm.CopyFile
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return &Driver{config: c, log: c.Log, programs: map[string]program{}, trials: map[string]chan bool{}}, nil
}

// Boot starts a machine; see vm.Driver. Its errors do not say which, since that is what
// its caller says.
func (d *Driver) Boot(ctx context.Context, spec vm.Spec) (vm.Machine, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	var err error
	if spec.Dir, err = filepath.Abs(spec.Dir); err != nil {
		return nil, err
	}
	release, err := d.take()
	if err != nil {
		return nil, err
	}
	m, err := d.start(ctx, spec, release)
	if err != nil {
		release()
		return nil, err
	}
	if err := m.up(ctx); err != nil {
		return nil, m.failed(ctx, err)
	}
	return m, nil
}

// start plans a machine and starts its QEMU. The caller releases the slot if it fails;
// otherwise the machine does when it has ended.
func (d *Driver) start(ctx context.Context, spec vm.Spec, release func()) (*machine, error) {
	p, err := d.plan(ctx, spec)
	if err != nil {
		return nil, err
	}
	m, err := launch(ctx, p, d.config.CloneFile, d.log)
	if err != nil {
		return nil, err
	}
	go func() {
		m.live(context.WithoutCancel(ctx)) // the machine outlives the call
		release()
		close(m.done)
	}()
	return m, nil
}

// take takes a slot; release gives it back, once.
func (d *Driver) take() (release func(), err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.config.Slots > 0 && d.used >= d.config.Slots {
		return nil, fmt.Errorf("%w: all %d are taken", vm.ErrAtCapacity, d.config.Slots)
	}
	d.used++
	return sync.OnceFunc(func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.used--
	}), nil
}
