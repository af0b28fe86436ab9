package placement

import (
	"cmp"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// A VM starts from a state saved on its node, if the image has one there that no other
// VM uses, and by clone and boot otherwise. What each takes is measured by the node. A
// cold boot that a node did not measure is taken to last as long as the mean of those
// that did: else a node would look better for never having tried, and a pull to it too.

// indexStart notes what the node measured of an image that is ready there.
func (p *pass) indexStart(n *node, k int, start *fleet.ImageStart) {
	r, i := &n.have[k], &p.images[k]
	if r.cold = plausible(start.Cold); r.cold > 0 && n.in.Reachable {
		i.cold, i.measured = i.cold+r.cold, i.measured+1
	}
	if start.States <= 0 {
		return
	}
	r.saved = cmp.Or(plausible(start.Saved), min(DefaultResume, cmp.Or(r.cold, p.boot)))
	r.states, r.spent = int32(start.States), true
	for s := range n.in.Slots {
		// A VM that the node has not begun yet takes one that it still counts.
		if n.in.Slots[s].State == fleet.VMPlaced && n.in.Slots[s].Image == i.Digest {
			r.states = max(0, r.states-1)
		}
	}
}

// plausible bounds what a node says of its starts: sums of it must not overflow.
func plausible(d time.Duration) time.Duration { return min(max(0, d), maxStart) }

// averageStarts makes the sums of indexStart into means.
func (p *pass) averageStarts() {
	for k := range p.images {
		if i := &p.images[k]; i.measured > 0 {
			i.cold /= time.Duration(i.measured)
		} else {
			i.cold = p.boot
		}
	}
}

// start is how the image's next VM on the node would start, and how long that takes.
func (p *pass) start(n *node, k int) (took time.Duration, saved bool) {
	r := &n.have[k]
	switch {
	case r.states > 0:
		return r.saved, true
	case r.cold > 0:
		return r.cold, false
	default:
		return p.images[k].cold, false
	}
}

// takeState leaves one saved state less to the jobs after this one. That such a state is
// free again when its VM ends is left to a later pass.
func (p *pass) takeState(pool *pool, c *candidate) {
	if !c.saved {
		return
	}
	n := &p.nodes[c.node]
	n.have[pool.image].states--
	if took, saved := p.start(n, pool.image); !saved && took < c.boot {
		p.weighAgain(pool.image, c.node) // a boot that is faster than a start from a state
	}
}

// usualStart is what is said where nobody measured anything.
const usualStart = "no saved state; nothing measured, so what is usual"

// startWords say how a VM would start, and where its seconds are from.
func (p *pass) startWords(pool *pool, c *candidate) string {
	r := &p.nodes[c.node].have[pool.image]
	switch {
	case c.saved:
		return "a saved state is there"
	case r.spent && r.cold > 0:
		return "its saved states are taken; a boot as measured there"
	case r.spent:
		return "its saved states are taken; no boot measured there"
	case r.cold > 0:
		return "no saved state; a boot as measured there"
	case p.images[pool.image].measured > 0:
		return "no saved state; a boot as measured on other nodes"
	default:
		return usualStart
	}
}
