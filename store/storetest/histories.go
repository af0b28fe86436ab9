package storetest

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
)

// tickOfStore is what a claim may lack of its time, since the store counts milliseconds.
const tickOfStore = time.Millisecond

// puller is a node of a random history as it sees itself.
type puller struct {
	id    fleet.NodeID
	have  map[int]bool
	until map[int]time.Time // claims, and until when they hold at least
	told  map[int]bool      // what it has, by its last word
	spoke time.Time         // before its last word
	dead  bool
}

// history is nodes that pull one image: they ask, fetch, get pieces from each other, lose
// claims, leave and die in any order, until those that live have all.
type history struct {
	t      *testing.T
	s      *store.Store
	limits store.ChunkLimits
	rng    *rand.Rand
	nodes  []*puller
	grants int // claims that came to a node
}

// chunkHistories holds the store to what claims are for, whatever the nodes do: no claim
// is two nodes' at once; a piece is granted again only if whoever had the claim let it
// lapse, gave it back or died; nobody is sent outside for what a live node has; and in the
// end all pieces are granted.
func chunkHistories(t *testing.T, s *store.Store) {
	for seed := range uint64(4) {
		h := &history{t: t, s: s, rng: rand.New(rand.NewPCG(seed, 1)), limits: slow}
		h.limits.Claim, h.limits.Silent, h.limits.Open = 150*time.Millisecond, 250*time.Millisecond, 8
		for i := range 6 {
			h.nodes = append(h.nodes, &puller{id: fleet.NodeID(fmt.Sprintf("mac-%d-%d", seed, i)), have: map[int]bool{}, until: map[int]time.Time{}, told: map[int]bool{}})
		}
		image := fleet.Digest(fmt.Sprintf("sha256:%064x", seed))
		eventually(t, func() bool {
			for range 20 {
				h.step(image)
			}
			return h.done()
		})
		t.Logf("seed %d: %d grants of %d pieces", seed, h.grants, pieceCount)
	}
}

// done: every node that lives has all. One at least lives.
func (h *history) done() bool {
	return !slices.ContainsFunc(h.nodes, func(n *puller) bool { return !n.dead && len(n.have) < pieceCount })
}

// step has one node do one thing.
func (h *history) step(image fleet.Digest) {
	n := h.nodes[h.rng.IntN(len(h.nodes))]
	if n.dead {
		return
	}
	switch h.rng.IntN(20) {
	case 0: // it dies with all that it has and holds, unless it is the last
		n.dead = n != h.nodes[0] && h.rng.IntN(4) == 0
	case 1: // it gives up for now
		w := h.word(n, image)
		w.Leave = true
		began := time.Now()
		ask(h.t, h.s, w, h.limits)
		clear(n.until)
		n.spoke, n.told = began, copyOf(n.have)
	case 2: // it loses what it holds without a word, as after a restart
		clear(n.until)
	case 3, 4, 5, 6, 7, 8: // a piece has come from outside
		for p, until := range n.until {
			if time.Now().Before(until) {
				n.have[p] = true
				delete(n.until, p)
				return
			}
		}
	default:
		h.ask(n, image)
	}
}

func copyOf(set map[int]bool) map[int]bool {
	c := make(map[int]bool, len(set))
	for p := range set {
		c[p] = true
	}
	return c
}

func (h *history) word(n *puller, image fleet.Digest) store.ChunkWord {
	w := word(n.id)
	w.Image, w.Want = image, h.rng.Perm(pieceCount)
	for p := range n.have {
		w.Have[p/8] |= 1 << (p % 8)
	}
	for p := range n.until {
		w.Fetching = append(w.Fetching, p)
	}
	return w
}

// ask has a node say its word, and takes what it gets.
func (h *history) ask(n *puller, image fleet.Digest) {
	w := h.word(n, image)
	began := time.Now()
	a := ask(h.t, h.s, w, h.limits)
	ended := time.Now()
	n.spoke, n.told = began, copyOf(n.have)
	for p, until := range n.until {
		delete(n.until, p) // what may not have been renewed in time may be another's
		if ended.Before(until) {
			n.until[p] = began.Add(h.limits.Claim - tickOfStore)
		}
	}
	for _, p := range a.Grant {
		if _, mine := n.until[p]; !mine {
			h.check(n, p, ended)
			h.grants++
		}
		n.until[p] = began.Add(h.limits.Claim - tickOfStore)
	}
	for _, peer := range a.Peers {
		if i := slices.IndexFunc(h.nodes, func(o *puller) bool { return o.id == peer.Node }); i >= 0 && !h.nodes[i].dead {
			for p := range h.nodes[i].have {
				n.have[p] = true
				delete(n.until, p)
			}
			return
		}
	}
}

// check holds a grant to the claims and pieces of the others.
func (h *history) check(n *puller, p int, at time.Time) {
	h.t.Helper()
	for _, o := range h.nodes {
		if o == n || o.dead && !at.Before(o.spoke.Add(h.limits.Silent-tickOfStore)) {
			continue
		}
		if at.Before(o.until[p]) {
			h.t.Errorf("piece %d is granted to %s while it is %s's for another %s", p, n.id, o.id, o.until[p].Sub(at))
		}
		if o.told[p] && at.Before(o.spoke.Add(h.limits.Silent-tickOfStore)) {
			h.t.Errorf("piece %d is granted to %s while %s has it and spoke %s ago", p, n.id, o.id, at.Sub(o.spoke))
		}
	}
}
