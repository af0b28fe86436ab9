package placement

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/paddock-ci/paddock/fleet"
)

// demandFloor is the λ, in jobs per hour, from which an image counts as in demand without
// a job that waits for it: one a day. Rarer ones would keep disks full for nothing.
const demandFloor = 1.0 / 24

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
)

// stays says why an image may not leave a node; empty: it may. Only a ready image and
// what is left of a pull that ended or waits can go.
func (p *pass) stays(n *node, on *fleet.NodeImage) Stay {
	if why := p.fixed(n, on); why != "" {
		return why
	}
	k, known := p.index[on.Digest]
	switch {
	case on.DiskBytes <= 0 && on.State != fleet.ImageReady:
		return StayEmpty
	case !known:
		return ""
	case n.have[k].needed:
		return StayNeeded
	case p.others(n, k) == 0 && p.inDemand(k):
		return StayLast // also half done: it may be whole by the time that the order comes
	}
	return ""
}

// mayGo: the image is not leaving already, and nothing keeps it.
func (p *pass) mayGo(n *node, on *fleet.NodeImage) bool {
	return on.State != fleet.ImageEvicting && !p.leaving(n, on.Digest) && p.stays(n, on) == ""
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
	return p.images[k].wanted || p.images[k].lambda >= demandFloor
}

// leaving reports whether an image is on its way out of a node, so that it counts as gone:
// it is ordered out, was recalled from that too lately, or this pass lets it go.
func (p *pass) leaving(n *node, d fleet.Digest) bool {
	return slices.Contains(n.in.Evict, d) || slices.Contains(n.in.Recalled, d) || slices.Contains(n.gone, d)
}

// standing repeats the evictions that nodes were ordered and have not carried out. They
// are not taken back because room was found otherwise: the node may be about to. They
// are if the image must not go any more, and if a job waits for it and has no other copy;
// and nothing stands on a node that is silent.
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
			if p.fixed(n, on) != "" || known && p.images[k].copies == 0 && p.inDemand(k) {
				continue
			}
			if on.State != fleet.ImageEvicting { // else its bytes are counted as free
				n.disk += on.DiskBytes
			}
			p.plan.Evict = append(p.plan.Evict, Eviction{Node: n.in.ID, Digest: d, Why: "it was ordered before"})
		}
	}
}

// makeRoom lets images go until the node has room for what was ordered there and for
// its clones to grow.
func (p *pass) makeRoom(pool *pool, n *node) {
	p.letGo(n, pool.growth*int64(len(n.slots)), classPool, 0, "room for "+pool.Image)
}

// letGo orders images out until the node has free bytes left beside what is ordered, or
// none of the classes up to worst may go any more. At least keep ready images of pools
// stay.
func (p *pass) letGo(n *node, free int64, worst class, keep int, purpose string) {
	for n.disk < free {
		v, found := p.victim(n)
		if !found || v.class > worst || v.class == classPool && p.usable(n) <= keep {
			return
		}
		short := size(free - n.disk)
		why := fmt.Sprintf("%s, %s short: %s", purpose, short, p.whyGoes(n, &v))
		n.disk += p.frees(n, v.on)
		p.evictions++
		if k, known := p.index[v.on.Digest]; known {
			if n.have[k].presence == ready {
				p.images[k].copies--
				p.images[k].slots -= len(n.slots)
			}
			n.have[k] = residence{gone: true, left: p.images[k].Bytes, disk: p.images[k].DiskBytes}
		}
		n.gone = append(n.gone, v.on.Digest)
		p.plan.Evict = append(p.plan.Evict, Eviction{Node: n.in.ID, Digest: v.on.Digest, Why: why})
	}
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
}

// victim is the next image to let go on a node; false: none may.
func (p *pass) victim(n *node) (found victim, any bool) {
	for i := range n.in.Images {
		on := &n.in.Images[i]
		if !p.mayGo(n, on) {
			continue
		}
		if v := p.weighImage(n, on); !any || compareVictims(&v, &found) < 0 {
			found, any = v, true
		}
	}
	return found, any
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
		v.value = p.value(n, k, on)
	}
	return v
}

// compareVictims orders images by how little they are missed.
func compareVictims(a, b *victim) int {
	return cmp.Or(cmp.Compare(a.class, b.class), cmp.Compare(a.value, b.value),
		a.on.UsedAt.Compare(b.on.UsedAt), strings.Compare(string(a.on.Digest), string(b.on.Digest)))
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
