package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/gin-gonic/gin"
	"github.com/google/go-cmp/cmp"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
)

// request sends one, raw; the answer is status and body.
func (h *house) request(method, path, token, body string) (int, string) {
	h.t.Helper()
	r := httptest.NewRequestWithContext(h.t.Context(), method, path, strings.NewReader(body))
	if token != "" {
		r.Header.Set("Authorization", "Bearer "+token)
	}
	w := httptest.NewRecorder()
	h.server.Handler().ServeHTTP(w, r)
	return w.Code, w.Body.String()
}

// Every route with every role, with no token, and with tokens that are no good. The
// right answers are in package access; here each route must have asked.
func TestEveryRouteAndRole(t *testing.T) {
	h := newHouse(t)
	stranger := &house{t: t, key: access.NewKey(), now: h.now}
	expired, err := h.key.Sign(access.Identity{ID: "1", Role: access.Admin, Subject: "ann", ExpiresAt: h.now.Add(-time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	revoked := h.token(access.Admin, "eve")
	if err := h.server.amend(t.Context(), h.now, func(l *store.Ledger) error {
		id, err := h.server.verifier.Verify(revoked, h.now, nil)
		l.Revoked = map[string]time.Time{id.ID: id.ExpiresAt}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	for _, r := range table {
		path := strings.Replace(r.path, "{id}", "mac1", 1)
		for name, token := range map[string]string{
			"none": "", "another fleet's": stranger.token(access.Admin, "ann"), "expired": string(expired), "revoked": revoked, "garbage": "pdk_x",
		} {
			code, body := h.request(r.method, path, token, "")
			if (code == http.StatusUnauthorized) != (r.needs != "" || r.path == api.RouteJoin) {
				t.Errorf("%s %s with token %s: %d %s", r.method, path, name, code, body)
			}
		}
		if r.needs == "" {
			continue
		}
		for _, role := range access.Roles {
			code, body := h.request(r.method, path, h.token(role, "mac1"), "")
			if code == http.StatusUnauthorized || (code == http.StatusForbidden) == access.Allows(role, r.needs) {
				t.Errorf("%s %s as %s: %d %s", r.method, path, role, code, body)
			}
			if code >= 500 {
				t.Errorf("%s %s as %s: %d %s", r.method, path, role, code, body)
			}
		}
	}
}

// The table serves every route of package api, and nothing else is there.
func TestRoutesAreServed(t *testing.T) {
	h := newHouse(t)
	served := map[string]bool{api.RouteMetrics: true}
	for _, r := range table {
		served[r.path] = true
	}
	for _, route := range []string{
		api.RouteSync, api.RouteJoin, api.RouteNodes, api.RouteNode, api.RouteCordon, api.RouteUncordon, api.RouteVMs, api.RouteVMSession, api.RouteNodeSession, api.RouteImages,
		api.RouteChunks, api.RoutePullToken,
		api.RouteEvictions, api.RouteJobs, api.RouteExplain, api.RouteEvents, api.RouteTokens, api.RouteToken, api.RouteHealth, api.RouteReady, api.RouteMetrics,
	} {
		if !served[route] {
			t.Errorf("%s is not served", route)
		}
		delete(served, route)
	}
	if len(served) > 0 {
		t.Errorf("%v are not in package api", served)
	}
	if code, body := h.request("GET", "/v2/nodes", "", ""); code != http.StatusNotFound || !strings.Contains(body, "hint") {
		t.Errorf("%d %s", code, body)
	}
	if code, body := h.request("DELETE", "/v1/nodes", "", ""); code != http.StatusMethodNotAllowed || !strings.Contains(body, "hint") {
		t.Errorf("%d %s", code, body)
	}
}

func TestBodies(t *testing.T) {
	h := newHouse(t)
	admin := h.token(access.Admin, "ann")
	for name, c := range map[string]struct {
		body   string
		status int
	}{
		"not JSON":       {"{", http.StatusBadRequest},
		"wrong types":    {`{"name":7}`, http.StatusBadRequest},
		"two values":     {`{} {}`, http.StatusBadRequest},
		"garbage behind": {`{"name":"a","role":"viewer"} x`, http.StatusBadRequest},
		"too large":      {`{"name":"` + strings.Repeat("a", maxBody) + `"}`, http.StatusRequestEntityTooLarge},
		"deep":           {strings.Repeat("[", 20000), http.StatusBadRequest},
	} {
		code, body := h.request("POST", api.RouteTokens, admin, c.body)
		var e api.Error
		if err := json.Unmarshal([]byte(body), &e); err != nil || code != c.status || e.Message == "" || e.Hint == "" {
			t.Errorf("%s: %d %s, want a %d with a hint", name, code, body, c.status)
		}
	}
}

func TestProbesAndMetrics(t *testing.T) {
	h := newHouse(t)
	for _, path := range []string{api.RouteHealth, api.RouteReady} {
		if code, body := h.request("GET", path, "", ""); code != http.StatusOK || body != `{"status":"ok"}` {
			t.Errorf("%s: %d %s", path, code, body)
		}
	}
	h.queue(7)
	h.place("vmaaaaaa", "mac1")
	h.change("vmaaaaaa", func(vm *fleet.VM) { vm.Cold, vm.PlacedAt = true, h.now.Add(8*time.Second) })
	m := h.mac("mac1")
	busy := ran(m.is("vmaaaaaa", fleet.VMBusy))
	busy.BootingAt, busy.WarmAt, busy.RegisteredAt, busy.BusyAt = h.now.Add(9*time.Second), h.now.Add(20*time.Second), h.now.Add(22*time.Second), h.now.Add(24*time.Second)
	h.advance(30 * time.Second)
	m.say(busy)
	_, text := h.request("GET", api.RouteMetrics, "", "")
	for _, line := range []string{
		`paddock_start_delay_seconds_sum{phase="queue"} 0`,
		`paddock_start_delay_seconds_sum{phase="pull"} 8`,
		`paddock_start_delay_seconds_sum{phase="boot"} 12`,
		`paddock_start_delay_seconds_sum{phase="register"} 4`,
		`paddock_starts_total{pool="small",start="cold"} 1`,
		`paddock_vm_boot_seconds_sum{pool="small"} 12`,
		`paddock_http_request_seconds_count{route="/v1/nodes/{id}/sync",status="200"} 1`,
	} {
		if !strings.Contains(text, line+"\n") {
			t.Errorf("no line %s", line)
		}
	}
}

func TestStoreDown(t *testing.T) {
	h := newHouse(t)
	h.mac("mac1").say()
	if err := h.store.Close(); err != nil {
		t.Fatal(err)
	}
	h.advance(ledgerAge)
	for _, r := range table {
		if r.path == api.RouteHealth || r.path == api.RouteJoin {
			continue
		}
		role := access.Admin
		if r.needs == access.Sync {
			role = access.Node
		}
		path := strings.Replace(r.path, "{id}", "mac1", 1)
		code, body := h.request(r.method, path, h.token(role, "mac1"), "")
		if code != http.StatusServiceUnavailable || !strings.Contains(body, "hint") {
			t.Errorf("%s %s: %d %s, want a 503 with a hint", r.method, path, code, body)
		}
	}
	if code, _ := h.request("GET", api.RouteHealth, "", ""); code != http.StatusOK {
		t.Errorf("the process runs, store or not: %d", code)
	}
}

// A panic ends a request, not the process, and its words stay here.
func TestPanic(t *testing.T) {
	h := newHouse(t)
	h.server.engine.GET("/panic", endpoint(func(*Server, context.Context, call, struct{}) (int, error) { panic("a secret word") })(h.server, route{path: "/panic"}))
	code, body := h.request("GET", "/panic", "", "")
	if code != http.StatusInternalServerError || strings.Contains(body, "secret") || !strings.Contains(h.log.String(), "a secret word") {
		t.Errorf("%d %s", code, body)
	}
}

// Errors that nobody foresaw are logged, and not told.
func TestUnforeseenErrors(t *testing.T) {
	h := newHouse(t)
	h.server.engine.GET("/odd", endpoint(func(*Server, context.Context, call, struct{}) (int, error) {
		return 0, errors.New("redis password is hunter2")
	})(h.server, route{path: "/odd"}))
	code, body := h.request("GET", "/odd", "", "")
	if code != http.StatusInternalServerError || strings.Contains(body, "hunter2") {
		t.Errorf("%d %s", code, body)
	}
}

func TestTold(t *testing.T) {
	for err, want := range map[error]int{
		fmt.Errorf("x: %w", store.ErrDown):          503,
		fmt.Errorf("x: %w", store.ErrStale):         409,
		fmt.Errorf("x: %w", store.ErrConflict):      503,
		fmt.Errorf("x: %w", store.ErrFenced):        503,
		fmt.Errorf("x: %w", access.ErrExpired):      401,
		fmt.Errorf("x: %w", context.Canceled):       503,
		fmt.Errorf("x: %w", io.ErrUnexpectedEOF):    500,
		refusal(http.StatusTeapot, "tea", "coffee"): 418,
	} {
		if e := told(err); e.Status != want || e.Message == "" || e.Hint == "" {
			t.Errorf("%v: %+v, want %d", err, e, want)
		}
	}
}

func TestNewWants(t *testing.T) {
	h := newHouse(t)
	for name, c := range map[string]Config{
		"no store": {Key: h.key, Fleet: "f"},
		"no key":   {Store: h.store, Fleet: "f"},
		"no fleet": {Store: h.store, Key: h.key},
	} {
		if _, err := New(c); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	s, err := New(Config{Store: h.store, Key: h.key, Fleet: "f"})
	if err != nil {
		t.Fatal(err)
	}
	h.server = s
	if code, body := h.request("GET", "/v1/jobs/7/explain", h.tokenNow(access.Viewer), ""); code != http.StatusNotImplemented {
		t.Errorf("%d %s", code, body)
	}
}

// tokenNow is good by the real clock.
func (h *house) tokenNow(role access.Role) string {
	h.t.Helper()
	h.advance(time.Until(h.clock()) * -1)
	return h.token(role, "ann")
}

// FuzzSync: no body makes the server fail or the store hold nonsense.
func FuzzSync(f *testing.F) {
	gin.SetMode(gin.ReleaseMode)
	h := newHouse(f)
	h.place("vmbbbbbb", "mac2")
	token := h.token(access.Node, "mac1")
	m := &mac{h: h, id: "mac1", session: "s1"}
	m.vms = []api.VMReport{ran(m.is("vmaaaaaa", fleet.VMBusy))}
	seed, err := json.Marshal(m.request(0))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	for _, text := range []string{"", "{}", "null", "[]", `{"protocol":1,"session":"a","sequence":9e99}`,
		`{"protocol":1,"session":"a","sequence":1,"vms":[{"id":"vmaaaaaa","state":"warm","order":{"placed_at":"0001-01-01T00:00:00Z"}}]}`,
		`{"protocol":1,"session":"a","sequence":2,"node":{"images":[{"digest":"sha256:1"}]},"wait":1}`} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		r := httptest.NewRequestWithContext(t.Context(), "POST", "/v1/nodes/mac1/sync", strings.NewReader(string(body)))
		r.Header.Set("Authorization", "Bearer "+token)
		w := httptest.NewRecorder()
		h.server.Handler().ServeHTTP(w, r)
		if w.Code >= 500 {
			t.Fatalf("%d %s", w.Code, w.Body)
		}
		view, err := h.store.View(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if vm := view.VMs["vmbbbbbb"]; vm == nil || vm.State != fleet.VMPlaced || vm.Node != "mac2" {
			t.Fatalf("mac1 changed mac2's VM: %+v", vm)
		}
	})
}

func TestSplitRef(t *testing.T) {
	for ref, want := range map[string][2]string{
		"host/a/b:tag":         {"host/a/b", "tag"},
		"host:5000/a":          {"host:5000/a", ""},
		"host:5000/a:1":        {"host:5000/a", "1"},
		"host/a@sha256:12":     {"host/a", ""},
		"host/a:tag@sha256:12": {"host/a", "tag"},
		"":                     {"", ""},
	} {
		name, tag := splitRef(ref)
		if diff := cmp.Diff(want, [2]string{name, tag}); diff != "" {
			t.Errorf("%s: %s", ref, diff)
		}
	}
}
