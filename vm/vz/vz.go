// Package vz is the driver of machines on Apple Silicon Macs: macOS and Linux guests of
// Apple's Virtualization.framework, by way of Code-Hex/vz.
//
//  1. Boot makes the framework's configuration of a clone (macguest.go, linuxguest.go,
//     hardware.go), starts it or restores it from a saved state, and waits for the
//     guest's agent if there is one.
//  2. A machine (machine.go) has one goroutine that sees its changes of state and ends
//     it; dial.go reaches its guest by vsock and by TCP; save.go saves it.
//  3. Install makes a new macOS image of Apple's restore image.
//
// The framework knows no contexts: each call blocks until it answers, which may be
// never. So every call is raced against the caller's context and may outlive it; a
// machine has at most one verb, one Stop and maxConnects connects outstanding, each a
// goroutine that ends with the process. An Objective-C exception ends the process, too,
// which is one reason why each machine lives in a helper process of its own.
//
// It is not the keeper of slots: how many macOS guests a host may run is counted by the
// framework for all processes, and placed by others. It does not start runners, and it
// is not what runs inside the guest (runner/guest).
//
// The files that need the framework are built for darwin/arm64 with cgo, and with the tag
// vzstandin against the small module in standin, which tests use:
//
//	GOWORK=$PWD/vm/vz/standin.work go test -race -tags vzstandin ./vm/vz
//
// Elsewhere New returns ErrPlatform. Called by cmd, inside the vm-helper process and for
// making images.
package vz

import (
	"context"
	"errors"
	"log/slog"
)

// ErrPlatform: this program was built for another platform, or without cgo.
var ErrPlatform = errors.New("the vz driver runs on Apple Silicon Macs only; use driver qemu or process")

// Config makes a driver.
type Config struct {
	// CloneFile makes dst a copy of src that shares its blocks where the file system can
	// (clonefile). Nil: an ordinary copy, which for a disk takes as long as it is big.
	CloneFile func(ctx context.Context, src, dst string) error
	// Leases is the file of the host's DHCP server; "": the one of macOS.
	Leases string
	Log    *slog.Logger // nil: no log
}

// InstallConfig says what Install makes.
type InstallConfig struct {
	// IPSW is the path of a restore image; "": the newest that this Mac can run is
	// fetched from Apple (about 15 GB), into Dir, and removed afterwards.
	IPSW string
	// Dir is the image's directory, which must not exist: disk.img, nvram.bin and
	// config.json are put there.
	Dir      string
	DiskSize int64 // bytes; 0: 64 GB; the file is sparse
	CPU      int   // cores of the image's machines; 0: 4, or what the system needs
	Memory   int64 // bytes; 0: 8 GiB, or what the system needs
	// Progress is told how much is done, 0 to 1, about once a second and never again
	// after Install has returned; a download counts for the first half. Nil: nobody is.
	Progress func(fraction float64)
}
