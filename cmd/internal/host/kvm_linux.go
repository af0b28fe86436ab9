package host

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// kvmVersion is what every KVM since 2007 answers to its first question.
const (
	kvmGetVersion = 0xAE00
	kvmVersion    = 12
)

// askKVM opens the kernel's machines and asks for their version. That they answer does
// not say that they run a guest: within some virtual machines they do not.
func askKVM() error {
	fd, err := unix.Open("/dev/kvm", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open /dev/kvm: %w", err)
	}
	defer func() { _ = unix.Close(fd) }()
	version, err := unix.IoctlRetInt(fd, kvmGetVersion)
	if err != nil {
		return fmt.Errorf("ask /dev/kvm for its version: %w", err)
	}
	if version != kvmVersion {
		return fmt.Errorf("/dev/kvm has version %d, not %d", version, kvmVersion)
	}
	return nil
}
