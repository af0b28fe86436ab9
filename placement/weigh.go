package placement

import (
	"strings"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// candidate is a node weighed for a pool's next job: the inner form of an Option.
type candidate struct {
	refusal     Reason
	node, slot  int // indexes
	wait, image time.Duration
	cost        time.Duration
	boot        time.Duration // clone and boot, or the start from a saved state
	newPull     bool
	saved       bool // it would start from a saved state
}

// now reports whether a VM can be placed at once.
func (c *candidate) now() bool { return c.refusal == "" && c.wait == 0 && c.image == 0 }

// early reports that the slot is so far away that no pull has to begin yet.
func (c *candidate) early() bool { return c.wait > c.image+orderAhead }

// far reports that the slot is too far away to reserve it.
func (c *candidate) far() bool { return c.wait > planAhead && c.early() }

// ready is the time until the guest answers.
func (c *candidate) ready() time.Duration { return max(c.wait, c.image) + c.boot }

// weigh is the formula: one node for a job of one pool, as things stand in this pass;
// what refuses does not say is left to the caller.
// Strict leaves out every reservation, for VMs that no job waits for. Within a pass the
// cost of a node only grows, and strict only adds to it; the heaps rely on that. The two
// exceptions call weighAgain: an ordered image loses the weight of its pull (enqueue), and
// a boot may be faster than the last saved state was (takeState).
func (p *pass) weigh(pool *pool, ni int, strict bool) candidate {
	n := &p.nodes[ni]
	c := candidate{node: ni}
	var last bool
	if c.refusal, last = p.room(pool, n, !strict); c.refusal != "" {
		return c
	}
	r := &n.have[pool.image]
	var own time.Duration
	switch {
	case r.presence == ready:
	case r.presence == moving:
		c.image = max(minPull, transfer(r.left, n.rate))
	case r.queued:
		c.image = r.delay + max(minPull, transfer(n.queue, n.rate)) // its bytes are in the queue
	default:
		c.image = r.delay + max(minPull, transfer(n.queue+r.left, n.rate))
		c.newPull = r.presence == absent
	}
	if c.newPull {
		own = transfer(r.left, n.rate)
	}
	c.slot, c.wait = n.pick(c.image == 0, strict)
	spread := spreadWeight * time.Duration(n.used) / time.Duration(len(n.slots))
	c.boot, c.saved = p.start(n, pool.image)
	if last {
		c.cost = own // somebody will have to wait for about as long a pull of what goes
	}
	c.cost += c.ready() + time.Duration(p.alpha*float64(own)).Round(time.Millisecond) + n.tie + spread.Round(time.Millisecond)
	return c
}

// pick is the node's best slot for a pool, and when it is free: with the image ready
// the first that is open, else the one with the earliest end of all reservations.
func (n *node) pick(imageReady, strict bool) (int, time.Duration) {
	best, wait := 0, time.Duration(-1)
	for i := range n.slots {
		s := &n.slots[i]
		t := s.avail
		if s.open && imageReady && !strict {
			t = s.soon
		}
		if wait < 0 || t < wait {
			best, wait = i, t
		}
	}
	return best, wait
}

// refuses says why the node is no option for the pool in all of this pass; empty: it
// may be one.
func (p *pass) refuses(pool *pool, n *node) Reason {
	switch {
	case !n.in.Reachable:
		return ReasonUnreachable
	case n.in.Cordoned:
		return ReasonCordoned
	case len(n.slots) == 0:
		return ReasonNoSlots
	case !pool.Nodes.Matches(&n.in.Node):
		return ReasonSelector
	case !fits(pool.Pool, n.in):
		return ReasonTooSmall
	case n.in.Failing[pool.Name]:
		return ReasonFailing
	}
	return ""
}

// consider is refuses and weigh.
func (p *pass) consider(pool *pool, ni int) candidate {
	if r := p.refuses(pool, &p.nodes[ni]); r != "" {
		return candidate{node: ni, refusal: r}
	}
	return p.weigh(pool, ni, false)
}

// fill weighs every node for the pool: once per pass, when its first job comes.
func (p *pass) fill(pool *pool) {
	if pool.refusals != nil {
		return
	}
	pool.refusals = map[Reason]int{}
	pool.heap = newCandidates(len(p.nodes))
	for i := range p.nodes {
		c := p.consider(pool, i)
		if c.refusal != "" {
			pool.refusals[c.refusal]++
			continue
		}
		pool.heap.add(i, c.cost)
		if c.image > 0 && (pool.cheapest == 0 || c.image < pool.cheapest) {
			pool.cheapest = c.image
		}
		if c.image == 0 && p.nodes[i].unknownSlot() >= 0 {
			pool.unknown = append(pool.unknown, i)
		}
	}
	pool.heap.build()
}

// unknownSlot is a slot of which nobody knows when it is free; -1: none.
func (n *node) unknownSlot() int {
	for i := range n.slots {
		if n.slots[i].unknown {
			return i
		}
	}
	return -1
}

// best is the pool's node of lowest cost, weighed afresh; false if every node refuses.
func (p *pass) best(pool *pool, strict bool) (candidate, bool) {
	for pool.heap.len() > 0 {
		if c, ok := p.fresh(pool, 0, strict); ok {
			return c, true
		}
	}
	return candidate{}, false
}

// second is the next best node after best, of which it must be called at once.
func (p *pass) second(pool *pool) (candidate, bool) {
	for {
		at := pool.heap.second()
		if at < 0 {
			return candidate{}, false
		}
		if c, ok := p.fresh(pool, at, false); ok {
			return c, true
		}
	}
}

// fresh weighs the node at a place of the heap again. If it became dearer it sinks, if
// it now refuses it leaves, and the caller looks again.
func (p *pass) fresh(pool *pool, at int, strict bool) (candidate, bool) {
	c := p.weigh(pool, pool.heap.node(at), strict)
	switch {
	case c.refusal != "":
		pool.refusals[c.refusal]++
		pool.heap.remove(at)
		return c, false
	case c.cost > pool.heap.cost(at):
		pool.heap.update(at, c.cost)
		return c, false
	}
	return c, true
}

// option is a candidate in the form that is shown.
func (p *pass) option(pool *pool, c *candidate) Option {
	n := &p.nodes[c.node]
	if c.refusal != "" {
		return Option{Node: n.in.ID, Refusal: c.refusal}
	}
	o := Option{Node: n.in.ID, Slot: c.wait, Image: c.image, Boot: c.boot, Ready: c.ready(), Cost: c.cost,
		Tier: fleet.TierCold, Start: p.startWords(pool, c), NewPull: c.newPull, SlotUnknown: n.slots[c.slot].unknown}
	if c.saved {
		o.Tier = fleet.TierSaved
	}
	if c.image > 0 {
		o.Pull = n.have[pool.image].left
	}
	if s := &n.slots[c.slot]; s.idle != "" && s.pool != pool.Name {
		o.Evacuate = s.idle
	}
	return o
}

// compareOptions puts options before refusals, and each in a fixed order.
func compareOptions(a, b Option) int {
	switch {
	case a.Refusal == "" && b.Refusal != "":
		return -1
	case a.Refusal != "" && b.Refusal == "":
		return 1
	case a.Cost != b.Cost:
		return int(min(1, max(-1, a.Cost-b.Cost)))
	default:
		return strings.Compare(string(a.Node), string(b.Node))
	}
}
