package placement

import (
	"cmp"
	"reflect"
	"slices"

	"github.com/paddock-ci/paddock/fleet"
)

// check holds a plan to the rules that its snapshot can tell.
func (h *history) check(s *Snapshot, plan *Plan) {
	h.t.Helper()
	for i := range s.Nodes {
		n := &s.Nodes[i]
		for _, e := range plan.Evict {
			if e.Node != n.ID {
				continue
			}
			on, has := n.Image(e.Digest)
			_, pinned := s.Pinned[e.Digest]
			_, pinnedHere := n.Pinned[e.Digest]
			moves := on.State == fleet.ImageCaching || on.State == fleet.ImageQueued || on.State == fleet.ImageVerifying
			placed := slices.ContainsFunc(n.Slots, func(v Slot) bool { return v.Image == e.Digest })
			ordered := slices.ContainsFunc(n.Hold, func(o fleet.Hold) bool { return o.Digest == e.Digest })
			if !has || !n.Reachable || pinned || pinnedHere || moves || placed || ordered || on.Leases > 0 {
				h.t.Fatalf("%s is ordered out of %s: %+v, pinned %v, a VM placed %v, held %v, reachable %v", e.Digest, n.ID, on, pinned, placed, ordered, n.Reachable)
			}
			if slices.ContainsFunc(plan.Bind, func(b Binding) bool { return b.Node == n.ID && b.Image == e.Digest }) {
				h.t.Fatalf("%s is ordered out of %s, where a VM is placed of it", e.Digest, n.ID)
			}
		}
	}
	if h.looks%2 == 0 {
		h.checkRoom(s, plan)
	}
	if h.rnd.IntN(4) == 0 {
		shuffled := *s
		shuffled.Nodes, shuffled.Jobs = slices.Clone(s.Nodes), slices.Clone(s.Jobs)
		h.rnd.Shuffle(len(shuffled.Nodes), reflect.Swapper(shuffled.Nodes))
		h.rnd.Shuffle(len(shuffled.Jobs), reflect.Swapper(shuffled.Jobs))
		if again := Make(shuffled); !reflect.DeepEqual(again, *plan) {
			h.t.Fatalf("equal snapshots, other plans:\n%+v\n%+v", *plan, again)
		}
	}
}

// checkRoom: room is reached where it can be, by the pass and as asked for, and the dry run
// says what the pass does.
func (h *history) checkRoom(s *Snapshot, plan *Plan) {
	h.t.Helper()
	current := map[fleet.Digest]bool{}
	for _, image := range s.Images {
		current[image.Digest] = true
	}
	var goes []Eviction
	for _, n := range Evictions(*s, "", 0) {
		rest := 0 // images of pools that could go and stay
		for _, i := range n.Images {
			if i.Fate == FateGoes || i.Fate == FateGoing && i.State != fleet.ImageEvicting {
				goes = append(goes, Eviction{n.Node, i.Digest, i.Why})
			}
			if i.Stay == StayFresh {
				h.fresh++
			}
			if i.Fate == FateNext && current[i.Digest] && i.State == fleet.ImageReady {
				rest++
			} else if i.Fate == FateNext && n.Free < n.Growth {
				h.t.Fatalf("%s has %d free of %d, and %s, which nobody misses, stays", n.Node, n.Free, n.Growth, i.Digest)
			}
		}
		if n.Free < n.Growth/2 && rest > 1 {
			h.t.Fatalf("%s has %d free of %d, and %d images could go", n.Node, n.Free, n.Growth, rest)
		}
	}
	ordered := slices.DeleteFunc(slices.Clone(plan.Evict), func(e Eviction) bool {
		return slices.ContainsFunc(s.Nodes, func(n Node) bool {
			on, _ := n.Image(e.Digest)
			return n.ID == e.Node && on.State == fleet.ImageEvicting
		})
	})
	slices.SortStableFunc(ordered, func(a, b Eviction) int { return cmp.Compare(a.Node, b.Node) })
	if !slices.Equal(goes, ordered) {
		h.t.Fatalf("the dry run says\n%+v\nthe plan\n%+v", goes, ordered)
	}
	want := h.rnd.Int64N(200e9)
	for _, n := range Evictions(*s, "", want) {
		if n.Free < want && n.Reachable && slices.ContainsFunc(n.Images, func(i ImageEviction) bool { return i.Fate == FateNext }) {
			h.t.Fatalf("%s: %d were to be free, %d are, and more could go: %+v", n.Node, want, n.Free, n.Images)
		}
	}
}

// excuse notes the two cases in which the last copy of an image in demand may go. A job's
// pull needs its room, and no job waits for it. Or no VM can start on its node, none runs
// there, and another image of a pool stays.
func (h *history) excuse(s *Snapshot, plan *Plan) {
	waits := map[fleet.Digest]bool{}
	for _, j := range s.Jobs {
		pool, _, _ := PoolFor(s.Pools, j)
		waits[s.Images[pool.Image].Digest] = true
	}
	for _, e := range plan.Evict {
		at := slices.IndexFunc(s.Nodes, func(n Node) bool { return n.ID == e.Node })
		n := &s.Nodes[at]
		if slices.Contains(n.Evict, e.Digest) {
			continue // it was excused when it was marked, or not
		}
		pulls := slices.ContainsFunc(plan.Hold, func(o Hold) bool { return o.Node == e.Node && o.Demand })
		other := slices.ContainsFunc(n.Images, func(on fleet.NodeImage) bool {
			gone := slices.ContainsFunc(plan.Evict, func(o Eviction) bool { return o.Node == e.Node && o.Digest == on.Digest })
			_, named := s.Images[on.Ref]
			return named && on.State == fleet.ImageReady && !gone
		})
		stuck := len(n.Slots) == 0 && n.DiskFree < 10e9 && other // half of 10 GB for each of two slots
		if !waits[e.Digest] && pulls || stuck {
			h.excused[mark{e.Node, e.Digest, h.looks}] = true
		}
	}
}
