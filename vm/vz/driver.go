//go:build (darwin && arm64 && cgo) || vzstandin

package vz

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/Code-Hex/vz/v3"

	"github.com/paddock-ci/paddock/image/tart"
	"github.com/paddock-ci/paddock/vm"
)

// Driver boots the framework's machines.
type Driver struct {
	config Config
	log    *slog.Logger
}

var _ vm.Driver = (*Driver)(nil)

// New makes a driver.
func New(c Config) (*Driver, error) {
	if c.Leases == "" {
		c.Leases = vm.LeasesFile
	}
	if c.CloneFile == nil {
		c.CloneFile = vm.CopyFile
	}
	d := &Driver{config: c, log: c.Log}
	if d.log == nil {
		d.log = slog.New(slog.DiscardHandler)
	}
	return d, nil
}

// Times that are waited for what nobody else bounds; variables for the tests.
var (
	// endTime is how long the framework is given to stop a machine that did not come up,
	// or to let one run on that was saved. It does both within a second.
	endTime = 30 * time.Second
	// wakeTime is how long the agent of a machine that was restored is waited for, before
	// the state is given up. It is there at once, or never.
	wakeTime = 30 * time.Second
)

// Boot starts a machine, or restores it from spec.State.
func (d *Driver) Boot(ctx context.Context, spec vm.Spec) (vm.Machine, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	m, err := d.build(spec)
	if errors.Is(err, vm.ErrState) {
		return nil, err // the image is not to blame
	}
	if err != nil {
		return nil, &vm.BootError{Err: err}
	}
	go m.live()
	if err := m.come(ctx, spec); err != nil {
		return nil, m.abandon(ctx, spec, err)
	}
	return m, nil
}

// build makes a machine that is not started. After an error nothing is open.
func (d *Driver) build(spec vm.Spec) (_ *machine, err error) {
	h := &hardware{disk: filepath.Join(spec.Dir, vm.DiskFile), mounts: spec.Mounts}
	c, err := vm.ReadConfig(spec.Dir)
	if err == nil {
		err = h.describe(spec, c)
	}
	var s *state
	if err == nil {
		s = stateOf(h, c)
		if spec.State != "" {
			err = s.check(spec.State)
		}
	}
	if err != nil {
		return nil, err
	}
	if h.console, err = openConsole(spec.Dir); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			h.console.close()
		}
	}()
	// From here on it is the framework that judges, and a wrong identity or a device
	// that is new since shows itself as a configuration that is refused.
	h.guest(spec.Dir, c)
	if err := h.assemble(); err != nil {
		return nil, h.stateless(spec, err)
	}
	unsaveable := h.saveable()
	if spec.State != "" && unsaveable != nil {
		return nil, h.stateless(spec, unsaveable)
	}
	framework, err := vz.NewVirtualMachine(h.config)
	if err != nil {
		return nil, fmt.Errorf("making the machine: %w", err)
	}
	return newMachine(d, spec, h, framework, s, unsaveable)
}

// describe takes from the clone what needs no framework to be judged.
func (h *hardware) describe(spec vm.Spec, c *tart.Config) error {
	if c.Arch != "arm64" {
		return fmt.Errorf("the image is for %s; guests on Apple Silicon are arm64", c.Arch)
	}
	if err := vm.CheckDisk(spec.Dir); err != nil {
		return err
	}
	if err := checkMounts(spec.Mounts); err != nil {
		return err
	}
	var err error
	if h.cpu, h.memory, err = resources(spec.CPU, spec.Memory, c); err != nil {
		return err
	}
	if spec.State == "" {
		return nil // a fresh identity
	}
	if h.identity, err = readIdentity(spec.Dir, c.OS); err != nil {
		return fmt.Errorf("%w: %w", vm.ErrState, err)
	}
	return nil
}

// guest makes the platform and the boot loader of the image's system.
func (h *hardware) guest(dir string, c *tart.Config) {
	if c.OS == "darwin" {
		h.macGuest(dir, c)
	} else {
		h.linuxGuest(dir, c)
	}
}

// stateless marks the error of a machine that a saved state was to be put into: without
// the state, with a fresh identity, it may well boot.
func (h *hardware) stateless(spec vm.Spec, err error) error {
	if spec.State == "" {
		return err
	}
	return fmt.Errorf("%w: %w", vm.ErrState, err)
}

// come starts the machine and waits for its guest's agent.
func (m *machine) come(ctx context.Context, spec vm.Spec) error {
	if spec.State != "" {
		return m.restore(ctx, spec)
	}
	if err := m.call(ctx, func() error { return m.framework.Start() }); err != nil {
		return fmt.Errorf("starting the machine: %w", err)
	}
	if !spec.Agent {
		return nil
	}
	return m.answer(ctx)
}

// answer waits until the guest's agent does.
func (m *machine) answer(ctx context.Context) error {
	conn, err := m.Dial(ctx)
	if errors.Is(err, vm.ErrEnded) {
		return errors.New("the guest stopped before its agent answered")
	}
	if err != nil {
		return fmt.Errorf("waiting for the guest's agent: %w", err)
	}
	return conn.Close()
}

// abandon ends a machine that did not come up, and says why it did not.
func (m *machine) abandon(ctx context.Context, spec vm.Spec, why error) error {
	// The machine that nobody waits for must not come up later and take a slot.
	ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), endTime)
	defer cancel()
	left := m.Destroy(ending)
	switch {
	case hasCode(why, vz.ErrorVirtualMachineLimitExceeded):
		why = fmt.Errorf("%w: %s: %w", vm.ErrAtCapacity, fullHost, why)
	case errors.Is(why, vm.ErrState) || ctx.Err() != nil && errors.Is(why, context.Canceled):
		// The state's failure, or the caller's wish; neither says anything of the image.
	default:
		why = &vm.BootError{Console: vm.ConsoleTail(spec.Dir), Err: why}
	}
	return errors.Join(why, left)
}

// fullHost says what to do about a full host. The framework's count is of all processes
// and users, and is known to keep machines that were killed.
const fullHost = "macOS runs two macOS guests at most and counts two; if fewer run here (paddock vm list, and other programs' machines), " +
	"a slot is leaked and only a reboot of this Mac frees it: cordon the node, let it drain, reboot"

// errorDomain is where the framework's error codes belong.
const errorDomain = "VZErrorDomain"

// hasCode reports whether the framework itself said so.
func hasCode(err error, code vz.ErrorCode) bool {
	var ns *vz.NSError
	return errors.As(err, &ns) && ns != nil && ns.Domain == errorDomain && ns.Code == int(code)
}
