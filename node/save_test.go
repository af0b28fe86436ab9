package node

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/vm"
)

// TestNobodyInBeforeTheSave: while a VM may yet be saved, a person gets its console and
// nothing else; once it is warm, the guest as well.
func TestNobodyInBeforeTheSave(t *testing.T) {
	s, d := newSavingStand(t), newDesk(t)
	s.people = d
	s.yard.console = "booting\n"
	begun, goOn := make(chan struct{}), make(chan struct{})
	s.yard.saving = func() { close(begun); <-goOn }
	stop := s.agent(t)
	release := sync.OnceFunc(func() { close(goOn) })
	t.Cleanup(release) // or the agent would wait with a test that failed
	s.office.place(s.order("a", jobLasts))
	<-begun
	port := listen(t, echo)
	for _, o := range []api.SessionOrder{
		{ID: "port", VM: "a", Kind: api.SessionPort, Port: port},
		{ID: "logs", VM: "a", Kind: api.SessionLogs},
	} {
		s.ask(o)
		if why := d.refusal(); !strings.Contains(why.Message, "VM a is still booting: try again once it is warm") {
			t.Errorf("%s: %v", o.ID, &why)
		}
	}
	s.ask(api.SessionOrder{ID: "console", VM: "a", Kind: api.SessionConsole, Once: true})
	_ = d.meet().Close()
	release()
	s.office.awaitState(t, "a", fleet.VMWarm)
	s.ask(api.SessionOrder{ID: "late", VM: "a", Kind: api.SessionPort, Port: port})
	conn := d.meet()
	ping(t, conn)
	_ = conn.Close()
	s.leave(t)
	stop()
	s.checkEmpty(t)
}

// TestSavingHasItsOwnTime: a guest that answered in time is not ended for the time that
// its saving takes, and a save that runs out of its own is counted.
func TestSavingHasItsOwnTime(t *testing.T) {
	for _, tt := range []struct {
		name  string
		takes time.Duration
		stops bool // the machine stands still afterwards
		tries int  // calls of Save for five VMs
		dead  int  // of the five
	}{
		{name: "longer than a boot may take", takes: saveTime - time.Second, tries: 1},
		{name: "longer than it may take", takes: saveTime + time.Second, tries: stateTries},
		{name: "and the guest is silent ever after", stops: true, tries: stateTries, dead: stateTries},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newSavingStand(t)
				s.slots = 1
				s.yard.saveTakes, s.yard.saveStops = tt.takes, tt.stops
				stop := s.agent(t)
				dead := 0
				for n := range 5 {
					order := s.order(fleet.VMID(fmt.Sprintf("vm%06d", n)), jobGood)
					order.Deadlines.Boot = 30 * time.Second
					s.office.place(order)
					time.Sleep(2 * saveTime)
					r := s.office.report(order.ID)
					if r.State == fleet.VMDone {
						dead++
						if want := "its guest did not answer within 1m0s after its state was saved"; !r.Failed || r.Reason != want {
							t.Errorf("%+v, want %q", r, want)
						}
						continue
					}
					if r.State != fleet.VMWarm {
						t.Fatalf("%+v", r)
					}
					s.destroy(t, order.ID)
				}
				stop()
				if s.yard.tries != tt.tries || dead != tt.dead {
					t.Errorf("%d calls of Save and %d dead, want %d and %d", s.yard.tries, dead, tt.tries, tt.dead)
				}
				s.checkEmpty(t)
			})
		})
	}
}

// TestSizeOfAState: what a state takes is its memory, and a second disk where files cannot
// share blocks; a memory that the order does not name is the image's.
func TestSizeOfAState(t *testing.T) {
	const disk, image = 1 << 20, 3 << 30
	dir := t.TempDir()
	clone := filepath.Join(dir, "clones", "a")
	must(t, os.MkdirAll(clone, 0o700))
	must(t, os.WriteFile(filepath.Join(clone, vm.DiskFile), []byte(strings.Repeat("disk", disk/4)), 0o600))
	must(t, os.Truncate(filepath.Join(clone, vm.DiskFile), 1<<30)) // a hole takes nothing
	yes := func() (bool, error) { return true, nil }
	no := func() (bool, error) { return false, nil }
	for name, c := range map[string]struct {
		share  func() (bool, error)
		order  int64
		config string
		want   int64
	}{
		"as ordered, blocks are shared": {yes, 2 << 30, ``, 2 << 30},
		"as ordered, and a second disk": {no, 2 << 30, ``, 2<<30 + disk},
		"nobody knows about blocks":     {nil, 2 << 30, ``, 2<<30 + disk},
		"nobody can say":                {func() (bool, error) { return true, os.ErrPermission }, 2 << 30, ``, 2<<30 + disk},
		"the image's":                   {yes, 0, fmt.Sprintf(`,"memorySize":%d`, image), image},
		"nobody says":                   {yes, 0, ``, unknownMemory},
		"the least the image takes":     {yes, 0, fmt.Sprintf(`,"memorySizeMin":%d`, int64(16<<30)), 16 << 30},
	} {
		must(t, os.WriteFile(filepath.Join(clone, vm.ConfigFile), []byte(`{"version":1,"os":"linux","arch":"amd64"`+c.config+`}`), 0o600))
		a := &Agent{c: Config{Dir: dir, CanShare: c.share}}
		got, err := a.stateSize(&life{order: api.VMOrder{ID: "a", Memory: c.order}})
		// A file system may keep some blocks for itself.
		if err != nil || got < c.want || got > c.want+64<<10 {
			t.Errorf("%s: %d, %v; want %d", name, got, err, c.want)
		}
	}
}

// TestIdleNodeIsRelieved: without VMs too, states give way before the disk is full.
func TestIdleNodeIsRelieved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSavingStand(t)
		stop := s.agent(t)
		s.warm(t, "aaaaaaaa", nil)
		s.destroy(t, "aaaaaaaa")
		s.awaitStates(t, 1)
		s.office.await(t, "the VM is forgotten", func() bool { return s.office.gone["aaaaaaaa"] })
		s.free.Store(idleFloor)
		time.Sleep(5 * time.Minute) // in which many a sync looks at the disk
		if n := len(s.stateDirs(t)); n != 1 {
			t.Errorf("%d states with %d bytes free and no VM", n, s.free.Load())
		}
		s.free.Store(idleFloor - 1)
		time.Sleep(5 * time.Minute)
		if n := len(s.stateDirs(t)); n != 0 {
			t.Errorf("%d states with %d bytes free", n, s.free.Load())
		}
		stop()
		s.checkEmpty(t)
	})
}

// slowDisk is a log whose line of a saved state, which comes when it is on disk, is held
// up until the machines are gone.
type slowDisk struct {
	slog.Handler
	yard *yard
	late *atomic.Bool
}

func (d slowDisk) Handle(ctx context.Context, r slog.Record) error {
	if r.Message == "a machine's state was saved" {
		d.wait()
	}
	return d.Handler.Handle(ctx, r)
}

func (d slowDisk) wait() {
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if ids, _ := d.yard.List(); len(ids) == 0 {
			return
		}
		if time.Now().After(end) {
			d.late.Store(true)
			return
		}
	}
}

func (d slowDisk) WithAttrs(attrs []slog.Attr) slog.Handler {
	return slowDisk{d.Handler.WithAttrs(attrs), d.yard, d.late}
}

// TestTeardownHeldUpByAState: a machine goes while its state is still being brought to
// disk, and its seat is freed after that.
func TestTeardownHeldUpByAState(t *testing.T) {
	s := newSavingStand(t)
	var late atomic.Bool
	s.log = slog.New(slowDisk{s.log.Handler(), s.yard, &late})
	stop := s.agent(t)
	s.warm(t, "aaaaaaaa", nil)
	s.destroy(t, "aaaaaaaa")
	if late.Load() {
		t.Error("the machine waited for the disk")
	}
	if r := s.warm(t, "bbbbbbbb", nil); r.Tier != fleet.TierSaved {
		t.Errorf("%+v", r)
	}
	s.destroy(t, "bbbbbbbb")
	stop()
	s.checkEmpty(t)
}

// TestDriverWithoutReadOnlyShares: where a driver refuses what bootstrap self asks for, the
// VM's reason says so, and what helps.
func TestDriverWithoutReadOnlyShares(t *testing.T) {
	s := newStand(t)
	s.yard.noReadOnly = true
	stop := s.agent(t)
	order := s.order("aaaaaaaa", jobGood)
	order.Bootstrap = fleet.BootstrapSelf
	s.office.place(order)
	r := s.office.awaitState(t, order.ID, fleet.VMDone)
	for _, want := range []string{
		`booting: the share "paddock-in": not possible with this driver; `,
		`bootstrap "self" needs a driver that shares directories with its guests, one of them read-only, and this node's ("yard") does not`,
		`give the pool bootstrap "agent" or "ssh", or nodes with driver vz`,
	} {
		if !strings.Contains(r.Reason, want) || !r.Failed {
			t.Errorf("%+v, want %q", r, want)
		}
	}
	stop()
	s.checkEmpty(t)
}
