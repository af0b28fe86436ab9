package server

import (
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
)

// The way of one VM through sync, from the first report of its node to the end.
func TestSyncLife(t *testing.T) {
	h := newHouse(t)
	m := h.mac("mac1")
	first := m.say()
	if len(first.Run)+len(first.Start)+len(first.Destroy)+len(first.Hold) != 0 || first.Revision == "" || first.Applied != 1 {
		t.Fatalf("orders for a node that nobody knew: %+v", first)
	}
	node := h.view().Nodes["mac1"]
	if node == nil || node.Slots != 2 || !node.SeenAt.Equal(h.now) || !node.JoinedAt.Equal(h.now) {
		t.Fatalf("the node's record: %+v", node)
	}

	h.queue(7)
	h.place("vmaaaaaa", "mac1")
	h.place("vmbbbbbb", "mac2")
	h.commit(store.Txn{Orders: []fleet.Orders{{Node: "mac1", Hold: []fleet.Hold{{Digest: digest, Ref: ref, Demand: true}}}}})
	placed := h.now
	reply := m.say()
	want := api.VMOrder{
		ID: "vmaaaaaa", Pool: "small", Image: digest, Ref: ref, CPU: 4, Memory: 8 << 30, Env: map[string]string{"A": "b"},
		Bootstrap: fleet.BootstrapAgent, Runner: []string{"run"}, Deadlines: fleet.Deadlines{}.WithDefaults(), PlacedAt: placed, Job: 7,
	}
	if diff := cmp.Diff([]api.VMOrder{want}, reply.Run); diff != "" {
		t.Fatal(diff)
	}
	if len(reply.Hold) != 1 || reply.Hold[0].Digest != digest || reply.Revision == first.Revision {
		t.Fatalf("%+v", reply)
	}
	if again := m.say(); again.Revision != reply.Revision || len(again.Run) != 1 {
		t.Fatalf("a VM that the node has not begun must be ordered again: %+v", again)
	}

	h.advance(10 * time.Second)
	if reply := m.say(m.is("vmaaaaaa", fleet.VMBooting)); len(reply.Run) != 0 {
		t.Fatalf("ordered although it boots: %+v", reply.Run)
	}
	h.advance(10 * time.Second)
	m.say(m.is("vmaaaaaa", fleet.VMWarm))
	if vm := h.vm("vmaaaaaa"); vm.State != fleet.VMWarm || !vm.WarmAt.Equal(placed.Add(20*time.Second)) {
		t.Fatalf("%+v", vm)
	}

	h.claim("vmaaaaaa")
	reply = m.say(m.is("vmaaaaaa", fleet.VMWarm))
	if len(reply.Start) != 1 || reply.Start[0].JIT != secret || reply.Start[0].Runner.Name != "paddock-f-vmaaaaaa-1" || reply.Start[0].Runner.RunnerID != 42 {
		t.Fatalf("%+v", reply.Start)
	}
	if again := m.say(m.is("vmaaaaaa", fleet.VMWarm)); len(again.Start) != 1 {
		t.Fatal("the JIT config must be sent again until the node has it")
	}
	if reply = m.say(ran(m.is("vmaaaaaa", fleet.VMWarm))); len(reply.Start) != 0 {
		t.Fatalf("%+v", reply.Start)
	}
	if claim := h.vm("vmaaaaaa").Claim; claim.Sealed != "" || !claim.Started {
		t.Fatalf("the node has the JIT config, and so has the store: %+v", claim)
	}

	h.advance(10 * time.Second)
	m.say(ran(m.is("vmaaaaaa", fleet.VMBusy)))
	done := ran(m.is("vmaaaaaa", fleet.VMDone))
	done.Reason = "runner exited 0"
	m.say(done)
	vm := h.vm("vmaaaaaa")
	if vm.State != fleet.VMDone || vm.Reason != "runner exited 0" || vm.BusyAt.IsZero() {
		t.Fatalf("%+v", vm)
	}
	h.checkNoSecrets(t)
	h.checkEvents(t, "vmaaaaaa", "vm.done", "vm.busy", "vm.registered", "vm.warm", "vm.booting")
}

// checkNoSecrets: the JIT config is neither in the log nor in the events.
func (h *house) checkNoSecrets(t *testing.T) {
	t.Helper()
	events, err := h.store.Events(t.Context(), store.EventFilter{})
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(events)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(text)+h.log.String(), secret) {
		t.Error("the JIT config leaked")
	}
}

// checkEvents compares the kinds of a VM's events, newest first.
func (h *house) checkEvents(t *testing.T, vm fleet.VMID, kinds ...string) {
	t.Helper()
	events, err := h.store.Events(t.Context(), store.EventFilter{VM: vm})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range events {
		if e.Actor != "node:mac1" || e.Text == "" {
			t.Errorf("%+v has no actor or no words", e)
		}
		got = append(got, e.Kind)
	}
	if diff := cmp.Diff(kinds, got); diff != "" {
		t.Error(diff)
	}
}

func TestStaleReports(t *testing.T) {
	h := newHouse(t)
	m := h.mac("mac1")
	h.place("vmaaaaaa", "mac1")
	m.say(m.is("vmaaaaaa", fleet.VMBooting))
	m.sequence = 0
	m.vms = []api.VMReport{m.is("vmaaaaaa", fleet.VMWarm)}
	if _, err := m.try(0); status(t, err) != http.StatusConflict {
		t.Errorf("the same sequence again: %v", err)
	}
	restarted := h.mac("mac1")
	restarted.session = "s2"
	restarted.say(m.is("vmaaaaaa", fleet.VMBooting))
	m.sequence = 10
	if _, err := m.try(0); status(t, err) != http.StatusConflict {
		t.Errorf("a superseded session: %v", err)
	}
	if vm := h.vm("vmaaaaaa"); vm.State != fleet.VMBooting {
		t.Errorf("a stale report moved the VM to %s", vm.State)
	}
}

func TestDestroyOrders(t *testing.T) {
	h := newHouse(t)
	m := h.mac("mac1")
	h.place("vmaaaaaa", "mac1")
	h.place("vmbbbbbb", "mac1")
	h.place("vmcccccc", "mac1")
	m.say(m.is("vmaaaaaa", fleet.VMWarm), m.is("vmbbbbbb", fleet.VMWarm))
	h.change("vmaaaaaa", func(vm *fleet.VM) { vm.Destroy, vm.Reason = true, "surplus" })
	h.change("vmbbbbbb", func(vm *fleet.VM) { vm.State, vm.DoneAt = fleet.VMLost, h.now })
	h.change("vmcccccc", func(vm *fleet.VM) { vm.Destroy = true }) // not begun: told to run and to end it
	reply := m.say(m.is("vmaaaaaa", fleet.VMWarm), m.is("vmbbbbbb", fleet.VMWarm))
	want := []api.DestroyOrder{{VM: "vmaaaaaa", Reason: "surplus"}, {VM: "vmbbbbbb", Reason: "it is lost"}, {VM: "vmcccccc", Reason: "it is placed"}}
	if diff := cmp.Diff(want, reply.Destroy); diff != "" {
		t.Error(diff)
	}
	if len(reply.Run) != 1 || reply.Run[0].ID != "vmcccccc" {
		t.Errorf("%+v", reply.Run)
	}
	if vm := h.vm("vmbbbbbb"); vm.State != fleet.VMLost {
		t.Errorf("a lost VM became %s", vm.State)
	}
	reply = m.say(m.is("vmaaaaaa", fleet.VMDone), m.is("vmbbbbbb", fleet.VMDone), m.is("vmcccccc", fleet.VMDone))
	if len(reply.Destroy) != 0 || len(reply.Run) != 0 {
		t.Errorf("orders for VMs that are gone: %+v", reply)
	}
}

// After the store was emptied, the first report brings the VMs back, claim and all, and
// destroys nothing. Which job and which number at GitHub a runner has, GitHub says.
func TestEmptiedStore(t *testing.T) {
	h := newHouse(t)
	m := h.mac("mac1")
	m.sequence = 55 // it has talked to the old store for long
	busy := ran(m.is("vmaaaaaa", fleet.VMBusy))
	busy.WarmAt, busy.RegisteredAt, busy.BusyAt = h.now.Add(-3*time.Minute), h.now.Add(-2*time.Minute), h.now.Add(-time.Minute)
	busy.Order.PlacedAt = h.now.Add(-5 * time.Minute)
	reply := m.say(busy, m.is("vmbbbbbb", fleet.VMWarm), m.is("vmcccccc", fleet.VMDone))
	if len(reply.Destroy)+len(reply.Start)+len(reply.Run) != 0 {
		t.Fatalf("orders about VMs that only the node knew: %+v", reply)
	}
	want := fleet.VM{
		ID: "vmaaaaaa", Node: "mac1", Pool: "small", Image: digest, State: fleet.VMBusy, Attempt: 1,
		Claim:    &fleet.Claim{Scope: "acme", Group: 1, Labels: pool.Labels, Runner: "paddock-f-vmaaaaaa-1", At: h.now, Started: true},
		PlacedAt: h.now.Add(-5 * time.Minute), BootingAt: h.now.Add(-3 * time.Minute), WarmAt: h.now.Add(-3 * time.Minute),
		RegisteredAt: h.now.Add(-2 * time.Minute), BusyAt: h.now.Add(-time.Minute),
	}
	got := h.vm("vmaaaaaa")
	got.Rev = 0
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if vm := h.vm("vmbbbbbb"); vm.State != fleet.VMWarm || vm.Claim != nil {
		t.Errorf("%+v", vm)
	}
	if h.view().VMs["vmcccccc"] != nil {
		t.Error("a finished VM needs no record")
	}
	if again := m.say(busy, m.is("vmbbbbbb", fleet.VMWarm)); len(again.Destroy) != 0 {
		t.Errorf("%+v", again.Destroy)
	}
}

// A store restored from before a claim learns the runner from the node.
func TestForgottenClaim(t *testing.T) {
	h := newHouse(t)
	m := h.mac("mac1")
	h.place("vmaaaaaa", "mac1")
	m.say(ran(m.is("vmaaaaaa", fleet.VMRegistered)))
	vm := h.vm("vmaaaaaa")
	if vm.Claim == nil || vm.Claim.Runner != "paddock-f-vmaaaaaa-1" || vm.Attempt != 1 || vm.State != fleet.VMRegistered {
		t.Errorf("%+v", vm)
	}
	// Once GitHub has deleted the runner, the leader takes the claim back; that the node
	// still tells of it, until it has destroyed the VM, brings it not back, even if the
	// pool is gone meanwhile.
	h.change("vmaaaaaa", func(vm *fleet.VM) { vm.Claim, vm.Destroy = nil, true })
	late := ran(m.is("vmaaaaaa", fleet.VMRegistered))
	late.Runner.Scope = "gone"
	if reply := m.say(late); len(reply.Destroy) != 1 {
		t.Errorf("%+v", reply)
	}
	if vm := h.vm("vmaaaaaa"); vm.Claim != nil {
		t.Errorf("learned anew: %+v", vm.Claim)
	}
}

// Absence does not act: a VM that the journal lacks is a question for GitHub.
func TestMissingInTheJournal(t *testing.T) {
	h := newHouse(t)
	m := h.mac("mac1")
	h.place("vmaaaaaa", "mac1")
	m.say(m.is("vmaaaaaa", fleet.VMWarm))
	reply := m.say()
	if len(reply.Destroy) != 0 {
		t.Errorf("%+v", reply.Destroy)
	}
	vm := h.vm("vmaaaaaa")
	if vm.State != fleet.VMWarm || vm.Destroy || vm.Retire != fleet.RetireLose || vm.Reason != "missing in the node's journal" {
		t.Errorf("%+v", vm)
	}
	rev := vm.Rev
	m.say()
	if again := h.vm("vmaaaaaa"); again.Rev != rev {
		t.Error("written again although nothing changed")
	}
	m.say(m.is("vmaaaaaa", fleet.VMWarm))
	if vm := h.vm("vmaaaaaa"); vm.Retire != fleet.RetireNone || vm.Reason != "" {
		t.Errorf("it is there after all: %+v", vm)
	}
}

// A VM that was to be destroyed before its node began it must not hold a slot for ever.
func TestNeverBegun(t *testing.T) {
	h := newHouse(t)
	m := h.mac("mac1")
	h.place("vmaaaaaa", "mac1")
	h.change("vmaaaaaa", func(vm *fleet.VM) { vm.Destroy, vm.Reason = true, "boot" })
	h.advance(11 * time.Minute)
	m.say()
	if vm := h.vm("vmaaaaaa"); vm.State != fleet.VMPlaced {
		t.Fatalf("given up too early: %+v", vm)
	}
	h.advance(2 * time.Minute)
	m.say()
	if vm := h.vm("vmaaaaaa"); vm.State != fleet.VMDone {
		t.Fatalf("%+v", vm)
	}
	// It shows up after all, and is destroyed by name.
	if reply := m.say(m.is("vmaaaaaa", fleet.VMBooting)); len(reply.Destroy) != 1 {
		t.Errorf("%+v", reply)
	}
}

// What wakes the leader and parked calls, and what does not: a thousand nodes' heartbeats
// and bytes moved must not.
func TestHeartbeatsAreQuiet(t *testing.T) {
	h := newHouse(t)
	m := h.mac("mac1")
	h.place("vmaaaaaa", "mac1")
	m.images = []fleet.NodeImage{{Digest: digest, Ref: ref, State: fleet.ImageCaching, Done: 1, Total: 9}}
	m.say(m.is("vmaaaaaa", fleet.VMWarm))
	for name, c := range map[string]struct {
		change func(*api.SyncRequest)
		after  time.Duration
		quiet  bool
	}{
		"a heartbeat":     {func(*api.SyncRequest) {}, 20 * time.Second, true},
		"bytes moved":     {func(r *api.SyncRequest) { r.Node.Images[0].Done, r.Node.PullRate = 5, 100 }, time.Second, true},
		"a boot measured": {func(r *api.SyncRequest) { r.Node.Images[0].Start = fleet.ImageStart{Cold: 7 * time.Second, States: 1} }, time.Second, true},
		"an address":      {func(r *api.SyncRequest) { r.VMs[0].Address, r.VMs[0].Tier = "192.168.64.5", fleet.TierSaved }, time.Second, true},
		"an image more":   {func(r *api.SyncRequest) { r.Node.Images[0].State = fleet.ImageReady }, time.Second, false},
		"a VM moved":      {func(r *api.SyncRequest) { r.VMs[0].State = fleet.VMBusy }, time.Second, false},
		"a VM is missing": {func(r *api.SyncRequest) { r.VMs = nil }, time.Second, false},
		"no more slots":   {func(r *api.SyncRequest) { r.Node.Slots = 0 }, time.Second, false},
		"a restart":       {func(r *api.SyncRequest) { r.Session = "s2" }, time.Second, false},
		"a return":        {func(*api.SyncRequest) {}, time.Minute, false},
	} {
		q := m.request(0)
		q.VMs, q.Node.Images = slices.Clone(q.VMs), slices.Clone(q.Node.Images)
		c.change(&q)
		r := report{view: h.view(), node: "mac1", fleet: "f", now: h.now.Add(c.after), boot: h.server.bootDeadline, ours: h.server.hasScope}
		if err := r.apply(&q, false); err != nil {
			t.Fatal(err)
		}
		if r.txn.Quiet != c.quiet {
			t.Errorf("%s: quiet %t", name, r.txn.Quiet)
		}
		if name == "an address" && (len(r.txn.VMs) != 1 || r.txn.VMs[0].Address != "192.168.64.5") {
			t.Errorf("%s is not written: %+v", name, r.txn.VMs)
		}
		if len(r.txn.Nodes) != 1 || !r.txn.Nodes[0].SeenAt.Equal(r.now) {
			t.Errorf("%s: the node's record says %+v", name, r.txn.Nodes)
		}
	}
}

// What a node tells of a VM's start and address is shown as far as it is what it should
// be: it comes from where guests are.
func TestTierAndAddress(t *testing.T) {
	h := newHouse(t)
	m := h.mac("mac1")
	h.place("vmaaaaaa", "mac1")
	for _, c := range []struct {
		tier          fleet.StartTier
		address, want string
	}{
		{"", "", ""},
		{fleet.TierCold, "192.168.64.5", "192.168.64.5"},
		{fleet.TierCold, "192.168.64.6", "192.168.64.6"},
		{fleet.TierSaved, "fd00::0005", "fd00::5"},
		{fleet.TierSaved, "fe80::1%en0", ""},
		{fleet.TierSaved, "192.168.64.5:22", ""},
		{"\x1b[2J", "\x1b[2J", ""},
		{fleet.TierSaved, strings.Repeat("1", 1<<20), ""},
		{fleet.TierSaved, "10.0.2.15", "10.0.2.15"},
	} {
		v := m.is("vmaaaaaa", fleet.VMWarm)
		v.Tier, v.Address = c.tier, c.address
		m.say(v)
		vm := h.vm("vmaaaaaa")
		if vm.Address != c.want || (vm.Tier != c.tier) != (c.tier == "\x1b[2J") {
			t.Errorf("told %q at %.40q, the record says %q at %q", c.tier, c.address, vm.Tier, vm.Address)
		}
	}
	rows, err := h.client(access.Viewer, "vera").VMs(t.Context())
	if err != nil || len(rows) != 1 || rows[0].Tier != fleet.TierSaved || rows[0].Address != "10.0.2.15" {
		t.Errorf("listed %+v (%v)", rows, err)
	}
}

// The leader writes the same records all the time; no report is lost, and none of the
// leader's writes.
func TestSyncBesideALeader(t *testing.T) {
	h := newHouse(t)
	m := h.mac("mac1")
	h.place("vmaaaaaa", "mac1")
	var writers sync.WaitGroup
	stop := make(chan struct{})
	writes := 0
	writers.Add(1)
	go func() {
		defer writers.Done()
		for {
			select {
			case <-stop:
				return
			default:
			}
			view, err := h.store.View(t.Context())
			if err != nil {
				t.Error(err)
				return
			}
			vm := *view.VMs["vmaaaaaa"]
			vm.Attempt++
			switch err := h.store.Commit(t.Context(), store.Txn{VMs: []fleet.VM{vm}}); {
			case err == nil:
				writes++
			case !errors.Is(err, store.ErrConflict):
				t.Error(err)
				return
			}
		}
	}()
	refused := 0
	for _, state := range []fleet.VMState{fleet.VMBooting, fleet.VMWarm, fleet.VMRegistered, fleet.VMBusy, fleet.VMDone} {
		m.vms = []api.VMReport{m.is("vmaaaaaa", state)}
		for {
			_, err := m.try(0)
			if err == nil {
				break
			}
			// Eight times in a row the leader was faster: the node is told to try again.
			if refused++; status(t, err) != http.StatusServiceUnavailable || refused > 100 {
				t.Fatal(err)
			}
		}
	}
	close(stop)
	writers.Wait()
	if vm := h.vm("vmaaaaaa"); vm.State != fleet.VMDone || vm.Attempt != writes {
		t.Errorf("%s, %d of %d writes", vm.State, vm.Attempt, writes)
	}
}

func TestRenewal(t *testing.T) {
	h := newHouse(t)
	m := h.mac("mac1")
	if reply := m.say(); reply.Credential != "" {
		t.Fatal("renewed on the first day")
	}
	h.advance(61 * 24 * time.Hour)
	reply := m.say()
	if reply.Credential == "" {
		t.Fatal("not renewed with 29 days left")
	}
	h.advance(80 * 24 * time.Hour)
	m.client = h.with(reply.Credential)
	if again := m.say(); again.Credential == "" {
		t.Error("the renewed one is not renewed in its turn")
	}
	if strings.Contains(h.log.String(), reply.Credential) {
		t.Error("the credential is in the log")
	}
}
