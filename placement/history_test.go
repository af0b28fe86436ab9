package placement

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// The cast of the histories: a leader, a store with one line of revisions, two to four Macs
// with small disks, three names of images of which new digests are published. A Mac has one
// call under way at a time: its report is taken, later an answer is written from the
// orders as they are then, and later still it arrives, or never. The leader looks, and
// writes its orders a while after. Whatever happens in between, happens in between. VMs
// start and end, images are pulled, paused, served and pinned, Macs go silent and come back.
type history struct {
	t                                 *testing.T
	rnd                               *rand.Rand
	now                               time.Time
	rev                               int64
	macs                              []*mac
	refs                              map[string]fleet.Image
	pools                             []fleet.Pool
	lambda                            map[fleet.Digest]float64
	pinned                            map[fleet.Digest]string
	jobs                              []fleet.Job
	serial                            int
	looks                             int                  // passes so far
	wanted                            map[fleet.Digest]int // the pass since which an image is in demand without a break
	excused                           map[mark]bool
	plan                              *Plan // looked, not written yet
	looked                            map[fleet.NodeID]fleet.Node
	held                              map[fleet.NodeID]fleet.Orders // as they were looked at
	evicted, refused, spared, recalls int
	lastGone                          int // last copies of images in demand that went with an excuse
	fresh                             int // images that stayed since they came lately
}

// mac is a Mac: what is on its disk, what the store knows of it, and the call under way.
type mac struct {
	id     fleet.NodeID
	images map[fleet.Digest]*fleet.NodeImage
	vms    map[fleet.VMID]fleet.Digest // on the Mac, each with a lease
	slots  []Slot                      // in the store
	disk   int64
	node   fleet.Node // as last reported
	orders fleet.Orders
	since  map[fleet.Digest]int // of orders.Evict, the pass that marked it
	silent int                  // steps to go
	pinned map[fleet.Digest]string
	call   string // "": none, "asked", "answered"
	answer fleet.Orders
	told   map[fleet.Digest]int // of answer
	run    []Slot
}

// mark is an order to let go, by the pass that gave it first.
type mark struct {
	node  fleet.NodeID
	image fleet.Digest
	pass  int
}

func newHistory(t *testing.T, seed uint64) *history {
	h := &history{t: t, rnd: rand.New(rand.NewPCG(seed, 9)), now: time.Date(2026, 6, 1, 9, 0, 0, 0, time.UTC), rev: 1,
		refs: map[string]fleet.Image{}, pinned: map[fleet.Digest]string{}, wanted: map[fleet.Digest]int{}, excused: map[mark]bool{}}
	for i := range 3 {
		h.publish(i)
		h.pools = append(h.pools, fleet.Pool{Name: fleet.PoolName(fmt.Sprintf("p%d", i)), Image: fmt.Sprintf("r%d", i), Scopes: []fleet.Scope{"acme"},
			Labels: fleet.NewLabels("self-hosted", fmt.Sprintf("r%d", i)), Growth: 10e9, MinIdle: h.rnd.IntN(8) / 7})
	}
	for i := range 2 + h.rnd.IntN(3) {
		m := &mac{id: fleet.NodeID(fmt.Sprintf("mac-%d", i)), images: map[fleet.Digest]*fleet.NodeImage{}, vms: map[fleet.VMID]fleet.Digest{}, disk: 60e9 + h.rnd.Int64N(90e9)}
		for _, ref := range slices.Sorted(maps.Keys(h.refs)) {
			if h.rnd.IntN(3) > 0 {
				m.images[h.refs[ref].Digest] = &fleet.NodeImage{Digest: h.refs[ref].Digest, Ref: ref, State: fleet.ImageReady, DiskBytes: 30e9}
			}
		}
		h.macs = append(h.macs, m)
		h.report(m)
	}
	return h
}

// publish gives a name a new digest.
func (h *history) publish(i int) {
	h.serial++
	ref := fmt.Sprintf("r%d", i)
	h.refs[ref] = fleet.Image{Ref: ref, Digest: fleet.Digest(fmt.Sprintf("sha256:%s-%d", ref, h.serial)), Bytes: 20e9, DiskBytes: 30e9 + h.rnd.Int64N(20e9)}
}

// free is what is left of a Mac's disk.
func (m *mac) free() int64 {
	free := m.disk
	for _, on := range m.images {
		free -= on.DiskBytes
	}
	return free - int64(len(m.vms))*3e9
}

// report writes the Mac's word on itself into the store.
func (h *history) report(m *mac) {
	h.rev++
	m.node = fleet.Node{ID: m.id, Slots: 2, DiskFree: m.free(), PullRate: 100e6, SeenAt: h.now, Rev: h.rev}
	for _, d := range slices.Sorted(maps.Keys(m.images)) {
		on := *m.images[d]
		for _, image := range m.vms {
			if image == d {
				on.Leases++
			}
		}
		m.node.Images = append(m.node.Images, on)
	}
	m.slots = slices.DeleteFunc(m.slots, func(s Slot) bool {
		_, alive := m.vms[s.VM]
		return s.State != fleet.VMPlaced && !alive
	})
}

// snapshot is the store as the leader reads it.
func (h *history) snapshot() Snapshot {
	s := Snapshot{Now: h.now, Pools: h.pools, Images: maps.Clone(h.refs), Demand: maps.Clone(h.lambda), Pinned: maps.Clone(h.pinned), Jobs: slices.Clone(h.jobs)}
	for _, m := range h.macs {
		n := Node{Node: m.node, Reachable: h.now.Sub(m.node.SeenAt) < 45*time.Second, Slots: slices.Clone(m.slots),
			Pinned: maps.Clone(m.pinned), Hold: m.orders.Hold, Evict: m.orders.Evict, Recalled: InDoubt(&m.orders, &m.node)}
		s.Nodes = append(s.Nodes, n)
	}
	return s
}

// look has the leader plan, and checks the plan against what it saw.
func (h *history) look() {
	s := h.snapshot()
	plan := Make(s)
	h.looks++
	demanded := map[fleet.Digest]bool{}
	for d, lambda := range h.lambda {
		demanded[d] = lambda >= demandFloor
	}
	for _, j := range h.jobs {
		pool, _, _ := PoolFor(h.pools, j)
		demanded[h.refs[pool.Image].Digest] = true
	}
	for d := range h.wanted {
		if !demanded[d] {
			delete(h.wanted, d)
		}
	}
	for d, yes := range demanded {
		if _, since := h.wanted[d]; yes && !since {
			h.wanted[d] = h.looks
		}
	}
	h.check(&s, &plan)
	h.excuse(&s, &plan)
	h.plan, h.looked, h.held = &plan, map[fleet.NodeID]fleet.Node{}, map[fleet.NodeID]fleet.Orders{}
	for _, m := range h.macs {
		h.looked[m.id], h.held[m.id] = m.node, m.orders
	}
}

// write commits what the leader decided, as the controller does: orders whose record
// changed since are left to the next pass.
func (h *history) write() {
	if h.plan == nil {
		return
	}
	plan := h.plan
	h.plan = nil
	for _, b := range plan.Bind {
		m := h.mac(b.Node)
		h.serial++
		m.slots = append(m.slots, Slot{VM: fleet.VMID(fmt.Sprintf("vm-%d", h.serial)), Pool: b.Pool, Image: b.Image, State: fleet.VMPlaced, Job: b.Job})
		h.jobs = slices.DeleteFunc(h.jobs, func(j fleet.Job) bool { return j.ID == b.Job })
	}
	for _, m := range h.macs {
		node, before := h.looked[m.id], h.held[m.id]
		next := fleet.Orders{Node: m.id}
		for _, hold := range plan.Hold {
			if hold.Node == m.id {
				next.Hold = append(next.Hold, fleet.Hold{Digest: hold.Digest, Ref: hold.Ref, Demand: hold.Demand})
			}
		}
		since := map[fleet.Digest]int{}
		for _, e := range plan.Evict {
			if e.Node == m.id {
				next.Evict = append(next.Evict, e.Digest)
				since[e.Digest] = h.looks
				if at, standing := m.since[e.Digest]; standing {
					since[e.Digest] = at
				}
			}
		}
		next.Recalled = Recall(&before, &node, next.Evict)
		if reflect.DeepEqual(next.Hold, before.Hold) && slices.Equal(next.Evict, before.Evict) && slices.Equal(next.Recalled, before.Recalled) {
			continue
		}
		h.recalls += len(next.Recalled)
		h.rev++
		next.Rev = h.rev
		m.orders, m.since = next, since
	}
}

func (h *history) mac(id fleet.NodeID) *mac {
	return h.macs[slices.IndexFunc(h.macs, func(m *mac) bool { return m.id == id })]
}

// call moves the Mac's exchange with the controller one step on.
func (h *history) call(m *mac) {
	switch {
	case m.silent > 0:
		m.silent--
	case m.call == "":
		h.report(m)
		m.call = "asked"
	case m.call == "asked":
		m.answer, m.told, m.call = m.orders, m.since, "answered"
		m.run = nil
		for _, s := range m.slots {
			if s.State == fleet.VMPlaced {
				m.run = append(m.run, s)
			}
		}
	case h.rnd.IntN(8) == 0:
		m.call = "" // the connection broke before the answer came
	default:
		m.call = ""
		h.obey(m)
	}
}

// obey carries an answer out, as an agent and its image store do.
func (h *history) obey(m *mac) {
	for _, s := range m.run {
		at := slices.IndexFunc(m.slots, func(have Slot) bool { return have.VM == s.VM })
		if at < 0 || m.slots[at].State != fleet.VMPlaced {
			continue
		}
		m.slots[at].State = fleet.VMBusy
		if on := m.images[s.Image]; on != nil && on.State == fleet.ImageReady {
			m.vms[s.VM], on.UsedAt = s.Image, h.now
		} else {
			h.refused++ // the image had gone: the VM fails
		}
	}
	for _, hold := range m.answer.Hold {
		if on := m.images[hold.Digest]; on == nil {
			m.images[hold.Digest] = &fleet.NodeImage{Digest: hold.Digest, Ref: hold.Ref, State: fleet.ImageCaching, Total: 20e9, DiskBytes: 1e9}
		}
	}
	for _, d := range m.answer.Evict {
		on := m.images[d]
		held := slices.ContainsFunc(m.answer.Hold, func(o fleet.Hold) bool { return o.Digest == d })
		leased := slices.Contains(slices.Collect(maps.Values(m.vms)), d) || on != nil && on.Leases > 0
		if on == nil || held || leased || on.State == fleet.ImageCaching || on.State == fleet.ImageVerifying {
			h.spared++
			continue
		}
		was := on.State
		on.State = fleet.ImageEvicting
		h.evicted++
		since, wanted := h.wanted[d]
		if was != fleet.ImageReady || !wanted || since > m.told[d] {
			continue // it was in no demand when it was marked
		}
		if _, any := h.copyOf(d); !any && h.excused[mark{m.id, d, m.told[d]}] {
			h.lastGone++
		} else if !any {
			h.t.Fatalf("%s of %s was the last copy, and in demand since pass %d; it was marked in pass %d of %d", d, m.id, since, m.told[d], h.looks)
		}
	}
}

// copyOf finds a Mac that has the image and is not letting it go.
func (h *history) copyOf(d fleet.Digest) (fleet.NodeID, bool) {
	for _, m := range h.macs {
		if on := m.images[d]; on != nil && on.State == fleet.ImageReady {
			return m.id, true
		}
	}
	return "", false
}

// live lets time do its work on a Mac's disk.
func (h *history) live(m *mac) {
	for _, d := range slices.Sorted(maps.Keys(m.images)) {
		on := m.images[d]
		switch on.State {
		case fleet.ImageEvicting:
			if h.rnd.IntN(3) > 0 {
				delete(m.images, d)
			}
		case fleet.ImageCaching:
			switch h.rnd.IntN(6) {
			case 0:
				on.State = fleet.ImagePaused
			case 1:
				on.State = fleet.ImageFailed
			case 2, 3:
				on.State = fleet.ImageVerifying
			}
			on.DiskBytes = min(on.DiskBytes+5e9, 30e9)
		case fleet.ImageVerifying:
			on.State, on.DiskBytes, on.ReadyAt = fleet.ImageReady, 30e9, h.now
		case fleet.ImagePaused, fleet.ImageFailed:
			if slices.ContainsFunc(m.answer.Hold, func(o fleet.Hold) bool { return o.Digest == d }) {
				on.State = fleet.ImageCaching
			}
		case fleet.ImageReady: // served to another Mac for a while
			on.Leases = max(0, h.rnd.IntN(6)-4)
		case fleet.ImageQueued:
		}
	}
	for _, id := range slices.Sorted(maps.Keys(m.vms)) {
		if h.rnd.IntN(5) == 0 {
			delete(m.vms, id)
		}
	}
}

// step is one thing that happens.
func (h *history) step() {
	h.now = h.now.Add(time.Duration(h.rnd.IntN(3)) * time.Second)
	m := h.macs[h.rnd.IntN(len(h.macs))]
	switch k := h.rnd.IntN(100); {
	case k < 45:
		h.call(m)
	case k < 55:
		h.live(m)
	case k < 72:
		if h.plan == nil {
			h.look()
		}
	case k < 88:
		h.write()
	case k < 92 && len(h.jobs) < 5:
		h.serial++
		h.jobs = append(h.jobs, fleet.Job{ID: fleet.JobID(h.serial), Repository: "acme/app", Labels: fleet.NewLabels("self-hosted", fmt.Sprintf("r%d", h.rnd.IntN(3))),
			CreatedAt: h.now.Add(-time.Duration(h.rnd.IntN(1800)) * time.Second)})
	case k < 93:
		h.jobs = nil
	case k < 94:
		h.publish(h.rnd.IntN(3))
	case k < 95:
		h.chance()
	case k < 96:
		m.silent = 10 + h.rnd.IntN(40)
	case k < 97: // other files come and go
		m.disk = 60e9 + h.rnd.Int64N(90e9)
	case k < 98: // everywhere
		for _, m := range h.macs {
			m.disk -= max(0, m.free()-h.rnd.Int64N(12e9))
		}
	default: // the one copy is pinned, so that another is the next in turn
		m.pinned = map[fleet.Digest]string{}
		for _, d := range slices.Sorted(maps.Keys(m.images)) {
			if h.rnd.IntN(2) == 0 {
				m.pinned[d] = ""
			}
		}
	}
}

// chance changes what is asked for and what is pinned.
func (h *history) chance() {
	h.lambda, h.pinned = nil, map[fleet.Digest]string{}
	if h.rnd.IntN(3) > 0 {
		h.lambda = map[fleet.Digest]float64{}
		for _, ref := range slices.Sorted(maps.Keys(h.refs)) {
			h.lambda[h.refs[ref].Digest] = []float64{0.01, 0.5, 0.5, 7}[h.rnd.IntN(4)]
		}
	}
	for _, m := range h.macs {
		for _, d := range slices.Sorted(maps.Keys(m.images)) {
			if h.rnd.IntN(12) == 0 {
				h.pinned[d] = "by hand"
			}
		}
	}
}

// settle lets everything come to rest: calls end well, the leader looks and writes. Then
// no order to let go stands any more, and no recalled one is in doubt.
func (h *history) settle() {
	h.lambda, h.jobs, h.pinned = nil, nil, map[fleet.Digest]string{}
	for i := range h.pools {
		h.pools[i].MinIdle = 0
	}
	for range 12 {
		for _, m := range h.macs {
			m.silent, m.call, m.pinned = 0, "", nil
			clear(m.vms)
			for d, on := range m.images {
				switch on.Leases = 0; on.State {
				case fleet.ImageEvicting:
					delete(m.images, d)
				case fleet.ImageCaching, fleet.ImageVerifying:
					on.State, on.DiskBytes = fleet.ImageReady, 30e9
				case fleet.ImageReady, fleet.ImagePaused, fleet.ImageFailed, fleet.ImageQueued:
				}
			}
			h.report(m)
			m.answer, m.told = m.orders, m.since
			h.obey(m)
			h.now = h.now.Add(time.Second)
		}
		h.plan = nil
		h.look()
		h.write()
	}
	for _, m := range h.macs {
		if len(m.orders.Evict) > 0 || len(m.orders.Recalled) > 0 {
			h.t.Errorf("%s: %v still stand, %v still are in doubt; it lists %+v", m.id, m.orders.Evict, m.orders.Recalled, m.node.Images)
		}
	}
}

// TestHistories: over random histories nothing is ordered out that must stay, the last copy
// of an image in demand never goes, however late orders arrive and from whichever pass they
// are, but for a job or where it is of no use; room is reached where it can be, and everything
// comes to rest.
func TestHistories(t *testing.T) {
	evicted, refused, spared, recalls, last, fresh := 0, 0, 0, 0, 0, 0
	const histories = 1000
	for seed := range uint64(histories) {
		h := newHistory(t, seed)
		for range 400 {
			h.step()
		}
		h.settle()
		if t.Failed() {
			t.Fatalf("in history %d", seed)
		}
		evicted, refused, spared, recalls = evicted+h.evicted, refused+h.refused, spared+h.spared, recalls+h.recalls
		last, fresh = last+h.lastGone, fresh+h.fresh
	}
	t.Logf("%d evictions carried out, %d not, %d recalled; %d VMs found their image gone; %d last copies went, %d images stayed as fresh", evicted, spared, recalls, refused, last, fresh)
	if min(evicted, spared, recalls, fresh) < histories/4 || last < histories/40 {
		t.Errorf("%d evictions carried out, %d not, %d recalled: too few to say much", evicted, spared, recalls)
	}
}
