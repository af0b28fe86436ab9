package qemu

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/paddock-ci/paddock/vm"
)

// markEnv marks a machine's processes by its directory, for Reap.
const markEnv = "PADDOCK_MACHINE"

// Reap kills what a killed process of ours left of the machine in spec.Dir. The kernel
// does that by itself on Linux, but not under every parent: see owner.
func (d *Driver) Reap(ctx context.Context, spec vm.Spec) error {
	dir, err := filepath.Abs(spec.Dir)
	if err != nil {
		return fmt.Errorf("reaping %s: %w", spec.ID, err)
	}
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		pids, err := marked(markEnv + "=" + dir)
		if err != nil {
			return fmt.Errorf("reaping %s: listing processes: %w", spec.ID, err)
		}
		if len(pids) == 0 {
			return nil
		}
		for _, pid := range pids {
			if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("reaping %s: killing process %d: %w", spec.ID, pid, err)
			}
		}
		select {
		case <-time.After(pause): // a killed process needs a moment to die
		case <-ctx.Done():
			return fmt.Errorf("reaping %s: processes %d do not die: %w", spec.ID, pids, ctx.Err())
		}
	}
}
