package vz

import (
	"fmt"
	"net"
	"os"
	"strings"

	"github.com/Code-Hex/vz/v3/internal/objc"
)

// DiskImageCachingMode is how the host caches a disk.
type DiskImageCachingMode int

// The mode that is used.
const DiskImageCachingModeCached DiskImageCachingMode = 2

// DiskImageSynchronizationMode is what becomes of a guest's flush.
type DiskImageSynchronizationMode int

// The mode that is used.
const DiskImageSynchronizationModeNone DiskImageSynchronizationMode = 3

// StorageDeviceAttachment is where a disk's bytes are.
type StorageDeviceAttachment interface {
	objc.NSObject
	storageDeviceAttachment()
}

// DiskImageStorageDeviceAttachment is a file.
type DiskImageStorageDeviceAttachment struct {
	*pointer
	path string
}

func (*DiskImageStorageDeviceAttachment) storageDeviceAttachment() {}

// NewDiskImageStorageDeviceAttachmentWithCacheAndSync opens a raw disk.
func NewDiskImageStorageDeviceAttachmentWithCacheAndSync(diskPath string, readOnly bool, cachingMode DiskImageCachingMode, syncMode DiskImageSynchronizationMode) (*DiskImageStorageDeviceAttachment, error) {
	info, err := os.Stat(diskPath)
	if err != nil {
		return nil, err
	}
	if info.Size() == 0 {
		return nil, failure(ErrorInvalidVirtualMachineConfiguration, "the storage device attachment is invalid")
	}
	return &DiskImageStorageDeviceAttachment{pointer: &pointer{}, path: diskPath}, nil
}

// StorageDeviceConfiguration is a disk.
type StorageDeviceConfiguration interface {
	objc.NSObject
	storageDeviceConfiguration()
}

// VirtioBlockDeviceConfiguration is a disk of virtio.
type VirtioBlockDeviceConfiguration struct {
	*pointer
	attachment StorageDeviceAttachment
}

func (*VirtioBlockDeviceConfiguration) storageDeviceConfiguration() {}

// NewVirtioBlockDeviceConfiguration makes one.
func NewVirtioBlockDeviceConfiguration(attachment StorageDeviceAttachment) (*VirtioBlockDeviceConfiguration, error) {
	return &VirtioBlockDeviceConfiguration{pointer: &pointer{}, attachment: attachment}, nil
}

// NetworkDeviceAttachment is where a network's packets go.
type NetworkDeviceAttachment interface {
	objc.NSObject
	fmt.Stringer
	networkDeviceAttachment()
}

// NATNetworkDeviceAttachment is the host's NAT.
type NATNetworkDeviceAttachment struct{ *pointer }

func (*NATNetworkDeviceAttachment) networkDeviceAttachment() {}

func (*NATNetworkDeviceAttachment) String() string { return "NATNetworkDeviceAttachment" }

// NewNATNetworkDeviceAttachment makes one.
func NewNATNetworkDeviceAttachment() (*NATNetworkDeviceAttachment, error) {
	return &NATNetworkDeviceAttachment{pointer: &pointer{}}, nil
}

// VirtioNetworkDeviceConfiguration is a network card.
type VirtioNetworkDeviceConfiguration struct {
	*pointer
	attachment NetworkDeviceAttachment
	mac        *MACAddress
}

// NewVirtioNetworkDeviceConfiguration makes one.
func NewVirtioNetworkDeviceConfiguration(attachment NetworkDeviceAttachment) (*VirtioNetworkDeviceConfiguration, error) {
	return &VirtioNetworkDeviceConfiguration{pointer: &pointer{}, attachment: attachment}, nil
}

// SetMACAddress sets its address.
func (v *VirtioNetworkDeviceConfiguration) SetMACAddress(macAddress *MACAddress) { v.mac = macAddress }

// MACAddress is the address of a network card.
type MACAddress struct {
	*pointer
	address net.HardwareAddr
}

// NewMACAddress makes a given one.
func NewMACAddress(macAddr net.HardwareAddr) (*MACAddress, error) {
	if len(macAddr) != 6 {
		raise("no MAC address of nothing")
	}
	return &MACAddress{pointer: &pointer{}, address: macAddr}, nil
}

// NewRandomLocallyAdministeredMACAddress makes a fresh one.
func NewRandomLocallyAdministeredMACAddress() (*MACAddress, error) {
	b := random(6)
	b[0] = b[0]&^1 | 2
	return &MACAddress{pointer: &pointer{}, address: b}, nil
}

func (m *MACAddress) String() string { return m.address.String() }

// SocketDeviceConfiguration is a device for streams between host and guest.
type SocketDeviceConfiguration interface {
	objc.NSObject
	socketDeviceConfiguration()
}

// VirtioSocketDeviceConfiguration is vsock.
type VirtioSocketDeviceConfiguration struct{ *pointer }

func (*VirtioSocketDeviceConfiguration) socketDeviceConfiguration() {}

// NewVirtioSocketDeviceConfiguration makes one.
func NewVirtioSocketDeviceConfiguration() (*VirtioSocketDeviceConfiguration, error) {
	return &VirtioSocketDeviceConfiguration{pointer: &pointer{}}, nil
}

// SerialPortAttachment is where a console's bytes go.
type SerialPortAttachment interface {
	objc.NSObject
	serialPortAttachment()
}

// FileHandleSerialPortAttachment are two file descriptors, which are not duplicated.
type FileHandleSerialPortAttachment struct {
	*pointer
	read, write *os.File
}

func (*FileHandleSerialPortAttachment) serialPortAttachment() {}

// NewFileHandleSerialPortAttachment makes one.
func NewFileHandleSerialPortAttachment(read, write *os.File) (*FileHandleSerialPortAttachment, error) {
	if read == nil || write == nil {
		raise("a file handle without a file descriptor")
	}
	return &FileHandleSerialPortAttachment{pointer: &pointer{}, read: read, write: write}, nil
}

// VirtioConsoleDeviceSerialPortConfiguration is a console.
type VirtioConsoleDeviceSerialPortConfiguration struct {
	*pointer
	attachment SerialPortAttachment
}

// NewVirtioConsoleDeviceSerialPortConfiguration makes one.
func NewVirtioConsoleDeviceSerialPortConfiguration(attachment SerialPortAttachment) (*VirtioConsoleDeviceSerialPortConfiguration, error) {
	return &VirtioConsoleDeviceSerialPortConfiguration{pointer: &pointer{}, attachment: attachment}, nil
}

// VirtioEntropyDeviceConfiguration is a source of random numbers.
type VirtioEntropyDeviceConfiguration struct{ *pointer }

// NewVirtioEntropyDeviceConfiguration makes one.
func NewVirtioEntropyDeviceConfiguration() (*VirtioEntropyDeviceConfiguration, error) {
	return &VirtioEntropyDeviceConfiguration{pointer: &pointer{}}, nil
}

// DirectorySharingDeviceConfiguration shows directories to the guest.
type DirectorySharingDeviceConfiguration interface {
	objc.NSObject
	directorySharingDeviceConfiguration()
}

// VirtioFileSystemDeviceConfiguration does so by virtiofs.
type VirtioFileSystemDeviceConfiguration struct {
	*pointer
	tag   string
	share DirectoryShare
}

func (*VirtioFileSystemDeviceConfiguration) directorySharingDeviceConfiguration() {}

// NewVirtioFileSystemDeviceConfiguration makes one.
func NewVirtioFileSystemDeviceConfiguration(tag string) (*VirtioFileSystemDeviceConfiguration, error) {
	if tag == "" {
		return nil, failure(ErrorInvalidVirtualMachineConfiguration, "the tag is empty")
	}
	return &VirtioFileSystemDeviceConfiguration{pointer: &pointer{}, tag: tag}, nil
}

// SetDirectoryShare sets what is shown.
func (c *VirtioFileSystemDeviceConfiguration) SetDirectoryShare(share DirectoryShare) {
	c.share = share
}

// DirectoryShare is what is shown.
type DirectoryShare interface {
	objc.NSObject
	directoryShare()
}

// SharedDirectory is one directory of the host's.
type SharedDirectory struct {
	*pointer
	path     string
	readOnly bool
}

// NewSharedDirectory makes one.
func NewSharedDirectory(dirPath string, readOnly bool) (*SharedDirectory, error) {
	info, err := os.Stat(dirPath)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		raise("%s is no directory", dirPath)
	}
	return &SharedDirectory{pointer: &pointer{}, path: dirPath, readOnly: readOnly}, nil
}

// MultipleDirectoryShare are several directories by name.
type MultipleDirectoryShare struct {
	*pointer
	directories map[string]*SharedDirectory
}

func (*MultipleDirectoryShare) directoryShare() {}

// NewMultipleDirectoryShare makes one; a name that is none is an exception.
func NewMultipleDirectoryShare(shares map[string]*SharedDirectory) (*MultipleDirectoryShare, error) {
	for name := range shares {
		if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") {
			raise("%q is no name of a directory", name)
		}
	}
	return &MultipleDirectoryShare{pointer: &pointer{}, directories: shares}, nil
}

// MacOSGuestAutomountTag is the tag that macOS mounts by itself.
func MacOSGuestAutomountTag() (string, error) { return "com.apple.virtio-fs.automount", available(13) }

// GraphicsDeviceConfiguration is a graphics card.
type GraphicsDeviceConfiguration interface {
	objc.NSObject
	graphicsDeviceConfiguration()
}

// MacGraphicsDeviceConfiguration is that of a Mac.
type MacGraphicsDeviceConfiguration struct {
	*pointer
	displays []*MacGraphicsDisplayConfiguration
}

func (*MacGraphicsDeviceConfiguration) graphicsDeviceConfiguration() {}

// NewMacGraphicsDeviceConfiguration makes one.
func NewMacGraphicsDeviceConfiguration() (*MacGraphicsDeviceConfiguration, error) {
	return &MacGraphicsDeviceConfiguration{pointer: &pointer{}}, available(12)
}

// SetDisplays sets its displays.
func (m *MacGraphicsDeviceConfiguration) SetDisplays(displayConfigs ...*MacGraphicsDisplayConfiguration) {
	m.displays = displayConfigs
}

// MacGraphicsDisplayConfiguration is a display.
type MacGraphicsDisplayConfiguration struct {
	*pointer
	width, height int64
}

// NewMacGraphicsDisplayConfiguration makes one.
func NewMacGraphicsDisplayConfiguration(widthInPixels int64, heightInPixels int64, pixelsPerInch int64) (*MacGraphicsDisplayConfiguration, error) {
	if widthInPixels < 1 || heightInPixels < 1 || pixelsPerInch < 1 {
		raise("a display without pixels")
	}
	return &MacGraphicsDisplayConfiguration{pointer: &pointer{}, width: widthInPixels, height: heightInPixels}, available(12)
}

// KeyboardConfiguration is a keyboard.
type KeyboardConfiguration interface {
	objc.NSObject
	keyboardConfiguration()
}

// MacKeyboardConfiguration is a Mac's.
type MacKeyboardConfiguration struct{ *pointer }

func (*MacKeyboardConfiguration) keyboardConfiguration() {}

// NewMacKeyboardConfiguration makes one.
func NewMacKeyboardConfiguration() (*MacKeyboardConfiguration, error) {
	if err := available(14); err != nil {
		return nil, err
	}
	return &MacKeyboardConfiguration{pointer: &pointer{}}, nil
}

// USBKeyboardConfiguration is one by USB.
type USBKeyboardConfiguration struct{ *pointer }

func (*USBKeyboardConfiguration) keyboardConfiguration() {}

// NewUSBKeyboardConfiguration makes one.
func NewUSBKeyboardConfiguration() (*USBKeyboardConfiguration, error) {
	return &USBKeyboardConfiguration{pointer: &pointer{}}, available(12)
}

// PointingDeviceConfiguration is a mouse or its like.
type PointingDeviceConfiguration interface {
	objc.NSObject
	pointingDeviceConfiguration()
}

// MacTrackpadConfiguration is a Mac's trackpad.
type MacTrackpadConfiguration struct{ *pointer }

func (*MacTrackpadConfiguration) pointingDeviceConfiguration() {}

// NewMacTrackpadConfiguration makes one.
func NewMacTrackpadConfiguration() (*MacTrackpadConfiguration, error) {
	return &MacTrackpadConfiguration{pointer: &pointer{}}, available(13)
}
