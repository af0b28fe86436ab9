package qemu

import (
	"fmt"
	"os"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/vm"
)

// checkMounts refuses shares before anything starts: a path that is not there, by name.
func checkMounts(mounts []fleet.Mount) error {
	for _, m := range mounts {
		info, err := os.Stat(m.Path)
		if err != nil {
			return fmt.Errorf("the share %q: %w", m.Name, err)
		}
		if !info.IsDir() {
			return fmt.Errorf("the share %q: %s is no directory", m.Name, m.Path)
		}
	}
	if len(mounts) > 0 {
		return fmt.Errorf("%w: sharing directories with the guest (%q)", vm.ErrUnsupported, mounts[0].Name)
	}
	return nil
}
