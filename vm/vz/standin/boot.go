package vz

import (
	"fmt"
	"os"

	"github.com/Code-Hex/vz/v3/internal/objc"
)

// BootLoader starts a guest.
type BootLoader interface {
	objc.NSObject
	bootLoader()
}

type baseBootLoader struct{}

func (*baseBootLoader) bootLoader() {}

// LinuxBootLoader starts a kernel.
type LinuxBootLoader struct {
	*pointer
	*baseBootLoader
	kernel, initrd, commandLine string
}

// LinuxBootLoaderOption changes one.
type LinuxBootLoaderOption func(b *LinuxBootLoader) error

// WithCommandLine sets the kernel's parameters.
func WithCommandLine(cmdLine string) LinuxBootLoaderOption {
	return func(b *LinuxBootLoader) error {
		b.commandLine = cmdLine
		return nil
	}
}

// WithInitrd sets the initial RAM disk.
func WithInitrd(initrdPath string) LinuxBootLoaderOption {
	return func(b *LinuxBootLoader) error {
		b.initrd = initrdPath
		_, err := os.Stat(initrdPath)
		return err
	}
}

// NewLinuxBootLoader makes one.
func NewLinuxBootLoader(vmlinuz string, opts ...LinuxBootLoaderOption) (*LinuxBootLoader, error) {
	if _, err := os.Stat(vmlinuz); err != nil {
		return nil, fmt.Errorf("invalid linux kernel path: %w", err)
	}
	b := &LinuxBootLoader{pointer: &pointer{}, kernel: vmlinuz}
	for _, opt := range opts {
		if err := opt(b); err != nil {
			return nil, err
		}
	}
	return b, nil
}

// EFIBootLoader starts what it finds on the disk.
type EFIBootLoader struct {
	*pointer
	*baseBootLoader
	store *EFIVariableStore
}

// NewEFIBootLoaderOption changes one.
type NewEFIBootLoaderOption func(b *EFIBootLoader)

// WithEFIVariableStore sets the firmware's variables.
func WithEFIVariableStore(variableStore *EFIVariableStore) NewEFIBootLoaderOption {
	return func(b *EFIBootLoader) { b.store = variableStore }
}

// NewEFIBootLoader makes one.
func NewEFIBootLoader(opts ...NewEFIBootLoaderOption) (*EFIBootLoader, error) {
	b := &EFIBootLoader{pointer: &pointer{}}
	for _, opt := range opts {
		opt(b)
	}
	return b, available(13)
}

// EFIVariableStore holds the firmware's variables.
type EFIVariableStore struct {
	*pointer
	path string
}

// NewEFIVariableStoreOption changes one.
type NewEFIVariableStoreOption func(*EFIVariableStore) error

// NewEFIVariableStore opens one.
func NewEFIVariableStore(path string, opts ...NewEFIVariableStoreOption) (*EFIVariableStore, error) {
	s := &EFIVariableStore{pointer: &pointer{}, path: path}
	for _, opt := range opts {
		if err := opt(s); err != nil {
			return nil, err
		}
	}
	if _, err := os.Stat(path); err != nil {
		return nil, err
	}
	return s, available(13)
}

// MacOSBootLoader starts macOS.
type MacOSBootLoader struct {
	*pointer
	*baseBootLoader
}

// NewMacOSBootLoader makes one.
func NewMacOSBootLoader() (*MacOSBootLoader, error) {
	return &MacOSBootLoader{pointer: &pointer{}}, available(12)
}
