package node

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/vm"
)

// newSavingStand is a node whose machines can be saved.
func newSavingStand(t *testing.T) *stand {
	s := newStand(t)
	s.states, s.yard.saves = true, true
	return s
}

// warm brings up a VM and returns what was reported of it; destroy ends one. Both take
// the steps of a pre-warmed VM.
func (s *stand) warm(t *testing.T, id fleet.VMID, change func(*api.VMOrder)) api.VMReport {
	t.Helper()
	order := s.order(id, jobGood)
	if change != nil {
		change(&order)
	}
	s.office.place(order)
	return s.office.awaitState(t, id, fleet.VMWarm)
}

func (s *stand) destroy(t *testing.T, ids ...fleet.VMID) {
	t.Helper()
	s.office.order(func() {
		for _, id := range ids {
			s.office.destroy[id] = "surplus"
		}
	})
	for _, id := range ids {
		s.office.awaitState(t, id, fleet.VMDone)
	}
}

// stateDirs are the states on disk that are whole, without their image.
func (s *stand) stateDirs(t *testing.T) []string {
	t.Helper()
	marks, err := filepath.Glob(filepath.Join(s.dir, "states", "*", "*", stateMark))
	if err != nil {
		t.Fatal(err)
	}
	return marks
}

// awaitStates waits until so many states are reported as free.
func (s *stand) awaitStates(t *testing.T, n int) fleet.ImageStart {
	t.Helper()
	var start fleet.ImageStart
	s.office.await(t, fmt.Sprintf("%d free states", n), func() bool {
		i, _ := s.office.last.Node.Image(base)
		start = i.Start
		return i.Start.States == n
	})
	return start
}

// TestSavedStates: the first VMs of an image boot cold, one per slot, and are saved once
// each; all later ones start from those states, never two of one at once.
func TestSavedStates(t *testing.T) {
	s := newSavingStand(t)
	stop := s.agent(t)
	for n, want := range []fleet.StartTier{fleet.TierCold, fleet.TierSaved, fleet.TierSaved} {
		a, b := fleet.VMID(fmt.Sprintf("aaaaaa%02d", n)), fleet.VMID(fmt.Sprintf("bbbbbb%02d", n))
		if r := s.warm(t, a, nil); r.Tier != want {
			t.Errorf("round %d: the first VM's tier is %s, want %s", n, r.Tier, want)
		}
		if r := s.warm(t, b, nil); r.Tier != want {
			t.Errorf("round %d: the second VM's tier is %s, want %s", n, r.Tier, want)
		}
		s.destroy(t, a, b)
		s.awaitStates(t, 2)
	}
	start := s.awaitStates(t, 2)
	if s.yard.tries != 2 || len(s.stateDirs(t)) != 2 {
		t.Errorf("saved %d times, %d states", s.yard.tries, len(s.stateDirs(t)))
	}
	if start.Cold <= 0 || start.Saved <= 0 || start.Cold%startStep != 0 || start.Saved%startStep != 0 {
		t.Errorf("measured %+v", start)
	}
	// A job runs in a VM from a state as in any other.
	s.office.order(func() { s.office.start["cccccccc"] = runnerOrder("cccccccc") })
	s.office.place(s.order("cccccccc", jobGood))
	if r := s.office.awaitState(t, "cccccccc", fleet.VMDone); r.Reason != "runner exited 0" || r.Tier != fleet.TierSaved {
		t.Errorf("%+v", r)
	}
	stop()
	s.checkEmpty(t)
}

// TestStateFitsOrNot: a state serves VMs that are alike in all that a machine is made of.
func TestStateFitsOrNot(t *testing.T) {
	s := newSavingStand(t)
	s.slots = 1
	stop := s.agent(t)
	s.warm(t, "aaaaaaaa", nil)
	s.destroy(t, "aaaaaaaa")
	s.awaitStates(t, 1)
	for i, c := range []struct {
		name   string
		change func(*api.VMOrder)
		want   fleet.StartTier
	}{
		{"alike", nil, fleet.TierSaved},
		{"another pool and environment", func(o *api.VMOrder) { o.Pool, o.Env = "q", map[string]string{"A": "b"} }, fleet.TierSaved},
		{"more cores", func(o *api.VMOrder) { o.CPU = 4 }, fleet.TierCold},
		{"more memory", func(o *api.VMOrder) { o.Memory = 1 << 30 }, fleet.TierCold},
		{"a larger disk", func(o *api.VMOrder) { o.Disk = 1 << 30 }, fleet.TierCold},
		{"a mount", func(o *api.VMOrder) { o.Mounts = []fleet.Mount{{Name: "m", Path: "/m"}} }, fleet.TierCold},
		{"more cores again", func(o *api.VMOrder) { o.CPU = 4 }, fleet.TierSaved},
	} {
		id := fleet.VMID(fmt.Sprintf("vm%06d", i))
		if r := s.warm(t, id, c.change); r.Tier != c.want {
			t.Errorf("%s: tier %s, want %s", c.name, r.Tier, c.want)
		}
		s.destroy(t, id)
	}
	stop()
	s.checkEmpty(t)
}

// TestStateFailures: whatever a state's life can bring, a VM starts at the latest with
// the next order, and nothing of the failure is left.
func TestStateFailures(t *testing.T) {
	for _, tt := range []struct {
		name    string
		before  func(*stand) // the first VM, which would be saved
		between func(*stand) // the second, which would start from the state
		reason  string       // of the second's end, if it fails
		tier    fleet.StartTier
		third   fleet.StartTier // of the VM after those
		saves   int             // calls of Save after all three
	}{
		{name: "all goes well", tier: fleet.TierSaved, third: fleet.TierSaved, saves: 1},
		{name: "a driver that cannot save is asked once", before: func(s *stand) { s.yard.saves = false },
			tier: fleet.TierCold, third: fleet.TierCold, saves: 1},
		{name: "saving fails halfway", before: func(s *stand) { s.yard.saveErr = errors.New("disk full") },
			between: func(s *stand) { s.yard.saveErr = nil }, tier: fleet.TierCold, third: fleet.TierSaved, saves: 2},
		{name: "the disk has no room", before: func(s *stand) { s.free.Store(cloneGrowth + unknownMemory - 1) },
			between: func(s *stand) { s.free.Store(2 * cloneGrowth) }, tier: fleet.TierCold, third: fleet.TierSaved, saves: 1},
		{name: "the disk fills up", between: func(s *stand) { s.free.Store(cloneGrowth / 2) },
			tier: fleet.TierCold, third: fleet.TierCold, saves: 1},
		{name: "no slot on the host: the state stays", between: func(s *stand) { s.yard.stateErr = vm.ErrAtCapacity },
			tier: fleet.TierSaved, reason: "booting from a saved state: no free machine slot", third: fleet.TierSaved, saves: 1},
		// Whatever else goes wrong, the same VM boots cold, and its state replaces the bad one.
		{name: "the state is broken", between: func(s *stand) { s.yard.stateErr = fmt.Errorf("of another version: %w", vm.ErrState) },
			tier: fleet.TierCold, third: fleet.TierCold, saves: 3},
		{name: "the start fails otherwise", between: func(s *stand) { s.yard.stateErr = &vm.BootError{Err: errors.New("odd")} },
			tier: fleet.TierCold, third: fleet.TierCold, saves: 3},
		{name: "the start hangs", between: func(s *stand) { s.yard.stateHang = true },
			tier: fleet.TierCold, third: fleet.TierCold, saves: 3},
		{name: "the machine ends at once", between: func(s *stand) { s.yard.stillborn = true },
			tier: fleet.TierCold, third: fleet.TierCold, saves: 3},
		{name: "the machine from it will not go at first", between: func(s *stand) { s.yard.mute, s.yard.stubborn = true, 3 },
			tier: fleet.TierCold, third: fleet.TierCold, saves: 3},
		{name: "the guest cannot be woken", between: func(s *stand) { s.yard.wakeErr = errors.New("no such clock") },
			tier: fleet.TierCold, third: fleet.TierCold, saves: 3},
		{name: "the guest does not answer", between: func(s *stand) { s.yard.mute = true },
			tier: fleet.TierCold, third: fleet.TierCold, saves: 3},
		{name: "a file of the state cannot be cloned", between: func(s *stand) { s.damage(vm.IdentityFile, true) },
			tier: fleet.TierCold, third: fleet.TierSaved, saves: 2},
		{name: "the state has no disk", between: func(s *stand) { s.damage(vm.DiskFile, false) },
			tier: fleet.TierCold, third: fleet.TierSaved, saves: 2},
		{name: "the state has no VM config", between: func(s *stand) { s.damage(vm.ConfigFile, false) },
			tier: fleet.TierCold, third: fleet.TierSaved, saves: 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newSavingStand(t)
				s.slots = 1
				if tt.before != nil {
					tt.before(s)
				}
				stop := s.agent(t)
				s.warm(t, "aaaaaaaa", nil)
				s.destroy(t, "aaaaaaaa")
				synctest.Wait()
				if tt.between != nil {
					tt.between(s)
				}
				time.Sleep(time.Minute) // in which a sync looks at the disk
				s.office.place(s.order("bbbbbbbb", jobGood))
				time.Sleep(10 * time.Minute / savedShare) // the most that a bad state may cost
				if tt.reason == "" {
					s.office.awaitState(t, "bbbbbbbb", fleet.VMWarm)
					s.destroy(t, "bbbbbbbb")
				} else {
					s.office.awaitDone(t, "bbbbbbbb")
				}
				r := s.office.report("bbbbbbbb")
				if r.Tier != tt.tier || !strings.Contains(r.Reason, tt.reason) || r.Failed != (tt.reason != "") {
					t.Errorf("the second VM: %+v", r)
				}
				synctest.Wait()
				if tt.reason != "" || tt.between == nil {
					s.yard.stateErr, s.yard.wakeErr, s.yard.mute = nil, nil, false
				}
				s.office.place(s.order("cccccccc", jobGood))
				time.Sleep(10 * time.Minute / savedShare)
				if r := s.office.awaitState(t, "cccccccc", fleet.VMWarm); r.Tier != tt.third {
					t.Errorf("the third VM: %+v", r)
				}
				s.destroy(t, "cccccccc")
				stop()
				if s.yard.tries != tt.saves {
					t.Errorf("%d calls of Save, want %d", s.yard.tries, tt.saves)
				}
				s.checkEmpty(t)
			})
		})
	}
}

// damage takes a file out of every state, and with dir puts a directory in its place.
func (s *stand) damage(name string, dir bool) {
	files, err := filepath.Glob(filepath.Join(s.dir, "states", "*", "*", name))
	if err == nil && len(files) == 0 {
		err = errors.New("no state has a " + name)
	}
	for _, f := range files {
		err = errors.Join(err, os.Remove(f))
		if dir {
			err = errors.Join(err, os.Mkdir(f, 0o700))
		}
	}
	if err != nil {
		panic(err)
	}
}

// TestSeatAfterARestart: a VM that outlives its agent keeps its seat, whether its machine
// started from the state or was saved as it.
func TestSeatAfterARestart(t *testing.T) {
	s := newSavingStand(t)
	s.keep = true
	stop := s.agent(t)
	s.warm(t, "aaaaaaaa", nil) // is saved
	stop()
	stop = s.agent(t)
	if r := s.warm(t, "bbbbbbbb", nil); r.Tier != fleet.TierCold {
		t.Errorf("a state was used whose first machine lives: %+v", r)
	}
	s.destroy(t, "aaaaaaaa", "bbbbbbbb")
	s.awaitStates(t, 2)
	s.warm(t, "cccccccc", nil) // from the first
	stop()
	stop = s.agent(t)
	s.awaitStates(t, 1)
	if r := s.warm(t, "dddddddd", nil); r.Tier != fleet.TierSaved {
		t.Errorf("the second state is free: %+v", r)
	}
	s.awaitStates(t, 0)
	s.destroy(t, "cccccccc", "dddddddd")
	s.awaitStates(t, 2)
	// An agent that saves no states removes those of before.
	stop()
	s.states = false
	stop = s.agent(t)
	if r := s.warm(t, "eeeeeeee", nil); r.Tier != fleet.TierCold {
		t.Errorf("%+v", r)
	}
	s.destroy(t, "eeeeeeee")
	s.keep = false
	stop()
	if left := s.stateDirs(t); len(left) != 0 {
		t.Errorf("states left: %v", left)
	}
	s.checkEmpty(t)
}

// TestNoStatesBesideAStranger: a machine that the journal does not know may have the
// identity of any state, so none is used until it is gone.
func TestNoStatesBesideAStranger(t *testing.T) {
	s := newSavingStand(t)
	stop := s.agent(t)
	s.warm(t, "aaaaaaaa", nil)
	s.destroy(t, "aaaaaaaa")
	s.awaitStates(t, 1)
	stop()
	running(t, s, s.order("stranger", ""))
	stop = s.agent(t)
	if r := s.warm(t, "bbbbbbbb", nil); r.Tier != fleet.TierCold {
		t.Errorf("beside a stranger: %+v", r)
	}
	s.destroy(t, "bbbbbbbb")
	s.awaitStates(t, 0)
	stop()
	s.yard.machines["stranger"].die("ended by a person")
	stop = s.agent(t)
	if r := s.warm(t, "cccccccc", nil); r.Tier != fleet.TierSaved {
		t.Errorf("and after it: %+v", r)
	}
	s.destroy(t, "cccccccc")
	stop()
	s.checkEmpty(t)
}

// TestKilledBetweenStateAndWarm: the agent died after the machine had started from a
// state and before the guest was woken: the next one wakes it before it is warm.
func TestKilledBetweenStateAndWarm(t *testing.T) {
	s := newSavingStand(t)
	s.keep = true
	stop := s.agent(t)
	s.warm(t, "aaaaaaaa", nil)
	s.destroy(t, "aaaaaaaa")
	s.awaitStates(t, 1)
	stop()
	mark, err := os.ReadFile(s.stateDirs(t)[0])
	if err != nil {
		t.Fatal(err)
	}
	m, err := decodeMark(mark)
	if err != nil {
		t.Fatal(err)
	}
	order := s.order("bbbbbbbb", jobGood)
	state := filepath.Dir(s.stateDirs(t)[0])
	dir := s.clone(t, order)
	for _, name := range vm.SavedFiles {
		data, err := os.ReadFile(filepath.Join(state, name))
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), data, 0o600)
		}
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
	}
	if _, err := s.yard.Boot(t.Context(), vm.Spec{ID: order.ID, Dir: dir, Agent: true, State: state}); err != nil {
		t.Fatal(err)
	}
	j := &journal{dir: filepath.Join(s.dir, "journal"), node: "mac-1"}
	report := api.VMReport{ID: order.ID, Order: order, State: fleet.VMBooting, BootingAt: time.Now(), Tier: fleet.TierSaved}
	if err := j.put(record{Report: report, Seat: &m.Seat}); err != nil {
		t.Fatal(err)
	}
	woken := len(s.yard.entropy)
	stop = s.agent(t)
	s.office.awaitState(t, order.ID, fleet.VMWarm)
	s.yard.mu.Lock()
	if s.yard.machines[order.ID].asleep || len(s.yard.entropy) != woken+1 {
		t.Error("it is warm and was not woken")
	}
	s.yard.mu.Unlock()
	s.destroy(t, order.ID)
	s.keep = false
	stop()
	s.checkEmpty(t)
}

// TestStatesAtStart: what a crash or a change left in the states' directory goes, and
// what is whole stays.
func TestStatesAtStart(t *testing.T) {
	key := strings.Repeat("a", 16)
	good := seat{Image: base, Key: key, Number: 1}
	for _, tt := range []struct {
		name  string
		spoil func(t *testing.T, s *states, dir string)
		stays bool
	}{
		{name: "whole", stays: true, spoil: func(*testing.T, *states, string) {}},
		{name: "not finished", spoil: func(t *testing.T, _ *states, dir string) { must(t, os.Remove(filepath.Join(dir, stateMark))) }},
		{name: "a mark of another", spoil: func(t *testing.T, s *states, dir string) {
			must(t, os.Rename(dir, s.path(seat{Image: base, Key: key, Number: 0})))
		}},
		{name: "a file is shorter", spoil: func(t *testing.T, _ *states, dir string) { must(t, os.Truncate(filepath.Join(dir, vm.DiskFile), 1)) }},
		{name: "a file is missing", spoil: func(t *testing.T, _ *states, dir string) { must(t, os.Remove(filepath.Join(dir, vm.DiskFile))) }},
		{name: "fewer slots", spoil: func(_ *testing.T, s *states, _ string) { s.seats = 1 }},
		{name: "no mark but bytes", spoil: func(t *testing.T, _ *states, dir string) {
			must(t, os.WriteFile(filepath.Join(dir, stateMark), []byte("{"), 0o600))
		}},
		{name: "its image is gone", spoil: func(t *testing.T, s *states, dir string) {
			must(t, s.open())
			s.prune(nil)
		}},
		{name: "nobody asked for it in eight days", spoil: func(t *testing.T, s *states, dir string) {
			old := time.Now().Add(-8 * 24 * time.Hour)
			must(t, os.Chtimes(filepath.Join(dir, stateMark), old, old))
			must(t, s.open())
			s.prune([]fleet.NodeImage{{Digest: base}})
		}},
		{name: "old, and in use", stays: true, spoil: func(t *testing.T, s *states, dir string) {
			old := time.Now().Add(-8 * 24 * time.Hour)
			must(t, os.Chtimes(filepath.Join(dir, stateMark), old, old))
			must(t, s.open())
			s.hold("aaaaaaaa", good)
			s.prune(nil)
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			log := newStand(t).log
			top := t.TempDir()
			s := newStates(top, 2, time.Now, log)
			dir, err := s.begin(good)
			must(t, err)
			must(t, os.WriteFile(filepath.Join(dir, vm.DiskFile), []byte("disk"), 0o600))
			must(t, s.finish(good))
			again := newStates(top, 2, time.Now, log)
			tt.spoil(t, again, dir)
			must(t, again.open())
			if again.ready[good] != tt.stays {
				t.Errorf("it can be started from: %v", again.ready[good])
			}
			if left, _ := filepath.Glob(filepath.Join(top, "*")); (len(left) > 0) != tt.stays {
				t.Errorf("left: %v", left)
			}
		})
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// FuzzMark: no bytes in a mark lead out of the states' directory.
func FuzzMark(f *testing.F) {
	f.Add([]byte(`{"format":1,"seat":{"image":"` + string(base) + `","key":"0123456789abcdef","number":1},"files":{"disk.img":4}}`))
	f.Add([]byte(`{"format":1,"seat":{"image":"sha256:..","key":"../../..","number":-1},"files":{"../x":4}}`))
	f.Add([]byte(`{`))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := decodeMark(data)
		if err != nil {
			return
		}
		s := newStates("top", 2, time.Now, nil)
		if rel, err := filepath.Rel("top", s.path(m.Seat)); err != nil || !filepath.IsLocal(rel) || len(strings.Split(rel, "/")) != 2 {
			t.Fatalf("%+v is at %s", m.Seat, s.path(m.Seat))
		}
	})
}
