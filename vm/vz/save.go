//go:build (darwin && arm64 && cgo) || vzstandin

package vz

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/Code-Hex/vz/v3"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image/tart"
	"github.com/paddock-ci/paddock/vm"
)

// Names of the files of a saved state beside those of vm.SavedFiles.
const (
	memoryFile = "machine.vzstate" // by the framework, encrypted for this host
	stateFile  = "state.json"      // written last: without it the state is none
)

// state is what a saved state is bound to, besides its identity. The framework refuses
// most of what does not match, but not in words, and not all of it.
type state struct {
	Version int           `json:"version"` // 1
	CPU     uint          `json:"cpu"`
	Memory  uint64        `json:"memory"` // bytes
	Mounts  []fleet.Mount `json:"mounts,omitempty"`
	OS      string        `json:"os"`    // of the guest
	Build   string        `json:"build"` // of the host's system: an update may change the format
	User    int           `json:"user"`  // the key is in this user's keychain
}

// stateOf is what a state of such a machine would be bound to, on this host today.
func stateOf(h *hardware, c *tart.Config) *state {
	return &state{Version: 1, CPU: h.cpu, Memory: h.memory, Mounts: h.mounts, OS: c.OS, Build: hostBuild(), User: os.Getuid()}
}

// check says whether the state in dir is one of a machine like s.
func (s *state) check(dir string) error {
	var was state
	if err := readJSON(filepath.Join(dir, stateFile), &was); err != nil {
		return fmt.Errorf("%w: %w", vm.ErrState, err)
	}
	differs := func(what string, was, is any) error {
		return fmt.Errorf("%w: it is of %s %v, wanted is %v", vm.ErrState, what, was, is)
	}
	switch {
	case was.Version != s.Version:
		return differs("format", was.Version, s.Version)
	case was.CPU != s.CPU:
		return differs("CPU count", was.CPU, s.CPU)
	case was.Memory != s.Memory:
		return differs("memory size", was.Memory, s.Memory)
	case !slices.Equal(was.Mounts, s.Mounts):
		return differs("mounts", was.Mounts, s.Mounts)
	case was.OS != s.OS:
		return differs("guest", was.OS, s.OS)
	case was.Build != s.Build:
		return differs("host system", was.Build, s.Build)
	case was.User != s.User:
		return differs("user", was.User, s.User)
	}
	return nil
}

// identity is what makes a machine itself to the world; a saved state keeps it.
type identity struct {
	MAC     string `json:"mac"`
	Machine []byte `json:"machine,omitempty"` // macOS guests' machine identifier
}

// readIdentity reads the identity that a state brought along into the clone.
func readIdentity(dir, os string) (identity, error) {
	var id identity
	if err := readJSON(filepath.Join(dir, vm.IdentityFile), &id); err != nil {
		return id, err
	}
	if id.MAC == "" || os == "darwin" && len(id.Machine) == 0 {
		return id, fmt.Errorf("%s holds no identity", vm.IdentityFile)
	}
	return id, nil
}

// restore puts the saved state into the machine and lets it run on.
func (m *machine) restore(ctx context.Context, spec vm.Spec) error {
	err := m.call(ctx, func() error { return m.framework.RestoreMachineStateFromURL(filepath.Join(spec.State, memoryFile)) })
	if err == nil {
		err = m.call(ctx, m.framework.Resume)
	}
	if err == nil && spec.Agent {
		waking, cancel := context.WithTimeout(ctx, wakeTime)
		defer cancel()
		err = m.answer(waking)
	}
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil, hasCode(err, vz.ErrorVirtualMachineLimitExceeded):
		return fmt.Errorf("restoring the machine: %w", err)
	}
	return fmt.Errorf("%w: restoring the machine: %w", vm.ErrState, err)
}

// Save writes the machine's state into dir and lets it run on.
func (m *machine) Save(ctx context.Context, dir string) (err error) {
	if m.unsaveable != nil {
		return fmt.Errorf("%w: %w", vm.ErrUnsupported, m.unsaveable)
	}
	select {
	case m.save <- struct{}{}:
		defer func() { <-m.save }()
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, empty(dir))
		}
	}()
	// The guest sees its streams end while it still runs, and waits for new ones, of which
	// there are none in the state.
	release, err := m.hold(ctx)
	if err != nil {
		return fmt.Errorf("cutting the streams to the guest: %w", err)
	}
	defer release() // deferred before the resume: done after it
	// Before the first error: a pause that was not waited for may happen nevertheless.
	defer func() { err = errors.Join(err, m.resume(ctx)) }()
	if err := m.call(ctx, m.framework.Pause); err != nil {
		return fmt.Errorf("pausing the machine: %w", err)
	}
	if err := m.call(ctx, func() error { return m.framework.SaveMachineStateToPath(filepath.Join(dir, memoryFile)) }); err != nil {
		return fmt.Errorf("saving the machine: %w", err)
	}
	// Still paused: the disk is the one that the memory knows.
	return m.savedFiles(ctx, dir)
}

// resume lets a machine run on, whatever became of saving it and of the caller.
func (m *machine) resume(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endTime)
	defer cancel()
	err := m.call(ctx, func() error {
		if m.framework.State() == vz.VirtualMachineStateRunning {
			return nil // it was never paused
		}
		return m.framework.Resume()
	})
	if err != nil {
		return fmt.Errorf("letting the machine run on: %w", err)
	}
	return nil
}

// savedFiles puts the files of the machine that stands still beside its memory.
func (m *machine) savedFiles(ctx context.Context, dir string) error {
	for _, name := range []string{vm.ConfigFile, vm.NVRAMFile, vm.DiskFile} {
		err := m.cloneFile(ctx, filepath.Join(m.dir, name), filepath.Join(dir, name))
		if errors.Is(err, fs.ErrNotExist) && name == vm.NVRAMFile {
			continue // a kernel of its own needs none
		}
		if err != nil {
			return fmt.Errorf("saving the machine's %s: %w", name, err)
		}
	}
	if err := writeJSON(filepath.Join(dir, vm.IdentityFile), m.hardware.identity); err != nil {
		return err
	}
	return writeJSON(filepath.Join(dir, stateFile), m.saved)
}

// empty removes what an unfinished Save has left.
func empty(dir string) error {
	var errs []error
	for _, name := range append([]string{memoryFile, stateFile}, vm.SavedFiles...) {
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// maxJSON bounds the two small files of a state, in bytes; mounts are the longest part.
const maxJSON = 1 << 20

// readJSON reads a small file into v.
func readJSON(path string, v any) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	raw, err := io.ReadAll(io.LimitReader(f, maxJSON))
	if err != nil {
		return fmt.Errorf("reading %s: %w", path, err)
	}
	if err := json.Unmarshal(raw, v); err != nil {
		return fmt.Errorf("reading %s: %w", path, err)
	}
	return nil
}

// writeJSON writes what only this user may read: an identity is half of what it takes to
// be the machine.
func writeJSON(path string, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return os.WriteFile(path, raw, 0o600)
}
