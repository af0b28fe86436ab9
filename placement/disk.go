package placement

import (
	"github.com/paddock-ci/paddock/fleet"
)

// room says whether the node's disk lets the pool run a VM there, now or after a pull:
// ReasonImageSize if it never will, ReasonDisk or ReasonLeaving if not now. Growth for all slots is
// kept free of images; below half of it no further clone is made. An image that is
// on its way had its room counted when it was ordered.
// It tells besides whether the last copy of an image in demand would have to go for it,
// which is granted to jobs only.
func (p *pass) room(pool *pool, n *node, demand bool) (refusal Reason, last bool) {
	r, free := &n.have[pool.image], pool.growth*int64(len(n.slots))
	switch {
	case r.presence == ready && n.free < free/2:
		return ReasonDisk, false
	case r.gone:
		return ReasonLeaving, false
	case r.presence != absent:
		return "", false
	case p.images[pool.image].DiskBytes+free > n.total:
		return ReasonImageSize, false
	case r.disk+free <= n.disk:
		return "", false
	}
	g := p.grantFor(pool, demand)
	if r.disk+free > n.disk+p.evictable(n, g) {
		return ReasonDisk, false
	}
	g.worst = classPool
	return "", demand && r.disk+free > n.disk+p.evictable(n, g)
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
// even then: room for the clones of nothing is of no use. The last copy of an image in
// demand goes only if the node could start nothing else either.
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
		g := grant{worst: classSpare, keep: 1}
		if n.disk < room/2 {
			g.worst = classPool
		}
		p.letGo(n, room, g, "room for clones to grow")
		p.unstick(n)
	}
}

// evictable are the bytes that could be let go on a node by a grant of classPool or more.
// Images are weighed anew only when a choice or an eviction may have changed them.
func (p *pass) evictable(n *node, g grant) int64 {
	if n.counted != p.evictions+1 {
		n.counted, n.evictable, n.guarded = p.evictions+1, 0, n.guarded[:0]
		for i := range n.in.Images {
			v, might := p.candidate(n, &n.in.Images[i])
			switch {
			case !might || v.class == classWanted:
			case grant{worst: classPool}.covers(&v):
				n.evictable += p.frees(n, v.on)
			default:
				n.guarded = append(n.guarded, v)
			}
		}
	}
	bytes := n.evictable
	for i := range n.guarded {
		if g.covers(&n.guarded[i]) {
			bytes += p.frees(n, n.guarded[i].on)
		}
	}
	return bytes
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
