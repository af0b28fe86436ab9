package placement

import (
	"cmp"
	"slices"
	"strings"

	"github.com/paddock-ci/paddock/fleet"
)

// NodeEvictions is what goes from a node, what would go next, and what stays there.
type NodeEvictions struct {
	Node      fleet.NodeID `json:"node"`
	Reachable bool         `json:"reachable"` // nothing is ordered from one that is silent
	DiskFree  int64        `json:"disk_free"` // bytes, as last reported
	Growth    int64        `json:"growth"`    // bytes kept free for clones to grow
	Want      int64        `json:"want"`      // bytes that were to be free; 0: what a pass wants by itself
	// Free are the bytes left once what goes has gone and what is ordered has come. It is
	// less than Want if the rest must stay.
	Free   int64           `json:"free"`
	Images []ImageEviction `json:"images"` // what goes, what would go next, each in its order; then what stays
}

// Fate is what becomes of an image on a node.
type Fate string

// The fates.
const (
	FateGoing Fate = "going" // it was ordered out, or the node is at it
	FateGoes  Fate = "goes"  // this pass orders it out
	FateNext  Fate = "next"  // it may go and need not: it would, in this order
	FateStays Fate = "stays" // it must not go
)

// ImageEviction is an image on a node and what becomes of it.
type ImageEviction struct {
	Digest    fleet.Digest     `json:"digest"`
	Ref       string           `json:"ref"`
	State     fleet.ImageState `json:"state"`
	DiskBytes int64            `json:"disk_bytes"` // what its eviction frees
	Fate      Fate             `json:"fate"`
	// Turn counts from 1 over what goes and would go next; 0: it stays.
	Turn int `json:"turn,omitempty"`
	// Stay is why it must not go, "" if it may.
	Stay Stay   `json:"stay,omitempty"`
	Why  string `json:"why"` // in words
}

// Evictions runs a pass and tells what it lets go on a node, or on every one if id is "",
// sorted by id. With free > 0 it is as if a pull needed that so many bytes are free there.
func Evictions(s Snapshot, id fleet.NodeID, free int64) []NodeEvictions {
	p := newPass(&s, 0)
	p.run()
	told := []NodeEvictions{}
	for i := range p.nodes {
		if n := &p.nodes[i]; free > 0 && (id == "" || id == n.in.ID) && n.in.Reachable {
			p.letGo(n, free, grant{worst: classPool}, "room that was asked for")
		}
	}
	ordered := map[fleet.NodeID][]Eviction{}
	for _, e := range p.plan.Evict {
		ordered[e.Node] = append(ordered[e.Node], e)
	}
	for i := range p.nodes {
		n := &p.nodes[i]
		if id != "" && id != n.in.ID {
			continue
		}
		told = append(told, NodeEvictions{Node: n.in.ID, Reachable: n.in.Reachable, DiskFree: n.in.DiskFree, Growth: p.growthRoom(n),
			Want: free, Free: n.disk, Images: p.fates(n, ordered[n.in.ID])})
	}
	return told
}

// fates are the rows of one node: ordered is what goes from it, in its order.
func (p *pass) fates(n *node, ordered []Eviction) []ImageEviction {
	rows := []ImageEviction{}
	row := func(on *fleet.NodeImage, fate Fate, stay Stay, why string) {
		r := ImageEviction{Digest: on.Digest, Ref: on.Ref, State: on.State, DiskBytes: on.DiskBytes, Fate: fate, Stay: stay, Why: why}
		if fate != FateStays {
			r.Turn = len(rows) + 1
		}
		rows = append(rows, r)
	}
	byDigest := map[fleet.Digest]*fleet.NodeImage{}
	for i := range n.in.Images {
		byDigest[n.in.Images[i].Digest] = &n.in.Images[i]
	}
	for _, e := range ordered {
		fate := FateGoes
		if slices.Contains(n.in.Evict, e.Digest) {
			fate = FateGoing
		}
		row(byDigest[e.Digest], fate, "", e.Why)
		delete(byDigest, e.Digest)
	}
	var next []victim
	var rest []*fleet.NodeImage
	for i := range n.in.Images {
		on := &n.in.Images[i]
		switch {
		case byDigest[on.Digest] == nil:
		case on.State == fleet.ImageEvicting:
			row(on, FateGoing, "", "the node is letting it go")
		case p.mayGo(n, on) && n.in.Reachable:
			next = append(next, p.weighImage(n, on))
		default:
			rest = append(rest, on)
		}
	}
	slices.SortFunc(next, func(a, b victim) int { return compareVictims(&a, &b) })
	slices.SortFunc(rest, func(a, b *fleet.NodeImage) int {
		return cmp.Or(strings.Compare(a.Ref, b.Ref), strings.Compare(string(a.Digest), string(b.Digest)))
	})
	for i := range next {
		row(next[i].on, FateNext, "", p.whyGoes(n, &next[i]))
	}
	for _, on := range rest {
		stay, why := p.whyNotNow(n, on)
		row(on, FateStays, stay, why)
	}
	return rows
}

// whyNotNow is of what this pass does not let go and would not next.
func (p *pass) whyNotNow(n *node, on *fleet.NodeImage) (Stay, string) {
	stay := p.stays(n, on)
	switch {
	case !n.in.Reachable:
		return StaySilent, "the node is silent; it lets go of unleased superseded images only"
	case stay == "":
		return StayRecalled, "it was ordered out and that is taken back; the node has not reported since"
	default:
		return stay, p.whyStays(n, on, stay)
	}
}
