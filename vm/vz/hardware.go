//go:build (darwin && arm64 && cgo) || vzstandin

package vz

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/Code-Hex/vz/v3"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image/tart"
	"github.com/paddock-ci/paddock/vm"
)

// hardware collects what one machine is configured with. The first failure stays and
// makes the rest do nothing, so that the parts read as a list.
type hardware struct {
	config   *vz.VirtualMachineConfiguration
	boot     vz.BootLoader
	platform vz.PlatformConfiguration // nil: the framework's generic one
	entropy  bool
	screen   bool // with keyboard and trackpad
	display  *tart.Display
	disk     string
	identity identity
	console  *console // nil: none
	shareTag string   // under which the guest finds the mounts
	mounts   []fleet.Mount
	cpu      uint
	memory   uint64

	// held are all parts, for as long as the machine lives: the bindings read a part's
	// foreign pointer and pass it on without keeping the part itself, whose finalizer
	// would release what is pointed to.
	held []any
	err  error
}

// take makes one part, unless an earlier one failed, and holds it.
func take[T any](h *hardware, what string, make func() (T, error)) T {
	var part T
	if h.err != nil {
		return part
	}
	part, err := make()
	if err != nil {
		h.err = fmt.Errorf("%s: %w", what, err)
		return part
	}
	h.held = append(h.held, part)
	return part
}

// assemble makes the framework's configuration and lets it judge.
func (h *hardware) assemble() error {
	h.config = take(h, "the configuration", func() (*vz.VirtualMachineConfiguration, error) {
		return vz.NewVirtualMachineConfiguration(h.boot, h.cpu, h.memory)
	})
	if h.err == nil && h.platform != nil {
		h.config.SetPlatformVirtualMachineConfiguration(h.platform)
	}
	h.storage()
	h.network()
	h.socket()
	h.serial()
	h.share()
	if h.screen {
		h.graphics()
		h.input()
	}
	if h.entropy {
		device := take(h, "the entropy device", vz.NewVirtioEntropyDeviceConfiguration)
		if h.err == nil {
			h.config.SetEntropyDevicesVirtualMachineConfiguration([]*vz.VirtioEntropyDeviceConfiguration{device})
		}
	}
	if h.err != nil {
		return h.err
	}
	if ok, err := h.config.Validate(); err != nil || !ok {
		return fmt.Errorf("the framework refuses the machine's configuration (an unsigned program has no right to virtual machines, see docs/first-mac.md): %w", refusal(err))
	}
	return nil
}

// storage attaches the disk. A clone is thrown away with its machine: what the guest
// flushes need not reach the host's disk.
func (h *hardware) storage() {
	attachment := take(h, "the disk", func() (*vz.DiskImageStorageDeviceAttachment, error) {
		return vz.NewDiskImageStorageDeviceAttachmentWithCacheAndSync(
			h.disk, false, vz.DiskImageCachingModeCached, vz.DiskImageSynchronizationModeNone)
	})
	device := take(h, "the disk", func() (*vz.VirtioBlockDeviceConfiguration, error) {
		return vz.NewVirtioBlockDeviceConfiguration(attachment)
	})
	if h.err == nil {
		h.config.SetStorageDevicesVirtualMachineConfiguration([]vz.StorageDeviceConfiguration{device})
	}
}

// network attaches the host's NAT, with the identity's MAC address or a fresh one.
func (h *hardware) network() {
	attachment := take(h, "the network", vz.NewNATNetworkDeviceAttachment)
	device := take(h, "the network", func() (*vz.VirtioNetworkDeviceConfiguration, error) {
		return vz.NewVirtioNetworkDeviceConfiguration(attachment)
	})
	address := take(h, "the MAC address", func() (*vz.MACAddress, error) {
		if len(h.identity.MAC) == 0 {
			return vz.NewRandomLocallyAdministeredMACAddress()
		}
		mac, err := net.ParseMAC(h.identity.MAC)
		if err != nil {
			return nil, err
		}
		return vz.NewMACAddress(mac)
	})
	if h.err != nil {
		return
	}
	h.identity.MAC = address.String()
	device.SetMACAddress(address)
	h.config.SetNetworkDevicesVirtualMachineConfiguration([]*vz.VirtioNetworkDeviceConfiguration{device})
}

// socket attaches the vsock device, by which the guest's agent is reached.
func (h *hardware) socket() {
	device := take(h, "the vsock device", vz.NewVirtioSocketDeviceConfiguration)
	if h.err == nil {
		h.config.SetSocketDevicesVirtualMachineConfiguration([]vz.SocketDeviceConfiguration{device})
	}
}

// serial attaches the console, which the framework reads and writes by our own file
// descriptors: they stay open until the machine has ended.
func (h *hardware) serial() {
	if h.console == nil {
		return
	}
	attachment := take(h, "the console", func() (*vz.FileHandleSerialPortAttachment, error) {
		return vz.NewFileHandleSerialPortAttachment(h.console.toGuest, h.console.fromGuest)
	})
	device := take(h, "the console", func() (*vz.VirtioConsoleDeviceSerialPortConfiguration, error) {
		return vz.NewVirtioConsoleDeviceSerialPortConfiguration(attachment)
	})
	if h.err == nil {
		h.config.SetSerialPortsVirtualMachineConfiguration([]*vz.VirtioConsoleDeviceSerialPortConfiguration{device})
	}
}

// share shows the mounts, each under its name in one shared directory.
func (h *hardware) share() {
	if len(h.mounts) == 0 || h.err != nil {
		return
	}
	directories := map[string]*vz.SharedDirectory{}
	for _, m := range h.mounts {
		directories[m.Name] = take(h, "mount "+m.Name, func() (*vz.SharedDirectory, error) {
			return vz.NewSharedDirectory(m.Path, m.ReadOnly)
		})
	}
	share := take(h, "the mounts", func() (*vz.MultipleDirectoryShare, error) {
		return vz.NewMultipleDirectoryShare(directories)
	})
	device := take(h, "the mounts", func() (*vz.VirtioFileSystemDeviceConfiguration, error) {
		return vz.NewVirtioFileSystemDeviceConfiguration(h.shareTag)
	})
	if h.err == nil {
		device.SetDirectoryShare(share)
		h.config.SetDirectorySharingDevicesVirtualMachineConfiguration([]vz.DirectorySharingDeviceConfiguration{device})
	}
}

// checkMounts refuses what the framework would answer with an exception, which ends the
// process.
func checkMounts(mounts []fleet.Mount) error {
	names := map[string]bool{}
	for _, m := range mounts {
		if names[m.Name] {
			return fmt.Errorf("two mounts are called %q", m.Name)
		}
		names[m.Name] = true
		if err := checkMount(m); err != nil {
			return err
		}
	}
	return nil
}

func checkMount(m fleet.Mount) error {
	const longest = 255 // bytes, as for a file's name
	if m.Name == "" || m.Name == "." || m.Name == ".." || len(m.Name) > longest || strings.ContainsAny(m.Name, "/\x00") {
		return fmt.Errorf("a mount cannot be called %q: it is a directory's name in the guest", m.Name)
	}
	info, err := os.Stat(m.Path)
	if err != nil {
		return fmt.Errorf("mount %q: its directory must exist on this host: %w", m.Name, err)
	}
	if !info.IsDir() {
		return fmt.Errorf("mount %q: %s is not a directory", m.Name, m.Path)
	}
	return nil
}

// graphics attaches a screen, without which macOS guests lack what a user's session
// needs, though nobody looks.
func (h *hardware) graphics() {
	width, height, err := pixels(h.display)
	if err != nil && h.err == nil {
		h.err = err
	}
	const pixelsPerInch = 80 // of an ordinary screen: no scaling
	display := take(h, "the display", func() (*vz.MacGraphicsDisplayConfiguration, error) {
		return vz.NewMacGraphicsDisplayConfiguration(width, height, pixelsPerInch)
	})
	device := take(h, "the display", vz.NewMacGraphicsDeviceConfiguration)
	if h.err == nil {
		device.SetDisplays(display)
		h.config.SetGraphicsDevicesVirtualMachineConfiguration([]vz.GraphicsDeviceConfiguration{device})
	}
}

// pixels is the size of the screen that an image asks for; a point is taken for a pixel.
func pixels(d *tart.Display) (width, height int64, err error) {
	const most = 16384 // above all displays that there are
	if d == nil || (d.Width == 0 && d.Height == 0) {
		return 1920, 1080, nil // what test suites with a screen expect
	}
	if d.Width < 1 || d.Height < 1 || d.Width > most || d.Height > most {
		return 0, 0, fmt.Errorf("the image's display of %d × %d cannot be: 1 to %d each", d.Width, d.Height, most)
	}
	return int64(d.Width), int64(d.Height), nil
}

// input attaches keyboard and trackpad: those of a Mac, since a machine with others
// cannot be saved; before macOS 14 there is no such keyboard.
func (h *hardware) input() {
	keyboard := take(h, "the keyboard", func() (vz.KeyboardConfiguration, error) {
		mac, err := vz.NewMacKeyboardConfiguration()
		if errors.Is(err, vz.ErrUnsupportedOSVersion) {
			return vz.NewUSBKeyboardConfiguration()
		}
		return mac, err
	})
	trackpad := take(h, "the trackpad", vz.NewMacTrackpadConfiguration)
	if h.err == nil {
		h.config.SetKeyboardsVirtualMachineConfiguration([]vz.KeyboardConfiguration{keyboard})
		h.config.SetPointingDevicesVirtualMachineConfiguration([]vz.PointingDeviceConfiguration{trackpad})
	}
}

// saveable is nil if a machine of this configuration can be saved.
func (h *hardware) saveable() error {
	// Asking an older framework ends the process; this keyboard came with the same
	// version as the question.
	if _, err := vz.NewMacKeyboardConfiguration(); err != nil {
		return fmt.Errorf("saved states need macOS 14 on the host: %w", err)
	}
	if ok, err := h.config.ValidateSaveRestoreSupport(); err != nil || !ok {
		return fmt.Errorf("the framework cannot save such a machine: %w", refusal(err))
	}
	return nil
}

// refusal is the error of a judgement that came without one.
func refusal(err error) error {
	if err == nil {
		return errors.New("it gives no reason")
	}
	return err
}

// nvram is the path of a clone's NVRAM, which a boot loader cannot do without.
func nvram(dir string) (string, error) {
	path := filepath.Join(dir, vm.NVRAMFile)
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return "", fmt.Errorf("the image has no NVRAM: %w", err)
	case !info.Mode().IsRegular() || info.Size() == 0:
		return "", fmt.Errorf("the image's NVRAM %s is empty or no file: push the image again", vm.NVRAMFile)
	}
	return path, nil
}
