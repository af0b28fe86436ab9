package server

import (
	"fmt"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
)

// private is an image that no pool runs, on a node of the site "vault"; mallory says that
// it pulls that, and that it is at that site.
const private = fleet.Digest("sha256:9999999999999999999999999999999999999999999999999999999999999999")

const privateRef = "registry.example/private/app:1"

func withMallory(h *house) *mac {
	h.t.Helper()
	owner := h.puller("mac1", fleet.ImageReady)
	owner.site = "vault"
	owner.images = []fleet.NodeImage{{Digest: private, Ref: privateRef, State: fleet.ImageReady}}
	owner.say()
	m := h.puller("mallory", fleet.ImageQueued)
	m.site = "vault"
	m.images = []fleet.NodeImage{{Digest: private, Ref: privateRef, State: fleet.ImageQueued}}
	m.say()
	h.advance(sitesAge)
	return m
}

// tries says a word on the private image in its time.
func (m *mac) tries() (api.ChunksReply, error) {
	m.h.advance(wordGap)
	return m.client.Chunks(m.h.t.Context(), m.id, api.ChunksRequest{Image: private, Ref: privateRef, Pieces: 10})
}

// wantRight asks for both, peers and a token.
func (m *mac) wantRight(when string, want int) {
	m.h.t.Helper()
	r, err := m.tries()
	if status(m.h.t, err) != want || (len(r.Peers) == 1) != (want == http.StatusOK) {
		m.h.t.Errorf("%s: %+v, %v, want %d", when, r, err, want)
	}
	if _, err := m.h.buy(m.id, "registry.example/private/app"); status(m.h.t, err) != want {
		m.h.t.Errorf("%s: a token for pulls: %v, want %d", when, err, want)
	}
}

// A node's word opens no image to it; an order does, for a while after its end and as long
// as the node goes on pulling.
func TestRightToAnImage(t *testing.T) {
	h, _ := buying(t)
	m := withMallory(h)
	m.wantRight("by its own word", http.StatusForbidden)
	hold := fleet.Orders{Node: m.id, Hold: []fleet.Hold{{Digest: private, Ref: privateRef}}}
	h.commit(store.Txn{Orders: []fleet.Orders{hold}})
	m.wantRight("ordered", http.StatusOK)
	hold.Hold, hold.Rev = nil, h.view().Orders[m.id].Rev
	h.commit(store.Txn{Orders: []fleet.Orders{hold}})
	other := h.mac("mac9")
	speak := func(state fleet.ImageState, during time.Duration) {
		for end := h.clock().Add(during); h.clock().Before(end); h.advance(time.Minute) {
			m.images[0].State = state
			m.say()
			h.advance(sitesAge)
			other.say() // somebody's sync looks at the sites
		}
	}
	owner := h.mac("mac1")
	owner.site, owner.session = "vault", "s2"
	owner.peer = fleet.NodePeer{Address: "mac1.example:7843", Certificate: fmt.Sprintf("%064x", 1)}
	owner.images = []fleet.NodeImage{{Digest: private, Ref: privateRef, State: fleet.ImageReady}}
	back := func() {
		owner.say()
		m.say()
		h.advance(sitesAge)
	}
	speak(fleet.ImageCaching, 3*orderedKept)
	back()
	m.wantRight("still pulling", http.StatusOK)
	speak(fleet.ImageFailed, orderedKept/2)
	back()
	m.wantRight("a while after", http.StatusOK)
	speak(fleet.ImageFailed, orderedKept)
	back()
	m.images[0].State = fleet.ImageCaching
	m.say()
	m.wantRight("long after", http.StatusForbidden)
}

// A pool's image is open to nodes that its selector fits, by its tag or its digest.
func TestRightByPool(t *testing.T) {
	for name, c := range map[string]struct {
		image  string
		nodes  fleet.Selector
		status int
	}{
		"any node's":     {privateRef, fleet.Selector{}, http.StatusOK},
		"another node's": {privateRef, fleet.Selector{Names: []fleet.NodeID{"mac1"}}, http.StatusForbidden},
		"by digest":      {"registry.example/private/app@" + string(private), fleet.Selector{Names: []fleet.NodeID{"mallory"}}, http.StatusOK},
		"of other tags":  {privateRef, fleet.Selector{Tags: map[string]string{"team": "vault"}}, http.StatusForbidden},
	} {
		t.Run(name, func(t *testing.T) {
			h, b := buying(t)
			p := pool
			p.Image, p.Nodes = c.image, c.nodes
			h.server.c.Pools = func() []fleet.Pool { return []fleet.Pool{p} }
			m := withMallory(h)
			h.commit(store.Txn{Images: []fleet.Image{{Ref: privateRef, Digest: private}}})
			m.wantRight(name, c.status)
			if sold := int(b.asked.Load()); (sold == 1) != (c.status == http.StatusOK) {
				t.Errorf("the registry was asked %d times", sold)
			}
		})
	}
}

// 200 words that are refused at once look at the store a few times, not 200.
func TestRefusalsShareLooks(t *testing.T) {
	h := newHouse(t)
	m := h.mac("mallory")
	m.say()
	h.advance(sitesAge)
	began := time.Now()
	before := h.looks()
	var all sync.WaitGroup
	for i := range 200 {
		all.Go(func() {
			_, err := m.client.Chunks(t.Context(), m.id, api.ChunksRequest{Image: fleet.Digest(fmt.Sprintf("sha256:%064x", i)), Pieces: 10})
			if status(t, err) != http.StatusForbidden {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if n, most := h.looks()-before, 3+int(time.Since(began)/freshGap); n > most {
		t.Errorf("%d looks in %s", n, time.Since(began))
	}
}

func (h *house) looks() int {
	h.server.siteCache.mu.Lock()
	defer h.server.siteCache.mu.Unlock()
	return h.server.siteCache.looks
}
