package placement

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/paddock-ci/paddock/fleet"
)

// room says whether the node's disk lets the pool run a VM there, now or after a pull:
// ReasonImageSize if it never will, ReasonDisk if not now. Growth for all slots is
// kept free of images; below half of it no further clone is made. An image that is
// on its way had its room counted when it was ordered.
func (p *pass) room(pool *pool, n *node) Reason {
	r, free := &n.have[pool.image], pool.growth*int64(len(n.slots))
	switch {
	case r.presence == ready && n.free < free/2:
		return ReasonDisk
	case r.gone:
		return ReasonDisk // this pass wants it to make room for another
	case r.presence != absent:
		return ""
	case p.images[pool.image].DiskBytes+free > n.total:
		return ReasonImageSize
	case r.disk+free > n.disk && r.disk+free > n.disk+p.evictable(n):
		return ReasonDisk
	}
	return ""
}

// evictable are the bytes that could be let go on a node. They are counted anew only
// when a choice or an eviction may have changed them.
func (p *pass) evictable(n *node) int64 {
	if n.counted == p.evictions+1 {
		return n.evictable
	}
	n.counted, n.evictable = p.evictions+1, 0
	for i := range n.in.Images {
		if p.mayGo(n, &n.in.Images[i]) {
			n.evictable += n.in.Images[i].DiskBytes
		}
	}
	return n.evictable
}

// need keeps an image that a choice rests on from being let go.
func (p *pass) need(pool *pool, n *node) {
	if r := &n.have[pool.image]; !r.needed {
		r.needed, n.counted = true, 0
	}
}

// mayGo reports whether an image may leave a node: ready, not leased, no VM made or
// about to be made of it, not ordered to be there, no choice of this pass resting on
// it, and not the last copy of an image that is asked for.
func (p *pass) mayGo(n *node, on *fleet.NodeImage) bool {
	if on.State != fleet.ImageReady || on.Leases > 0 {
		return false
	}
	for i := range n.in.Slots {
		if n.in.Slots[i].Image == on.Digest {
			return false
		}
	}
	for i := range n.in.Hold {
		if n.in.Hold[i].Digest == on.Digest {
			return false
		}
	}
	k, known := p.index[on.Digest]
	if !known {
		return !slices.Contains(n.gone, on.Digest)
	}
	return n.have[k].presence == ready && !n.have[k].needed && (!p.images[k].wanted || p.images[k].copies > 1)
}

// makeRoom lets images go until the node has room for what was ordered there and for
// its clones to grow: those of no pool first, then the least recently used.
func (p *pass) makeRoom(pool *pool, n *node) {
	free := pool.growth * int64(len(n.slots))
	for n.disk < free {
		victim := p.victim(n)
		if victim == nil {
			return
		}
		n.disk += victim.DiskBytes
		p.evictions++
		if k, known := p.index[victim.Digest]; known {
			n.have[k] = residence{gone: true}
			p.images[k].copies--
		} else {
			n.gone = append(n.gone, victim.Digest)
		}
		p.plan.Evict = append(p.plan.Evict, Eviction{Node: n.in.ID, Digest: victim.Digest,
			Why: fmt.Sprintf("room for %s", pool.Image)})
	}
}

// victim is the next image to let go on a node; nil: none may.
func (p *pass) victim(n *node) *fleet.NodeImage {
	var found *fleet.NodeImage
	for i := range n.in.Images {
		on := &n.in.Images[i]
		if p.mayGo(n, on) && (found == nil || p.compareVictims(on, found) < 0) {
			found = on
		}
	}
	return found
}

// compareVictims orders images by how little they are missed.
func (p *pass) compareVictims(a, b *fleet.NodeImage) int {
	_, usedA := p.index[a.Digest]
	_, usedB := p.index[b.Digest]
	if usedA != usedB {
		if usedB {
			return -1
		}
		return 1
	}
	return cmp.Or(a.UsedAt.Compare(b.UsedAt), strings.Compare(string(a.Digest), string(b.Digest)))
}
