package placement

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// pass is the working state of one Make: the snapshot, indexed, and what the jobs
// planned so far have taken from it.
type pass struct {
	s       *Snapshot
	boot    time.Duration
	waitCap time.Duration
	alpha   float64
	busy    float64 // share of the slots of nodes in use that VMs have

	nodes  []node // by id
	pools  []pool // file order
	images []image
	repos  []repository
	index  map[fleet.Digest]int // of images

	plan    Plan
	classes map[classKey]int // index into plan.Decisions
	owned   []bool           // by decision: its Refusals are not shared
	ahead   int              // jobs planned so far

	evictions int // images let go so far

	// watch is the job that Explain asks about; 0: none. seen is its table.
	watch fleet.JobID
	seen  *Explanation
}

// repository counts slots for fairness and limits: those running and bound in this
// pass, and with those that are only reserved.
type repository struct{ bound, planned int }

// image is one digest that pools use.
type image struct {
	fleet.Image
	pools  []int // that use it
	copies int   // ready ones on reachable nodes
	slots  int   // of the nodes that have those copies
	// waiting counts the jobs of this pass that need it; waited is the age of the oldest.
	waiting int
	waited  time.Duration
	lambda  float64 // jobs per hour that ask for it; 0: none, or not known
	// cold is what a cold boot takes where the node itself did not measure it: the mean of
	// the nodes that did, of which measured is the number.
	cold     time.Duration
	measured int
}

// pool is a pool with its nodes in the order of their cost.
type pool struct {
	*fleet.Pool
	image          int   // index into pass.images; -1: unresolved
	growth         int64 // bytes kept free for each slot
	bound, planned int   // its VMs, and with those only reserved
	idle           int   // VMs without a job that are warm or on their way
	heap           candidates
	refusals       map[Reason]int
	// cheapest is the shortest time in which some node would have the image by a pull,
	// when the pass began; 0: every node has it, or none may.
	cheapest time.Duration
	// unknown are nodes with the image ready and a slot whose end is not known.
	unknown []int
}

// node is a node with what this pass has already given away there.
type node struct {
	in    *Node
	rate  int64 // bytes per second
	queue int64 // bytes on the wire of the demand pulls before a new one
	free  int64 // bytes left on the disk
	disk  int64 // the same, less what ordered images are still to fill; may be negative
	total int64 // bytes that the image store has in all: what is left and what images fill
	used  int   // slots used, bound or reserved
	slots []slot
	have  []residence // by image
	due   int64       // bytes of disk that come free by images on their way out

	leaving   map[fleet.Digest]bool // see leave; nil: none
	evictions int                   // orders to let go that stand in the plan
	evictable int64                 // see the function of that name
	guarded   []victim              // those that go for some purposes only
	counted   int                   // 1 + pass.evictions when both were found; 0: not yet
	tie       time.Duration
}

// slot is one of a node's slots, free or used.
type slot struct {
	// soon is when it could be had by a job whose image is ready, if open; avail is when
	// it is to be had after every reservation. They differ for a slot that is reserved
	// for a job whose image takes long.
	soon, avail time.Duration
	open        bool
	unknown     bool           // avail is a guess
	idle        fleet.VMID     // the idle VM in it, that another pool may evacuate
	pool        fleet.PoolName // of that VM
}

// presence is how far an image is on a node.
type presence int8

const (
	absent  presence = iota
	waiting          // ordered or queued, not moving
	moving           // bytes are moving, or being verified
	ready
)

// residence is an image on a node.
type residence struct {
	left     int64         // bytes on the wire still to come
	disk     int64         // bytes on the disk still to be filled
	delay    time.Duration // until a failed pull is tried again
	cold     time.Duration // a cold boot as the node measured it; 0: not
	saved    time.Duration // a start from a saved state, where there are or were states
	states   int32         // saved states that nobody uses yet
	held     int32         // 1 + index into plan.Hold; 0: not in it
	presence presence
	ordered  bool // before this pass
	queued   bool // its bytes are counted in the node's queue
	demand   bool // ordered for a job before this pass
	needed   bool // a choice of this pass rests on it
	gone     bool // about to leave: let go by this pass or one before it
	spent    bool // there are no states any more, once states is 0
}

// newPass indexes a snapshot. It costs nodes × (images there + slots) and pools; each
// pool's nodes are only weighed when a job asks for them.
func newPass(s *Snapshot, watch fleet.JobID) *pass {
	p := &pass{s: s, watch: watch, classes: make(map[classKey]int, len(s.Jobs)/4),
		boot: cmp.Or(s.Boot, DefaultBoot), waitCap: cmp.Or(s.WaitCap, DefaultWaitCap)}
	p.indexPools()
	p.nodes = make([]node, len(s.Nodes))
	have := make([]residence, len(s.Nodes)*len(p.images))
	order := make([]*Node, len(s.Nodes))
	for i := range s.Nodes {
		order[i] = &s.Nodes[i]
	}
	slices.SortFunc(order, func(a, b *Node) int { return strings.Compare(string(a.ID), string(b.ID)) })
	used, slots := 0, 0
	for i, n := range order {
		p.nodes[i] = node{in: n, rate: n.PullRate, free: n.DiskFree, disk: n.DiskFree, total: n.DiskFree, used: len(n.Slots),
			have: have[i*len(p.images) : (i+1)*len(p.images) : (i+1)*len(p.images)],
			tie:  min(failureCost*time.Duration(n.Failures), maxFailureCost)}
		if n.PullRate <= 0 {
			p.nodes[i].rate = DefaultPullRate
		}
		p.nodes[i].indexSlots(s.Now)
		p.indexImages(&p.nodes[i])
		if n.Reachable && !n.Cordoned {
			used, slots = used+len(n.Slots), slots+n.Node.Slots
		}
	}
	p.averageStarts()
	p.alpha = alpha(used, slots)
	p.busy = float64(used) / float64(max(1, slots))
	p.countVMs()
	return p
}

// indexPools gives every resolved digest a number.
func (p *pass) indexPools() {
	p.index = make(map[fleet.Digest]int, len(p.s.Pools))
	p.pools = make([]pool, len(p.s.Pools))
	for i := range p.s.Pools {
		p.pools[i] = pool{Pool: &p.s.Pools[i], image: -1, growth: cmp.Or(p.s.Pools[i].Growth, DefaultGrowth)}
		resolved, ok := p.s.Images[p.s.Pools[i].Image]
		if !ok {
			continue
		}
		n, known := p.index[resolved.Digest]
		if !known {
			n = len(p.images)
			p.index[resolved.Digest] = n
			p.images = append(p.images, image{Image: resolved})
		}
		p.pools[i].image = n
		p.images[n].pools = append(p.images[n].pools, i)
	}
	for d, lambda := range p.s.Demand {
		if !(lambda > 0) {
			continue
		}
		n, known := p.index[d]
		if !known { // no pool names it any more, and still it must not vanish
			n = len(p.images)
			p.index[d] = n
			p.images = append(p.images, image{Image: fleet.Image{Digest: d}})
		}
		p.images[n].lambda = lambda
	}
}

// indexSlots lays out the node's slots: the used ones, then the free ones.
func (n *node) indexSlots(now time.Time) {
	n.slots = make([]slot, max(n.in.Node.Slots, len(n.in.Slots)))
	for i := range n.slots {
		s := &n.slots[i]
		if i >= len(n.in.Slots) {
			s.open = true
			continue
		}
		used := &n.in.Slots[i]
		s.avail, s.unknown = remaining(used, now)
		if used.Idle {
			*s = slot{soon: teardown, avail: teardown, open: true, idle: used.VM, pool: used.Pool}
		}
	}
}

// indexImages notes how far each pool's image is on the node, and how many bytes of
// demand pulls are queued there. Pre-warms give way, so they are not in the queue.
func (p *pass) indexImages(n *node) {
	for i := range n.have {
		n.have[i].left, n.have[i].disk = p.images[i].Bytes, p.images[i].DiskBytes
		if left, shared := n.in.Missing[p.images[i].Digest]; shared {
			n.have[i].left = left
		}
	}
	for i := range n.in.Hold {
		if k, known := p.index[n.in.Hold[i].Digest]; known {
			r := &n.have[k]
			r.presence, r.demand = waiting, n.in.Hold[i].Demand
			r.queued = r.demand
		}
	}
	for _, d := range n.in.Evict {
		n.leave(d)
	}
	for _, d := range n.in.Recalled {
		n.leave(d)
	}
	for i := range n.in.Images {
		p.indexImage(n, &n.in.Images[i])
	}
	for i := range n.have {
		r := &n.have[i]
		if r.queued {
			n.queue += r.left
		}
		if r.presence == waiting || r.presence == moving {
			r.ordered = true
			n.disk -= r.disk
		}
	}
}

// indexImage notes one image that the node reported.
func (p *pass) indexImage(n *node, on *fleet.NodeImage) {
	n.total += on.DiskBytes
	if on.State == fleet.ImageEvicting {
		n.disk += on.DiskBytes // about to be free
		n.due += on.DiskBytes
	}
	k, known := p.index[on.Digest]
	if !known {
		if on.State == fleet.ImageCaching {
			n.queue += max(0, on.Total-on.Done)
		}
		return
	}
	r := &n.have[k]
	if n.leaving[on.Digest] {
		*r = residence{gone: true, left: p.images[k].Bytes, disk: p.images[k].DiskBytes}
		return
	}
	if on.Total > 0 {
		r.left = max(0, on.Total-on.Done)
	}
	r.disk = max(0, r.disk-on.DiskBytes)
	switch on.State {
	case fleet.ImageReady:
		*r = residence{presence: ready, demand: r.demand}
		p.indexStart(n, k, &on.Start)
		if n.in.Reachable {
			p.images[k].copies++
			p.images[k].slots += len(n.slots)
		}
	case fleet.ImageCaching, fleet.ImageVerifying:
		r.queued = r.demand || r.presence == absent // without an order here, its reason is not known
		r.presence = moving
	case fleet.ImageQueued, fleet.ImagePaused:
		r.presence = waiting
	case fleet.ImageFailed:
		r.delay = max(0, on.RetryAt.Sub(p.s.Now))
		r.queued = false // others go first until then
	case fleet.ImageEvicting:
		*r = residence{left: p.images[k].Bytes, disk: p.images[k].DiskBytes}
	}
}

// countVMs counts each pool's VMs wherever they are: limits hold for nodes that are
// out of reach, too.
func (p *pass) countVMs() {
	byName := make(map[fleet.PoolName]*pool, len(p.pools))
	for i := range p.pools {
		byName[p.pools[i].Name] = &p.pools[i]
	}
	for i := range p.nodes {
		n := p.nodes[i].in
		for j := range n.Slots {
			pool := byName[n.Slots[j].Pool]
			if pool == nil {
				continue
			}
			pool.bound++
			pool.planned++
			if n.Reachable && n.Slots[j].spare() {
				pool.idle++
			}
		}
	}
}

// spare reports whether the VM counts towards its pool's minimum of idle ones.
func (s *Slot) spare() bool {
	switch s.State {
	case fleet.VMPlaced, fleet.VMBooting, fleet.VMWarm:
		return s.Job == 0
	case fleet.VMRegistered, fleet.VMBusy, fleet.VMDone, fleet.VMLost:
		return false
	default:
		return false
	}
}
