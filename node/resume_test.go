package node

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/vm"
)

// TestAfterACrash starts an agent upon what a killed one may leave: a journal that says
// one thing and a world that is as far or a step further.
func TestAfterACrash(t *testing.T) {
	for _, tt := range []struct {
		name    string
		journal func(*record)
		world   func(*testing.T, *stand, api.VMOrder)
		order   bool // the controller sends the runner (again)
		reason  string
		failed  bool
		boots   int
	}{
		{name: "booting and nothing done", boots: 1, order: true, reason: "runner exited 0"},
		{name: "booting with half a clone", boots: 1, order: true, reason: "runner exited 0",
			world: func(t *testing.T, s *stand, o api.VMOrder) { s.clone(t, o) }},
		{name: "booting and the machine runs", boots: 1, order: true, reason: "runner exited 0", world: running},
		{name: "booting and the machine ended with the agent", boots: 2, order: true, reason: "runner exited 0",
			world: func(t *testing.T, s *stand, o api.VMOrder) {
				running(t, s, o)
				s.yard.machines[o.ID].die("killed")
			}},
		{name: "booting for too long", reason: "its guest did not answer within 10m0s", failed: true,
			journal: func(r *record) { r.Report.BootingAt = time.Now().Add(-time.Hour) }},
		{name: "warm and the machine runs", boots: 1, order: true, reason: "runner exited 0", world: running,
			journal: func(r *record) {
				r.Report.State, r.Report.BootingAt = fleet.VMWarm, time.Now().Add(-time.Hour)
			}},
		{name: "warm and the machine is gone", reason: "the VM did not survive", failed: true,
			journal: func(r *record) { r.Report.State = fleet.VMWarm }},
		{name: "starting, and the guest took it", boots: 1, reason: "runner exited 0", world: started,
			journal: func(r *record) { r.Report.State, r.Starting = fleet.VMWarm, theRunner() }},
		{name: "starting, and the guest did not hear", boots: 1, order: true, reason: "runner exited 0", world: running,
			journal: func(r *record) { r.Report.State, r.Starting = fleet.VMWarm, theRunner() }},
		{name: "warm, and the guest has a runner that we never started", boots: 1, reason: "did not start", failed: true, world: started,
			journal: func(r *record) { r.Report.State = fleet.VMWarm }},
		{name: "registered and it ran meanwhile", boots: 1, reason: "runner exited 0", world: started,
			journal: func(r *record) { r.Report.State, r.Report.Runner = fleet.VMRegistered, theRunner() }},
		{name: "registered and the guest knows nothing", boots: 1, reason: "the runner did not survive", failed: true, world: running,
			journal: func(r *record) { r.Report.State, r.Report.Runner = fleet.VMRegistered, theRunner() }},
		{name: "busy and the machine ended", boots: 1, reason: "the machine ended: killed", failed: true,
			journal: func(r *record) { r.Report.State, r.Report.Runner = fleet.VMBusy, theRunner() },
			world: func(t *testing.T, s *stand, o api.VMOrder) {
				running(t, s, o)
				s.yard.machines[o.ID].die("killed")
			}},
		{name: "too old", boots: 1, reason: "its maximum lifetime of 6h0m0s is over", world: started,
			journal: func(r *record) {
				r.Report.State, r.Report.Runner, r.Report.BootingAt = fleet.VMBusy, theRunner(), time.Now().Add(-7*time.Hour)
			}},
		{name: "ending and the machine runs", boots: 1, reason: "destroyed: surplus", world: running,
			journal: func(r *record) {
				r.Report.State, r.End = fleet.VMWarm, &ending{Reason: "destroyed: surplus"}
			}},
		{name: "ending and nothing is left", reason: "runner exited 0",
			journal: func(r *record) { r.Report.State, r.End = fleet.VMBusy, &ending{Reason: "runner exited 0"} }},
		{name: "done and not acknowledged", reason: "runner exited 0",
			journal: func(r *record) {
				r.Report.State, r.Report.Reason, r.Report.DoneAt = fleet.VMDone, "runner exited 0", time.Now()
			}},
		{name: "the image went meanwhile", boots: 1, order: true, reason: "runner exited 0",
			world: func(t *testing.T, s *stand, o api.VMOrder) {
				running(t, s, o)
				s.shelf.images = map[fleet.Digest]*fleet.NodeImage{}
			}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newStand(t)
			order := s.order("aaaaaaaa", jobGood)
			a, err := New(Config{ID: "mac-1", Dir: s.dir, Machines: s.yard, Images: s.shelf, Sync: s.office.Sync})
			if err != nil {
				t.Fatal(err)
			}
			r := record{Report: api.VMReport{ID: order.ID, Order: order, State: fleet.VMBooting, BootingAt: time.Now()}}
			if tt.journal != nil {
				tt.journal(&r)
			}
			if err := a.journal.put(r); err != nil {
				t.Fatal(err)
			}
			if tt.world != nil {
				tt.world(t, s, order)
			}
			s.shelf.leases["bbbbbbbb"] = base // of a VM that nobody knows
			if tt.order {
				s.office.start[order.ID] = runnerOrder(order.ID)
			}
			stop := s.agent(t)
			got := s.office.awaitState(t, order.ID, fleet.VMDone)
			if !strings.HasPrefix(got.Reason, tt.reason) && !strings.Contains(got.Reason, tt.reason) || got.Failed != tt.failed {
				t.Errorf("done because %q, failed %v; want %q, %v", got.Reason, got.Failed, tt.reason, tt.failed)
			}
			if n := s.yard.boots[order.ID]; n != tt.boots {
				t.Errorf("booted %d times; want %d", n, tt.boots)
			}
			stop()
			s.checkEmpty(t)
		})
	}
}

// TestDestroyOfADoneVM: the agent that ended the VM is gone, its end is not acknowledged,
// and the controller, which has not heard of it, wants the VM destroyed.
func TestDestroyOfADoneVM(t *testing.T) {
	inBubble(t, func(t *testing.T, s *stand) {
		order := s.order("aaaaaaaa", jobGood)
		calls := make(chan api.SyncRequest)
		a, err := New(Config{ID: "mac-1", Dir: s.dir, Machines: s.yard, Images: s.shelf, Log: s.log,
			Sync: func(ctx context.Context, r api.SyncRequest) (api.SyncReply, error) {
				select {
				case calls <- r:
					return api.SyncReply{Revision: "1", Destroy: []api.DestroyOrder{{VM: order.ID, Reason: "surplus"}}}, nil
				case <-ctx.Done():
					return api.SyncReply{}, ctx.Err()
				}
			}})
		if err != nil {
			t.Fatal(err)
		}
		done := api.VMReport{ID: order.ID, Order: order, State: fleet.VMDone, DoneAt: time.Now(), Reason: "runner exited 0"}
		if err := a.journal.put(record{Report: done}); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- a.Run(ctx) }()
		for range 2 { // the second call says what the first one's reply did
			if r := <-calls; len(r.VMs) != 1 || r.VMs[0].State != fleet.VMDone || r.VMs[0].Reason != done.Reason {
				t.Errorf("reported: %+v", r.VMs)
			}
		}
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("the agent: %v", err)
		}
	})
}

func theRunner() *api.RunnerReport {
	r := runnerOrder("aaaaaaaa").Runner
	return &r
}

func (s *stand) clone(t *testing.T, o api.VMOrder) string {
	t.Helper()
	dir := filepath.Join(s.dir, "clones", string(o.ID))
	if err := s.shelf.Clone(t.Context(), o.Image, dir, 0); err != nil {
		t.Fatal(err)
	}
	return dir
}

// running makes the clone and the machine, as an agent before would have.
func running(t *testing.T, s *stand, o api.VMOrder) {
	t.Helper()
	if _, err := s.yard.Boot(t.Context(), vm.Spec{ID: o.ID, Dir: s.clone(t, o), Agent: true}); err != nil {
		t.Fatal(err)
	}
}

// started is running, with the runner started.
func started(t *testing.T, s *stand, o api.VMOrder) {
	t.Helper()
	running(t, s, o)
	conn, err := s.yard.machines[o.ID].Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	client := guest.New(conn)
	order := runnerOrder(o.ID)
	if err := client.Start(t.Context(), guest.Run{Name: order.Runner.Name, Argv: o.Runner, Input: []byte(order.JIT)}); err != nil {
		t.Fatal(err)
	}
	if err := client.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestLeftovers: a clone and a lease that no journal entry speaks for go; a machine
// that none speaks for stays, with its clone; a journal file that is none is kept for
// people and does not stop the agent.
func TestLeftovers(t *testing.T) {
	s := newStand(t)
	a, err := New(Config{ID: "mac-1", Dir: s.dir, Machines: s.yard, Images: s.shelf, Sync: s.office.Sync})
	if err != nil {
		t.Fatal(err)
	}
	s.clone(t, s.order("orphan22", ""))
	running(t, s, s.order("stranger", ""))
	running(t, s, s.order("endedone", "")) // of which an agent lost the journal
	s.yard.machines["endedone"].die("killed")
	other := &journal{dir: a.journal.dir, node: "mac-2"}
	if err := other.put(record{Report: api.VMReport{ID: "foreign2", State: fleet.VMWarm, Order: api.VMOrder{ID: "foreign2"}}}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := os.WriteFile(filepath.Join(a.journal.dir, "broken22.json"), []byte(`{"format":1,`), 0o600); err != nil {
			t.Fatal(err)
		}
		stop := s.agent(t)
		s.office.await(t, "a report", func() bool { return s.office.calls > 0 })
		stop()
		if len(s.office.last.VMs) != 0 {
			t.Errorf("reported %+v", s.office.last.VMs)
		}
	}
	names := func(dir string) string {
		entries, err := os.ReadDir(filepath.Join(s.dir, dir))
		if err != nil {
			t.Fatal(err)
		}
		var list []string
		for _, e := range entries {
			list = append(list, e.Name())
		}
		return strings.Join(list, " ")
	}
	if got := names("clones"); got != "stranger" {
		t.Errorf("clones: %s", got)
	}
	if got := names("journal"); got != "aside" {
		t.Errorf("journal: %s", got)
	}
	if got := names("journal/aside"); got != "broken22.json broken22.json.1 foreign2.json" {
		t.Errorf("aside: %s", got)
	}
	if ids, _ := s.yard.List(); len(ids) != 1 {
		t.Errorf("machines: %v", ids)
	}
	s.yard.machines["stranger"].die("end of the test")
}

// FuzzJournal: no bytes in a journal file make the decoder fail otherwise than by an
// error, and what it accepts is written and read back as it was.
func FuzzJournal(f *testing.F) {
	f.Add([]byte(``))
	f.Add([]byte(`{"format":1,"node":"mac-1","report":{"id":"aaaaaaaa","state":"warm","order":{"id":"aaaaaaaa"}}}`))
	f.Add([]byte(`{"format":1,"node":"mac-1","report":{"id":"aaaaaaaa","state":"done","reason":"runner exited 0","order":{"id":"aaaaaaaa","deadlines":{"life":1}}},"end":{"reason":"x","failed":true}}`))
	f.Add([]byte(`{"format":1,"node":"mac-1","report":{"id":"../aaaaa","state":"warm","order":{"id":"../aaaaa"}}}`))
	f.Add([]byte(`{"format":2}`))
	f.Add([]byte(`{"format":1,"report":{"id":"aaaaaaaa","state":"lost","order":{"id":"aaaaaaaa"}},"starting":{"name":"n"}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := decodeRecord(data)
		if err != nil {
			return
		}
		j, err := openJournal(t.TempDir(), r.Node)
		if err != nil {
			t.Fatal(err)
		}
		if err := j.put(r); err != nil {
			return // a time beyond what JSON can say is refused when it is written
		}
		records, problems, err := j.load()
		if err != nil || len(problems) > 0 || len(records) != 1 {
			t.Fatalf("read back: %v, %v, %d records", err, problems, len(records))
		}
		if back := records[0]; back.Report.ID != r.Report.ID || back.Report.State != r.Report.State || back.Report.Reason != r.Report.Reason {
			t.Fatalf("%+v became %+v", r, back)
		}
	})
}
