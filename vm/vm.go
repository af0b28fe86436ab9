// Package vm is the contract of a machine: it boots, it is reached, it ends, it is
// destroyed.
//
// It knows no jobs, no runners and no images beyond a directory that holds a clone.
// The drivers are its children: vm/process (a child process, for tests and the demo),
// later vm/vz and vm/qemu; vm/helper puts any of them into a process of its own, which
// is how node calls them. vm/vmtest is this contract as a test.
package vm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// Driver boots machines. It is safe for concurrent use.
type Driver interface {
	// Boot starts a machine from a clone and returns once it runs; whether the guest
	// answers is for Dial to find out. It fails with *BootError (this machine or image:
	// try another node), ErrAtCapacity (no slot), or another error (ours). After an
	// error nothing of the machine is left but spec.Dir.
	Boot(ctx context.Context, spec Spec) (Machine, error)
}

// Machine is one running machine. Its methods are safe for concurrent use.
type Machine interface {
	// Dial opens a stream to the guest agent; it waits for the guest to listen until
	// ctx ends, and fails with ErrEnded once the machine has ended.
	Dial(ctx context.Context) (net.Conn, error)
	// Wait returns when the machine has ended, however often it is called.
	Wait(ctx context.Context) (Exit, error)
	// Destroy ends the machine at once with all that runs in it, and returns when
	// nothing is left of it but spec.Dir. On an ended machine it succeeds.
	Destroy(ctx context.Context) error
}

// Spec is what a machine is made of.
type Spec struct {
	ID     fleet.VMID
	Dir    string // holds the clone (disk.img, nvram.bin, config.json); the driver may add files
	CPU    int    // cores; 0: what the image says
	Memory int64  // bytes; 0: what the image says
	Mounts []fleet.Mount
}

// Names of the files in Spec.Dir.
const (
	DiskFile    = "disk.img"
	NVRAMFile   = "nvram.bin"
	ConfigFile  = "config.json"
	ConsoleFile = "console.log" // what the machine printed; written by the driver
)

// Exit is how a machine ended.
type Exit struct {
	At     time.Time `json:"at"`
	Reason string    `json:"reason"` // in words: "exit status 1", "destroyed", "killed"
}

// Errors that a caller decides on.
var (
	// ErrAtCapacity: the host runs as many machines as it may, or a slot is leaked.
	ErrAtCapacity = errors.New("no free machine slot on this host")
	// ErrEnded: the machine has ended.
	ErrEnded = errors.New("the machine has ended")
	// ErrUnknown: nothing is known here of a machine of that name: it was never started,
	// or nothing of it is left.
	ErrUnknown = errors.New("no such machine here")
)

// BootError says that a machine did not come up, with the tail of its console.
type BootError struct {
	Console string // the last lines, at most 4 KiB
	Err     error
}

func (e *BootError) Error() string {
	if e.Console == "" {
		return fmt.Sprintf("machine did not boot: %v", e.Err)
	}
	return fmt.Sprintf("machine did not boot: %v; console ends: %q", e.Err, e.Console)
}

func (e *BootError) Unwrap() error { return e.Err }

// Saver is a machine whose state can be saved to a file and started from it again.
type Saver interface {
	Save(ctx context.Context, path string) error
}

// Addresser is a machine that has an IP address of its own.
type Addresser interface {
	Address(ctx context.Context) (string, error)
}

// Reaper is a driver that can end what a process of its own left of a machine when it
// was killed: the machine itself where it runs on, sockets, locks. Nothing left is a
// success; spec.Dir stays.
type Reaper interface {
	Reap(ctx context.Context, spec Spec) error
}
