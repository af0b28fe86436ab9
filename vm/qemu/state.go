package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/vm"
)

// Files of a state's directory beside those of vm.SavedFiles. The first is written last:
// without it there is no state.
const (
	stateFile  = "state.json"
	memoryFile = "memory.bin" // RAM and devices, as QEMU writes them for a migration
)

// memoryFD is the name by which QEMU gets that file.
const memoryFD = "memory"

// maxState bounds state.json, in bytes; with some mounts it has 1,000.
const maxState = 64 << 10

// restoreLimit bounds the loading of a state: an emulated machine with some GB takes
// seconds, and a broken file must not take forever.
const restoreLimit = 60 * time.Second

// state is what a saved state is bound to: QEMU loads it into the very same machine.
type state struct {
	QEMU       string        `json:"qemu"`    // version line
	Machine    string        `json:"machine"` // type, versioned
	Arch       string        `json:"arch"`
	Accel      string        `json:"accel"`
	Network    string        `json:"network"`
	CPU        int           `json:"cpu"`
	Memory     int64         `json:"memory"` // bytes
	Mounts     []fleet.Mount `json:"mounts,omitempty"`
	MAC        string        `json:"mac"`
	MemorySize int64         `json:"memory_size"` // of memoryFile, bytes
	DiskSize   int64         `json:"disk_size"`   // bytes
}

// bound is the state that a machine of this plan has, but for the sizes.
func (p *plan) bound() state {
	return state{
		QEMU: p.program.version, Machine: p.machine(), Arch: p.config.Arch, Accel: p.accel, Network: p.network,
		CPU: p.cpu, Memory: p.memory, Mounts: p.spec.Mounts, MAC: p.mac,
	}
}

// resume reads the state that the plan's machine is to start from, and checks that it is
// one for it. All that is wrong is vm.ErrState.
func (p *plan) resume() error {
	raw, err := readBounded(filepath.Join(p.spec.State, stateFile))
	if err != nil {
		return fmt.Errorf("%w: %w", vm.ErrState, err)
	}
	s, err := parseState(raw)
	if err != nil {
		return fmt.Errorf("%w: %s: %w", vm.ErrState, stateFile, err)
	}
	var own identity
	if raw, err = readBounded(filepath.Join(p.spec.Dir, vm.IdentityFile)); err == nil {
		err = json.Unmarshal(raw, &own)
	}
	if err != nil {
		return fmt.Errorf("%w: the machine's identity: %w", vm.ErrState, err)
	}
	p.mac = own.MAC
	if what := s.differs(p.bound()); what != "" {
		return fmt.Errorf("%w: it was saved with %s", vm.ErrState, what)
	}
	for path, size := range map[string]int64{
		filepath.Join(p.spec.State, memoryFile): s.MemorySize,
		filepath.Join(p.spec.Dir, vm.DiskFile):  s.DiskSize,
	} {
		if info, err := os.Stat(path); err != nil {
			return fmt.Errorf("%w: %w", vm.ErrState, err)
		} else if info.Size() != size {
			return fmt.Errorf("%w: %s has %d bytes, it was saved with %d", vm.ErrState, filepath.Base(path), info.Size(), size)
		}
	}
	p.state = &s
	return nil
}

// parseState reads state.json.
func parseState(raw []byte) (state, error) {
	var s state
	if err := json.Unmarshal(raw, &s); err != nil {
		return state{}, err
	}
	if s.MemorySize < 1 || s.DiskSize < 1 || s.CPU < 1 || s.Memory < 1 {
		return state{}, errors.New("a size is missing")
	}
	return s, nil
}

// differs says in words what a state was saved with that the machine has not; "" if
// nothing.
func (s state) differs(have state) string {
	for _, d := range []struct{ what, saved, have string }{
		{"the QEMU", s.QEMU, have.QEMU},
		{"the machine type", s.Machine, have.Machine},
		{"the architecture", s.Arch, have.Arch},
		{"the accelerator", s.Accel, have.Accel},
		{"the network", s.Network, have.Network},
		{"a number of CPUs of", fmt.Sprint(s.CPU), fmt.Sprint(have.CPU)},
		{"a memory in bytes of", fmt.Sprint(s.Memory), fmt.Sprint(have.Memory)},
		{"the MAC address", s.MAC, have.MAC},
	} {
		if d.saved != d.have {
			return fmt.Sprintf("%s %.100q, this machine has %.100q", d.what, d.saved, d.have)
		}
	}
	if !slices.Equal(s.Mounts, have.Mounts) {
		return "other mounts"
	}
	return ""
}

func readBounded(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	raw, err := io.ReadAll(io.LimitReader(f, maxState+1))
	if err == nil && len(raw) > maxState {
		err = fmt.Errorf("%s is longer than %d bytes", filepath.Base(path), maxState)
	}
	return raw, err
}

// restore loads the state into the waiting machine and lets it run. What QEMU does not
// load, it ends with; that is the state's fault, unless ctx ended.
func (m *machine) restore(ctx context.Context) error {
	limited, cancel := context.WithTimeout(ctx, restoreLimit)
	defer cancel()
	err := m.load(limited)
	if err == nil {
		err = m.monitor.run(limited, "cont", nil)
	}
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return fmt.Errorf("starting from the saved state: %w", ctx.Err())
	}
	return fmt.Errorf("%w: %w", vm.ErrState, m.ended(limited, err))
}

func (m *machine) load(ctx context.Context) error {
	f, err := os.Open(filepath.Join(m.plan.spec.State, memoryFile))
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // QEMU has its own
	if err := m.monitor.pass(ctx, memoryFD, f); err != nil {
		return err
	}
	if err := m.monitor.run(ctx, "migrate-incoming", map[string]string{"uri": "fd:" + memoryFD}); err != nil {
		return err
	}
	return m.migrated(ctx)
}

// migrated waits for the end of a migration, in either direction.
func (m *machine) migrated(ctx context.Context) error {
	tick := time.NewTicker(3 * time.Millisecond) // a small state takes 30 ms
	defer tick.Stop()
	for {
		var info struct {
			Status string `json:"status"`
			Desc   string `json:"error-desc"`
		}
		if err := m.monitor.query(ctx, "query-migrate", nil, nil, &info); err != nil {
			return err
		}
		switch info.Status {
		case "completed":
			return nil
		case "failed", "cancelled":
			return fmt.Errorf("QEMU says: %s %.500s", info.Status, info.Desc)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
