package server

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
)

// The cast besides the house's: ann, an operator, who wants into vmaaaaaa on mac1; the
// VM is warm. mac1 answers as its test says.

var port22 = api.SessionOrder{VM: "vmaaaaaa", Kind: api.SessionPort, Port: 22}

// warm is a house where mac1 has reported the VM.
func warm(t *testing.T) (*house, *mac) {
	t.Helper()
	h := newHouse(t)
	return h, h.warmUp()
}

func (h *house) warmUp() *mac {
	h.t.Helper()
	h.place("vmaaaaaa", "mac1")
	m := h.mac("mac1")
	v := m.is("vmaaaaaa", fleet.VMWarm)
	v.BootingAt, v.WarmAt = h.clock(), h.clock()
	m.say(v)
	return m
}

func (h *house) ann() *api.Client {
	if h.annsToken == "" {
		h.annsToken = h.token(access.Operator, "ann")
	}
	return h.with(h.annsToken)
}

// opened is what a call for a session gave.
type opened struct {
	stream api.Stream
	err    error
}

// open asks for a session beside the test, which closes what it gives.
func (h *house) open(ctx context.Context, order api.SessionOrder) <-chan opened {
	c := make(chan opened, 1)
	client := h.ann()
	go func() {
		stream, err := client.Session(ctx, order)
		if err == nil {
			h.t.Cleanup(func() { _ = stream.Close() })
		}
		c <- opened{stream, err}
	}()
	return c
}

// order is the next session that mac1 is told of; it parks its sync for it.
func (m *mac) order() api.SessionOrder {
	m.h.t.Helper()
	for range 10 {
		reply, err := m.try(20 * time.Second)
		if err != nil {
			m.h.t.Fatal(err)
		}
		if len(reply.Sessions) > 0 {
			return reply.Sessions[0]
		}
	}
	m.h.t.Fatal("no session is ordered")
	return api.SessionOrder{}
}

func (m *mac) answer(sid string) api.Stream {
	m.h.t.Helper()
	stream, err := m.client.Answer(m.h.t.Context(), m.id, sid)
	if err != nil {
		m.h.t.Fatal(err)
	}
	m.h.t.Cleanup(func() { _ = stream.Close() })
	return stream
}

// meets is a session with both its ends.
func (m *mac) meets(order api.SessionOrder) (near, far api.Stream) {
	m.h.t.Helper()
	c := m.h.open(m.h.t.Context(), order)
	far = m.answer(m.order().ID)
	o := <-c
	if o.err != nil {
		m.h.t.Fatal(o.err)
	}
	return o.stream, far
}

func (h *house) openSessions() float64 {
	h.t.Helper()
	families, err := h.server.c.Metrics.Gather()
	if err != nil {
		h.t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == "paddock_sessions_open" {
			return f.GetMetric()[0].GetGauge().GetValue()
		}
	}
	h.t.Fatal("no gauge of sessions")
	return 0
}

// until polls for what goroutines of the server do.
func (h *house) until(what string, met func() bool) {
	h.t.Helper()
	late := time.After(30 * time.Second)
	for tick := time.NewTicker(5 * time.Millisecond); !met(); {
		select {
		case <-tick.C:
		case <-late:
			h.t.Fatalf("not within 30 s: %s", what)
		}
	}
}

func TestSession(t *testing.T) {
	h, m := warm(t)
	c := h.open(t.Context(), port22)
	order := m.order()
	if want := (api.SessionOrder{ID: order.ID, VM: "vmaaaaaa", Kind: api.SessionPort, Port: 22}); order != want || len(order.ID) < 26 {
		t.Fatalf("%+v, want %+v with 128 bits of an id", order, want)
	}
	if h.openSessions() != 0 {
		t.Error("it counts as open before it is answered")
	}
	far := m.answer(order.ID)
	o := <-c
	if o.err != nil {
		t.Fatal(o.err)
	}
	near := o.stream
	h.until("it counts as open", func() bool { return h.openSessions() == 1 })
	if reply, err := m.try(0); err != nil || len(reply.Sessions) != 0 {
		t.Errorf("answered, and ordered still: %+v, %v", reply.Sessions, err)
	}
	exchange(t, near, far)
	h.until("nothing is open", func() bool { return h.openSessions() == 0 })

	events, err := h.store.Events(t.Context(), store.EventFilter{VM: "vmaaaaaa"})
	if err != nil || len(events) == 0 || events[0].Kind != "vm.session" || events[0].Actor != "operator:ann" || events[0].Node != "mac1" || !strings.Contains(events[0].Text, "port 22") {
		t.Errorf("%+v, %v: want who opened what", events, err)
	}
	_, text := h.request("GET", api.RouteMetrics, "", "")
	for _, route := range []string{api.RouteVMSession, api.RouteNodeSession} {
		if line := fmt.Sprintf("paddock_http_request_seconds_count{route=%q,status=\"101\"} 1\n", route); !strings.Contains(text, line) {
			t.Errorf("no line %s", line)
		}
	}
}

// exchange sends 10 MB each way at once, ends one direction after the other, and sees
// both ends.
func exchange(t *testing.T, near, far api.Stream) {
	t.Helper()
	const size = 10 << 20
	send := func(to api.Stream, seed uint64) []byte {
		sum := sha256.New()
		source := rand.New(rand.NewPCG(seed, 0)) //nolint:gosec // not for secrets
		piece := make([]byte, 64<<10)
		for range size / len(piece) {
			for i := range piece {
				piece[i] = byte(source.Uint32())
			}
			sum.Write(piece)
			if _, err := to.Write(piece); err != nil {
				t.Error(err)
				break
			}
		}
		return sum.Sum(nil)
	}
	take := func(from api.Stream) []byte {
		sum := sha256.New()
		if n, err := io.Copy(sum, from); err != nil || n != size {
			t.Errorf("%d bytes, %v, want %d", n, err, size)
		}
		return sum.Sum(nil)
	}
	var up, down, upGot, downGot []byte
	var both sync.WaitGroup
	both.Go(func() {
		up = send(near, 1)
		if err := near.CloseWrite(); err != nil {
			t.Error(err)
		}
	})
	both.Go(func() { upGot = take(far) })
	both.Go(func() { downGot = take(near) })
	both.Go(func() {
		down = send(far, 2)
		if err := far.CloseWrite(); err != nil {
			t.Error(err)
		}
	})
	both.Wait()
	if !bytes.Equal(up, upGot) || !bytes.Equal(down, downGot) {
		t.Error("what arrives is not what was sent")
	}
}

// A request may end with the end of its direction; the answer comes all the same.
func TestHalfClosedSession(t *testing.T) {
	_, m := warm(t)
	near, far := m.meets(port22)
	if _, err := io.WriteString(near, "question"); err != nil {
		t.Fatal(err)
	}
	if err := near.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(far); err != nil || string(got) != "question" {
		t.Fatalf("%q, %v", got, err)
	}
	if _, err := io.WriteString(far, "answer"); err != nil {
		t.Fatal(err)
	}
	_ = far.Close()
	if got, err := io.ReadAll(near); err != nil || string(got) != "answer" {
		t.Fatalf("%q, %v", got, err)
	}
}

// Over TLS with the pinned certificate, at a server that would rather speak HTTP/2.
func TestSessionOverTLS(t *testing.T) {
	h, m := warm(t)
	front := httptest.NewUnstartedServer(h.server.Handler())
	front.EnableHTTP2 = true
	front.StartTLS()
	t.Cleanup(front.Close)
	sum := sha256.Sum256(front.Certificate().Raw)
	dial := func(role access.Role, subject string) *api.Client {
		c, err := api.New(api.Config{URL: front.URL, Token: h.token(role, subject), CertificateHash: hex.EncodeToString(sum[:])})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	m.client = dial(access.Node, "mac1")
	c := make(chan opened, 1)
	ann := dial(access.Operator, "ann")
	go func() {
		stream, err := ann.Session(t.Context(), port22)
		c <- opened{stream, err}
	}()
	far := m.answer(m.order().ID)
	o := <-c
	if o.err != nil {
		t.Fatal(o.err)
	}
	defer func() { _ = o.stream.Close() }()
	exchange(t, o.stream, far)

	stranger, err := api.New(api.Config{URL: front.URL, Token: h.token(access.Operator, "ann"), CertificateHash: strings.Repeat("0", 64)})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stranger.Session(t.Context(), port22); err == nil || !strings.Contains(err.Error(), "another certificate") {
		t.Errorf("with another certificate pinned: %v", err)
	}
}

func TestSessionsRefused(t *testing.T) {
	h, m := warm(t)
	h.place("vmbbbbbb", "mac1")
	h.place("vmcccccc", "mac1")
	h.change("vmcccccc", func(vm *fleet.VM) { vm.State, vm.Reason = fleet.VMDone, "runner exited 0" })
	h.place("vmdddddd", "mac1")
	h.change("vmdddddd", func(vm *fleet.VM) { vm.State, vm.Destroy, vm.Reason = fleet.VMWarm, true, "it is surplus" })
	h.place("vmeeeeee", "mac9")
	h.change("vmeeeeee", func(vm *fleet.VM) { vm.State = fleet.VMBusy })
	for name, c := range map[string]struct {
		order  api.SessionOrder
		status int
		says   string
	}{
		"unknown":              {api.SessionOrder{VM: "vmzzzzzz", Kind: api.SessionConsole}, 404, "no VM"},
		"not begun":            {api.SessionOrder{VM: "vmbbbbbb", Kind: api.SessionConsole}, 409, "has not been started"},
		"done":                 {api.SessionOrder{VM: "vmcccccc", Kind: api.SessionConsole}, 409, "runner exited 0"},
		"ending":               {api.SessionOrder{VM: "vmdddddd", Kind: api.SessionConsole}, 409, "it is surplus"},
		"a node without word":  {api.SessionOrder{VM: "vmeeeeee", Kind: api.SessionConsole}, 503, "mac9"},
		"logs without runner":  {api.SessionOrder{VM: "vmaaaaaa", Kind: api.SessionLogs}, 409, "no runner"},
		"port 0":               {api.SessionOrder{VM: "vmaaaaaa", Kind: api.SessionPort}, 400, "port"},
		"port 65536":           {api.SessionOrder{VM: "vmaaaaaa", Kind: api.SessionPort, Port: 65536}, 400, "port"},
		"port -1":              {api.SessionOrder{VM: "vmaaaaaa", Kind: api.SessionPort, Port: -1}, 400, "port"},
		"a console has none":   {api.SessionOrder{VM: "vmaaaaaa", Kind: api.SessionConsole, Port: 22}, 400, "port"},
		"an unknown kind":      {api.SessionOrder{VM: "vmaaaaaa", Kind: "shell"}, 400, "kind"},
		"a kind with controls": {api.SessionOrder{VM: "vmaaaaaa", Kind: "\x1b[2J"}, 400, "kind"},
	} {
		_, err := h.ann().Session(t.Context(), c.order)
		if err == nil {
			t.Fatalf("%s: a session", name)
		}
		var e *api.Error
		if !errors.As(err, &e) || e.Status != c.status || e.Hint == "" || !strings.Contains(e.Message, c.says) || strings.Contains(e.Message, "\x1b") {
			t.Errorf("%s: %#v, want a %d that says %q", name, err, c.status, c.says)
		}
	}
	if _, err := h.client(access.Viewer, "eve").Session(t.Context(), port22); status(t, err) != http.StatusForbidden {
		t.Errorf("a viewer: %v", err)
	}
	if _, err := h.client(access.Node, "mac1").Session(t.Context(), port22); status(t, err) != http.StatusForbidden {
		t.Errorf("a node: %v", err)
	}
	if code, body := h.request("POST", "/v1/vms/vmaaaaaa/session?kind=console", h.token(access.Operator, "ann"), ""); code != http.StatusUpgradeRequired || !strings.Contains(body, "hint") {
		t.Errorf("without an Upgrade: %d %s", code, body)
	}
	h.advance(unreachableAfter + time.Second)
	if _, err := h.ann().Session(t.Context(), port22); status(t, err) != http.StatusServiceUnavailable {
		t.Errorf("a node that is silent: %v", err)
	}
	if reply := m.say(m.is("vmaaaaaa", fleet.VMWarm)); len(reply.Sessions) != 0 {
		t.Errorf("refused, and ordered: %+v", reply.Sessions)
	}
}

// What a node has to say reaches the person, without the controls that a guest may have
// put into it.
func TestNodeRefusesASession(t *testing.T) {
	h, m := warm(t)
	c := h.open(t.Context(), port22)
	order := m.order()
	why := api.Error{Message: "nothing listens on \x1b[31mport 22\r\n\u009b2J\xff of the guest" + strings.Repeat("x", 5000), Hint: "wait"}
	if err := m.client.Refuse(t.Context(), "mac1", order.ID, why); err != nil {
		t.Fatal(err)
	}
	var e *api.Error
	if o := <-c; !errors.As(o.err, &e) || e.Status != http.StatusBadGateway || !strings.HasPrefix(e.Message, "nothing listens on  [31mport 22") ||
		len(e.Message) > maxWhy || strings.ContainsAny(e.Message, "\x1b\r\n\u009b") || e.Hint != "wait" {
		t.Errorf("%#v", o.err)
	}
	if err := m.client.Refuse(t.Context(), "mac1", order.ID, why); status(t, err) != http.StatusNotFound {
		t.Errorf("a second time: %v, want a 404", err)
	}
	if err := m.client.Refuse(t.Context(), "mac1", order.ID, api.Error{}); status(t, err) != http.StatusUpgradeRequired {
		t.Errorf("without a word and without an Upgrade: %v, want a 426", err)
	}
}

// A session is its VM's node's to answer, once.
func TestWhoMayAnswerASession(t *testing.T) {
	h, m := warm(t)
	c := h.open(t.Context(), port22)
	sid := m.order().ID
	if _, err := h.client(access.Node, "mac2").Answer(t.Context(), "mac2", sid); status(t, err) != http.StatusNotFound {
		t.Errorf("another node: %v, want a 404", err)
	}
	if _, err := h.client(access.Node, "mac2").Answer(t.Context(), "mac1", sid); status(t, err) != http.StatusForbidden {
		t.Errorf("another node under the node's name: %v, want a 403", err)
	}
	if _, err := h.client(access.Admin, "mac1").Answer(t.Context(), "mac1", sid); status(t, err) != http.StatusForbidden {
		t.Errorf("an admin: %v, want a 403", err)
	}
	if _, err := m.client.Answer(t.Context(), "mac1", "nonsense"); status(t, err) != http.StatusNotFound {
		t.Errorf("an unknown session: %v, want a 404", err)
	}
	won := make(chan api.Stream, 8)
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			if stream, err := m.client.Answer(t.Context(), "mac1", sid); err == nil {
				won <- stream
			}
		})
	}
	all.Wait()
	if len(won) != 1 {
		t.Fatalf("%d answers were taken, want 1", len(won))
	}
	far := <-won
	defer func() { _ = far.Close() }()
	if o := <-c; o.err != nil {
		t.Errorf("none of it is the session's end: %v", o.err)
	}
}

// A node that does not answer, and a caller that does not wait for it.
func TestUnansweredSessions(t *testing.T) {
	h, m := warm(t)
	h.server.times.answer = 50 * time.Millisecond
	o := <-h.open(t.Context(), port22)
	if status(t, o.err) != http.StatusGatewayTimeout {
		t.Errorf("%v, want a 504", o.err)
	}
	if n := len(h.view().Pending); n != 0 {
		t.Errorf("%d orders are left of it", n)
	}
	h.server.times.answer = time.Minute
	ctx, leave := context.WithCancel(t.Context())
	c := h.open(ctx, port22)
	sid := m.order().ID
	leave()
	if o := <-c; !errors.Is(o.err, context.Canceled) {
		t.Errorf("%v", o.err)
	}
	h.until("its order is forgotten", func() bool { return len(h.view().Pending) == 0 })
	h.until("nobody waits", func() bool {
		_, err := m.client.Answer(t.Context(), "mac1", sid)
		return status(t, err) == http.StatusNotFound
	})
}

func TestTooManySessionsWait(t *testing.T) {
	h, m := warm(t)
	ctx, leave := context.WithCancel(t.Context())
	var waiting []<-chan opened
	for range pendingLimits.Actor {
		waiting = append(waiting, h.open(ctx, port22))
	}
	h.until("all wait", func() bool { return len(h.view().Pending) == pendingLimits.Actor })
	if o := <-h.open(t.Context(), port22); status(t, o.err) != http.StatusTooManyRequests {
		t.Errorf("one more: %v, want a 429", o.err)
	}
	if reply := m.say(m.is("vmaaaaaa", fleet.VMWarm)); len(reply.Sessions) != pendingLimits.Actor {
		t.Errorf("%d are ordered", len(reply.Sessions))
	}
	leave()
	for _, c := range waiting {
		<-c
	}
	h.until("none waits", func() bool { return len(h.view().Pending) == 0 })
}

// Whatever ends a session ends both sides of it, and leaves no goroutine.
func TestSessionsEnd(t *testing.T) {
	console := api.SessionOrder{VM: "vmaaaaaa", Kind: api.SessionConsole}
	for name, c := range map[string]struct {
		order api.SessionOrder
		end   func(h *house, m *mac, near, far api.Stream)
	}{
		"the VM": {port22, func(h *house, m *mac, near, far api.Stream) {
			v := m.is("vmaaaaaa", fleet.VMDone)
			v.DoneAt, v.Reason = h.clock(), "destroyed"
			m.say(v)
		}},
		"the token":                          {port22, func(h *house, _ *mac, _, _ api.Stream) { h.revokeAnn() }},
		"the token's end":                    {port22, func(h *house, _ *mac, _, _ api.Stream) { h.advance(access.NodeLife) }},
		"the server":                         {port22, func(h *house, _ *mac, _, _ api.Stream) { h.server.Drain() }},
		"who watches leaves":                 {console, func(_ *house, _ *mac, near, _ api.Stream) { _ = near.CloseWrite() }},
		"there is no more":                   {console, func(_ *house, _ *mac, _, far api.Stream) { _ = far.CloseWrite() }},
		"one side left, the other is silent": {port22, func(_ *house, _ *mac, near, _ api.Stream) { _ = near.CloseWrite() }},
	} {
		t.Run(name, func(t *testing.T) {
			h, m := warm(t)
			h.server.times = sessionTimes{answer: time.Minute, look: 20 * time.Millisecond, quiet: 100 * time.Millisecond, grace: 20 * time.Millisecond}
			before := runtime.NumGoroutine()
			near, far := m.meets(c.order)
			h.untilLooked(10) // idle for longer than a quiet half lasts
			if _, err := io.WriteString(far, "still here"); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(near, make([]byte, 10)); err != nil {
				t.Fatalf("an idle session ended: %v", err)
			}
			c.end(h, m, near, far)
			for side, stream := range map[string]api.Stream{"near": near, "far": far} {
				over := make(chan struct{})
				go func() { defer close(over); _, _ = io.Copy(io.Discard, stream) }()
				select {
				case <-over:
				case <-time.After(20 * time.Second):
					t.Fatalf("the %s side goes on", side)
				}
				_ = stream.Close()
			}
			h.until("nothing is open", func() bool { return h.openSessions() == 0 })
			h.until("no goroutine is left", func() bool { return runtime.NumGoroutine() <= before+2 }) // net/http's idle connections
		})
	}
}
