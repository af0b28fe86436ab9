package placement

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// scramble is a random small fleet in which everything that can be odd is: mixed image
// states, cordons, limits, full disks, idle VMs, unknown ends, unresolved images,
// public repositories. Small numbers make the odd cases meet.
func scramble(seed uint64) Snapshot {
	rnd := rand.New(rand.NewPCG(seed, 1))
	s := Snapshot{Now: time.Date(2026, 6, 1, 9, 0, 0, 0, time.UTC), Images: map[string]fleet.Image{}, Running: map[string]int{"acme/r0": rnd.IntN(3)}}
	images := 1 + rnd.IntN(4)
	for i := range images {
		ref := fmt.Sprintf("image-%d", i)
		if rnd.IntN(10) > 0 {
			s.Images[ref] = fleet.Image{Ref: ref, Digest: fleet.Digest("sha256:" + ref), Bytes: rnd.Int64N(60e9), DiskBytes: rnd.Int64N(90e9)}
		}
	}
	for i := range 1 + rnd.IntN(5) {
		p := fleet.Pool{Name: fleet.PoolName(fmt.Sprintf("pool-%d", i)), Image: fmt.Sprintf("image-%d", rnd.IntN(images)),
			Scopes: []fleet.Scope{"acme"}, Labels: fleet.NewLabels("self-hosted", fmt.Sprintf("l%d", rnd.IntN(3)), fmt.Sprintf("l%d", rnd.IntN(3))),
			Priority: rnd.IntN(2), Growth: 20e9, PublicRepositories: rnd.IntN(2) == 0}
		if rnd.IntN(3) == 0 {
			p.Max, p.MaxPerRepository = rnd.IntN(4), rnd.IntN(3)
		}
		if rnd.IntN(3) == 0 {
			p.MinIdle = rnd.IntN(4)
		}
		if rnd.IntN(4) == 0 {
			p.Nodes.Tags = map[string]string{"zone": "a"}
		}
		s.Pools = append(s.Pools, p)
	}
	for i := range rnd.IntN(7) {
		s.Nodes = append(s.Nodes, scrambleNode(rnd, &s, i, images))
	}
	starts := rand.New(rand.NewPCG(seed, 3))
	for i := range s.Nodes {
		for k := range s.Nodes[i].Images {
			s.Nodes[i].Images[k].Start = scrambleStart(starts)
		}
	}
	for i := range rnd.IntN(14) {
		s.Jobs = append(s.Jobs, fleet.Job{ID: fleet.JobID(i + 1), Repository: fmt.Sprintf("acme/r%d", rnd.IntN(3)), Public: rnd.IntN(5) == 0,
			Name: fmt.Sprintf("j%d", rnd.IntN(3)), Labels: fleet.NewLabels("self-hosted", fmt.Sprintf("l%d", rnd.IntN(3))),
			CreatedAt: s.Now.Add(-time.Duration(rnd.IntN(40)) * time.Minute)})
	}
	s.Durations = func(_, name string) (time.Duration, bool) {
		return time.Duration(name[1]-'0') * 7 * time.Minute, name != "j0"
	}
	return s
}

func scrambleNode(rnd *rand.Rand, s *Snapshot, i, images int) Node {
	n := Node{Reachable: rnd.IntN(8) > 0, Failures: rnd.IntN(2)}
	n.ID, n.Cordoned, n.Node.Slots = fleet.NodeID(fmt.Sprintf("mac-%d", i)), rnd.IntN(8) == 0, rnd.IntN(4)
	n.DiskFree, n.PullRate = rnd.Int64N(200e9), rnd.Int64N(200e6)
	if rnd.IntN(3) > 0 {
		n.Tags = map[string]string{"zone": "a"}
	}
	states := []fleet.ImageState{fleet.ImageReady, fleet.ImageReady, fleet.ImageReady, fleet.ImageCaching, fleet.ImageQueued, fleet.ImageEvicting,
		fleet.ImageFailed, fleet.ImageVerifying, fleet.ImagePaused}
	for k := range images + 1 { // the last one is of no pool
		d := fleet.Digest(fmt.Sprintf("sha256:image-%d", k))
		if rnd.IntN(2) == 0 {
			total := 1 + rnd.Int64N(60e9)
			n.Images = append(n.Images, fleet.NodeImage{Digest: d, State: states[rnd.IntN(len(states))], DiskBytes: rnd.Int64N(90e9),
				Total: total, Done: rnd.Int64N(total), Leases: rnd.IntN(2), RetryAt: s.Now.Add(time.Duration(rnd.IntN(3)-1) * time.Minute)})
		}
		if rnd.IntN(6) == 0 {
			n.Hold = append(n.Hold, fleet.Hold{Digest: d, Demand: rnd.IntN(2) == 0})
		}
	}
	for k := range rnd.IntN(n.Node.Slots + 1) {
		u := Slot{VM: fleet.VMID(fmt.Sprintf("vm-%d-%d", i, k)), Pool: s.Pools[rnd.IntN(len(s.Pools))].Name, State: fleet.VMBusy}
		switch rnd.IntN(4) {
		case 0:
			u.State, u.Idle = fleet.VMWarm, true
		case 1:
			u.Ends = s.Now.Add(time.Duration(rnd.IntN(30)-3) * time.Minute)
		case 2:
			u.State = fleet.VMBooting
		}
		n.Slots = append(n.Slots, u)
	}
	return n
}

// scrambleStart is mostly nothing; now and then a start from a state is slower than a boot.
func scrambleStart(rnd *rand.Rand) (start fleet.ImageStart) {
	if rnd.IntN(2) == 0 {
		start.Cold = time.Duration(rnd.IntN(40)) * time.Second
	}
	if rnd.IntN(2) == 0 {
		start.States, start.Saved = rnd.IntN(3), time.Duration(rnd.IntN(6))*time.Second
	}
	return start
}

const scrambles = 4000

// Whatever the fleet looks like: a VM is only placed on a reachable, willing node, in a
// slot of its own, with its image ready and staying, for a job that is in the queue and
// of that pool, and no limit is broken.
func TestPlansAreSound(t *testing.T) {
	var binds, holds, evictions, evacuations, idle int
	for seed := range uint64(scrambles) {
		s := scramble(seed)
		p := Make(s)
		if err := sound(&s, &p); err != nil {
			t.Fatalf("seed %d: %v\nplan %+v", seed, err, p)
		}
		for _, b := range p.Bind {
			if b.Job == 0 {
				idle++
			}
		}
		binds, holds, evictions, evacuations = binds+len(p.Bind), holds+len(p.Hold), evictions+len(p.Evict), evacuations+len(p.Evacuate)
	}
	if least := min(binds, holds, evictions, evacuations, idle); least < scrambles/50 {
		t.Errorf("%d binds, %d holds, %d evictions, %d evacuations, %d idle: too few of one kind to say much", binds, holds, evictions, evacuations, idle)
	}
}

// sound returns the first rule that a plan breaks.
func sound(s *Snapshot, p *Plan) error {
	nodes, jobs, pools := map[fleet.NodeID]*Node{}, map[fleet.JobID]*fleet.Job{}, map[fleet.PoolName]*fleet.Pool{}
	spare, vms, bound := map[fleet.PoolName]int{}, map[fleet.PoolName]int{}, map[fleet.JobID]bool{}
	for i := range s.Pools {
		pools[s.Pools[i].Name] = &s.Pools[i]
	}
	for i := range s.Jobs {
		jobs[s.Jobs[i].ID] = &s.Jobs[i]
	}
	taken, running := map[fleet.NodeID]int{}, map[string]int{}
	for i := range s.Nodes {
		n := &s.Nodes[i]
		nodes[n.ID], taken[n.ID] = n, len(n.Slots)
		for j := range n.Slots {
			vms[n.Slots[j].Pool]++
			if n.Reachable && n.Slots[j].spare() {
				spare[n.Slots[j].Pool]++
			}
		}
	}
	for r, n := range s.Running {
		running[r] = n
	}
	for _, b := range p.Bind {
		n, pool := nodes[b.Node], pools[b.Pool]
		on, has := n.Image(b.Image)
		taken[b.Node]++
		vms[b.Pool]++
		switch {
		case !n.Reachable || n.Cordoned || !pool.Nodes.Matches(&n.Node):
			return fmt.Errorf("bound on %s, which may not be used", b.Node)
		case taken[b.Node] > n.Node.Slots:
			return fmt.Errorf("%s has %d VMs for %d slots", b.Node, taken[b.Node], n.Node.Slots)
		case !has || on.State != fleet.ImageReady || b.Image != s.Images[pool.Image].Digest:
			return fmt.Errorf("bound on %s without the ready image of %s", b.Node, b.Pool)
		case n.DiskFree < pool.Growth*int64(n.Node.Slots)/2:
			return fmt.Errorf("bound on %s with %d bytes of disk left", b.Node, n.DiskFree)
		case pool.Max > 0 && vms[b.Pool] > pool.Max:
			return fmt.Errorf("%d VMs in %s, which may have %d", vms[b.Pool], b.Pool, pool.Max)
		}
		if b.Job == 0 {
			if spare[b.Pool]++; spare[b.Pool] > pool.MinIdle {
				return fmt.Errorf("%d idle VMs in %s, which wants %d", spare[b.Pool], b.Pool, pool.MinIdle)
			}
			continue
		}
		job := jobs[b.Job]
		if job == nil || bound[b.Job] {
			return fmt.Errorf("job %d is not in the queue or bound twice", b.Job)
		}
		bound[b.Job] = true
		if of, _, refusal := PoolFor(s.Pools, *job); refusal.Refused() || of.Name != b.Pool {
			return fmt.Errorf("job %d is not of pool %s", b.Job, b.Pool)
		}
		if running[job.Repository]++; pool.MaxPerRepository > 0 && running[job.Repository] > pool.MaxPerRepository {
			return fmt.Errorf("%s runs %d VMs of %d in %s", job.Repository, running[job.Repository], pool.MaxPerRepository, b.Pool)
		}
	}
	if err := soundDecisions(s, p, bound); err != nil {
		return err
	}
	return soundImages(s, p, nodes)
}

// soundDecisions: every job is in exactly one decision, which counts its binds, and
// waits with a reason if it is not bound.
func soundDecisions(s *Snapshot, p *Plan, bound map[fleet.JobID]bool) error {
	decided := map[fleet.JobID]bool{}
	for _, d := range p.Decisions {
		n := 0
		for _, job := range d.Jobs {
			if decided[job] {
				return fmt.Errorf("job %d is decided twice", job)
			}
			decided[job] = true
			if bound[job] {
				n++
			}
		}
		switch {
		case n != d.Bound:
			return fmt.Errorf("%s: %d bound, %d said", d.Class, n, d.Bound)
		case (n < len(d.Jobs)) != (d.Wait != ""):
			return fmt.Errorf("%s: %d of %d bound, but waits %q", d.Class, n, len(d.Jobs), d.Wait)
		case d.RunnerUp != nil && d.RunnerUp.Node == d.Choice.Node:
			return fmt.Errorf("%s: runner-up is the choice", d.Class)
		}
	}
	if len(decided) != len(s.Jobs) {
		return fmt.Errorf("%d jobs decided of %d", len(decided), len(s.Jobs))
	}
	return nil
}

// soundImages: orders and evictions are for nodes in use, once each; nothing is let go
// that is leased, in use, ordered, or the ground of a bind.
func soundImages(s *Snapshot, p *Plan, nodes map[fleet.NodeID]*Node) error {
	type place struct {
		node  fleet.NodeID
		image fleet.Digest
	}
	held, gone := map[place]bool{}, map[place]bool{}
	for _, h := range p.Hold {
		at := place{h.Node, h.Digest}
		on, _ := nodes[h.Node].Image(h.Digest)
		if held[at] || on.State == fleet.ImageReady || !nodes[h.Node].Reachable || nodes[h.Node].Cordoned || h.Why == "" {
			return fmt.Errorf("hold %+v: twice, ready already, or on a node out of use", h)
		}
		held[at] = true
	}
	for _, e := range p.Evict {
		at := place{e.Node, e.Digest}
		on, has := nodes[e.Node].Image(e.Digest)
		ordered := slices.ContainsFunc(nodes[e.Node].Hold, func(h fleet.Hold) bool { return h.Digest == e.Digest })
		moves := on.State == fleet.ImageQueued || on.State == fleet.ImageCaching || on.State == fleet.ImageVerifying
		if gone[at] || held[at] || ordered || !has || moves || on.Leases > 0 || e.Why == "" {
			return fmt.Errorf("evict %+v: twice, wanted there, leased or not there", e)
		}
		gone[at] = true
	}
	for _, b := range p.Bind {
		if gone[place{b.Node, b.Image}] {
			return fmt.Errorf("%s is let go from %s, where a VM is made of it", b.Image, b.Node)
		}
	}
	for _, vm := range p.Evacuate {
		found := false
		for _, n := range nodes {
			found = found || slices.ContainsFunc(n.Slots, func(u Slot) bool { return u.VM == vm && u.Idle && n.Reachable })
		}
		if !found {
			return fmt.Errorf("evacuates %s, which is not idle within reach", vm)
		}
	}
	if n := len(p.Evacuate); n != len(slices.Compact(slices.Sorted(slices.Values(p.Evacuate)))) {
		return fmt.Errorf("evacuates a VM twice: %v", p.Evacuate)
	}
	return nil
}

// The order in which jobs, nodes and images come in says nothing; nor does Make change
// what it was given.
func TestOrderOfInputDoesNotMatter(t *testing.T) {
	for seed := range uint64(scrambles / 4) {
		s, rnd := scramble(seed), rand.New(rand.NewPCG(seed, 2))
		want := Make(s)
		rnd.Shuffle(len(s.Jobs), reflect.Swapper(s.Jobs))
		rnd.Shuffle(len(s.Nodes), reflect.Swapper(s.Nodes))
		for i := range s.Nodes {
			rnd.Shuffle(len(s.Nodes[i].Images), reflect.Swapper(s.Nodes[i].Images))
		}
		if got := Make(s); !reflect.DeepEqual(got, want) {
			t.Fatalf("seed %d:\ngot  %+v\nwant %+v", seed, got, want)
		}
	}
	s, untouched := scramble(3), scramble(3)
	Make(s)
	s.Durations, untouched.Durations = nil, nil
	if !reflect.DeepEqual(s, untouched) {
		t.Errorf("Make changed the snapshot:\n%+v\nwas\n%+v", s, untouched)
	}
}

// Explain shows what Make did: the same binds, the same choice for the first job of a
// decision, the same reason to wait; and the choice is the cheapest row of the table,
// unless the job is patient because nobody knows when a warm slot is free.
func TestExplainAgrees(t *testing.T) {
	patient := 0
	for seed := range uint64(scrambles / 4) {
		s := scramble(seed)
		p := Make(s)
		bound := map[fleet.JobID]fleet.NodeID{}
		for _, b := range p.Bind {
			bound[b.Job] = b.Node
		}
		for _, d := range p.Decisions {
			said := false
			for i, job := range d.Jobs {
				x, ok := Explain(s, job)
				node, isBound := bound[job]
				switch {
				case !ok || x.Job != job || x.Bound != isBound || x.Bound == (x.Wait != ""):
					t.Fatalf("seed %d job %d: bound %v, explained %+v", seed, job, isBound, x)
				case isBound && x.Choice.Node != node:
					t.Fatalf("seed %d job %d: bound on %s, explained %s", seed, job, node, x.Choice.Node)
				case i == 0 && !reflect.DeepEqual(x.Choice, d.Choice):
					t.Fatalf("seed %d job %d: chose %+v, explained %+v", seed, job, d.Choice, x.Choice)
				case !x.Bound && !said && x.Wait != d.Wait:
					t.Fatalf("seed %d job %d: waits %q, explained %q", seed, job, d.Wait, x.Wait)
				case x.Pool != "" && len(x.Options) != len(s.Nodes):
					t.Fatalf("seed %d job %d: %d rows for %d nodes", seed, job, len(x.Options), len(s.Nodes))
				}
				said = said || !x.Bound
				if x.Choice != nil && x.Choice.Cost != x.Options[0].Cost {
					if !x.Options[0].NewPull || x.Age >= x.Options[0].Image {
						t.Fatalf("seed %d job %d: chose %+v over %+v", seed, job, *x.Choice, x.Options[0])
					}
					patient++
				}
			}
		}
	}
	if patient == 0 {
		t.Error("no job was patient: the rule was not tried")
	}
	if _, ok := Explain(scramble(1), 99); ok {
		t.Error("explained a job that is not in the snapshot")
	}
}

// No slot stays empty without a reason: where nothing is pulled for a job, a job within
// its limits that could start on a free slot with its image ready does start, unless it
// is to have an idle VM of its own pool or the slot it waits for has its guest answer
// sooner: a start from a saved state is worth a few seconds.
func TestNoSlotIsWasted(t *testing.T) {
	tried, passed := 0, 0
	for seed := range uint64(scrambles) {
		s := scramble(seed)
		p := Make(s)
		if slices.ContainsFunc(p.Hold, func(h Hold) bool { return h.Demand }) {
			continue
		}
		free, penalty := map[fleet.NodeID]int{}, map[fleet.NodeID]time.Duration{}
		for i := range s.Nodes {
			penalty[s.Nodes[i].ID] = failureCost * time.Duration(s.Nodes[i].Failures)
			free[s.Nodes[i].ID] = s.Nodes[i].Node.Slots - len(s.Nodes[i].Slots)
		}
		bound := map[fleet.JobID]bool{}
		for _, b := range p.Bind {
			free[b.Node]--
			bound[b.Job] = true
		}
		for _, job := range s.Jobs {
			x, _ := Explain(s, job.ID)
			if bound[job.ID] || x.Refusal.Refused() {
				continue
			}
			for _, o := range x.Options {
				tried++
				if o.Refusal != "" || o.Image > 0 || free[o.Node] == 0 {
					continue
				}
				if x.Choice.Ready+penalty[x.Choice.Node] <= o.Ready+penalty[o.Node]+spreadWeight || strings.Contains(x.Wait, "of its own pool") {
					passed++
				} else {
					t.Fatalf("seed %d: job %d waits %q, but %s has a free slot and the image", seed, job.ID, x.Wait, o.Node)
				}
			}
		}
	}
	if tried < scrambles/10 || passed > tried/20 {
		t.Errorf("%d options were looked at, %d free slots passed over: too few to say much, or too many", tried, passed)
	}
}
