package runner

import (
	"errors"
	"flag"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/paddock-ci/paddock/fleet"
)

var update = flag.Bool("update", false, "write docs/runner-life.md again")

var t0 = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func after(seconds int) time.Time { return t0.Add(time.Duration(seconds) * time.Second) }

func placed() fleet.VM {
	return fleet.VM{ID: "vmaaaaaa", Node: "mac1", State: fleet.VMPlaced, PlacedAt: t0}
}

func TestDiagramPage(t *testing.T) {
	const page = "../docs/runner-life.md"
	if *update {
		if err := os.WriteFile(page, []byte(Diagram()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(Diagram(), string(got)); diff != "" {
		t.Errorf("%s is not what the table says; run go test ./runner -update\n%s", page, diff)
	}
}

// The table is a function (one row for each state and event), every live state can end
// and be given up, and no row leaves a finished state.
func TestTable(t *testing.T) {
	seen := map[Row]bool{}
	for _, row := range Table {
		key := Row{From: row.From, On: row.On}
		if seen[key] {
			t.Errorf("two rows for %s in %s", row.On, row.From)
		}
		seen[key] = true
		if row.From.Final() {
			t.Errorf("%s leaves the finished state %s", row.On, row.From)
		}
	}
	for _, s := range States {
		for _, e := range []Event{Ended, GivenUp} {
			if to, ok := Next(s, e); ok == s.Final() || !to.Final() {
				t.Errorf("%s in %s leads to %s, %t", e, s, to, ok)
			}
		}
	}
}

func TestAdvance(t *testing.T) {
	busy := Report{
		State: fleet.VMBusy, Now: after(60),
		BootingAt: after(1), WarmAt: after(10), RegisteredAt: after(20), BusyAt: after(25),
	}
	done := busy
	done.State, done.DoneAt = fleet.VMDone, after(50)

	for name, c := range map[string]struct {
		vm     func(*fleet.VM)
		report Report
		state  fleet.VMState
		on     []Event
	}{
		"one step":            {nil, Report{State: fleet.VMBooting, Now: after(2)}, fleet.VMBooting, []Event{Accepted}},
		"several at once":     {nil, busy, fleet.VMBusy, []Event{Accepted, Answered, Started, TookJob}},
		"a whole life":        {nil, done, fleet.VMDone, []Event{Accepted, Answered, Started, TookJob, Ended}},
		"ended while booting": {nil, Report{State: fleet.VMDone, Now: after(9), BootingAt: after(1)}, fleet.VMDone, []Event{Accepted, Ended}},
		"refused":             {nil, Report{State: fleet.VMDone, Now: after(9)}, fleet.VMDone, []Event{Ended}},
		"the rest":            {func(v *fleet.VM) { v.State, v.WarmAt = fleet.VMWarm, after(10) }, busy, fleet.VMBusy, []Event{Started, TookJob}},
		"behind the record":   {func(v *fleet.VM) { v.State = fleet.VMBusy }, Report{State: fleet.VMWarm, Now: after(9)}, fleet.VMBusy, nil},
		"lost stays lost":     {func(v *fleet.VM) { v.State = fleet.VMLost }, busy, fleet.VMLost, nil},
		"done stays done":     {func(v *fleet.VM) { v.State = fleet.VMDone }, done, fleet.VMDone, nil},
	} {
		t.Run(name, func(t *testing.T) {
			vm := placed()
			if c.vm != nil {
				c.vm(&vm)
			}
			got, moves, err := Advance(vm, c.report)
			if err != nil {
				t.Fatal(err)
			}
			var on []Event
			for _, m := range moves {
				on = append(on, m.On)
			}
			if got.State != c.state || !slices.Equal(on, c.on) {
				t.Errorf("state %s by %v, want %s by %v", got.State, on, c.state, c.on)
			}
		})
	}
}

func TestAdvanceTimes(t *testing.T) {
	// The node's clock is ahead, and it never saw the guest answer by itself.
	vm, _, err := Advance(placed(), Report{
		State: fleet.VMDone, Now: after(60),
		BootingAt: after(-5), RegisteredAt: after(20), DoneAt: after(600),
	})
	if err != nil {
		t.Fatal(err)
	}
	want := placed()
	want.State = fleet.VMDone
	want.BootingAt = t0     // not before it was placed
	want.WarmAt = after(20) // by then it was
	want.RegisteredAt = after(20)
	want.DoneAt = after(60) // not in the future
	if diff := cmp.Diff(want, vm); diff != "" {
		t.Error(diff)
	}
}

func TestAdvanceRefusesWhatANodeCannotSay(t *testing.T) {
	for _, s := range []fleet.VMState{fleet.VMPlaced, fleet.VMLost, "", "asleep"} {
		if _, _, err := Advance(placed(), Report{State: s, Now: t0}); !errors.Is(err, ErrReport) {
			t.Errorf("%q: %v, want ErrReport", s, err)
		}
	}
}

func TestJITConfigIsErased(t *testing.T) {
	for _, e := range []Event{Started, Ended, GivenUp} {
		vm := placed()
		claim := fleet.Claim{Runner: "paddock-f-vmaaaaaa-1", Sealed: "sealed"}
		vm.State, vm.Claim = fleet.VMWarm, &claim
		got, ok := Apply(vm, e, after(1))
		if !ok || got.Claim.Sealed != "" || got.Claim.Started != (e == Started) {
			t.Errorf("after %s: %t, %+v", e, ok, got.Claim)
		}
		if claim.Sealed != "sealed" {
			t.Errorf("%s wrote into the shared claim", e)
		}
	}
}

func TestDeadline(t *testing.T) {
	claim := &fleet.Claim{At: after(100)}
	for name, c := range map[string]struct {
		vm   fleet.VM
		d    fleet.Deadlines
		at   time.Time
		what string
	}{
		"placed":     {fleet.VM{State: fleet.VMPlaced, PlacedAt: t0}, fleet.Deadlines{}, after(600), "boot"},
		"booting":    {fleet.VM{State: fleet.VMBooting, PlacedAt: t0, BootingAt: after(9)}, fleet.Deadlines{}, after(600), "boot"},
		"warm":       {fleet.VM{State: fleet.VMWarm, PlacedAt: t0, WarmAt: after(30)}, fleet.Deadlines{}, after(1830), "warm"},
		"claimed":    {fleet.VM{State: fleet.VMWarm, PlacedAt: t0, WarmAt: after(30), Claim: claim}, fleet.Deadlines{}, after(400), "claimed"},
		"registered": {fleet.VM{State: fleet.VMRegistered, PlacedAt: t0, RegisteredAt: after(40)}, fleet.Deadlines{}, after(340), "registered"},
		"busy":       {fleet.VM{State: fleet.VMBusy, PlacedAt: t0, BusyAt: after(50)}, fleet.Deadlines{}, after(6 * 3600), "life"},
		"a short life": {fleet.VM{State: fleet.VMWarm, PlacedAt: t0, WarmAt: after(30)},
			fleet.Deadlines{Life: time.Minute}, after(60), "life"},
		"done": {fleet.VM{State: fleet.VMDone, PlacedAt: t0}, fleet.Deadlines{}, time.Time{}, ""},
	} {
		if at, what := Deadline(c.vm, c.d); !at.Equal(c.at) || what != c.what {
			t.Errorf("%s: %s at %s, want %s at %s", name, what, at, c.what, c.at)
		}
	}
}

// FuzzLife feeds any sequence of events, at any times, and any report after it: no
// finished state is ever left, no time lies before the one of the state before, and a
// VM never goes back.
func FuzzLife(f *testing.F) {
	f.Add([]byte{0, 1, 1, 2, 2, 3, 3, 4, 4, 5}, uint8(4))
	f.Add([]byte{4, 0, 0, 0, 5, 9}, uint8(6))
	f.Add([]byte{0, 200, 1, 3, 2, 1, 5, 0, 3, 3}, uint8(2))
	f.Fuzz(func(t *testing.T, script []byte, reported uint8) {
		vm := placed()
		check := func(next fleet.VM) {
			if vm.State.Final() && next.State != vm.State {
				t.Fatalf("%s was left for %s", vm.State, next.State)
			}
			if slices.Index(States, next.State) < slices.Index(States, vm.State) {
				t.Fatalf("went back from %s to %s", vm.State, next.State)
			}
			if EnteredAt(next).Before(EnteredAt(vm)) {
				t.Fatalf("%s at %s, %s at %s", vm.State, EnteredAt(vm), next.State, EnteredAt(next))
			}
			vm = next
		}
		for len(script) >= 2 {
			next, ok := Apply(vm, Events[int(script[0])%len(Events)], after(int(script[1])-100))
			if !ok && !cmp.Equal(vm, next) {
				t.Fatalf("changed without a move: %s", cmp.Diff(vm, next))
			}
			check(next)
			script = script[2:]
		}
		next, moves, err := Advance(vm, Report{State: States[int(reported)%len(States)], Now: after(50), WarmAt: after(70)})
		if err != nil && (len(moves) > 0 || !cmp.Equal(vm, next)) {
			t.Fatalf("moved in spite of %v", err)
		}
		check(next)
	})
}
