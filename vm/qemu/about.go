package qemu

import (
	"context"
	"runtime"
)

// About is what this host has for QEMU's guests.
type About struct {
	Path, Version string
	// Firmware boots disks that have a boot loader; "": there is none here, and only
	// images with a kernel boot.
	Firmware string
	Packages string // that have the firmware, for people
}

// About looks for QEMU as Boot does; its error says what to install. "": guests of this
// host's own architecture.
func (d *Driver) About(ctx context.Context, guestArch string) (About, error) {
	if guestArch == "" {
		guestArch = runtime.GOARCH
	}
	p, err := d.program(ctx, guestArch)
	if err != nil {
		return About{}, err
	}
	about := About{Path: p.path, Version: p.version, Packages: firmwarePackages[p.goarch]}
	for _, f := range firmwares[p.goarch] {
		if isFile(f.code) && isFile(f.vars) {
			about.Firmware = f.code
			break
		}
	}
	return about, nil
}
