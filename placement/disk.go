package placement

import (
	"github.com/paddock-ci/paddock/fleet"
)

// room says whether the node's disk lets the pool run a VM there, now or after a pull:
// ReasonImageSize if it never will, ReasonDisk or ReasonLeaving if not now. Growth for all slots is
// kept free of images; below half of it no further clone is made. An image that is
// on its way had its room counted when it was ordered.
func (p *pass) room(pool *pool, n *node) Reason {
	r, free := &n.have[pool.image], pool.growth*int64(len(n.slots))
	switch {
	case r.presence == ready && n.free < free/2:
		return ReasonDisk
	case r.gone:
		return ReasonLeaving
	case r.presence != absent:
		return ""
	case p.images[pool.image].DiskBytes+free > n.total:
		return ReasonImageSize
	case r.disk+free > n.disk && r.disk+free > n.disk+p.evictable(n):
		return ReasonDisk
	}
	return ""
}

// growthRoom is what is kept free on a node for clones to grow, in bytes: for each slot
// what the neediest pool's VM there may write.
func (p *pass) growthRoom(n *node) int64 {
	var growth int64
	for i := range p.pools {
		pool := &p.pools[i]
		if pool.growth > growth && pool.Nodes.Matches(&n.in.Node) && fits(pool.Pool, n.in) {
			growth = pool.growth
		}
	}
	return growth * int64(len(n.slots))
}

// keepRoom lets images go where clones have too little room left though no pull asks for
// any. Below the whole room goes what nobody would miss. An image that a pool uses goes
// only below half of it, where VMs would have to wait: the room is there to be used, and
// what clones have taken of it comes back when they end. The node's last such image stays
// even then: room for the clones of nothing is of no use.
func (p *pass) keepRoom() {
	var most int64
	for i := range p.pools {
		most = max(most, p.pools[i].growth)
	}
	for i := range p.nodes {
		n := &p.nodes[i]
		if !n.in.Reachable || n.disk >= most*int64(len(n.slots)) {
			continue
		}
		room := p.growthRoom(n)
		worst := classSpare
		if n.disk < room/2 {
			worst = classPool
		}
		p.letGo(n, room, worst, 1, "room for clones to grow")
	}
}

// evictable are the bytes that could be let go on a node. They are counted anew only
// when a choice or an eviction may have changed them.
func (p *pass) evictable(n *node) int64 {
	if n.counted == p.evictions+1 {
		return n.evictable
	}
	n.counted, n.evictable = p.evictions+1, 0
	for i := range n.in.Images {
		if on := &n.in.Images[i]; p.mayGo(n, on) {
			n.evictable += p.frees(n, on)
		}
	}
	return n.evictable
}

// frees is what letting an image go gives back, in bytes: what it fills and, of a pull
// left half done, what was kept for the rest.
func (p *pass) frees(n *node, on *fleet.NodeImage) int64 {
	if k, known := p.index[on.Digest]; known && n.have[k].ordered {
		return on.DiskBytes + n.have[k].disk
	}
	return on.DiskBytes
}

// need keeps an image that a choice rests on from being let go.
func (p *pass) need(pool *pool, n *node) {
	if r := &n.have[pool.image]; !r.needed {
		r.needed, n.counted = true, 0
	}
}
