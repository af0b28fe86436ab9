package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/paddock-ci/paddock/vm"
)

// Save writes the machine's state into dir; see vm.Saver.
func (m *machine) Save(ctx context.Context, dir string) error {
	if len(m.plan.spec.Mounts) > 0 {
		return fmt.Errorf("saving the machine: %w: it shares directories with its host, which QEMU cannot save", vm.ErrUnsupported)
	}
	select {
	case <-m.saving:
		defer func() { m.saving <- struct{}{} }()
	case <-ctx.Done():
		return fmt.Errorf("saving the machine: %w", ctx.Err())
	}
	ctx, cancel := m.whileAlive(ctx)
	defer cancel()
	err := m.save(ctx, dir)
	if m.over() {
		err = errors.Join(vm.ErrEnded, err)
	}
	if err != nil {
		return fmt.Errorf("saving the machine: %w", errors.Join(err, forget(dir)))
	}
	return nil
}

// save cuts the line, stops the machine, writes, and lets it run on.
func (m *machine) save(ctx context.Context, dir string) (err error) {
	release, err := m.port.hold(ctx)
	if err != nil {
		return err
	}
	defer release()
	m.port.cut()
	if err := m.portCut(ctx); err != nil {
		return err
	}
	defer func() {
		// The machine runs on, whatever happened to the state and to ctx; to one that was
		// not stopped after all the command means nothing.
		resume, cancel := context.WithTimeout(context.WithoutCancel(ctx), commandLimit)
		defer cancel()
		if failure := m.monitor.run(resume, "cont", nil); failure != nil {
			err = errors.Join(err, fmt.Errorf("the machine stands still: %w", failure))
		}
	}()
	if err := m.monitor.run(ctx, "stop", nil); err != nil {
		return err
	}
	if err := m.writeMemory(ctx, filepath.Join(dir, memoryFile)); err != nil {
		return err
	}
	return m.writeRest(ctx, dir)
}

// portCut waits until QEMU knows that nobody is behind the guest's port any more: so
// does the guest then, in the state, before anything else.
func (m *machine) portCut(ctx context.Context) error {
	for {
		var devices []struct {
			Label    string `json:"label"`
			Filename string `json:"filename"`
		}
		if err := m.monitor.query(ctx, "query-chardev", nil, nil, &devices); err != nil {
			return err
		}
		for _, d := range devices {
			if d.Label == portID && strings.HasPrefix(d.Filename, "disconnected") {
				return nil
			}
		}
		select {
		case <-time.After(time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// writeMemory writes RAM and devices, as fast as the disk takes them.
func (m *machine) writeMemory(ctx context.Context, path string) (err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	const unlimited = 1 << 40 // bytes a second; the default is 128 MiB
	if err := m.monitor.run(ctx, "migrate-set-parameters", map[string]int64{"max-bandwidth": unlimited}); err != nil {
		return err
	}
	if err := m.monitor.pass(ctx, memoryFD, f); err != nil {
		return err
	}
	if err := m.monitor.run(ctx, "migrate", map[string]string{"uri": "fd:" + memoryFD}); err != nil {
		return err
	}
	if err = m.migrated(ctx); err != nil {
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), commandLimit)
		defer cancel()
		_ = m.monitor.run(stop, "migrate_cancel", nil)
		_ = m.migrated(stop) // "cont" is refused before it is over
	}
	return err
}

// writeRest clones the files as they are while the machine stands still, and says last
// what the state is bound to.
func (m *machine) writeRest(ctx context.Context, dir string) error {
	for _, name := range []string{vm.ConfigFile, vm.NVRAMFile, vm.DiskFile} {
		src := filepath.Join(m.plan.spec.Dir, name)
		if _, err := os.Stat(src); errors.Is(err, os.ErrNotExist) && name == vm.NVRAMFile {
			continue
		}
		if err := m.clone(ctx, src, filepath.Join(dir, name)); err != nil {
			return fmt.Errorf("cloning %s: %w", name, err)
		}
	}
	if err := writeJSON(filepath.Join(dir, vm.IdentityFile), identity{MAC: m.plan.mac}); err != nil {
		return err
	}
	s := m.plan.bound()
	for name, size := range map[string]*int64{memoryFile: &s.MemorySize, vm.DiskFile: &s.DiskSize} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		*size = info.Size()
	}
	return writeJSON(filepath.Join(dir, stateFile), s)
}

func writeJSON(path string, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return os.WriteFile(path, raw, 0o600)
}

// forget removes what a save that failed has written.
func forget(dir string) error {
	var all []error
	for _, name := range append([]string{stateFile, memoryFile}, vm.SavedFiles...) {
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			all = append(all, err)
		}
	}
	return errors.Join(all...)
}
