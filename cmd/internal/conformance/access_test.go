package conformance

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/cmd/internal/parts"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github/githubtest"
)

// Who may say what, over the wire.

// refusedWith asserts that a call was refused with the status and a hint.
func refusedWith(t *testing.T, what string, err error, status int) {
	t.Helper()
	var refused *api.Error
	if !errors.As(err, &refused) || refused.Status != status || refused.Hint == "" {
		t.Errorf("%s: %v, want %d with a hint", what, err, status)
	}
}

// credential is a node's own.
func (h *house) credential(name string) parts.Endpoint {
	h.t.Helper()
	e, err := parts.ReadEndpoint(filepath.Join(h.dir, name, "credential.json"))
	if err != nil {
		h.t.Fatal(err)
	}
	return e
}

// report sends one sync with a node's credential.
func report(ctx context.Context, t *testing.T, e parts.Endpoint, r api.SyncRequest) error {
	t.Helper()
	client, err := e.Client()
	if err != nil {
		t.Fatal(err)
	}
	r.Protocol, r.Session, r.Sequence = api.Protocol, "of-the-test", 1
	_, err = client.Sync(ctx, r)
	return err
}

// Node mac-2, which has joined and is up to no good, speaks of the VM of mac-1, under its
// own name and under mac-1's.
func TestANodeSpeaksOnlyForItself(t *testing.T) {
	h := open(t, plan{})
	h.join("mac-2")
	bad := h.credential("mac-2")
	id := h.run("acme/app", githubtest.JobSpec{Name: "build", Labels: mac, Seconds: 1})[0]
	h.waitJob(id, fleet.JobInProgress)
	var vm fleet.VMID
	h.untilView("no VM runs the job", func(v *viewOf) bool {
		for _, running := range v.VMs {
			if running.State == fleet.VMBusy {
				vm = running.ID
			}
		}
		return vm != ""
	})
	before := *h.view().VMs[vm]
	for what, r := range map[string]api.SyncRequest{
		"under its own name": {
			Node: fleet.Node{ID: "mac-2", Slots: 2}, VMs: []api.VMReport{{ID: vm, State: fleet.VMWarm}},
		},
		"under its own name, done": {
			Node: fleet.Node{ID: "mac-2", Slots: 2}, VMs: []api.VMReport{{ID: vm, State: fleet.VMDone}},
		},
		"under the other's name": {
			Node: fleet.Node{ID: "mac-1", Slots: 2}, VMs: []api.VMReport{{ID: vm, State: fleet.VMWarm}},
		},
	} {
		refusedWith(t, what, report(t.Context(), t, bad, r), http.StatusForbidden)
	}
	if after := h.view().VMs[vm]; after.Node != before.Node || after.State.Final() {
		t.Errorf("the VM became %+v", after)
	}
	h.succeeded(id)
	h.empty()
}

// Credentials that were revoked, have expired, or never were.
func TestBadCredentials(t *testing.T) {
	h := open(t, plan{})
	h.join("mac-2")
	good := h.credential("mac-2")
	alive := api.SyncRequest{Node: fleet.Node{ID: "mac-2", Slots: 2}}
	if err := report(t.Context(), t, good, alive); err != nil {
		t.Fatalf("the good credential: %v", err)
	}
	admin := h.admin()
	tokens, err := admin.Tokens(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range tokens {
		if row.Role == string(access.Node) && row.Name == "mac-2" {
			if _, err := admin.RevokeToken(t.Context(), row.ID); err != nil {
				t.Fatal(err)
			}
		}
	}
	// The controller may believe its copy of the ledger for a moment.
	h.until(func() error {
		if err := report(t.Context(), t, good, alive); err == nil {
			return errors.New("the revoked credential still works")
		}
		return nil
	})
	refusedWith(t, "revoked", report(t.Context(), t, good, alive), http.StatusUnauthorized)

	expired := good
	expired.Token = h.signed(access.Identity{ID: access.NewID(), Role: access.Node, Subject: "mac-2", ExpiresAt: time.Now().Add(-time.Hour)})
	refusedWith(t, "expired", report(t.Context(), t, expired, alive), http.StatusUnauthorized)

	forged := good
	token, err := access.NewKey().Sign(access.Identity{ID: access.NewID(), Role: access.Admin, Subject: "mac-2", ExpiresAt: time.Now().Add(time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	forged.Token = string(token)
	refusedWith(t, "forged", report(t.Context(), t, forged, alive), http.StatusUnauthorized)

	// The refusals do not quote what was sent.
	for _, e := range []parts.Endpoint{good, expired, forged} {
		if strings.Contains(h.answerTo(e), e.Token) {
			t.Error("a refusal quotes the token")
		}
	}
}

// signed makes a token with the fleet's key, as only its owner can.
func (h *house) signed(id access.Identity) string {
	h.t.Helper()
	text, err := h.file("data/fleet.key")
	if err != nil {
		h.t.Fatal(err)
	}
	key, err := access.ParseKey(text)
	if err != nil {
		h.t.Fatal(err)
	}
	token, err := key.Sign(id)
	if err != nil {
		h.t.Fatal(err)
	}
	return string(token)
}

// answerTo is the body of the answer to a list of nodes.
func (h *house) answerTo(e parts.Endpoint) string {
	h.t.Helper()
	r, err := http.NewRequestWithContext(h.t.Context(), http.MethodGet, e.URL+api.RouteNodes, nil)
	if err != nil {
		h.t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+e.Token)
	answer, err := (&http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}).RoundTrip(r)
	if err != nil {
		h.t.Fatal(err)
	}
	defer func() { _ = answer.Body.Close() }()
	var said map[string]any
	if err := json.NewDecoder(answer.Body).Decode(&said); err != nil || answer.StatusCode != http.StatusUnauthorized {
		h.t.Errorf("answered %d, %v", answer.StatusCode, err)
	}
	text, err := json.Marshal(said)
	if err != nil {
		h.t.Fatal(err)
	}
	return string(text)
}

// A viewer looks and makes no tokens; a node's credential does neither.
func TestRolesOverTheWire(t *testing.T) {
	h := open(t, plan{})
	viewer, err := h.control.part.Client(access.Viewer)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := viewer.Nodes(t.Context()); err != nil {
		t.Errorf("a viewer lists nodes: %v", err)
	}
	node, err := h.credential("mac-1").Client()
	if err != nil {
		t.Fatal(err)
	}
	for who, client := range map[string]*api.Client{"viewer": viewer, "node": node} {
		_, err := client.CreateToken(t.Context(), api.TokenRequest{Name: "more", Role: "admin"})
		refusedWith(t, who+" makes a token", err, http.StatusForbidden)
		_, err = client.CreateToken(t.Context(), api.TokenRequest{Node: "mac-9"})
		refusedWith(t, who+" makes a join token", err, http.StatusForbidden)
	}
	_, err = node.Nodes(t.Context())
	refusedWith(t, "a node lists nodes", err, http.StatusForbidden)
	err = report(t.Context(), t, parts.Endpoint{URL: h.control.part.URL(), Certificate: h.credential("mac-1").Certificate,
		Token: h.signed(access.Identity{ID: access.NewID(), Role: access.Viewer, Subject: "mac-1", ExpiresAt: time.Now().Add(time.Hour)}),
	}, api.SyncRequest{Node: fleet.Node{ID: "mac-1"}})
	refusedWith(t, "a viewer named like a node syncs", err, http.StatusForbidden)
}

// A join token works once, and for its node only.
func TestJoinTokenOnce(t *testing.T) {
	h := open(t, plan{none: true})
	token, err := h.control.part.JoinToken(t.Context(), "mac-1")
	if err != nil {
		t.Fatal(err)
	}
	other := h.node("mac-2")
	if err := parts.Join(t.Context(), other, token, ""); err == nil || !strings.Contains(err.Error(), "hint") {
		t.Errorf("another node joined with it: %v", err)
	}
	if err := parts.Join(t.Context(), h.node("mac-1"), token, ""); err != nil {
		t.Fatal(err)
	}
	refusedWith(t, "the token's second use", parts.Join(t.Context(), h.node("mac-1"), token, ""), http.StatusUnauthorized)
}
