package server

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/redis/go-redis/v9"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github"
	"github.com/paddock-ci/paddock/store"
	"github.com/paddock-ci/paddock/store/storetest"
)

// A node joins by a token that an admin made; the token works once, for its name, and
// what the name had before works no more.
func TestJoin(t *testing.T) {
	h := newHouse(t)
	admin := h.client(access.Admin, "ann")
	made, err := admin.CreateToken(t.Context(), api.TokenRequest{Node: "mac1"})
	if err != nil {
		t.Fatal(err)
	}
	read, err := access.ReadJoin(made.Token)
	if err != nil || read.Node != "mac1" || read.Certificate != "abcd" || read.URL != "https://paddock.example" || !read.ExpiresAt.Equal(h.now.Add(access.JoinLife)) {
		t.Fatalf("%+v, %v", read, err)
	}
	nobody := h.with("")
	joined, err := nobody.Join(t.Context(), made.Token+"\n")
	if err != nil {
		t.Fatal(err)
	}
	if joined.Node != "mac1" || joined.Fleet != "f" || !joined.ExpiresAt.Equal(h.now.Add(access.NodeLife)) {
		t.Errorf("%+v", joined)
	}
	m := h.mac("mac1")
	m.client = h.with(joined.Credential)
	m.say()

	if _, err := nobody.Join(t.Context(), made.Token); status(t, err) != http.StatusUnauthorized {
		t.Errorf("used twice: %v", err)
	}
	late, err := admin.CreateToken(t.Context(), api.TokenRequest{Node: "mac1"})
	if err != nil {
		t.Fatal(err)
	}
	h.advance(access.JoinLife + time.Minute)
	if _, err := nobody.Join(t.Context(), late.Token); status(t, err) != http.StatusUnauthorized {
		t.Errorf("too late: %v", err)
	}

	// Made with the fleet key by whoever has it, without this server.
	token, err := h.key.SignJoin(access.Join{ID: access.NewID(), Node: "mac1", ExpiresAt: h.now.Add(access.JoinLife)})
	if err != nil {
		t.Fatal(err)
	}
	again, err := nobody.Join(t.Context(), string(token))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.try(0); status(t, err) != http.StatusUnauthorized {
		t.Errorf("the old credential of a node that joined anew: %v", err)
	}
	m.client = h.with(again.Credential)
	m.say()
	if _, err := nobody.Join(t.Context(), string(token)); status(t, err) != http.StatusUnauthorized {
		t.Errorf("used twice: %v", err)
	}
	ledger, err := h.store.ReadLedger(t.Context())
	if err != nil || len(ledger.Nodes) != 1 || len(ledger.Tokens) != 1 || len(ledger.Revoked) != 1 {
		t.Errorf("%+v, %v", ledger, err)
	}
	for _, leak := range []string{made.Token, joined.Credential, again.Credential} {
		if strings.Contains(h.log.String(), leak) {
			t.Error("a token is in the log")
		}
	}
}

func TestTokens(t *testing.T) {
	h := newHouse(t)
	admin := h.client(access.Admin, "ann")
	made, err := admin.CreateToken(t.Context(), api.TokenRequest{Name: "dashboard", Role: "viewer", Life: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	want := api.TokenRow{ID: made.ID, Name: "dashboard", Role: "viewer", CreatedAt: h.now, ExpiresAt: h.now.Add(time.Hour), CreatedBy: "admin:ann"}
	rows, err := admin.Tokens(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]api.TokenRow{want}, rows); diff != "" {
		t.Error(diff)
	}
	viewer := h.with(made.Token)
	if _, err := viewer.Nodes(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := admin.RevokeToken(t.Context(), made.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := viewer.Nodes(t.Context()); status(t, err) != http.StatusUnauthorized {
		t.Errorf("revoked: %v", err)
	}
	if _, err := admin.RevokeToken(t.Context(), made.ID); status(t, err) != http.StatusNotFound {
		t.Errorf("revoked twice: %v", err)
	}
	if rows, err := admin.Tokens(t.Context()); err != nil || len(rows) != 0 {
		t.Errorf("%v, %v", rows, err)
	}
	events, err := admin.Events(t.Context(), api.EventFilter{})
	if err != nil || len(events) != 2 || events[0].Kind != "token.revoked" || events[1].Kind != "token.created" || events[0].Actor != "admin:ann" {
		t.Errorf("the audit trail: %+v, %v", events, err)
	}
	for name, q := range map[string]api.TokenRequest{
		"no name":        {Role: "viewer"},
		"no role":        {Name: "x"},
		"a node's":       {Name: "x", Role: "node"},
		"for ever":       {Name: "x", Role: "viewer", Life: 100000 * time.Hour},
		"over already":   {Name: "x", Role: "viewer", Life: -time.Hour},
		"node and more":  {Node: "mac1", Role: "viewer"},
		"no such node's": {Node: "Mac 1"},
	} {
		if _, err := admin.CreateToken(t.Context(), q); status(t, err) != http.StatusBadRequest {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestLedgerIsPruned(t *testing.T) {
	now := time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)
	old, fresh := now.Add(-48*time.Hour), now.Add(-time.Hour)
	l := store.Ledger{
		Tokens:  []store.TokenRecord{{ID: "old", ExpiresAt: old}, {ID: "fresh", ExpiresAt: fresh}, {ID: "never"}},
		Joins:   []store.JoinRecord{{Hash: "old", ExpiresAt: old}, {Hash: "fresh", ExpiresAt: fresh}},
		Revoked: map[string]time.Time{"old": old, "fresh": fresh},
	}
	prune(&l, now)
	want := store.Ledger{
		Tokens:  []store.TokenRecord{{ID: "fresh", ExpiresAt: fresh}, {ID: "never"}},
		Joins:   []store.JoinRecord{{Hash: "fresh", ExpiresAt: fresh}},
		Revoked: map[string]time.Time{"fresh": fresh},
	}
	if diff := cmp.Diff(want, l); diff != "" {
		t.Error(diff)
	}
}

func TestLists(t *testing.T) {
	h := newHouse(t)
	began := h.now
	h.queue(7)
	h.place("vmaaaaaa", "mac1")
	h.commit(store.Txn{Images: []fleet.Image{{Ref: ref, Digest: digest, Bytes: 100, ResolvedAt: h.now}}})
	two := h.mac("mac2")
	two.images = []fleet.NodeImage{{Digest: digest, Ref: ref, State: fleet.ImageCaching, Done: 10, Total: 100, DiskBytes: 50}}
	two.say()
	h.advance(10 * time.Second)
	one := h.mac("mac1")
	one.images = []fleet.NodeImage{{Digest: digest, Ref: ref, State: fleet.ImageReady, DiskBytes: 500, Leases: 1}}
	one.say(ran(one.is("vmaaaaaa", fleet.VMBusy)))

	viewer := h.client(access.Viewer, "vera")
	ctx := t.Context()
	nodes, err := viewer.Nodes(ctx)
	check(t, "nodes", err, []api.NodeRow{
		{ID: "mac1", Status: api.NodeReady, Arch: "arm64", OS: "darwin", Driver: "process", Version: "test", Slots: 2, Used: 1, Images: 1, JoinedAt: h.now, SeenAt: h.now},
		{ID: "mac2", Status: api.NodeReady, Arch: "arm64", OS: "darwin", Driver: "process", Version: "test", Slots: 2, JoinedAt: began, SeenAt: began},
	}, nodes)
	vms, err := viewer.VMs(ctx)
	check(t, "vms", err, []api.VMRow{{
		ID: "vmaaaaaa", Node: "mac1", Pool: "small", State: fleet.VMBusy, Since: h.now, Image: digest, Job: 7, JobName: "acme/app: build",
		Runner: "paddock-f-vmaaaaaa-1", PlacedAt: began, BootingAt: h.now, WarmAt: h.now, RegisteredAt: h.now, BusyAt: h.now,
	}}, vms)
	images, err := viewer.Images(ctx)
	check(t, "images", err, []api.ImageRow{{
		Name: "registry.example/macos/sequoia", Tag: "16", Digest: digest, SpaceUsed: 550, NodesCount: 1, Bytes: 100, Current: true,
		Nodes: []api.ImageOnNode{{Node: "mac1", NodeImage: one.images[0]}, {Node: "mac2", NodeImage: two.images[0]}},
	}}, images)
	jobs, err := viewer.Jobs(ctx, fleet.JobQueued)
	if err != nil || len(jobs) != 1 {
		t.Fatalf("%+v, %v", jobs, err)
	}
	check(t, "job", nil, api.JobRow{
		Job: jobs[0].Job, Pool: "small", VM: "vmaaaaaa", Node: "mac1", Start: "warm", Phases: &api.Phases{Boot: 10 * time.Second},
	}, jobs[0])
	if jobs[0].ID != 7 || jobs[0].Phases.Total() != 10*time.Second {
		t.Errorf("%+v", jobs[0])
	}
	if done, err := viewer.Jobs(ctx, fleet.JobCompleted); err != nil || len(done) != 0 {
		t.Errorf("%+v, %v", done, err)
	}
	explained, err := viewer.Explain(ctx, 7)
	if err != nil || explained.Wait != "a slot" {
		t.Errorf("%+v, %v", explained, err)
	}
	evictions, err := viewer.Evictions(ctx, "mac1", 5e9)
	check(t, "evictions", err, []api.NodeEvictions{{Node: "mac1", Want: 5e9}}, evictions)
	events, err := viewer.Events(ctx, api.EventFilter{VM: "vmaaaaaa", Limit: 2})
	if err != nil || len(events) != 2 || events[0].Kind != "vm.busy" {
		t.Errorf("%+v, %v", events, err)
	}
}

func check(t *testing.T, what string, err error, want, got any) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateApproxTime(0)); diff != "" {
		t.Errorf("%s: %s", what, diff)
	}
}

func TestListErrors(t *testing.T) {
	h := newHouse(t)
	viewer := h.client(access.Viewer, "vera")
	for name, c := range map[string]struct {
		call   func(context.Context) error
		status int
	}{
		"an unknown status": {func(ctx context.Context) error { _, err := viewer.Jobs(ctx, "lost"); return err }, http.StatusBadRequest},
		"an unknown job":    {func(ctx context.Context) error { _, err := viewer.Explain(ctx, 9); return err }, http.StatusNotFound},
		"not a job":         {func(ctx context.Context) error { _, err := viewer.Explain(ctx, -1); return err }, http.StatusBadRequest},
		"an unknown node":   {func(ctx context.Context) error { _, err := viewer.Evictions(ctx, "mac9", 0); return err }, http.StatusNotFound},
		"too many events":   {func(ctx context.Context) error { _, err := viewer.Events(ctx, api.EventFilter{Limit: 1e6}); return err }, http.StatusBadRequest},
	} {
		if err := c.call(t.Context()); status(t, err) != c.status {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, path := range []string{api.RouteNodes, api.RouteVMs, api.RouteImages, api.RouteJobs, api.RouteEvents} {
		if _, body := h.request("GET", path, h.token(access.Viewer, "vera"), ""); body != "[]" {
			t.Errorf("an empty %s is %s, want []", path, body)
		}
	}
}

// The one that runs the job goes before the one it was meant for.
func TestWhichVMServesAJob(t *testing.T) {
	at := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	meant := &fleet.VM{ID: "a", Job: 7, State: fleet.VMPlaced, PlacedAt: at.Add(time.Hour)}
	ran := &fleet.VM{ID: "b", Job: 7, State: fleet.VMDone, PlacedAt: at, BusyAt: at}
	failed := &fleet.VM{ID: "c", Job: 7, State: fleet.VMDone, PlacedAt: at.Add(2 * time.Hour)}
	idle := &fleet.VM{ID: "d", State: fleet.VMWarm}
	for _, c := range []struct {
		vm, than *fleet.VM
		want     bool
	}{{ran, meant, true}, {meant, ran, false}, {meant, failed, true}, {failed, nil, true}, {idle, nil, false}, {idle, failed, false}} {
		if better(c.vm, c.than) != c.want {
			t.Errorf("%v better than %v: want %t", c.vm, c.than, c.want)
		}
	}
}

func TestPhases(t *testing.T) {
	at := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	job := &fleet.Job{CreatedAt: at}
	vm := &fleet.VM{PlacedAt: at.Add(5 * time.Second), WarmAt: at.Add(25 * time.Second), BusyAt: at.Add(30 * time.Second)}
	check(t, "waited for a slot", nil, api.Phases{Queue: 5 * time.Second, Boot: 20 * time.Second, Register: 5 * time.Second}, phases(vm, job))
	vm.Cold = true
	check(t, "waited for the image", nil, api.Phases{Pull: 5 * time.Second, Boot: 20 * time.Second, Register: 5 * time.Second}, phases(vm, job))
	warm := &fleet.VM{PlacedAt: at.Add(-time.Hour), WarmAt: at.Add(-50 * time.Minute), BusyAt: at.Add(2 * time.Second)}
	check(t, "a warm VM", nil, api.Phases{Register: 2 * time.Second}, phases(warm, job))
	approved := &fleet.Job{CreatedAt: at.Add(-time.Hour), Gate: at.UnixMilli()}
	check(t, "after an approval", nil, api.Phases{Register: 2 * time.Second}, phases(warm, approved))
}

// The deliveries that say that a job runs and that it has ended must not move the time
// from which its start delay counts.
func TestDelayMeasuredFromALaterDelivery(t *testing.T) {
	h := newHouse(t)
	at := h.now.UTC()
	guid := func(at time.Time) string { // a UUID of version 1, as GitHub's are
		ticks := uint64(at.UnixMilli())*10_000 + 0x01B21DD213814000
		return fmt.Sprintf("%08x-%04x-1%03x-81ab-4c9367dc0958", uint32(ticks), uint16(ticks>>32), ticks>>48)
	}
	vm := &fleet.VM{PlacedAt: at.Add(-time.Hour), WarmAt: at.Add(-time.Hour), BusyAt: at.Add(900 * time.Millisecond)}
	for i, action := range []string{"queued", "in_progress", "completed"} {
		sent := at.Add([]time.Duration{400 * time.Millisecond, 890 * time.Millisecond, 10 * time.Second}[i])
		job, err := github.ParseJob(fmt.Appendf(nil, `{"action":%q,"workflow_job":{"id":7,"status":%[1]q,"labels":["macos"],"created_at":%q,"started_at":%[2]q},
			"repository":{"full_name":"acme/app"}}`, action, at.Format(time.RFC3339)), guid(sent))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := h.store.MergeJob(t.Context(), store.Delivery{ID: action, At: sent, Job: job}); err != nil {
			t.Fatal(err)
		}
		check(t, "delay when it is "+action, nil, 500*time.Millisecond, phases(vm, h.view().Jobs[7]).Total())
	}
}

// The audit trail cannot be written: whoever made a token gets it all the same, since
// nobody could ever show it again, and a node's one-time token is not spent for nothing.
func TestSecretLostWithItsAuditEvent(t *testing.T) {
	url, _ := storetest.StartRedis(t)
	s, err := store.Open(t.Context(), store.Config{URL: url})
	if err != nil {
		t.Fatal(err)
	}
	h := newHouseOn(t, s)
	admin := h.client(access.Admin, "ann")
	if _, err := admin.CreateToken(t.Context(), api.TokenRequest{Name: "first", Role: "viewer"}); err != nil {
		t.Fatal(err)
	}
	options, err := redis.ParseURL(url)
	if err != nil {
		t.Fatal(err)
	}
	rdb := redis.NewClient(options)
	defer func() { _ = rdb.Close() }()
	keys, err := rdb.Keys(t.Context(), "*events").Result()
	if err != nil || len(keys) != 1 {
		t.Fatalf("keys %v, %v", keys, err)
	}
	if err := rdb.Set(t.Context(), keys[0], "not a list", 0).Err(); err != nil {
		t.Fatal(err)
	}
	made, err := admin.CreateToken(t.Context(), api.TokenRequest{Name: "second", Role: "viewer"})
	if err != nil || made.Token == "" {
		t.Fatalf("%+v, %v", made, err)
	}
	join, err := admin.CreateToken(t.Context(), api.TokenRequest{Node: "mac1"})
	if err != nil || join.Token == "" {
		t.Fatalf("%+v, %v", join, err)
	}
	joined, err := h.with("").Join(t.Context(), join.Token)
	if err != nil || joined.Credential == "" {
		t.Fatalf("%+v, %v", joined, err)
	}
	if _, err := admin.RevokeToken(t.Context(), made.ID); err != nil {
		t.Error(err)
	}
	if n := strings.Count(h.log.String(), "a change is not in the audit trail"); n != 4 {
		t.Errorf("%d of 4 changes without an event were logged", n)
	}
}
