package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/paddock-ci/paddock/vm"
)

// firmware is what boots a disk with a boot loader: code, and the variables that it
// keeps, each in a flash chip.
type firmware struct {
	code string // read only, shared by all machines
	vars string // a template, as it leaves the factory
	file string // the machine's own variables
}

// firmwares are the places where distributions keep it, by guest's architecture.
var firmwares = map[string][]firmware{
	"arm64": {
		{code: "/usr/share/AAVMF/AAVMF_CODE.fd", vars: "/usr/share/AAVMF/AAVMF_VARS.fd"},                                // Debian
		{code: "/usr/share/edk2/aarch64/QEMU_EFI-pflash.raw", vars: "/usr/share/edk2/aarch64/vars-template-pflash.raw"}, // Fedora
		{code: "/opt/homebrew/share/qemu/edk2-aarch64-code.fd", vars: "/opt/homebrew/share/qemu/edk2-arm-vars.fd"},
	},
	"amd64": {
		{code: "/usr/share/OVMF/OVMF_CODE_4M.fd", vars: "/usr/share/OVMF/OVMF_VARS_4M.fd"}, // Debian
		{code: "/usr/share/edk2/ovmf/OVMF_CODE.fd", vars: "/usr/share/edk2/ovmf/OVMF_VARS.fd"},
		{code: "/opt/homebrew/share/qemu/edk2-x86_64-code.fd", vars: "/opt/homebrew/share/qemu/edk2-i386-vars.fd"},
	},
}

// firmwarePackages say what to install.
var firmwarePackages = map[string]string{"arm64": "qemu-efi-aarch64", "amd64": "ovmf"}

// findFirmware finds the firmware for a guest and sees to the variables of the machine
// in dir: its own, if they fit, or new ones.
func findFirmware(ctx context.Context, guestArch, dir string) (firmware, error) {
	for _, f := range firmwares[guestArch] {
		if !isFile(f.code) || !isFile(f.vars) {
			continue
		}
		f.file = filepath.Join(dir, vm.NVRAMFile)
		return f, f.variables(ctx)
	}
	return firmware{}, fmt.Errorf("the image boots by a boot loader, and there is no firmware for %s guests here (Debian, Ubuntu: apt-get install %s; macOS: brew install qemu)",
		guestArch, firmwarePackages[guestArch])
}

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}

// variables checks the machine's variables, or makes them where the image has none. A
// flash chip has one size, and another hypervisor's variables another format as well.
func (f firmware) variables(ctx context.Context) error {
	template, err := os.Stat(f.vars)
	if err != nil {
		return err
	}
	own, err := os.Stat(f.file)
	switch {
	case errors.Is(err, os.ErrNotExist):
		if err := vm.CopyFile(ctx, f.vars, f.file); err != nil {
			return fmt.Errorf("making the firmware's variables: %w", err)
		}
		return nil
	case err != nil:
		return err
	case own.Size() != template.Size():
		return &vm.BootError{Err: fmt.Errorf(
			"an NVRAM that does not fit: %s has %d bytes, the firmware here (%s) keeps its variables in %d; the image was made for another hypervisor: make it anew on QEMU, or give it a kernel (paddockBoot)",
			vm.NVRAMFile, own.Size(), f.code, template.Size())}
	}
	return nil
}

func (f firmware) args() []string {
	drive := func(unit int, path, more string) string {
		// A comma in a path is written twice.
		return fmt.Sprintf("if=pflash,unit=%d,format=raw,file=%s%s", unit, strings.ReplaceAll(path, ",", ",,"), more)
	}
	return []string{"-drive", drive(0, f.code, ",readonly=on"), "-drive", drive(1, f.file, ",cache=unsafe")}
}
