package server

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
)

func TestANodeSpeaksOnlyForItself(t *testing.T) {
	h := newHouse(t)
	h.place("vmbbbbbb", "mac2")
	for name, c := range map[string]struct {
		vms    []api.VMReport
		client *api.Client
	}{
		"another's VM":          {[]api.VMReport{{ID: "vmbbbbbb", State: fleet.VMWarm}}, nil},
		"under another's name":  {nil, h.client(access.Node, "mac2")},
		"another VM's runner":   {[]api.VMReport{{ID: "vmaaaaaa", State: fleet.VMWarm, Runner: &api.RunnerReport{Name: "paddock-f-vmbbbbbb-1", Attempt: 1}}}, nil},
		"another fleet's":       {[]api.VMReport{{ID: "vmaaaaaa", State: fleet.VMWarm, Runner: &api.RunnerReport{Name: "paddock-g-vmaaaaaa-1", Attempt: 1}}}, nil},
		"a stranger's runner":   {[]api.VMReport{{ID: "vmaaaaaa", State: fleet.VMWarm, Runner: &api.RunnerReport{Name: "kiosk", Attempt: 1}}}, nil},
		"an admin's credential": {nil, h.client(access.Admin, "mac1")},
	} {
		m := h.mac("mac1")
		m.vms = c.vms
		if c.client != nil {
			m.client = c.client
		}
		_, err := m.try(0)
		var e *api.Error
		if !errors.As(err, &e) || e.Status != http.StatusForbidden || e.Hint == "" {
			t.Errorf("%s: %v, want a 403 with a hint", name, err)
		}
	}
	if vm := h.vm("vmbbbbbb"); vm.State != fleet.VMPlaced {
		t.Errorf("mac1 moved mac2's VM to %s", vm.State)
	}
	if h.view().Nodes["mac1"] != nil {
		t.Error("a refused report left a node's record")
	}
}

// A node's credential must not reach runners that are not the node's: the leader deletes
// at GitHub what a claim names.
func TestAnyRunnerDeletedByANodesWord(t *testing.T) {
	h := newHouse(t)
	m := h.mac("mac1")
	foreign := ran(m.is("evilevil", fleet.VMRegistered))
	foreign.Runner.RunnerID, foreign.Runner.Scope = 777, "some-other-org/prod"
	m.vms = []api.VMReport{foreign}
	if _, err := m.try(0); status(t, err) != http.StatusForbidden {
		t.Errorf("a scope of no pool: %v, want a 403", err)
	}
	if vm := h.view().VMs["evilevil"]; vm != nil {
		t.Errorf("a refused report left %+v", vm)
	}
	foreign.Runner.Scope = "acme"
	m.say(foreign)
	if vm := h.vm("evilevil"); vm.Claim == nil || vm.Claim.RunnerID != 0 {
		t.Errorf("the number at GitHub was taken from the node: %+v", vm.Claim)
	}
	// Nor for a VM that the leader has placed and not yet claimed, or claimed without
	// having written down GitHub's answer.
	h.place("vmaaaaaa", "mac1")
	h.place("vmbbbbbb", "mac1")
	h.change("vmbbbbbb", func(vm *fleet.VM) {
		vm.Attempt, vm.Claim = 1, &fleet.Claim{Scope: "acme", Runner: fleet.RunnerName("f", vm.ID, 1), At: h.now}
	})
	for _, id := range []fleet.VMID{"vmaaaaaa", "vmbbbbbb"} {
		v := ran(m.is(id, fleet.VMRegistered))
		v.Runner.RunnerID, v.Runner.Job = 777, 99
		m.say(v, foreign)
		if vm := h.vm(id); vm.Claim.RunnerID != 0 || vm.Job != 7 {
			t.Errorf("%s has runner %d and job %d by the node's word", id, vm.Claim.RunnerID, vm.Job)
		}
	}
}

// A node that makes a VM up must not take a certain job from everybody else with it.
func TestJobTakenByANodesWord(t *testing.T) {
	h := newHouse(t)
	h.queue(7)
	m := h.mac("mac1")
	m.say(m.is("evilevil", fleet.VMBooting), ran(m.is("evilfive", fleet.VMBusy)))
	for _, id := range []fleet.VMID{"evilevil", "evilfive"} {
		if vm := h.vm(id); vm.Job != 0 {
			t.Errorf("%s took job %d", id, vm.Job)
		}
	}
}

// A node that makes up other VMs in each of its syncs must not fill the store.
func TestRecordsWithoutEndByANodesWord(t *testing.T) {
	h := newHouse(t)
	m := h.mac("mac1")
	for sync := range 5 {
		m.vms = nil
		for i := range 90 {
			m.vms = append(m.vms, m.is(fleet.VMID(fmt.Sprintf("z%07d", 90*sync+i)), fleet.VMBooting))
		}
		if _, err := m.try(0); (status(t, err) == http.StatusOK) != (sync == 0) {
			t.Errorf("sync %d: %v", sync, err)
		}
	}
	if n := len(h.view().VMs); n > maxVMs {
		t.Errorf("%d VMs on a node of 2 slots", n)
	}
}

// The error of a pull may be as long as a tool's output: it is cut, and refuses nothing.
func TestLongPullError(t *testing.T) {
	h := newHouse(t)
	m := h.mac("mac1")
	m.images = []fleet.NodeImage{{Digest: digest, Ref: ref, State: fleet.ImageFailed, Error: strings.Repeat("é", 1<<20)}}
	m.say()
	if got := h.view().Nodes["mac1"].Images[0].Error; len(got) != maxText {
		t.Errorf("%d bytes", len(got))
	}
}

func TestRefusedSyncs(t *testing.T) {
	h := newHouse(t)
	for name, c := range map[string]struct {
		change func(*api.SyncRequest)
		status int
	}{
		"another protocol":  {func(r *api.SyncRequest) { r.Protocol = 2 }, http.StatusUpgradeRequired},
		"no session":        {func(r *api.SyncRequest) { r.Session = "" }, http.StatusBadRequest},
		"a session of two":  {func(r *api.SyncRequest) { r.Session = "a b" }, http.StatusBadRequest},
		"no sequence":       {func(r *api.SyncRequest) { r.Sequence = 0 }, http.StatusBadRequest},
		"negative slots":    {func(r *api.SyncRequest) { r.Node.Slots = -1 }, http.StatusBadRequest},
		"an unnamed image":  {func(r *api.SyncRequest) { r.Node.Images = []fleet.NodeImage{{Digest: "latest"}} }, http.StatusBadRequest},
		"a strange VM":      {func(r *api.SyncRequest) { r.VMs = []api.VMReport{{ID: "../../x", State: fleet.VMWarm}} }, http.StatusBadRequest},
		"an unknown state":  {func(r *api.SyncRequest) { r.VMs = []api.VMReport{{ID: "vmaaaaaa", State: "asleep"}} }, http.StatusBadRequest},
		"the leader's word": {func(r *api.SyncRequest) { r.VMs = []api.VMReport{{ID: "vmaaaaaa", State: fleet.VMLost}} }, http.StatusBadRequest},
		"a long version":    {func(r *api.SyncRequest) { r.Node.Version = strings.Repeat("x", 4<<20) }, http.StatusBadRequest},
		"a long platform":   {func(r *api.SyncRequest) { r.Node.OS = strings.Repeat("x", 300) }, http.StatusBadRequest},
		"a long tag":        {func(r *api.SyncRequest) { r.Node.Tags = map[string]string{"a": strings.Repeat("x", 300)} }, http.StatusBadRequest},
		"a long reference": {func(r *api.SyncRequest) {
			r.Node.Images = []fleet.NodeImage{{Digest: digest, Ref: strings.Repeat("x", 2000)}}
		}, http.StatusBadRequest},
		"a long label": {func(r *api.SyncRequest) {
			r.VMs = []api.VMReport{{ID: "vmaaaaaa", State: fleet.VMWarm, Runner: &api.RunnerReport{Labels: fleet.Labels{strings.Repeat("x", 300)}}}}
		}, http.StatusBadRequest},
		"many labels": {func(r *api.SyncRequest) {
			r.VMs = []api.VMReport{{ID: "vmaaaaaa", State: fleet.VMWarm, Runner: &api.RunnerReport{Labels: make(fleet.Labels, 1000)}}}
		}, http.StatusBadRequest},
		"more VMs than slots": {func(r *api.SyncRequest) {
			for i := range 101 {
				r.VMs = append(r.VMs, api.VMReport{ID: fleet.VMID(fmt.Sprintf("z%07d", i)), State: fleet.VMBooting})
			}
		}, http.StatusBadRequest},
		"an unordered image": {func(r *api.SyncRequest) {
			r.VMs = []api.VMReport{{ID: "vmaaaaaa", State: fleet.VMWarm, Order: api.VMOrder{Pool: "small", Image: "latest"}}}
		}, http.StatusBadRequest},
		"an unordered pool": {func(r *api.SyncRequest) {
			r.VMs = []api.VMReport{{ID: "vmaaaaaa", State: fleet.VMWarm, Order: api.VMOrder{Pool: "A B", Image: digest}}}
		}, http.StatusBadRequest},
		"a VM twice": {func(r *api.SyncRequest) {
			r.VMs = []api.VMReport{{ID: "vmaaaaaa", State: fleet.VMWarm}, {ID: "vmaaaaaa", State: fleet.VMBusy}}
		}, http.StatusBadRequest},
	} {
		m := h.mac("mac1")
		r := m.request(0)
		c.change(&r)
		_, err := m.client.Sync(t.Context(), r)
		var e *api.Error
		if !errors.As(err, &e) || e.Status != c.status || e.Hint == "" {
			t.Errorf("%s: %v, want a %d with a hint", name, err, c.status)
		}
	}
	if len(h.view().VMs)+len(h.view().Nodes) != 0 {
		t.Error("a refused report left records")
	}
}

// A node's words may be a guest's, and what is stored of them ends on people's terminals:
// each is one plain line there.
func TestEscapesInANodesWords(t *testing.T) {
	const said = "\x1b[2J\u009b1mended\nvmbbbbbb mac2\tbusy\r\u202e\xff"
	h := newHouse(t)
	h.place("vmaaaaaa", "mac1")
	m := h.mac("mac1")
	m.images = []fleet.NodeImage{{Ref: ref, Digest: digest, State: fleet.ImageFailed, Error: said + strings.Repeat("x", maxText)}}
	v := m.is("vmaaaaaa", fleet.VMDone)
	v.Failed, v.DoneAt, v.Reason = true, h.clock(), said+strings.Repeat("x", 2*maxReason)
	m.say(v)
	stored := []string{h.vm("vmaaaaaa").Reason, h.view().Nodes["mac1"].Images[0].Error}
	if len(stored[0]) > maxReason || len(stored[1]) > maxText {
		t.Errorf("%d and %d bytes are stored", len(stored[0]), len(stored[1]))
	}
	events, err := h.store.Events(t.Context(), store.EventFilter{})
	if err != nil || len(events) < 2 {
		t.Fatalf("%v, %v", events, err)
	}
	told := 0
	for _, e := range events {
		stored = append(stored, e.Text)
		if strings.Contains(e.Text, "1mended") {
			told++
		}
	}
	if told == 0 {
		t.Errorf("the words are in %d of %v", told, events)
	}
	for _, text := range stored {
		if !utf8.ValidString(text) || strings.ContainsAny(text, "\x1b\u009b\n\r\t\u202e") {
			t.Errorf("stored is %.200q", text)
		}
	}
}
