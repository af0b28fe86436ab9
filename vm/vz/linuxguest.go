//go:build (darwin && arm64 && cgo) || vzstandin

package vz

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/Code-Hex/vz/v3"

	"github.com/paddock-ci/paddock/image/tart"
	"github.com/paddock-ci/paddock/vm"
)

// LinuxShareTag is the tag of the mounts in a Linux guest, which mounts them itself:
// mount -t virtiofs paddock /somewhere.
const LinuxShareTag = "paddock"

// linuxGuest makes a Linux guest's boot loader: its kernel where the image names one,
// else the firmware, which looks for a loader on the disk.
func (h *hardware) linuxGuest(dir string, c *tart.Config) {
	// A Linux guest waits for entropy when it boots, which matters more than saving it:
	// with this device the framework does not.
	h.entropy, h.shareTag = true, LinuxShareTag
	if c.Boot != nil {
		h.kernel(dir, c.Boot)
		return
	}
	store := take(h, "the EFI variables", func() (*vz.EFIVariableStore, error) {
		path, err := nvram(dir)
		if err != nil {
			return nil, err
		}
		return vz.NewEFIVariableStore(path)
	})
	boot := take(h, "the boot loader", func() (*vz.EFIBootLoader, error) {
		return vz.NewEFIBootLoader(vz.WithEFIVariableStore(store))
	})
	h.boot = boot
}

// kernel boots the kernel that lies on the disk.
func (h *hardware) kernel(dir string, b *tart.Boot) {
	boot := take(h, "the kernel", func() (*vz.LinuxBootLoader, error) {
		kernel, initrd, err := vm.BootFiles(dir, b)
		if err != nil {
			return nil, err
		}
		if err := checkKernel(kernel); err != nil {
			return nil, err
		}
		options := []vz.LinuxBootLoaderOption{vz.WithCommandLine(commandLine(b.CommandLine))}
		if initrd != "" {
			options = append(options, vz.WithInitrd(initrd))
		}
		return vz.NewLinuxBootLoader(kernel, options...)
	})
	h.boot = boot
}

// commandLine adds what makes a failed boot visible: a console that is read, and a panic
// that ends the machine.
func commandLine(line string) string {
	for _, word := range []string{"console=hvc0", "panic=-1"} {
		key, _, _ := strings.Cut(word, "=")
		if !strings.HasPrefix(line, key+"=") && !strings.Contains(line, " "+key+"=") {
			line = strings.TrimSpace(line + " " + word)
		}
	}
	return line
}

// checkKernel tells a kernel that the framework can start from one that it cannot, about
// which it says no more than "internal error".
func checkKernel(path string) error {
	const at, magic = 56, "ARM\x64" // of the arm64 Image format (Documentation/arch/arm64/booting.rst)
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	head := make([]byte, at+len(magic))
	if _, err := io.ReadFull(f, head); err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return fmt.Errorf("reading the kernel: %w", err)
	}
	if string(head[at:]) != magic {
		return errors.New("it is no uncompressed arm64 kernel (Image); a compressed one must be unpacked when the image is made")
	}
	return nil
}
