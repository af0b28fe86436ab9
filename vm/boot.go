package vm

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/paddock-ci/paddock/image/tart"
)

// Names of the files that BootFiles makes in Spec.Dir.
const (
	KernelFile = "kernel"
	InitrdFile = "initrd"
)

// maxConfig bounds config.json, in bytes; real ones have 500.
const maxConfig = 1 << 20

// ReadConfig reads the VM config of the clone in dir.
func ReadConfig(dir string) (*tart.Config, error) {
	f, err := os.Open(filepath.Join(dir, ConfigFile))
	if err != nil {
		return nil, fmt.Errorf("the clone has no VM config: %w", err)
	}
	defer func() { _ = f.Close() }()
	raw, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
	if err != nil {
		return nil, fmt.Errorf("reading the VM config: %w", err)
	}
	return tart.ParseConfig(raw)
}

// CheckDisk is what can be told of a clone's disk without booting it: that there is one
// and that something was written to it.
func CheckDisk(dir string) error {
	path := filepath.Join(dir, DiskFile)
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return fmt.Errorf("the clone has no disk: %w", err)
	case !info.Mode().IsRegular() || info.Size() == 0:
		return fmt.Errorf("the clone's disk %s is empty or no file", path)
	}
	return nil
}

// BootFiles copies a Linux guest's kernel and initial RAM disk from the clone's disk into
// files beside it, since both hypervisors want files. initrd is "" if the image has none.
func BootFiles(dir string, b *tart.Boot) (kernel, initrd string, err error) {
	disk, err := os.Open(filepath.Join(dir, DiskFile))
	if err != nil {
		return "", "", fmt.Errorf("the clone has no disk: %w", err)
	}
	defer func() { _ = disk.Close() }()
	kernel = filepath.Join(dir, KernelFile)
	if err := copyExtent(kernel, disk, b.Kernel); err != nil {
		return "", "", fmt.Errorf("taking the kernel from the disk: %w", err)
	}
	if b.Initrd == (tart.Extent{}) {
		return kernel, "", nil
	}
	initrd = filepath.Join(dir, InitrdFile)
	if err := copyExtent(initrd, disk, b.Initrd); err != nil {
		return "", "", fmt.Errorf("taking the initrd from the disk: %w", err)
	}
	return kernel, initrd, nil
}

// copyExtent copies a part of the disk into a new file; the kernel does it without us,
// where it can.
func copyExtent(path string, disk *os.File, e tart.Extent) (err error) {
	if _, err := disk.Seek(e.Offset, io.SeekStart); err != nil {
		return err
	}
	out, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	n, err := io.CopyN(out, disk, e.Size)
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("the disk ends after %d of its %d bytes", n, e.Size)
	}
	return err
}
