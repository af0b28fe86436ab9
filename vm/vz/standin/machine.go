package vz

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"
)

// VirtualMachineState is what a machine does.
type VirtualMachineState int

// The states, with the real package's values.
const (
	VirtualMachineStateStopped VirtualMachineState = iota
	VirtualMachineStateRunning
	VirtualMachineStatePaused
	VirtualMachineStateError
	VirtualMachineStateStarting
	VirtualMachineStatePausing
	VirtualMachineStateResuming
	VirtualMachineStateStopping
	VirtualMachineStateSaving
	VirtualMachineStateRestoring
)

func (i VirtualMachineState) String() string {
	names := []string{"Stopped", "Running", "Paused", "Error", "Starting", "Pausing", "Resuming", "Stopping", "Saving", "Restoring"}
	if i < 0 || int(i) >= len(names) {
		return fmt.Sprintf("VirtualMachineState(%d)", int(i))
	}
	return "VirtualMachineState" + names[i]
}

// VirtualMachine is a machine.
type VirtualMachine struct {
	*pointer
	config *VirtualMachineConfiguration

	mu         sync.Mutex
	changed    *sync.Cond
	state      VirtualMachineState
	notify     chan VirtualMachineState // one for all readers
	guest      *Guest
	installing bool
}

// NewVirtualMachine makes a machine. A configuration that does not validate is an
// exception.
func NewVirtualMachine(config *VirtualMachineConfiguration) (*VirtualMachine, error) {
	if err := config.invalid(); err != nil {
		raise("a machine of an invalid configuration: %v", err)
	}
	v := &VirtualMachine{pointer: &pointer{}, config: config, notify: make(chan VirtualMachineState, 256)} // more than any test makes
	v.changed = sync.NewCond(&v.mu)
	return v, nil
}

// State is what the machine does now.
func (v *VirtualMachine) State() VirtualMachineState {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.state
}

// StateChangedNotify tells each change of state, to one of its readers.
func (v *VirtualMachine) StateChangedNotify() <-chan VirtualMachineState { return v.notify }

// set changes the state; v.mu is held.
func (v *VirtualMachine) set(s VirtualMachineState) {
	v.state = s
	if s == VirtualMachineStateStopped || s == VirtualMachineStateError {
		if v.guest != nil {
			v.guest.end()
		}
		world.leave(v) // the slot is free before anybody is told
	}
	v.notify <- s
	v.changed.Broadcast()
}

// move goes from one of some states to another, or says why not.
func (v *VirtualMachine) move(to VirtualMachineState, from ...VirtualMachineState) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if !slices.Contains(from, v.state) {
		return failure(ErrorInvalidVirtualMachineStateTransition, "from %v to %v", v.state, to)
	}
	v.set(to)
	return nil
}

type virtualMachineStartOptions struct{}

// VirtualMachineStartOption changes how a machine starts.
type VirtualMachineStartOption func(*virtualMachineStartOptions) error

// Start starts a machine that is stopped.
func (v *VirtualMachine) Start(opts ...VirtualMachineStartOption) error {
	if err := call(hooks().Queue); err != nil {
		return err
	}
	return v.start(hooks().Start)
}

// start goes through starting, in which the hook may take its time or fail, to running.
func (v *VirtualMachine) start(hook func(*Guest) error) error {
	if err := v.enter(VirtualMachineStateStarting); err != nil {
		return err
	}
	var err error
	if hook != nil {
		err = hook(v.guest)
	}
	if err != nil {
		v.fail(VirtualMachineStateStarting)
		return err
	}
	if err := v.move(VirtualMachineStateRunning, VirtualMachineStateStarting); err != nil {
		return failure(ErrorInternal, "the machine was stopped while it started")
	}
	v.guest.run()
	return nil
}

// fail is the end of a start: the state is told first, and the answer that explains it a
// moment later, for they come by two ways.
func (v *VirtualMachine) fail(from VirtualMachineState) {
	const moment = 20 * time.Millisecond
	_ = v.move(VirtualMachineStateStopped, from) // or it is stopped already
	time.Sleep(moment)
}

// enter takes one of the host's slots.
func (v *VirtualMachine) enter(s VirtualMachineState) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.state != VirtualMachineStateStopped && v.state != VirtualMachineStateError {
		return failure(ErrorInvalidVirtualMachineStateTransition, "from %v to %v", v.state, s)
	}
	if !world.admit(v) {
		return failure(ErrorVirtualMachineLimitExceeded, "The number of virtual machines exceeds the limit.")
	}
	v.guest = newGuest(v)
	v.set(s)
	return nil
}

// Pause lets a running machine stand still.
func (v *VirtualMachine) Pause() error {
	if err := call(hooks().Pause); err != nil {
		return err
	}
	if err := v.move(VirtualMachineStatePausing, VirtualMachineStateRunning); err != nil {
		return err
	}
	return v.move(VirtualMachineStatePaused, VirtualMachineStatePausing)
}

// Resume lets a machine that stands still run on.
func (v *VirtualMachine) Resume() error {
	if err := call(hooks().Resume); err != nil {
		return err
	}
	if err := v.move(VirtualMachineStateResuming, VirtualMachineStatePaused); err != nil {
		return err
	}
	if err := v.move(VirtualMachineStateRunning, VirtualMachineStateResuming); err != nil {
		return err
	}
	v.guest.run()
	return nil
}

func call(hook func() error) error {
	if hook == nil {
		return nil
	}
	return hook()
}

// CanStop reports whether Stop would be taken.
func (v *VirtualMachine) CanStop() bool {
	s := v.State()
	return s == VirtualMachineStateRunning || s == VirtualMachineStatePaused
}

// Stop ends a machine at once.
func (v *VirtualMachine) Stop() error {
	if err := call(hooks().Stop); err != nil {
		return err
	}
	if v.inInstallation() {
		world.fault("a machine is stopped while it is installed")
	}
	if err := v.move(VirtualMachineStateStopping, VirtualMachineStateRunning, VirtualMachineStatePaused); err != nil {
		return err
	}
	return v.move(VirtualMachineStateStopped, VirtualMachineStateStopping)
}

func (v *VirtualMachine) inInstallation() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.installing
}

// saved is what a file of a saved state holds here.
type saved struct {
	Key     string // of the host
	Machine string
	MACs    []string
	CPU     uint
	Memory  uint64
	Shares  int
}

// hostKey is what states of this host are encrypted with.
const hostKey = "standin"

func (v *VirtualMachine) snapshot() saved {
	s := saved{Key: hostKey, CPU: v.config.cpu, Memory: v.config.memory, Shares: len(v.config.shares)}
	if mac, ok := v.config.platform.(*MacPlatformConfiguration); ok {
		s.Machine = string(mac.machine.data)
	}
	for _, n := range v.config.network {
		s.MACs = append(s.MACs, n.mac.String())
	}
	return s
}

// SaveMachineStateToPath saves a machine that stands still.
func (v *VirtualMachine) SaveMachineStateToPath(saveFilePath string) error {
	if err := available(14); err != nil {
		return err
	}
	if _, err := v.config.ValidateSaveRestoreSupport(); err != nil {
		return err
	}
	if err := v.move(VirtualMachineStateSaving, VirtualMachineStatePaused); err != nil {
		return failure(ErrorInvalidVirtualMachineState, "the machine is not paused")
	}
	v.guest.saving()
	err := call(hooks().Save)
	if err == nil {
		raw, _ := json.Marshal(v.snapshot()) // of strings and numbers
		err = os.WriteFile(saveFilePath, raw, 0o600)
	}
	if back := v.move(VirtualMachineStatePaused, VirtualMachineStateSaving); err == nil {
		err = back
	}
	return err
}

// RestoreMachineStateFromURL puts a saved state into a machine that is stopped, which
// stands still then. It takes a path, whatever its name says.
func (v *VirtualMachine) RestoreMachineStateFromURL(saveFilePath string) error {
	if err := available(14); err != nil {
		return err
	}
	if _, err := v.config.ValidateSaveRestoreSupport(); err != nil {
		return err
	}
	if err := v.enter(VirtualMachineStateRestoring); err != nil {
		return err
	}
	err := call(hooks().Restore)
	if err == nil {
		err = v.matches(saveFilePath)
	}
	if err != nil {
		v.fail(VirtualMachineStateRestoring)
		return err
	}
	v.guest.restored = true
	return v.move(VirtualMachineStatePaused, VirtualMachineStateRestoring)
}

// matches says why a file is no state of this machine.
func (v *VirtualMachine) matches(path string) error {
	raw, err := os.ReadFile(path)
	if err != nil {
		return failure(ErrorRestore, "reading: %v", err)
	}
	var s saved
	if err := json.Unmarshal(raw, &s); err != nil || s.Key != hostKey {
		return failure(ErrorRestore, "permission denied")
	}
	if now := v.snapshot(); fmt.Sprint(s) != fmt.Sprint(now) {
		return failure(ErrorRestore, "invalid argument")
	}
	return nil
}
