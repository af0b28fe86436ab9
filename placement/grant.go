package placement

import (
	"math"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// An image that a pool uses stays on a node for a while once it has come: else two images
// with room for one would drive each other out with each job, a whole pull every time.
const (
	// stayPulls is that while, in times of what a new pull of it would take: then the pulls
	// cost at most a fifth of the time.
	stayPulls = 4
	// stayMost bounds it: behind a slow line nobody waits for hours.
	stayMost = time.Hour
)

// grant is what may be let go for some purpose. The zero value grants superseded images.
type grant struct {
	worst  class
	waited time.Duration // of the job that needs the room; 0: none does
	keep   int           // ready images of pools that stay on the node
}

// covers reports whether an image may go by the grant.
func (g grant) covers(v *victim) bool { return v.class <= g.worst && v.after <= g.waited }

// grantFor is what may go for a pull of the pool's image. A job that waits outweighs demand
// that is only expected, so it may have the room of a last copy that nobody waits for.
// That a VM is to be kept idle outweighs none.
func (p *pass) grantFor(pool *pool, demand bool) grant {
	if !demand {
		return grant{worst: classPool}
	}
	return grant{worst: classLast, waited: p.images[pool.image].waited}
}

// untilFree is how long a job must have waited to have the image's room, since the image came
// only lately; 0: it has been there for long enough, or nobody knows. A node's clock may
// be wrong either way.
func (p *pass) untilFree(n *node, k int, on *fleet.NodeImage) time.Duration {
	if on.ReadyAt.IsZero() || on.State != fleet.ImageReady {
		return 0
	}
	stay := min(stayPulls*min(p.refetch(n, k, on), stayMost), stayMost)
	if p.s.Now.Sub(on.ReadyAt).Abs() >= stay {
		return 0
	}
	return stay
}

// isStuck reports that the node can start nothing for lack of clone room, though it has
// images of pools and no VM whose end would give room back.
func (p *pass) isStuck(n *node) bool {
	least, _ := p.cloneRoom(n)
	return len(n.in.Slots) == 0 && !n.in.Cordoned && least > 0 && n.free+n.due < least
}

// cloneRoom is the room that the least and the most demanding pools need to start a VM from
// an image that is on the node and ready, be it on its way out; 0: none is.
func (p *pass) cloneRoom(n *node) (least, most int64) {
	for i := range p.pools {
		pool := &p.pools[i]
		if pool.image < 0 || n.have[pool.image].presence != ready && !n.have[pool.image].gone || p.refuses(pool, n) != "" {
			continue
		}
		need := pool.growth * int64(len(n.slots)) / 2
		if most = max(most, need); least == 0 || need < least {
			least = need
		}
	}
	return least, most
}

// unstick lets images go on a node that can start nothing, the last copies of wanted ones
// too: they are of no use where they are. One image of a pool stays, to start from.
func (p *pass) unstick(n *node) {
	if !p.isStuck(n) {
		return
	}
	_, most := p.cloneRoom(n)
	// What ordered pulls are still to fill does not count: nothing starts meanwhile.
	p.letGo(n, n.disk+most-n.free-n.due, grant{worst: classWanted, waited: math.MaxInt64, keep: 1}, "no VM can start there")
}
