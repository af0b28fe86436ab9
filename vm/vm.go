// Package vm is the contract of a machine: it boots, it is reached, it ends, it is
// destroyed.
//
// It knows no jobs, no runners and no images beyond a directory that holds a clone.
// The drivers are its children: vm/vz (Apple's Virtualization.framework), vm/qemu (a real
// machine on Linux) and vm/process (a child process, for tests and the demo); vm/helper
// puts any of them into a process of its own, which is how node calls them. vm/vmtest is
// this contract as a test.
package vm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// Driver boots machines. It is safe for concurrent use.
type Driver interface {
	// Boot starts a machine from a clone and returns once it runs; whether the guest
	// answers is for Dial to find out, though a driver that can tell may wait for the
	// guest's agent, if spec.Agent says that there is one. It fails with *BootError (this
	// machine or image: try another node), ErrAtCapacity (no slot), ErrState (spec.State
	// cannot be started from: boot cold), or another error (ours). After an error nothing
	// of the machine is left but spec.Dir.
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
	// Agent: the guest runs Paddock's agent (runner/guest), which opens the machine's
	// stream; without it Dial has nobody to reach.
	Agent bool
	// State is a directory that Saver.Save filled, of a machine with the same CPU, memory
	// and mounts on this very host; Dir then holds clones of the files of SavedFiles in
	// it. "": a cold boot.
	State string
}

// Names of the files in Spec.Dir.
const (
	DiskFile    = "disk.img"
	NVRAMFile   = "nvram.bin"
	ConfigFile  = "config.json"
	ConsoleFile = "console.log" // what the machine printed; written by the driver
	// IdentityFile is what a driver gave the machine that its state is bound to (a MAC
	// address, a machine identifier); only machines that are saved have it.
	IdentityFile = "identity.json"
)

// SavedFiles are the files of a state's directory of which a machine that starts from it
// needs clones of its own; one that is not there is not needed.
var SavedFiles = []string{ConfigFile, NVRAMFile, DiskFile, IdentityFile}

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
	// ErrState: a saved state is not this host's, not this machine's, or broken. It will
	// not get better: remove it and boot cold.
	ErrState = errors.New("the saved state cannot be started from")
	// ErrUnsupported: this driver's machines cannot do that.
	ErrUnsupported = errors.New("not possible with this driver")
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

// Saver is a machine whose state can be saved and started from again, on the same host.
type Saver interface {
	// Save writes the machine's state into dir, which exists and is empty: the files of
	// SavedFiles as they are at that instant, and what else the driver needs. The machine
	// stands still meanwhile and runs on, also after an error; streams to the guest are
	// cut. ErrUnsupported says why this machine cannot be saved.
	Save(ctx context.Context, dir string) error
}

// Addresser is a machine whose guest has an IP address that this host can tell.
type Addresser interface {
	// Address is the guest's address without a port, "" while it has none.
	Address(ctx context.Context) (string, error)
}

// PortDialer is a machine whose guest's TCP ports can be reached from this host without
// Paddock's agent.
type PortDialer interface {
	// DialPort connects to a port of the guest; it tries until somebody listens there or
	// ctx ends, and fails with ErrEnded once the machine has ended.
	DialPort(ctx context.Context, port int) (net.Conn, error)
}

// Reaper is a driver that can end what a process of its own left of a machine when it
// was killed: the machine itself where it runs on, sockets, locks. Nothing left is a
// success; spec.Dir stays.
type Reaper interface {
	Reap(ctx context.Context, spec Spec) error
}

// maxConsole is how much of a console goes into a BootError, in bytes.
const maxConsole = 4 << 10

// ConsoleTail is the end of the console of the machine in dir, as text; "" if there is
// none.
func ConsoleTail(dir string) string {
	f, err := os.Open(filepath.Join(dir, ConsoleFile))
	if err != nil {
		return ""
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil {
		return ""
	}
	tail, err := io.ReadAll(io.NewSectionReader(f, max(0, info.Size()-maxConsole), maxConsole))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(strings.ToValidUTF8(string(tail), "\uFFFD"))
}
