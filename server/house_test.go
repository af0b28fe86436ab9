package server

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/placement"
	"github.com/paddock-ci/paddock/store"
)

// The cast: the fleet "f" with the pool "small" (image sequoia); the nodes mac1 and
// mac2 with 2 slots each; the leader, which writes to the store as controller would;
// VMs named vmaaaaaa, vmbbbbbb; the job 7 of acme/app.

const (
	digest = fleet.Digest("sha256:1111111111111111111111111111111111111111111111111111111111111111")
	ref    = "registry.example/macos/sequoia:16"
	secret = "SECRET-JIT-CONFIG"
)

var pool = fleet.Pool{
	Name: "small", Scopes: []fleet.Scope{"acme"}, Labels: fleet.NewLabels("self-hosted", "macos"), Image: ref,
	CPU: 4, Memory: 8 << 30, Env: map[string]string{"A": "b"}, Bootstrap: fleet.BootstrapAgent, Runner: []string{"run"},
}

// house is a server on an embedded store, with a clock that the test moves.
type house struct {
	t      testing.TB
	store  *store.Store
	server *Server
	http   *httptest.Server
	key    access.Key
	log    *syncBuffer

	annsToken string // of an operator, once a test needs one

	mu  sync.Mutex
	now time.Time
}

// syncBuffer is a log that handlers may write to at once.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func newHouse(t testing.TB, changes ...func(*Config)) *house {
	t.Helper()
	s, err := store.OpenEmbedded(t.Context(), store.EmbeddedConfig{})
	if err != nil {
		t.Fatal(err)
	}
	return newHouseOn(t, s, changes...)
}

// newHouseOn is a house on a store of the caller's, which it runs and closes, with
// something else in the server's configuration.
func newHouseOn(t testing.TB, s *store.Store, changes ...func(*Config)) *house {
	t.Helper()
	h := &house{t: t, store: s, key: access.NewKey(), log: &syncBuffer{}, now: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)}
	h.runStore()
	h.server = h.serve(changes...)
	h.http = httptest.NewServer(h.server.Handler())
	t.Cleanup(h.http.Close)
	return h
}

// runStore runs the house's store until the test ends, and leads.
func (h *house) runStore() {
	h.t.Helper()
	s := h.store
	ctx, stop := context.WithCancel(context.WithoutCancel(h.t.Context()))
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	h.t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil && !errors.Is(err, context.Canceled) {
			h.t.Error(err)
		}
		_ = s.Close() // some tests have closed it to take it away
	})
	if _, leader, err := s.Lead(ctx, "leader", time.Hour); err != nil || !leader {
		h.t.Fatalf("lead: %t, %v", leader, err)
	}
}

func (h *house) serve(changes ...func(*Config)) *Server {
	h.t.Helper()
	c := Config{
		Store: h.store, Key: h.key, Fleet: "f", SelfURL: "https://paddock.example", Certificate: "abcd",
		Pools: func() []fleet.Pool { return []fleet.Pool{pool} },
		Explain: func(_ context.Context, id fleet.JobID) (placement.Explanation, error) {
			return placement.Explanation{Job: id, Wait: "a slot"}, nil
		},
		Evictions: func(_ context.Context, node fleet.NodeID, free int64) ([]placement.NodeEvictions, error) {
			return []placement.NodeEvictions{{Node: node, Want: free}}, nil
		},
		Log: slog.New(slog.NewJSONHandler(h.log, nil)), Now: h.clock,
	}
	for _, change := range changes {
		change(&c)
	}
	s, err := New(c)
	if err != nil {
		h.t.Fatal(err)
	}
	return s
}

func (h *house) clock() time.Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.now
}

func (h *house) advance(d time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.now = h.now.Add(d)
}

// token signs one for a role; a node's subject is its id.
func (h *house) token(role access.Role, subject string) string {
	h.t.Helper()
	token, err := h.key.Sign(access.Identity{ID: access.NewID(), Role: role, Subject: subject, ExpiresAt: h.clock().Add(access.NodeLife)})
	if err != nil {
		h.t.Fatal(err)
	}
	return string(token)
}

func (h *house) client(role access.Role, subject string) *api.Client {
	h.t.Helper()
	return h.with(h.token(role, subject))
}

func (h *house) with(token string) *api.Client {
	h.t.Helper()
	c, err := api.New(api.Config{URL: h.http.URL, Token: token})
	if err != nil {
		h.t.Fatal(err)
	}
	return c
}

func (h *house) view() *store.View {
	h.t.Helper()
	v, err := h.store.View(h.t.Context())
	if err != nil {
		h.t.Fatal(err)
	}
	return v
}

func (h *house) vm(id fleet.VMID) fleet.VM {
	h.t.Helper()
	vm := h.view().VMs[id]
	if vm == nil {
		h.t.Fatalf("no VM %s", id)
	}
	return *vm
}

// commit writes as the leader does.
func (h *house) commit(t store.Txn) {
	h.t.Helper()
	if err := h.store.Commit(h.t.Context(), t); err != nil {
		h.t.Fatal(err)
	}
}

// change rewrites a VM's record.
func (h *house) change(id fleet.VMID, change func(*fleet.VM)) {
	h.t.Helper()
	vm := h.vm(id)
	change(&vm)
	h.commit(store.Txn{VMs: []fleet.VM{vm}})
}

// place writes a VM for a node.
func (h *house) place(id fleet.VMID, node fleet.NodeID) {
	h.t.Helper()
	h.commit(store.Txn{VMs: []fleet.VM{{ID: id, Node: node, Pool: "small", Image: digest, State: fleet.VMPlaced, Job: 7, PlacedAt: h.clock()}}})
}

// claim writes what the leader writes once GitHub has registered a runner.
func (h *house) claim(id fleet.VMID) {
	h.t.Helper()
	name := fleet.RunnerName("f", id, 1)
	sealed, err := h.key.Seal(secret, id, name)
	if err != nil {
		h.t.Fatal(err)
	}
	h.change(id, func(vm *fleet.VM) {
		vm.Attempt = 1
		vm.Claim = &fleet.Claim{Scope: "acme", Group: 1, Labels: pool.Labels, Runner: name, RunnerID: 42, At: h.clock(), Sealed: sealed}
	})
}

func (h *house) queue(id fleet.JobID) {
	h.t.Helper()
	_, err := h.store.MergeJob(h.t.Context(), store.Delivery{ID: "d", At: h.clock(), Job: fleet.Job{
		ID: id, RunID: 1, Repository: "acme/app", Name: "build", Labels: pool.Labels, Status: fleet.JobQueued, CreatedAt: h.clock(),
	}})
	if err != nil {
		h.t.Fatal(err)
	}
}

// mac is a node's side of sync.
type mac struct {
	h          *house
	id         fleet.NodeID
	client     *api.Client
	credential string // if a test needs it
	session    string
	sequence   int64
	have       string
	vms        []api.VMReport
	images     []fleet.NodeImage
	site       string
	peer       fleet.NodePeer
}

func (h *house) mac(id fleet.NodeID) *mac {
	return &mac{h: h, id: id, client: h.client(access.Node, string(id)), session: "s1"}
}

func (m *mac) request(wait time.Duration) api.SyncRequest {
	m.sequence++
	return api.SyncRequest{
		Protocol: api.Protocol, Session: m.session, Sequence: m.sequence, Have: m.have, Wait: wait, VMs: m.vms,
		Node: fleet.Node{ID: m.id, Arch: "arm64", OS: "darwin", Driver: "process", Version: "test", Slots: 2, Images: m.images, Site: m.site, Peer: m.peer},
	}
}

// try makes one sync; say makes one that must succeed.
func (m *mac) try(wait time.Duration) (api.SyncReply, error) {
	reply, err := m.client.Sync(m.h.t.Context(), m.request(wait))
	if err == nil {
		m.have = reply.Revision
	}
	return reply, err
}

func (m *mac) say(vms ...api.VMReport) api.SyncReply {
	m.h.t.Helper()
	m.vms = vms
	reply, err := m.try(0)
	if err != nil {
		m.h.t.Fatal(err)
	}
	return reply
}

// is reports a VM in a state, with the times of a life of ten seconds a step.
func (m *mac) is(id fleet.VMID, state fleet.VMState) api.VMReport {
	return api.VMReport{ID: id, State: state, Order: api.VMOrder{ID: id, Pool: "small", Image: digest, Ref: ref, PlacedAt: m.h.clock(), Job: 7}}
}

func ran(v api.VMReport) api.VMReport {
	v.Runner = &api.RunnerReport{Name: fleet.RunnerName("f", v.ID, 1), RunnerID: 42, Scope: "acme", Group: 1, Labels: pool.Labels, Attempt: 1, Job: 7}
	return v
}

// status is the HTTP status in an error, 200 for none.
func status(t testing.TB, err error) int {
	t.Helper()
	if err == nil {
		return http.StatusOK
	}
	e, ok := err.(*api.Error) //nolint:errorlint // the client returns it bare
	if !ok {
		t.Fatalf("%v is no *api.Error", err)
	}
	return e.Status
}
