// Package runner is the life of a virtual machine with its runner, as one table, and
// the matching of jobs with runners as GitHub does it.
//
// It is pure: it reads no clock, talks to nobody and starts nothing. What runs inside
// the guest is runner/guest; which node a machine is placed on is decided in placement;
// who may write which move is decided by the callers: the leader (controller) places,
// claims and gives up, a node reports everything else, and server walks a report
// through this table.
package runner

import (
	"errors"
	"fmt"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// Event is what can happen to a VM.
type Event string

// The events, in the order of a good life.
const (
	Accepted Event = "accepted" // the node began with it: leases, clones, starts
	Answered Event = "answered" // the guest answers
	Started  Event = "started"  // the guest runs a runner with our JIT config
	TookJob  Event = "took job" // the runner was given a job
	Ended    Event = "ended"    // the node has torn it down, for whatever reason
	GivenUp  Event = "given up" // the leader gave it up: GitHub no longer knows its runner
)

// Row is one line of the table: event On moves a VM from From to To.
type Row struct {
	From fleet.VMState
	On   Event
	To   fleet.VMState
}

// Table is every move there is; what is not in it does not happen. A node may skip
// nothing: several steps between two of its reports are walked one by one.
var Table = []Row{
	{fleet.VMPlaced, Accepted, fleet.VMBooting},
	{fleet.VMBooting, Answered, fleet.VMWarm},
	{fleet.VMWarm, Started, fleet.VMRegistered},
	{fleet.VMRegistered, TookJob, fleet.VMBusy},

	{fleet.VMPlaced, Ended, fleet.VMDone}, // refused, or destroyed before it began
	{fleet.VMBooting, Ended, fleet.VMDone},
	{fleet.VMWarm, Ended, fleet.VMDone},
	{fleet.VMRegistered, Ended, fleet.VMDone},
	{fleet.VMBusy, Ended, fleet.VMDone},

	{fleet.VMPlaced, GivenUp, fleet.VMLost},
	{fleet.VMBooting, GivenUp, fleet.VMLost},
	{fleet.VMWarm, GivenUp, fleet.VMLost},
	{fleet.VMRegistered, GivenUp, fleet.VMLost},
	{fleet.VMBusy, GivenUp, fleet.VMLost},
}

// States are all states in the order of a good life.
var States = []fleet.VMState{
	fleet.VMPlaced, fleet.VMBooting, fleet.VMWarm, fleet.VMRegistered, fleet.VMBusy,
	fleet.VMDone, fleet.VMLost,
}

// Events are all events in the order of a good life.
var Events = []Event{Accepted, Answered, Started, TookJob, Ended, GivenUp}

// Next is where event e takes a VM in state s; ok is false if the table has no such move.
func Next(s fleet.VMState, e Event) (to fleet.VMState, ok bool) {
	for _, row := range Table {
		if row.From == s && row.On == e {
			return row.To, true
		}
	}
	return s, false
}

// Apply moves vm by e, which happened at the given time, and sets the time of the new
// state, never before the time of the one it leaves (clocks differ). If the table has
// no such move, vm comes back as it was, and false.
//
// A claim's sealed JIT config is erased as soon as nobody needs it: when the runner has
// started and when the VM is finished. The claim is copied first: vm may come from a
// shared view.
func Apply(vm fleet.VM, e Event, at time.Time) (fleet.VM, bool) {
	to, ok := Next(vm.State, e)
	if !ok {
		return vm, false
	}
	if entered := EnteredAt(vm); at.Before(entered) {
		at = entered
	}
	vm.State = to
	if field := enteredField(&vm); field != nil {
		*field = at
	}
	if vm.Claim != nil && (e == Started || to.Final()) {
		claim := *vm.Claim
		claim.Sealed = ""
		claim.Started = claim.Started || e == Started
		vm.Claim = &claim
	}
	return vm, true
}

// EnteredAt is when vm came into the state it is in.
func EnteredAt(vm fleet.VM) time.Time {
	if field := enteredField(&vm); field != nil {
		return *field
	}
	return time.Time{}
}

// enteredField is the field that holds when vm came into its state; nil for a state
// that does not exist.
func enteredField(vm *fleet.VM) *time.Time {
	switch vm.State {
	case fleet.VMPlaced:
		return &vm.PlacedAt
	case fleet.VMBooting:
		return &vm.BootingAt
	case fleet.VMWarm:
		return &vm.WarmAt
	case fleet.VMRegistered:
		return &vm.RegisteredAt
	case fleet.VMBusy:
		return &vm.BusyAt
	case fleet.VMDone, fleet.VMLost:
		return &vm.DoneAt
	}
	return nil
}

// Report is a node's word on one of its VMs.
type Report struct {
	State fleet.VMState // booting, warm, registered, busy or done
	// When it came into each state by the node's clock; zero: it did not, or not known.
	BootingAt, WarmAt, RegisteredAt, BusyAt, DoneAt time.Time
	// Now caps these times (a node's clock may be ahead) and stands in for a missing one.
	Now time.Time
}

// Move is one step of a VM's life.
type Move struct {
	On       Event
	From, To fleet.VMState
	At       time.Time
}

// ErrReport says that a report names a state that a node cannot report.
var ErrReport = errors.New("not a state that a node reports (want booting, warm, registered, busy or done)")

// Advance walks vm forward through the table to the reported state and returns the
// moves it took. A report behind the record, or on a finished VM, moves nothing: life
// does not go back. It fails only with ErrReport.
//
// A VM reported done is first walked through every state that the report has a time
// for, so that its phases are known even if it lived between two reports.
func Advance(vm fleet.VM, r Report) (fleet.VM, []Move, error) {
	steps := []step{{Accepted, r.BootingAt}, {Answered, r.WarmAt}, {Started, r.RegisteredAt}, {TookJob, r.BusyAt}}

	target := 0 // how many of the steps have happened
	switch r.State {
	case fleet.VMBooting:
		target = 1
	case fleet.VMWarm:
		target = 2
	case fleet.VMRegistered:
		target = 3
	case fleet.VMBusy:
		target = 4
	case fleet.VMDone:
		for i, s := range steps {
			if !s.at.IsZero() {
				target = i + 1
			}
		}
	case fleet.VMPlaced, fleet.VMLost:
		return vm, nil, fmt.Errorf("VM %s reported %q: %w", vm.ID, r.State, ErrReport)
	default:
		return vm, nil, fmt.Errorf("VM %s reported %q: %w", vm.ID, r.State, ErrReport)
	}

	var moves []Move
	take := func(e Event, at time.Time) {
		if at.IsZero() || at.After(r.Now) {
			at = r.Now
		}
		from := vm.State
		if next, ok := Apply(vm, e, at); ok {
			vm = next
			moves = append(moves, Move{On: e, From: from, To: vm.State, At: EnteredAt(vm)})
		}
	}
	for i, s := range steps[:target] {
		take(s.on, earliest(s.at, steps[i+1:target]))
	}
	if r.State == fleet.VMDone {
		take(Ended, r.DoneAt)
	}
	return vm, moves, nil
}

// earliest is at, or if that is not known the first known time of a later step: a step
// without a time of its own was over by then.
func earliest(at time.Time, later []step) time.Time {
	for _, s := range later {
		if !at.IsZero() {
			break
		}
		at = s.at
	}
	return at
}

// step is one reported step of a good life.
type step struct {
	on Event
	at time.Time
}

// Deadline is when the present phase of vm's life is over time, and the phase in a
// word: "boot", "warm", "claimed" (a runner is being made and started), "registered"
// or "life" (the longest a VM may live, even when busy). A finished VM has none: the
// zero time and "".
func Deadline(vm fleet.VM, d fleet.Deadlines) (at time.Time, what string) {
	d = d.WithDefaults()
	switch vm.State {
	case fleet.VMPlaced, fleet.VMBooting:
		at, what = vm.PlacedAt.Add(d.Boot), "boot"
	case fleet.VMWarm:
		at, what = vm.WarmAt.Add(d.Warm), "warm"
		if vm.Claim != nil {
			at, what = vm.Claim.At.Add(d.Registered), "claimed"
		}
	case fleet.VMRegistered:
		at, what = vm.RegisteredAt.Add(d.Registered), "registered"
	case fleet.VMBusy:
		at, what = vm.PlacedAt.Add(d.Life), "life"
	case fleet.VMDone, fleet.VMLost:
		return time.Time{}, ""
	}
	if life := vm.PlacedAt.Add(d.Life); life.Before(at) {
		at, what = life, "life"
	}
	return at, what
}
