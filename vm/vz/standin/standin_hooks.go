package vz

import (
	"context"
	"fmt"
	"maps"
	"net"
	"slices"
	"sync"
)

// What data of the framework's looks like here.
const (
	modelPrefix      = "standin-model-"
	identifierPrefix = "standin-machine-"
	ipswPrefix       = "ipsw "

	Model      = modelPrefix + "1"      // of a Mac that this host can run
	NewerModel = modelPrefix + "2"      // of one that it cannot
	Identifier = identifierPrefix + "0" // of an image
)

// NVRAM is the content of auxiliary storage for a hardware model.
func NVRAM[T string | []byte](model T) string { return "auxiliary storage of " + string(model) }

// IPSW is the content of a restore image.
func IPSW(model string) string { return ipswPrefix + model }

// Hooks are what a test decides. Nil functions do nothing and succeed.
type Hooks struct {
	Version float64 // of the host's system; 0: 15
	// Taken is how many macOS guests the host counts that are none of ours.
	Taken int
	// Unsaveable is what ValidateSaveRestoreSupport says.
	Unsaveable error

	// Guest is what runs in each machine, from its start until it returns; its end is
	// not the machine's.
	Guest func(*Guest)

	// Queue is how long Start takes before it does anything.
	Queue func() error

	// These are called by the verbs of their names, which take as long.
	Start                              func(*Guest) error
	Stop, Pause, Resume, Save, Restore func() error
	// Connect answers a connect instead of the guest, if it says so.
	Connect func(port uint32) (handled bool, conn *VirtioSocketConnection, err error)
	// Fetch is the download of a restore image.
	Fetch func(ctx context.Context) (content string, err error)
	// Install is an installation; cancelled is closed when it should end.
	Install func(g *Guest, progress func(float64), cancelled <-chan struct{}) error
}

func (h *Hooks) macOS() float64 {
	if h.Version == 0 {
		return 15
	}
	return h.Version
}

func (h *Hooks) lend(b []byte) []byte { return world.lend(b) }

// universe is what all machines of the process share.
type universe struct {
	mu     sync.Mutex
	hooks  *Hooks
	alive  map[*VirtualMachine]bool
	lent   [][]byte
	faults []string
}

var world = &universe{hooks: &Hooks{}, alive: map[*VirtualMachine]bool{}}

// Use has all calls from now on ask h.
func Use(h Hooks) {
	world.mu.Lock()
	defer world.mu.Unlock()
	world.hooks = &h
}

func hooks() *Hooks {
	world.mu.Lock()
	defer world.mu.Unlock()
	return world.hooks
}

// Alive counts the machines that are not stopped.
func Alive() int {
	world.mu.Lock()
	defer world.mu.Unlock()
	return len(world.alive)
}

// Faults are the misuses so far, which the real framework would punish or not notice.
func Faults() []string {
	world.mu.Lock()
	defer world.mu.Unlock()
	return slices.Clone(world.faults)
}

// Release takes back all memory that was lent, as the framework does at its own time.
func Release() {
	world.mu.Lock()
	defer world.mu.Unlock()
	for _, b := range world.lent {
		for i := range b {
			b[i] = '!'
		}
	}
	world.lent = nil
}

func (u *universe) lend(b []byte) []byte {
	u.mu.Lock()
	defer u.mu.Unlock()
	b = slices.Clone(b)
	u.lent = append(u.lent, b)
	return b
}

func (u *universe) fault(format string, args ...any) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.faults = append(u.faults, fmt.Sprintf(format, args...))
}

// admit takes a slot, of which there are two for macOS guests and enough for others.
func (u *universe) admit(v *VirtualMachine) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	macs := u.hooks.Taken
	for other := range u.alive {
		if other.config.isMac() {
			macs++
		}
	}
	if v.config.isMac() && macs >= 2 {
		return false
	}
	u.alive[v] = true
	return true
}

func (u *universe) leave(v *VirtualMachine) {
	u.mu.Lock()
	defer u.mu.Unlock()
	delete(u.alive, v)
}

// Guest is the inside of one machine.
type Guest struct {
	machine  *VirtualMachine
	restored bool
	done     chan struct{}
	once     sync.Once

	mu        sync.Mutex
	ended     bool
	listeners map[uint32]func(net.Conn)
	streams   []net.Conn
	open      int // streams that the host has not closed
}

func newGuest(v *VirtualMachine) *Guest {
	return &Guest{machine: v, done: make(chan struct{}), listeners: map[uint32]func(net.Conn){}}
}

// run begins with the guest, the first time.
func (g *Guest) run() {
	g.once.Do(func() {
		if hook := hooks().Guest; hook != nil {
			go hook(g)
		}
	})
}

// end cuts everything; the machine's lock is held.
func (g *Guest) end() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.ended {
		return
	}
	g.ended = true
	close(g.done)
	for _, s := range g.streams {
		_ = s.Close()
	}
}

// Done is closed when the machine stops.
func (g *Guest) Done() <-chan struct{} { return g.done }

// Restored says that the guest was saved, and runs on.
func (g *Guest) Restored() bool { return g.restored }

// Listen serves a port; each stream gets a goroutine.
func (g *Guest) Listen(port uint32, serve func(net.Conn)) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.listeners[port] = serve
}

// accept is a stream that the host opens. Nobody listening is a reset connection.
func (g *Guest) accept(port uint32) (*VirtioSocketConnection, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	serve := g.listeners[port]
	if serve == nil || g.ended {
		return nil, &NSError{Domain: "NSPOSIXErrorDomain", Code: 54, LocalizedDescription: "Connection reset by peer"}
	}
	host, inside, err := pair()
	if err != nil {
		return nil, err
	}
	g.streams = append(g.streams, inside)
	g.open++
	host.closed = sync.OnceFunc(func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.open--
	})
	go serve(inside)
	return host, nil
}

// saving is the moment at which all of the guest is written down. A stream that the host
// still has is alive in the state, and a guest that starts from there waits at it.
func (g *Guest) saving() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.open > 0 {
		world.fault("a machine is saved with %d open streams", g.open)
	}
}

// Print writes to the guest's console.
func (g *Guest) Print(p []byte) {
	for _, s := range g.machine.config.serial {
		_, err := s.attachment.(*FileHandleSerialPortAttachment).write.Write(p)
		select {
		case <-g.done:
		default:
			if err != nil {
				world.fault("the console of a machine that runs is closed: %v", err)
			}
		}
	}
}

// PowerOff is the guest's own end.
func (g *Guest) PowerOff() { g.stop(VirtualMachineStateStopped) }

// Crash is an end by an error of the framework's.
func (g *Guest) Crash() { g.stop(VirtualMachineStateError) }

func (g *Guest) stop(s VirtualMachineState) {
	_ = g.machine.move(s, VirtualMachineStateRunning, VirtualMachineStatePaused) // or it is stopped already
}

// What the machine was made of.

// Disk is the path of its disk.
func (g *Guest) Disk() string {
	for _, s := range g.machine.config.storage {
		return s.(*VirtioBlockDeviceConfiguration).attachment.(*DiskImageStorageDeviceAttachment).path
	}
	return ""
}

// MAC is its address.
func (g *Guest) MAC() string {
	for _, n := range g.machine.config.network {
		return n.mac.String()
	}
	return ""
}

// Machine is a Mac's identifier.
func (g *Guest) Machine() string { return g.machine.snapshot().Machine }

// CPU and Memory are its size, in cores and bytes.
func (g *Guest) CPU() uint { return g.machine.config.cpu }

// Memory is in bytes.
func (g *Guest) Memory() uint64 { return g.machine.config.memory }

// CommandLine is its kernel's.
func (g *Guest) CommandLine() string {
	if b, ok := g.machine.config.boot.(*LinuxBootLoader); ok {
		return b.commandLine
	}
	return ""
}

// Shares are "tag/name=path" or "tag/name=path ro", sorted.
func (g *Guest) Shares() []string {
	var all []string
	for _, s := range g.machine.config.shares {
		device := s.(*VirtioFileSystemDeviceConfiguration)
		directories := device.share.(*MultipleDirectoryShare).directories
		for _, name := range slices.Sorted(maps.Keys(directories)) {
			line := device.tag + "/" + name + "=" + directories[name].path
			if directories[name].readOnly {
				line += " ro"
			}
			all = append(all, line)
		}
	}
	return all
}

// Display is "width x height" of its screen.
func (g *Guest) Display() string {
	for _, d := range g.machine.config.graphics {
		for _, display := range d.(*MacGraphicsDeviceConfiguration).displays {
			return fmt.Sprintf("%d x %d", display.width, display.height)
		}
	}
	return ""
}
