package server

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
)

// sharing is a house whose fleet may move 1,200 bytes per second.
func sharing(t *testing.T) *house {
	t.Helper()
	return newHouse(t, func(c *Config) { c.Egress = 1200 })
}

// want is what the node's sync says of its bandwidth, once the picture is a new one.
func (m *mac) wantBandwidth(want int64) {
	m.h.t.Helper()
	m.h.advance(sitesAge)
	if got := m.say().Bandwidth; got != want {
		m.h.t.Errorf("%s may move %d, want %d", m.id, got, want)
	}
}

func TestBandwidth(t *testing.T) {
	if reply := newHouse(t).mac("mac1").say(); reply.Bandwidth != 0 {
		t.Errorf("no limit, and a share of %d", reply.Bandwidth)
	}
	h := sharing(t)
	idle := h.mac("mac9")
	idle.wantBandwidth(1200) // if it began
	one, two := h.puller("mac1", fleet.ImageCaching), h.puller("mac2", fleet.ImageCaching)
	one.wantBandwidth(600)
	two.wantBandwidth(600)
	idle.wantBandwidth(400)
	// Who asks its site and has no claim waits for the others, and does not count.
	three := h.puller("mac3", fleet.ImageCaching)
	waits := lacks()
	waits.Want = nil
	three.asks(waits)
	one.wantBandwidth(600)
	three.asks(lacks())
	one.wantBandwidth(400)
	three.wantBandwidth(400)
	done := lacks()
	done.Leave = true
	three.asks(done)
	two.reports(fleet.ImageReady)
	one.wantBandwidth(1200)
	h.advance(peerSilent) // mac1 says nothing any more
	idle.wantBandwidth(1200)
}

// Of 100 nodes that pull an image of 46 pieces the few that have claims share the bandwidth:
// what nobody may use is nobody's.
func TestBandwidthOfARollout(t *testing.T) {
	const egress, pieces = 1_000_000_000, 46
	h := newHouse(t, func(c *Config) { c.Egress = egress })
	q := api.ChunksRequest{Image: digest, Ref: ref, Pieces: pieces}
	for p := range pieces {
		q.Want = append(q.Want, p)
	}
	var macs []*mac
	for i := range 100 {
		macs = append(macs, h.puller(fleet.NodeID(fmt.Sprint("mac", i)), fleet.ImageCaching))
	}
	h.advance(sitesAge)
	claimants := map[*mac]bool{}
	for i, m := range macs {
		if len(m.asks(q).Grant) > 0 {
			claimants[m] = true
		}
		if i == 0 { // others come once it has its claims
			h.advance(sitesAge)
		}
	}
	h.advance(sitesAge)
	macs[99].say()
	if n := len(claimants); n < 5 || n > 40 {
		t.Fatalf("%d nodes have claims", n)
	}
	var sum int64
	for m := range claimants {
		sum += m.say().Bandwidth
	}
	if sum < egress*8/10 || sum > egress {
		t.Errorf("the %d nodes with claims may move %d %% together", len(claimants), 100*sum/egress)
	}
}

// A node that fetches is woken when its share is another one; small changes, and nodes
// that fetch nothing, are left alone.
func TestBandwidthWakes(t *testing.T) {
	h := sharing(t)
	one, idle := h.puller("mac1", fleet.ImageCaching), h.mac("mac9")
	one.wantBandwidth(1200)
	idle.say()
	answers := make(chan api.SyncReply, 2)
	park := func(m *mac) {
		go func() {
			reply, err := m.try(maxWait)
			if err != nil {
				t.Error(err)
			}
			answers <- reply
		}()
	}
	park(one)
	park(idle)
	h.waitParkedN(t, 2)
	h.puller("mac2", fleet.ImageCaching).wantBandwidth(600)
	if reply := <-answers; reply.Bandwidth != 600 {
		t.Errorf("woken with %d", reply.Bandwidth)
	}
	select {
	case reply := <-answers:
		t.Errorf("mac9, which fetches nothing, is woken: %+v", reply)
	default:
	}
	h.server.Drain()
	<-answers
}

// The shares change by steps: of ten nodes, one more is none, three more are.
func TestEgressSlack(t *testing.T) {
	var c siteCache
	told := []int{}
	for i, n := range []int{10, 11, 12, 13, 12, 11, 10, 1, 2, 0, 0} {
		outside := map[fleet.NodeID]bool{}
		for k := range n {
			outside[fleet.NodeID(fmt.Sprint("mac", k))] = true
		}
		c.keep(&sites{view: &store.View{Revision: int64(i)}, outside: outside})
		told = append(told, c.sharers)
	}
	if want := []int{10, 10, 10, 13, 13, 13, 10, 1, 2, 0, 0}; !slices.Equal(told, want) {
		t.Errorf("told %v, want %v", told, want)
	}
	c.keep(&sites{view: &store.View{Revision: 3}, outside: map[fleet.NodeID]bool{"mac1": true}})
	if c.sharers != 0 {
		t.Error("an older picture replaces a newer one")
	}
}

// Which ready nodes one is told of differs from node to node, and changes in time.
func TestSomeOf(t *testing.T) {
	var nodes []*fleet.Node
	for i := range 100 {
		nodes = append(nodes, &fleet.Node{ID: fleet.NodeID(fmt.Sprint("mac", i))})
	}
	now := time.Unix(1_800_000_000, 0)
	told := map[fleet.NodeID]int{}
	for i := range 1000 {
		for _, n := range someOf(nodes, 8, fleet.NodeID(fmt.Sprint("asker", i)), now) {
			told[n.ID]++
		}
	}
	for _, n := range nodes { // 80 on the average
		if told[n.ID] < 20 || told[n.ID] > 240 {
			t.Errorf("of %s are told %d", n.ID, told[n.ID])
		}
	}
	if a, b := someOf(nodes, 8, "x", now), someOf(nodes, 8, "x", now.Add(5*time.Minute)); a[0] == b[0] {
		t.Error("the same after five minutes")
	}
	if few := someOf(nodes[:3], 8, "x", now); len(few) != 3 {
		t.Errorf("%d of 3", len(few))
	}
}
