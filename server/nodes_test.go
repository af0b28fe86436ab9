package server

import (
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
)

// A cordon is in the ledger, so an emptied store does not lift it.
func TestCordon(t *testing.T) {
	h := newHouse(t)
	m := h.mac("mac1")
	m.say()
	operator := h.client(access.Operator, "olga")
	row, err := operator.Cordon(t.Context(), "mac1")
	if err != nil || row.Status != api.NodeCordoned {
		t.Fatalf("%+v, %v", row, err)
	}
	m.say()
	if !h.view().Nodes["mac1"].Cordoned {
		t.Error("the node's next report lifted the cordon")
	}
	h.commit(store.Txn{DropNodes: []fleet.NodeID{"mac1"}})
	m.session = "s2"
	m.say()
	if !h.view().Nodes["mac1"].Cordoned {
		t.Error("forgotten with the node's record")
	}
	if row, err = operator.Uncordon(t.Context(), "mac1"); err != nil || row.Status != api.NodeReady {
		t.Fatalf("%+v, %v", row, err)
	}
	m.say()
	if h.view().Nodes["mac1"].Cordoned {
		t.Error("still cordoned")
	}
	if _, err := operator.Cordon(t.Context(), "mac9"); status(t, err) != http.StatusNotFound {
		t.Errorf("an unknown node: %v", err)
	}
	h.advance(time.Minute)
	if rows, err := operator.Nodes(t.Context()); err != nil || rows[0].Status != api.NodeUnreachable {
		t.Errorf("%+v, %v", rows, err)
	}
}

// A cordon set at one replica while another one's copy of the ledger is a second old.
func TestCordonUndoneAtAnotherReplica(t *testing.T) {
	h := newHouse(t)
	m := h.mac("mac1")
	operator := h.client(access.Operator, "olga")
	two := httptest.NewServer(h.serve().Handler())
	t.Cleanup(two.Close)
	var err error
	if m.client, err = api.New(api.Config{URL: two.URL, Token: h.token(access.Node, "mac1")}); err != nil {
		t.Fatal(err)
	}
	m.say()
	for _, on := range []bool{true, false} {
		if on {
			_, err = operator.Cordon(t.Context(), "mac1")
		} else {
			_, err = operator.Uncordon(t.Context(), "mac1")
		}
		if err != nil {
			t.Fatal(err)
		}
		h.advance(ledgerAge / 4)
		m.say()
		if got := h.view().Nodes["mac1"].Cordoned; got != on {
			t.Errorf("cordoned %t after a sync at the other replica, want %t", got, on)
		}
	}
}

// A Mac that was taken out of service stayed in the ledger for ever, and each emptied
// store was waited for it.
func TestRetiredMacNeverForgotten(t *testing.T) {
	h := newHouse(t)
	admin, operator := h.client(access.Admin, "ann"), h.client(access.Operator, "olga")
	joinAs := func(node fleet.NodeID) *mac {
		t.Helper()
		made, err := admin.CreateToken(t.Context(), api.TokenRequest{Node: node})
		if err != nil {
			t.Fatal(err)
		}
		joined, err := h.with("").Join(t.Context(), made.Token)
		if err != nil {
			t.Fatal(err)
		}
		m := h.mac(node)
		m.client, m.credential = h.with(joined.Credential), joined.Credential
		return m
	}
	m := joinAs("mac1")
	m.say()
	if _, err := operator.RemoveNode(t.Context(), "mac1"); status(t, err) != http.StatusConflict {
		t.Errorf("a node that takes work: %v", err)
	}
	if _, err := operator.Cordon(t.Context(), "mac1"); err != nil {
		t.Fatal(err)
	}
	h.place("vmaaaaaa", "mac1")
	h.commit(store.Txn{Orders: []fleet.Orders{{Node: "mac1", Hold: []fleet.Hold{{Digest: digest, Ref: ref}}}}})
	m.say(m.is("vmaaaaaa", fleet.VMBusy))
	h.advance(lostAfter - time.Second)
	if _, err := operator.RemoveNode(t.Context(), "mac1"); status(t, err) != http.StatusConflict {
		t.Errorf("a VM lives there: %v", err)
	}
	h.advance(time.Second)
	unused, err := admin.CreateToken(t.Context(), api.TokenRequest{Node: "mac1"})
	if err != nil {
		t.Fatal(err)
	}
	row, err := operator.RemoveNode(t.Context(), "mac1")
	if err != nil || row.ID != "mac1" || row.Status != api.NodeUnreachable || row.Used != 1 {
		t.Fatalf("%+v, %v", row, err)
	}
	ledger, err := h.store.ReadLedger(t.Context())
	if err != nil || len(ledger.Nodes)+len(ledger.Cordons)+len(ledger.Tokens) != 0 || len(ledger.Revoked) != 1 {
		t.Errorf("%+v, %v", ledger, err)
	}
	if v := h.view(); v.Nodes["mac1"] != nil || v.Orders["mac1"] != nil || v.VMs["vmaaaaaa"] == nil {
		t.Errorf("node %v, orders %v, VM %v", v.Nodes["mac1"], v.Orders["mac1"], v.VMs["vmaaaaaa"])
	}
	if _, err := m.try(0); status(t, err) != http.StatusUnauthorized {
		t.Errorf("its credential: %v", err)
	}
	if _, err := h.with("").Join(t.Context(), unused.Token); status(t, err) != http.StatusUnauthorized {
		t.Errorf("a join token from before: %v", err)
	}
	if _, err := operator.RemoveNode(t.Context(), "mac1"); status(t, err) != http.StatusNotFound {
		t.Errorf("removed twice: %v", err)
	}

	// One that only the ledger knows, since the store was emptied.
	joinAs("mac2")
	if row, err := operator.RemoveNode(t.Context(), "mac2"); err != nil || row.ID != "mac2" {
		t.Errorf("%+v, %v", row, err)
	}

	// A replica whose copy of the ledger is older must not take its report.
	three := joinAs("mac3")
	late := h.serve()
	if _, err := late.ledger.get(t.Context(), h.clock()); err != nil {
		t.Fatal(err)
	}
	if _, err := operator.RemoveNode(t.Context(), "mac3"); err != nil {
		t.Fatal(err)
	}
	other := httptest.NewServer(late.Handler())
	t.Cleanup(other.Close)
	if three.client, err = api.New(api.Config{URL: other.URL, Token: three.credential}); err != nil {
		t.Fatal(err)
	}
	if _, err := three.try(0); status(t, err) != http.StatusUnauthorized || h.view().Nodes["mac3"] != nil {
		t.Errorf("known again by a replica that had not heard: %v", err)
	}
}

// The old credential of a node is used again and again, as by an agent that cannot keep
// the new one, or by whoever stole it. It has one successor at a time, not one for each
// sync, and ends when its successor is used.
func TestCredentialsPileUp(t *testing.T) {
	h := newHouse(t)
	m := h.mac("mac1")
	h.advance(access.NodeLife - access.RenewBefore + time.Hour)
	ledger := func() store.Ledger {
		l, err := h.store.ReadLedger(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	first := m.say().Credential
	for range 50 {
		if again := m.say().Credential; first == "" || again != "" {
			t.Fatal("not renewed, or renewed at once again")
		}
	}
	if l := ledger(); len(l.Tokens) != 1 || l.Version != 1 {
		t.Fatalf("%d credentials in force, ledger version %d", len(l.Tokens), l.Version)
	}
	// It seems to be lost: another one takes its place.
	h.advance(renewAgain)
	second := m.say().Credential
	if l := ledger(); second == "" || len(l.Tokens) != 1 || len(l.Revoked) != 1 {
		t.Fatalf("after an hour: %+v", l)
	}
	old := m.client
	m.client = h.with(first)
	if _, err := m.try(0); status(t, err) != http.StatusUnauthorized {
		t.Errorf("the successor that was lost still works: %v", err)
	}
	m.client = h.with(second)
	m.say()
	m.client = old
	if _, err := m.try(0); status(t, err) != http.StatusUnauthorized {
		t.Errorf("the old credential still works: %v", err)
	}
	m.client = h.with(second)
	m.say()
	if l := ledger(); len(l.Tokens) != 1 || len(l.Revoked) != 2 || l.Tokens[0].Replaces != "" {
		t.Errorf("at the end: %+v", l)
	}
}
