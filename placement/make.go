package placement

import (
	"fmt"
	"slices"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// Make plans one pass. It costs about nodes × pools asked for, and then a logarithm
// of the nodes for each job.
func Make(s Snapshot) Plan {
	p := newPass(&s, 0)
	p.run()
	return p.plan
}

// Explain runs the same pass and returns the whole table of one of the snapshot's jobs,
// as it was at its turn; false if the job is not among them.
func Explain(s Snapshot, job fleet.JobID) (Explanation, bool) {
	p := newPass(&s, job)
	p.run()
	if p.seen == nil {
		return Explanation{}, false
	}
	return *p.seen, true
}

func (p *pass) run() {
	line := p.entries()
	p.standing()
	p.walk(line, p.take)
	p.keepIdle()
	p.keepRoom()
}

// outcome is what became of one job.
type outcome struct {
	choice candidate
	found  bool   // choice is set
	bound  bool   // a VM is placed
	wait   string // why not; made only where it is shown
}

// take plans one job.
func (p *pass) take(e *entry) {
	index, first := p.decision(e)
	d := &p.plan.Decisions[index]
	d.Jobs = append(d.Jobs, e.job.ID)
	watched := p.watch != 0 && e.job.ID == p.watch
	if e.pool < 0 {
		if d.Wait == "" {
			d.Wait = e.refusal.String()
		}
		p.refuse(index, e.refusal.Reason)
		p.explain(e, watched, outcome{wait: d.Wait})
		p.ahead++
		return
	}
	pool := &p.pools[e.pool]
	p.fill(pool)
	if watched {
		p.tabulate(e, pool)
	}
	o, refused := p.choose(e, pool)
	if refused != "" {
		p.refuse(index, refused)
		e.refusal = Refusal{Reason: refused, Pool: pool.Name}
		o.wait = e.refusal.String()
	}
	if first && o.found {
		choice := p.option(pool, &o.choice)
		d.Choice, d.RunnerUp = &choice, p.runnerUp(pool, &o.choice)
	}
	if !o.bound && o.wait == "" && (d.Wait == "" || watched) {
		o.wait = p.waits(e, pool, &o)
	}
	if d.Wait == "" {
		d.Wait = o.wait
	}
	p.explain(e, watched, o)
	p.settle(e, pool, &o)
	if o.bound {
		d.Bound++
	}
	p.ahead++
}

// choose finds the node for a job within the limits of pool and repository. A limit
// counts what is bound; what is only reserved counts against another reservation, so
// that a pull for one job does not keep another from starting.
func (p *pass) choose(e *entry, pool *pool) (outcome, Reason) {
	repo := &p.repos[e.repo]
	if refused := exceeds(pool, pool.bound, repo.bound); refused != "" {
		return outcome{}, refused
	}
	c, found := p.best(pool, false)
	if !found {
		return outcome{}, ""
	}
	if c.now() {
		return outcome{choice: c, found: true, bound: true}, ""
	}
	if refused := exceeds(pool, pool.planned, repo.planned); refused != "" {
		return outcome{}, refused
	}
	if c.newPull && e.age < c.image {
		// Without history a warm slot may be free any moment: the job gives it as long as
		// the pull would take, by its age, and only then pulls.
		if patient, ok := p.patient(pool); ok {
			c = patient
		}
	}
	return outcome{choice: c, found: true}, ""
}

// exceeds compares counts of VMs with the pool's limits.
func exceeds(pool *pool, vms, ofRepository int) Reason {
	switch {
	case pool.Max > 0 && vms >= pool.Max:
		return ReasonPoolMax
	case pool.MaxPerRepository > 0 && ofRepository >= pool.MaxPerRepository:
		return ReasonRepositoryMax
	}
	return ""
}

// patient is a node with the image ready and a slot whose end nobody knows, not yet
// waited for in this pass.
func (p *pass) patient(pool *pool) (candidate, bool) {
	for len(pool.unknown) > 0 {
		ni := pool.unknown[0]
		n := &p.nodes[ni]
		i := n.unknownSlot()
		if i < 0 || n.have[pool.image].presence != ready || pool.heap.place[ni] < 0 {
			pool.unknown = pool.unknown[1:]
			continue
		}
		c := candidate{node: ni, slot: i, wait: n.slots[i].avail}
		c.boot, c.saved = p.start(n, pool.image)
		c.cost = c.ready()
		return c, true
	}
	return candidate{}, false
}

// settle writes a job's outcome into the plan and into what later jobs see.
func (p *pass) settle(e *entry, pool *pool, o *outcome) {
	if !o.found {
		return
	}
	c := &o.choice
	pool.planned++
	p.repos[e.repo].planned++
	p.need(pool, &p.nodes[c.node])
	if o.bound {
		pool.bound++
		p.repos[e.repo].bound++
		p.bind(pool, c, e.job.ID)
	}
	far := c.far()
	if c.image > 0 && (!far || p.nodes[c.node].have[pool.image].ordered) {
		p.order(pool, c, true)
	}
	if !far {
		p.reserve(pool, c, e.duration)
	}
}

// bind places a VM.
func (p *pass) bind(pool *pool, c *candidate, job fleet.JobID) {
	n, image := &p.nodes[c.node], &p.images[pool.image]
	p.plan.Bind = append(p.plan.Bind, Binding{Job: job, Pool: pool.Name, Node: n.in.ID, Image: image.Digest,
		Ref: pool.Image, Cold: n.have[pool.image].demand, Ready: p.s.Now.Add(c.ready())})
}

// reserve takes the choice's slot out of the pass, until the job would be done.
func (p *pass) reserve(pool *pool, c *candidate, duration time.Duration) {
	n := &p.nodes[c.node]
	s := &n.slots[c.slot]
	if s.idle != "" && s.pool != pool.Name && c.image == 0 {
		p.plan.Evacuate = append(p.plan.Evacuate, s.idle)
		s.idle = ""
	}
	s.unknown = duration == 0
	if s.unknown {
		duration = unknownEnd
	}
	s.avail = c.ready() + duration
	s.open = s.open && c.image > heldForPull
	n.used++
	p.takeState(pool, c)
	if s.unknown && c.now() {
		p.mayBePatient(c.node)
	}
}

// mayBePatient tells the pools whose image a node has that a slot's end there is now
// unknown.
func (p *pass) mayBePatient(ni int) {
	for i := range p.pools {
		if other := &p.pools[i]; other.refusals != nil && p.nodes[ni].have[other.image].presence == ready {
			other.unknown = append(other.unknown, ni)
		}
	}
}

// order lets later jobs see the choice's pull as under way, and puts it into the plan
// unless its slot is so far away that the choice may still change.
func (p *pass) order(pool *pool, c *candidate, demand bool) {
	n := &p.nodes[c.node]
	r := &n.have[pool.image]
	if r.presence != moving && !r.queued {
		p.enqueue(pool, c.node)
	}
	if !r.ordered && c.early() {
		return
	}
	if r.held == 0 {
		why := "a job waits for it in pool " + string(pool.Name)
		if !demand {
			why = fmt.Sprintf("pool %s keeps %d idle", pool.Name, pool.MinIdle)
		}
		p.plan.Hold = append(p.plan.Hold, Hold{Node: n.in.ID, Digest: p.images[pool.image].Digest, Ref: pool.Image, Why: why})
		r.held = int32(len(p.plan.Hold))
		p.makeRoom(pool, n, demand)
	}
	h := &p.plan.Hold[r.held-1]
	h.Demand, h.Priority = h.Demand || demand, max(h.Priority, pool.Priority)
}

// enqueue adds a pull to the node's queue.
func (p *pass) enqueue(pool *pool, ni int) {
	n := &p.nodes[ni]
	r := &n.have[pool.image]
	if r.presence == absent {
		r.presence = waiting
		n.disk -= r.disk
	}
	r.queued = true
	n.queue += r.left
	p.weighAgain(pool.image, ni) // the pull is no longer anybody's own
}

// weighAgain corrects a node's place in the heaps of an image's pools where its cost may
// have fallen.
func (p *pass) weighAgain(image, ni int) {
	for _, i := range p.images[image].pools {
		other := &p.pools[i]
		if other.refusals == nil || other.heap.place[ni] < 0 {
			continue
		}
		if again := p.weigh(other, ni, false); again.refusal == "" {
			other.heap.update(int(other.heap.place[ni]), again.cost)
		}
	}
}

// keepIdle gives free slots that no job reserved to the pools that keep VMs idle, the
// highest priority first. Jobs never wait for these: their images are pre-warms.
func (p *pass) keepIdle() {
	var short []*pool
	for i := range p.pools {
		if pool := &p.pools[i]; pool.image >= 0 && pool.idle < pool.MinIdle {
			short = append(short, pool)
		}
	}
	slices.SortStableFunc(short, func(a, b *pool) int { return b.Priority - a.Priority })
	for _, pool := range short {
		p.fill(pool)
		for ; pool.idle < pool.MinIdle && exceeds(pool, pool.planned, -1) == ""; pool.idle++ {
			c, found := p.best(pool, true)
			if !found || c.wait > 0 {
				break // no slot is free
			}
			p.need(pool, &p.nodes[c.node])
			pool.planned++
			if c.image == 0 {
				p.bind(pool, &c, 0)
			} else {
				p.order(pool, &c, false)
			}
			p.reserve(pool, &c, 0)
		}
	}
}
