package server

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
	"github.com/paddock-ci/paddock/store/storetest"
)

// An emptied store knows no VM for a moment; sessions do not end for that.
func TestSessionOverAnEmptiedStore(t *testing.T) {
	url, redis := storetest.StartRedis(t)
	s, err := store.Open(t.Context(), store.Config{URL: url})
	if err != nil {
		t.Fatal(err)
	}
	h := newHouseOn(t, s)
	m := h.warmUp()
	h.server.times.look = 10 * time.Millisecond
	near, far := m.meets(port22)
	redis.Flush(t)
	h.until("the VM is not known any more", func() bool { return h.view().VMs["vmaaaaaa"] == nil })
	h.untilLooked(5)
	if _, err := io.WriteString(far, "still here"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(near, make([]byte, 10)); err != nil {
		t.Fatalf("it ended: %v", err)
	}
}

// Two replicas on one Redis: the node is told by whichever holds its sync, and tries
// until the one is reached where the caller waits.
func TestSessionAcrossReplicas(t *testing.T) {
	url, _ := storetest.StartRedis(t)
	open := func() *store.Store {
		s, err := store.Open(t.Context(), store.Config{URL: url})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	h := newHouseOn(t, open())
	other := open()
	ran := make(chan error, 1)
	ctx, stop := context.WithCancel(t.Context())
	go func() { ran <- other.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-ran; err != nil {
			t.Error(err)
		}
		_ = other.Close()
	})
	c := h.server.c
	c.Store, c.Metrics = other, nil
	second, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	// The balancer gives every second connection to the other replica.
	var mu sync.Mutex
	n := 0
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		n++
		to := []*Server{h.server, second}[n%2]
		mu.Unlock()
		if strings.HasSuffix(r.URL.Path, "/sync") {
			to = second
		}
		to.Handler().ServeHTTP(w, r)
	}))
	t.Cleanup(front.Close)
	m := h.warmUp()
	if m.client, err = api.New(api.Config{URL: front.URL, Token: h.token(access.Node, "mac1")}); err != nil {
		t.Fatal(err)
	}
	for range 4 {
		got := h.open(t.Context(), port22) // at the first replica
		sid, misses := m.order().ID, 0
		var far api.Stream
		for far == nil {
			if far, err = m.client.Answer(t.Context(), "mac1", sid); err != nil && !api.Misdirected(err) {
				t.Fatal(err)
			} else if err != nil {
				misses++
			}
			if misses > 4 {
				t.Fatal("it never met its caller")
			}
		}
		o := <-got
		if o.err != nil {
			t.Fatal(o.err)
		}
		if _, err := io.WriteString(far, "hello"); err != nil {
			t.Fatal(err)
		}
		_ = far.Close()
		if text, err := io.ReadAll(o.stream); err != nil || string(text) != "hello" {
			t.Fatalf("%q, %v", text, err)
		}
		_ = o.stream.Close()
	}
}

// A replica ends with callers that wait: the next try of their nodes forgets them.
func TestSessionsOfADeadReplica(t *testing.T) {
	h, m := warm(t)
	p := store.Pending{ID: "orphan", Node: "mac1", VM: "vmaaaaaa", Kind: "console", Actor: "operator:ann"}
	if err := h.store.Pend(t.Context(), p, 200*time.Millisecond, pendingLimits); err != nil {
		t.Fatal(err)
	}
	if sid := m.order().ID; sid != "orphan" {
		t.Fatal(sid)
	}
	h.until("it is forgotten", func() bool {
		_, err := m.client.Answer(t.Context(), "mac1", "orphan")
		return status(t, err) == http.StatusNotFound
	})
	if reply := m.say(m.is("vmaaaaaa", fleet.VMWarm)); len(reply.Sessions) != 0 {
		t.Errorf("still ordered: %+v", reply.Sessions)
	}
}

// revokeAnn revokes the token by which she opens sessions, and lets copies of the ledger grow old.
func (h *house) revokeAnn() {
	h.t.Helper()
	if err := h.server.amend(h.t.Context(), h.clock(), func(l *store.Ledger) error {
		id, err := h.server.verifier.Verify(h.annsToken, h.clock(), nil)
		l.Revoked = map[string]time.Time{id.ID: id.ExpiresAt}
		return err
	}); err != nil {
		h.t.Fatal(err)
	}
	h.advance(2 * ledgerAge)
}

// untilLooked waits until open sessions were looked at n times more.
func (h *house) untilLooked(n int64) {
	h.t.Helper()
	n += h.server.looks.Load()
	h.until("open sessions are looked at", func() bool { return h.server.looks.Load() >= n })
}
