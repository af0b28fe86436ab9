package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
)

// inBubble runs a test in virtual time, with an agent that is stopped at its end.
func inBubble(t *testing.T, f func(*testing.T, *stand)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { f(t, newStand(t)) })
}

func (o *office) count() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.calls
}

// TestParked: a quiet node makes one call per parked wait; a controller that does not
// park is not asked without end.
func TestParked(t *testing.T) {
	inBubble(t, func(t *testing.T, s *stand) {
		s.agent(t)
		time.Sleep(10 * time.Minute)
		if n := s.office.count(); n < 30 || n > 33 {
			t.Errorf("%d calls in 10 quiet minutes; want 30 and the first", n)
		}
		s.office.check(t)
	})
	t.Run("the controller does not park", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			o := newOffice()
			s := newStand(t)
			a, err := New(Config{ID: "mac-1", Dir: s.dir, Machines: s.yard, Images: s.shelf,
				Sync: func(ctx context.Context, r api.SyncRequest) (api.SyncReply, error) {
					r.Wait = 0
					return o.Sync(ctx, r)
				}})
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			if err := a.Run(ctx); err != nil {
				t.Fatal(err)
			}
			if n := o.count(); n > 305 {
				t.Errorf("%d calls in a minute", n)
			}
		})
	})
}

// TestNewsEndsAParkedCall: what happens on the node is reported at once, not when the
// parked call is over, and orders arrive at once as well.
func TestNewsEndsAParkedCall(t *testing.T) {
	inBubble(t, func(t *testing.T, s *stand) {
		s.agent(t)
		time.Sleep(5 * time.Second)
		began := time.Now()
		s.office.place(s.order("aaaaaaaa", jobGood))
		s.office.awaitState(t, "aaaaaaaa", fleet.VMWarm)
		s.office.order(func() { s.office.start["aaaaaaaa"] = runnerOrder("aaaaaaaa") })
		r := s.office.awaitState(t, "aaaaaaaa", fleet.VMDone)
		if took := time.Since(began); took > time.Second {
			t.Errorf("it took %v", took)
		}
		if r.Runner == nil || r.Runner.RunnerID != 7 {
			t.Errorf("reported runner: %+v", r.Runner)
		}
		s.office.check(t)
	})
}

// TestControllerAway: while the controller answers nothing for ten minutes, it is asked
// at least every five seconds and not much oftener, a job ends, and all is told after.
func TestControllerAway(t *testing.T) {
	inBubble(t, func(t *testing.T, s *stand) {
		s.office.start["aaaaaaaa"] = runnerOrder("aaaaaaaa")
		s.office.place(s.order("aaaaaaaa", jobGood))
		s.office.place(s.order("bbbbbbbb", jobGood))
		s.agent(t)
		s.office.awaitState(t, "bbbbbbbb", fleet.VMWarm)
		s.office.awaitState(t, "aaaaaaaa", fleet.VMDone)

		s.office.order(func() { s.office.fail = errors.New("503") })
		before := s.office.count()
		time.Sleep(10 * time.Minute)
		if n := s.office.count() - before; n < 120 || n > 260 {
			t.Errorf("%d calls in ten minutes", n)
		}
		if ids, _ := s.yard.List(); !slices.Equal(ids, []fleet.VMID{"bbbbbbbb"}) {
			t.Errorf("machines after ten minutes: %v", ids)
		}
		s.office.order(func() { s.office.fail = nil; s.office.start["bbbbbbbb"] = runnerOrder("bbbbbbbb") })
		s.office.awaitState(t, "bbbbbbbb", fleet.VMDone)
		s.office.check(t)
	})
}

// TestHangingCall: a call that is never answered is given up, and the next one goes out.
func TestHangingCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStand(t)
		calls := 0
		a, err := New(Config{ID: "mac-1", Dir: s.dir, Machines: s.yard, Images: s.shelf,
			Sync: func(ctx context.Context, _ api.SyncRequest) (api.SyncReply, error) {
				calls++
				<-ctx.Done()
				return api.SyncReply{}, ctx.Err()
			}})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := a.Run(ctx); err != nil {
			t.Fatal(err)
		}
		if calls < 3 || calls > 6 {
			t.Errorf("%d calls in a minute", calls)
		}
	})
}

// TestDoneUntilApplied: a finished VM stays in the journal and is reported, also by the
// next agent, until a reply says that the report is applied.
func TestDoneUntilApplied(t *testing.T) {
	inBubble(t, func(t *testing.T, s *stand) {
		s.office.deaf = true
		s.office.start["aaaaaaaa"] = runnerOrder("aaaaaaaa")
		s.office.place(s.order("aaaaaaaa", jobGood))
		stop := s.agent(t)
		s.office.awaitState(t, "aaaaaaaa", fleet.VMDone)
		time.Sleep(5 * time.Minute)
		stop()
		if s.office.gone["aaaaaaaa"] {
			t.Fatal("it left the journal unheard")
		}
		stop = s.agent(t)
		time.Sleep(time.Minute)
		if vms := s.office.latest().VMs; len(vms) != 1 || vms[0].Reason != "runner exited 0" {
			t.Fatalf("the next agent reports %+v", vms)
		}
		s.office.order(func() { s.office.deaf = false })
		s.office.await(t, "it leaves the journal", func() bool { return s.office.gone["aaaaaaaa"] })
		stop()
		s.checkEmpty(t)
	})
}

// TestSlots: whatever is ordered, never more VMs than slots; the others wait and have
// their turn, and none is lived twice though its order is repeated.
func TestSlots(t *testing.T) {
	inBubble(t, func(t *testing.T, s *stand) {
		const vms = 7
		most := 0
		for i := range vms {
			id := fleet.VMID(fmt.Sprintf("vm%06d", i))
			s.office.start[id] = runnerOrder(id)
			s.office.run[id] = s.order(id, jobGood)
		}
		stop := s.agent(t)
		s.office.await(t, "all are done", func() bool {
			ids, _ := s.yard.List()
			most = max(most, len(ids))
			return len(s.office.gone) == vms
		})
		s.office.order(func() { s.office.reports = map[fleet.VMID]api.VMReport{} }) // all are ordered again
		time.Sleep(time.Minute)
		stop()
		for id, n := range s.yard.boots {
			if n != 1 {
				t.Errorf("VM %s was booted %d times", id, n)
			}
		}
		if most > 2 || len(s.yard.boots) != vms {
			t.Errorf("%d VMs at once on 2 slots, %d booted", most, len(s.yard.boots))
		}
		s.checkEmpty(t)
	})
}

// TestStrangeOrders: ids that lead out of the directory are refused, a VM that we do not
// know is not destroyed, a second runner is not started.
func TestStrangeOrders(t *testing.T) {
	s := newStand(t)
	s.office.place(s.order("../../aaa", jobGood))
	s.office.destroy["zzzzzzzz"] = "never heard of it"
	s.office.place(s.order("aaaaaaaa", idleLasts))
	s.office.start["aaaaaaaa"] = runnerOrder("aaaaaaaa")
	stop := s.agent(t)
	s.office.awaitState(t, "aaaaaaaa", fleet.VMRegistered)
	second := runnerOrder("aaaaaaaa")
	second.Runner.Name = fleet.RunnerName("f", "aaaaaaaa", 2)
	s.office.mu.Lock()
	s.office.start["aaaaaaaa"] = second
	v := s.office.reports["aaaaaaaa"]
	v.Runner = nil
	s.office.reports["aaaaaaaa"] = v // so that the order is repeated
	s.office.revision++
	s.office.wake()
	s.office.mu.Unlock()
	s.office.await(t, "it is reported again", func() bool { return s.office.reports["aaaaaaaa"].Runner != nil })
	if name := s.office.report("aaaaaaaa").Runner.Name; name != "paddock-f-aaaaaaaa-1" {
		t.Errorf("the runner is %s", name)
	}
	if _, known := s.office.reports["../../aaa"]; known {
		t.Error("an id with slashes was lived")
	}
	stop()
	s.checkEmpty(t)
}

// TestInventory: the request says what the node is.
func TestInventory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStand(t)
		free := int64(5000)
		var kept string
		a, err := New(Config{
			ID: "mac-1", Tags: map[string]string{"site": "attic"}, CPU: 8, Memory: 1 << 30, Dir: s.dir, Driver: "yard", Version: "1.2.3",
			Machines: s.yard, Images: s.shelf, Rate: func() int64 { return 77 },
			Free: func() (int64, error) {
				if free == 0 {
					return 0, errors.New("no such file system")
				}
				return free, nil
			},
			Renewed: func(c string) error { kept = c; return nil },
			Sync: func(ctx context.Context, r api.SyncRequest) (api.SyncReply, error) {
				free = 0
				reply, err := s.office.Sync(ctx, r)
				reply.Credential = "new"
				return reply, err
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := a.Run(ctx); err != nil {
			t.Fatal(err)
		}
		n := s.office.last.Node
		if n.DiskFree != 5000 || n.PullRate != 77 || n.CPU != 8 || n.Memory != 1<<30 || n.Tags["site"] != "attic" ||
			n.Driver != "yard" || n.Version != "1.2.3" || n.Arch == "" || n.OS == "" || n.Session == "" || n.Session != s.office.last.Session {
			t.Errorf("reported %+v", n)
		}
		if i, ok := n.Image(base); !ok || i.State != fleet.ImageReady {
			t.Errorf("images reported: %+v", n.Images)
		}
		if s.office.last.Protocol != api.Protocol || kept != "new" {
			t.Errorf("protocol %d, credential %q", s.office.last.Protocol, kept)
		}
	})
}

// TestNew: a configuration that cannot work is refused with what to do.
func TestNew(t *testing.T) {
	s := newStand(t)
	good := Config{ID: "mac-1", Dir: s.dir, Machines: s.yard, Images: s.shelf, Sync: s.office.Sync}
	for name, change := range map[string]func(*Config){
		"node name": func(c *Config) { c.ID = "Mac 1" },
		"Dir":       func(c *Config) { c.Dir = "" },
		"Sync":      func(c *Config) { c.Sync = nil },
		"slots":     func(c *Config) { c.Slots = -1 },
	} {
		c := good
		change(&c)
		if _, err := New(c); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestLock: a second agent in one directory does not begin; one whose predecessor takes
// a moment to be gone does.
func TestLock(t *testing.T) {
	inBubble(t, func(t *testing.T, s *stand) {
		unlock, err := lock(t.Context(), filepath.Join(s.dir, "lock"))
		if err != nil {
			t.Fatal(err)
		}
		a, err := New(Config{ID: "mac-1", Dir: s.dir, Machines: s.yard, Images: s.shelf, Sync: s.office.Sync})
		if err != nil {
			t.Fatal(err)
		}
		if err := a.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "another agent") {
			t.Errorf("a second agent in one directory: %v", err)
		}
		time.AfterFunc(lockTime/2, unlock)
		s.agent(t)
		s.office.await(t, "a report", func() bool { return s.office.calls > 0 })
	})
}

// TestNoSecretOnDisk: the JIT config is in no file of the node while a runner runs.
func TestNoSecretOnDisk(t *testing.T) {
	s := newStand(t)
	s.office.start["aaaaaaaa"] = runnerOrder("aaaaaaaa")
	s.office.place(s.order("aaaaaaaa", `read jit; echo "Running job: build"; exec sleep 300`))
	s.agent(t)
	s.office.awaitState(t, "aaaaaaaa", fleet.VMBusy)
	files := 0
	err := filepath.WalkDir(s.dir, func(path string, e os.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		files++
		info, err := e.Info()
		if err != nil {
			return err
		}
		if info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
		data, err := os.ReadFile(path)
		if strings.Contains(string(data), "c2VjcmV0") {
			t.Errorf("%s holds the JIT config", path)
		}
		return err
	})
	if err != nil || files < 2 {
		t.Errorf("walked %d files: %v", files, err)
	}
}

// TestPastIsForgotten: VMs that were acknowledged as done are remembered for an hour.
func TestPastIsForgotten(t *testing.T) {
	inBubble(t, func(t *testing.T, s *stand) {
		a, err := New(Config{ID: "mac-1", Dir: s.dir, Machines: s.yard, Images: s.shelf, Sync: s.office.Sync})
		must(t, err)
		l := newLife(record{Report: api.VMReport{ID: "aaaaaaaa", State: fleet.VMDone}})
		l.told = 1
		a.vms["aaaaaaaa"] = l
		for i, want := range []int{1, 1, 0} {
			a.forget(1)
			if len(a.past) != want {
				t.Errorf("step %d: %d remembered, want %d", i, len(a.past), want)
			}
			time.Sleep(40 * time.Minute)
		}
	})
}
