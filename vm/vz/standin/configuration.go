package vz

import "slices"

// VirtualMachineConfiguration is what a machine is made of.
type VirtualMachineConfiguration struct {
	*pointer
	boot      BootLoader
	cpu       uint
	memory    uint64
	platform  PlatformConfiguration
	entropy   []*VirtioEntropyDeviceConfiguration
	network   []*VirtioNetworkDeviceConfiguration
	serial    []*VirtioConsoleDeviceSerialPortConfiguration
	sockets   []SocketDeviceConfiguration
	storage   []StorageDeviceConfiguration
	shares    []DirectorySharingDeviceConfiguration
	graphics  []GraphicsDeviceConfiguration
	keyboards []KeyboardConfiguration
	pointing  []PointingDeviceConfiguration
}

// NewVirtualMachineConfiguration makes one, good or bad.
func NewVirtualMachineConfiguration(bootLoader BootLoader, cpu uint, memorySize uint64) (*VirtualMachineConfiguration, error) {
	return &VirtualMachineConfiguration{pointer: &pointer{}, boot: bootLoader, cpu: cpu, memory: memorySize}, nil
}

// SetPlatformVirtualMachineConfiguration sets the kind of machine.
func (v *VirtualMachineConfiguration) SetPlatformVirtualMachineConfiguration(c PlatformConfiguration) {
	v.platform = c
}

// SetEntropyDevicesVirtualMachineConfiguration sets devices.
func (v *VirtualMachineConfiguration) SetEntropyDevicesVirtualMachineConfiguration(cs []*VirtioEntropyDeviceConfiguration) {
	v.entropy = cs
}

// SetNetworkDevicesVirtualMachineConfiguration sets devices.
func (v *VirtualMachineConfiguration) SetNetworkDevicesVirtualMachineConfiguration(cs []*VirtioNetworkDeviceConfiguration) {
	v.network = cs
}

// SetSerialPortsVirtualMachineConfiguration sets devices.
func (v *VirtualMachineConfiguration) SetSerialPortsVirtualMachineConfiguration(cs []*VirtioConsoleDeviceSerialPortConfiguration) {
	v.serial = cs
}

// SetSocketDevicesVirtualMachineConfiguration sets devices.
func (v *VirtualMachineConfiguration) SetSocketDevicesVirtualMachineConfiguration(cs []SocketDeviceConfiguration) {
	v.sockets = cs
}

// SetStorageDevicesVirtualMachineConfiguration sets devices.
func (v *VirtualMachineConfiguration) SetStorageDevicesVirtualMachineConfiguration(cs []StorageDeviceConfiguration) {
	v.storage = cs
}

// SetDirectorySharingDevicesVirtualMachineConfiguration sets devices.
func (v *VirtualMachineConfiguration) SetDirectorySharingDevicesVirtualMachineConfiguration(cs []DirectorySharingDeviceConfiguration) {
	v.shares = cs
}

// SetGraphicsDevicesVirtualMachineConfiguration sets devices.
func (v *VirtualMachineConfiguration) SetGraphicsDevicesVirtualMachineConfiguration(cs []GraphicsDeviceConfiguration) {
	v.graphics = cs
}

// SetKeyboardsVirtualMachineConfiguration sets devices.
func (v *VirtualMachineConfiguration) SetKeyboardsVirtualMachineConfiguration(cs []KeyboardConfiguration) {
	v.keyboards = cs
}

// SetPointingDevicesVirtualMachineConfiguration sets devices.
func (v *VirtualMachineConfiguration) SetPointingDevicesVirtualMachineConfiguration(cs []PointingDeviceConfiguration) {
	v.pointing = cs
}

// What the stand-in's host has.
const (
	minCPU, maxCPU       = 1, 10
	minMemory, maxMemory = 4 << 20, 32 << 30
	mebibyte             = 1 << 20
)

// VirtualMachineConfigurationMinimumAllowedMemorySize is in bytes.
func VirtualMachineConfigurationMinimumAllowedMemorySize() uint64 { return minMemory }

// VirtualMachineConfigurationMaximumAllowedMemorySize is in bytes.
func VirtualMachineConfigurationMaximumAllowedMemorySize() uint64 { return maxMemory }

// VirtualMachineConfigurationMinimumAllowedCPUCount is in cores.
func VirtualMachineConfigurationMinimumAllowedCPUCount() uint { return minCPU }

// VirtualMachineConfigurationMaximumAllowedCPUCount is in cores.
func VirtualMachineConfigurationMaximumAllowedCPUCount() uint { return maxCPU }

// Validate says whether a machine can be made of it.
func (v *VirtualMachineConfiguration) Validate() (bool, error) {
	if err := v.invalid(); err != nil {
		return false, err
	}
	return true, nil
}

func (v *VirtualMachineConfiguration) invalid() error {
	invalid := func(what string) error { return failure(ErrorInvalidVirtualMachineConfiguration, "%s", what) }
	switch {
	case v.boot == nil:
		return invalid("no boot loader")
	case v.cpu < minCPU || v.cpu > maxCPU:
		return invalid("the CPU count is out of range")
	case v.memory < minMemory || v.memory > maxMemory || v.memory%mebibyte != 0:
		return invalid("the memory size is out of range or no multiple of 1 MiB")
	case len(v.sockets) > 1:
		return invalid("more than one socket device")
	case slices.ContainsFunc(v.network, func(n *VirtioNetworkDeviceConfiguration) bool { return n.attachment == nil || n.mac == nil }):
		return invalid("a network device without attachment or address")
	case slices.ContainsFunc(v.serial, func(s *VirtioConsoleDeviceSerialPortConfiguration) bool { return s.attachment == nil }):
		return invalid("a serial port without attachment")
	case slices.ContainsFunc(v.storage, func(s StorageDeviceConfiguration) bool {
		return s.(*VirtioBlockDeviceConfiguration).attachment == nil
	}):
		return invalid("a disk without attachment")
	case slices.ContainsFunc(v.shares, func(s DirectorySharingDeviceConfiguration) bool {
		return s.(*VirtioFileSystemDeviceConfiguration).share == nil
	}):
		return invalid("a file system device without a share")
	}
	mac, isMac := v.platform.(*MacPlatformConfiguration)
	if _, macOS := v.boot.(*MacOSBootLoader); macOS != isMac {
		return invalid("the boot loader is not one for this platform")
	}
	if isMac {
		return mac.invalid()
	}
	return nil
}

// isMac reports whether it counts as a macOS guest.
func (v *VirtualMachineConfiguration) isMac() bool {
	_, isMac := v.platform.(*MacPlatformConfiguration)
	return isMac
}

// ValidateSaveRestoreSupport says whether such a machine can be saved. On a system that
// cannot save at all it is an exception, as in the real package.
func (v *VirtualMachineConfiguration) ValidateSaveRestoreSupport() (bool, error) {
	if available(14) != nil {
		raise("UnhandledAvailabilityException")
	}
	switch {
	case len(v.entropy) > 0:
		return false, failure(ErrorNotSupported, "an entropy device cannot be saved")
	case slices.ContainsFunc(v.keyboards, func(k KeyboardConfiguration) bool {
		_, mac := k.(*MacKeyboardConfiguration)
		return !mac
	}):
		return false, failure(ErrorNotSupported, "such a keyboard cannot be saved")
	}
	if err := hooks().Unsaveable; err != nil {
		return false, err
	}
	return true, nil
}
