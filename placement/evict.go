package placement

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// demandFloor is the λ, in jobs per hour, from which an image counts as in demand without
// a job that waits for it: one a day. Rarer ones would keep disks full for nothing.
const demandFloor = 1.0 / 24

// maxEvictions bounds the orders to let go that stand on one node at a time. No honest node
// has so many images; one that claims to shall not make the leader's passes long.
const maxEvictions = 64

// Stay says why an image may not leave a node. The word is stable.
type Stay string

// The reasons, in the order in which they are looked for.
const (
	StayMoving    Stay = "moving"    // it is being pulled
	StayVerifying Stay = "verifying" // it is being verified and published
	StayLeased    Stay = "leased"    // VMs run from it, or it is being served to other nodes
	StayPlaced    Stay = "placed"    // a VM is placed there that starts from it
	StayHeld      Stay = "held"      // the node is ordered to have it
	StayPinned    Stay = "pinned"    // an operator or a policy wants it there
	StayEmpty     Stay = "empty"     // nothing of it fills the disk
	StayNeeded    Stay = "needed"    // a job of this pass is to start from it there
	StayLast      Stay = "last"      // it is the last copy of an image in demand
	StayFresh     Stay = "fresh"     // it came only lately; a job that waits for long has its room
)

// Reasons besides, of nodes whose orders are in doubt.
const (
	StaySilent   Stay = "silent"   // the node does not report
	StayRecalled Stay = "recalled" // it was ordered out and is not any more
)

// class says how little an image is missed: lower ones go first.
type class int

// The classes.
const (
	classSuperseded class = iota // a newer image of its name is ready on the same node
	classPartial                 // a pull left half done, that nobody holds
	classSpare                   // no pool uses it
	classPool                    // some pool uses it
	classLast                    // the last copy of an image in demand, for which no job waits now
	classWanted                  // the last copy of an image for which jobs wait
)

// stays says why an image may not leave a node; empty: it may. Only a ready image and
// what is left of a pull that ended or waits can go.
func (p *pass) stays(n *node, on *fleet.NodeImage) Stay {
	if why := p.fixed(n, on); why != "" {
		return why
	}
	if on.DiskBytes <= 0 && on.State != fleet.ImageReady {
		return StayEmpty
	}
	if k, known := p.index[on.Digest]; known && n.have[k].needed {
		return StayNeeded
	}
	switch v := p.weighImage(n, on); {
	case v.class > classPool:
		return StayLast
	case v.after > 0:
		return StayFresh
	}
	return ""
}

// mayGo: the image is not leaving already, and nothing keeps it.
func (p *pass) mayGo(n *node, on *fleet.NodeImage) bool {
	v, may := p.candidate(n, on)
	return may && grant{worst: classPool}.covers(&v)
}

// candidate weighs an image that might go; false: nothing whatever may have its room.
func (p *pass) candidate(n *node, on *fleet.NodeImage) (victim, bool) {
	if on.State == fleet.ImageEvicting || n.leaving[on.Digest] || p.fixed(n, on) != "" || on.DiskBytes <= 0 && on.State != fleet.ImageReady {
		return victim{}, false
	}
	if k, known := p.index[on.Digest]; known && n.have[k].needed {
		return victim{}, false
	}
	return p.weighImage(n, on), true
}

// fixed is the part of stays that holds for images already ordered out, too.
func (p *pass) fixed(n *node, on *fleet.NodeImage) Stay {
	switch on.State {
	case fleet.ImageQueued, fleet.ImageCaching:
		return StayMoving
	case fleet.ImageVerifying:
		return StayVerifying
	case fleet.ImageReady, fleet.ImagePaused, fleet.ImageFailed, fleet.ImageEvicting:
	}
	if on.Leases > 0 {
		return StayLeased
	}
	for i := range n.in.Slots {
		if n.in.Slots[i].Image == on.Digest {
			return StayPlaced
		}
	}
	for i := range n.in.Hold {
		if n.in.Hold[i].Digest == on.Digest {
			return StayHeld
		}
	}
	if _, pinned := p.pinned(n, on.Digest); pinned {
		return StayPinned
	}
	return ""
}

// pinned reports whether an image is pinned on a node, and by whom.
func (p *pass) pinned(n *node, d fleet.Digest) (string, bool) {
	if who, pinned := n.in.Pinned[d]; pinned {
		return who, true
	}
	who, pinned := p.s.Pinned[d]
	return who, pinned
}

// inDemand: jobs wait for the image, or come often enough.
func (p *pass) inDemand(k int) bool {
	return p.images[k].waiting > 0 || p.images[k].lambda >= demandFloor
}

// standing repeats the evictions that nodes were ordered and have not carried out. They
// are not taken back because room was found otherwise: the node may be about to. They
// are if the image must not go any more, and if a job waits for it and has no other copy,
// unless the node is of no use with it; and nothing stands on a node that is silent.
func (p *pass) standing() {
	for i := range p.nodes {
		n := &p.nodes[i]
		for _, d := range n.in.Evict {
			at := slices.IndexFunc(n.in.Images, func(on fleet.NodeImage) bool { return on.Digest == d })
			if at < 0 || !n.in.Reachable {
				continue
			}
			on := &n.in.Images[at]
			k, known := p.index[d]
			last := known && p.images[k].copies == 0 && p.images[k].waiting > 0
			if p.fixed(n, on) != "" || last && (!p.isStuck(n) || p.usable(n) == 0) {
				continue
			}
			if on.State != fleet.ImageEvicting { // else its bytes are counted as free
				n.disk += on.DiskBytes
				n.due += on.DiskBytes
			}
			n.evictions++
			p.plan.Evict = append(p.plan.Evict, Eviction{Node: n.in.ID, Digest: d, Why: "it was ordered before"})
		}
	}
}

// makeRoom lets images go until the node has room for what was ordered there and for
// its clones to grow. Demand: a job waits for that.
func (p *pass) makeRoom(pool *pool, n *node, demand bool) {
	p.letGo(n, pool.growth*int64(len(n.slots)), p.grantFor(pool, demand), "room for "+pool.Image)
}

// letGo orders images out until the node has free bytes left beside what is ordered, or
// nothing that is granted may go any more, or enough is ordered out for one pass.
func (p *pass) letGo(n *node, free int64, g grant, purpose string) {
	if n.disk >= free || n.evictions >= maxEvictions {
		return
	}
	// What goes changes the turn of no other image here, so they are weighed once.
	for _, v := range p.candidates(n, g) {
		if n.disk >= free || n.evictions >= maxEvictions || v.class >= classPool && p.usable(n) <= g.keep {
			return
		}
		why := fmt.Sprintf("%s, %s short: %s", purpose, size(free-n.disk), p.whyGoes(n, &v))
		n.disk += p.frees(n, v.on)
		n.due += v.on.DiskBytes
		n.evictions++
		p.evictions++
		if k, known := p.index[v.on.Digest]; known {
			if n.have[k].presence == ready {
				p.images[k].copies--
				p.images[k].slots -= len(n.slots)
			}
			n.have[k] = residence{gone: true, left: p.images[k].Bytes, disk: p.images[k].DiskBytes}
		}
		n.leave(v.on.Digest)
		p.plan.Evict = append(p.plan.Evict, Eviction{Node: n.in.ID, Digest: v.on.Digest, Why: why})
	}
}

// leave notes that an image is on its way out of the node and counts as gone: it is ordered
// out, was recalled from that too lately, or this pass lets it go.
func (n *node) leave(d fleet.Digest) {
	if n.leaving == nil {
		n.leaving = map[fleet.Digest]bool{}
	}
	n.leaving[d] = true
}

// usable counts the images on a node that VMs of some pool could start from.
func (p *pass) usable(n *node) (count int) {
	for k := range n.have {
		if n.have[k].presence == ready && len(p.images[k].pools) > 0 {
			count++
		}
	}
	return count
}

// victim is an image that may go, with what its turn depends on.
type victim struct {
	on    *fleet.NodeImage
	class class
	// value is what is lost with it, in seconds of waiting per hour and GB of disk. It is
	// known of pools' images only, and where demand is.
	value float64
	// waiting counts the jobs that wait for it.
	waiting int
	// after is how long a job must have waited to have its room; 0: it needs no job.
	after time.Duration
}

// candidates are the images on a node that may go by a grant, in their order.
func (p *pass) candidates(n *node, g grant) []victim {
	var may []victim
	for i := range n.in.Images {
		if v, might := p.candidate(n, &n.in.Images[i]); might && g.covers(&v) {
			may = append(may, v)
		}
	}
	slices.SortFunc(may, func(a, b victim) int { return compareVictims(&a, &b) })
	return may
}

// weighImage says how much an image is missed where it goes.
func (p *pass) weighImage(n *node, on *fleet.NodeImage) victim {
	v := victim{on: on, class: classPool}
	k, known := p.index[on.Digest]
	used := known && len(p.images[k].pools) > 0
	switch {
	case !used && p.isSuperseded(n, on):
		v.class = classSuperseded
	case on.State != fleet.ImageReady:
		v.class = classPartial
	case !used:
		v.class = classSpare
	default:
		v.value, v.waiting, v.after = p.value(n, k, on), p.images[k].waiting, p.untilFree(n, k, on)
	}
	// Also what is half done: it may be whole by the time that the order comes.
	if known && p.inDemand(k) && p.others(n, k) == 0 {
		v.class, v.waiting = classLast, p.images[k].waiting
		if v.waiting > 0 {
			v.class = classWanted
		}
	}
	return v
}

// compareVictims orders images by how little they are missed.
func compareVictims(a, b *victim) int {
	return cmp.Or(cmp.Compare(a.class, b.class), cmp.Compare(a.waiting, b.waiting), cmp.Compare(a.value, b.value),
		lastHad(a.on).Compare(lastHad(b.on)), strings.Compare(string(a.on.Digest), string(b.on.Digest)))
}

// lastHad is when an image was last leased or, if later, came.
func lastHad(on *fleet.NodeImage) time.Time {
	if on.ReadyAt.After(on.UsedAt) {
		return on.ReadyAt
	}
	return on.UsedAt
}

// isSuperseded: the image's name means another one now, which is ready on the node.
func (p *pass) isSuperseded(n *node, on *fleet.NodeImage) bool {
	newer, named := p.s.Images[on.Ref]
	if !named || newer.Digest == on.Digest {
		return false
	}
	k, known := p.index[newer.Digest]
	return known && n.have[k].presence == ready
}
