package runner

import (
	"cmp"
	"slices"

	"github.com/paddock-ci/paddock/fleet"
)

// Takes reports whether GitHub lets a runner with runnerLabels take a job that asks for
// jobLabels: each of the job's labels must be among the runner's.
func Takes(runnerLabels, jobLabels fleet.Labels) bool { return runnerLabels.ContainsAll(jobLabels) }

// Matching is what Match found.
type Matching struct {
	// Set holds the changes of VM.Job; 0: released.
	Set map[fleet.VMID]fleet.JobID
	// Unmet are queued jobs of our pools that no VM is there for, oldest first.
	Unmet []fleet.JobID
	// Surplus are registered VMs that no queued job could go to, sorted.
	Surplus []fleet.VMID
}

// PoolOf tells the pool that serves a job and the scope in which its runner registers;
// ok is false for a job that is none of ours.
type PoolOf func(*fleet.Job) (pool fleet.PoolName, scope fleet.Scope, ok bool)

// Match matches jobs with VMs the way GitHub is going to. A JIT runner is not bound to
// the job it was made for, so a match is a guess until in_progress names the runner:
//
//  1. A job in progress (or completed) that names a runner of ours belongs to that
//     runner's VM, whoever had it before; a runner serves one job in its life.
//  2. A match that is still possible is kept.
//  3. The oldest queued job takes the most advanced VM that GitHub would let it have:
//     a claimed or registered one by scope and labels, an unclaimed one by pool.
//  4. A claimed VM that is still idle takes a job from an unclaimed one: GitHub will
//     give it away there, long before the other has registered. The unclaimed one is
//     free for the next job.
//
// VMs that are retiring or to be destroyed take no queued job; finished VMs are left
// as they are, as history. The result does not depend on the order of the arguments.
// Cost: about linear in jobs plus VMs, since equal jobs and equal runners are classes.
func Match(jobs []*fleet.Job, vms []*fleet.VM, poolOf PoolOf, fleetName string) Matching {
	m := newMatcher(jobs, vms, poolOf)
	m.bind(fleetName)
	m.keep()
	m.index()
	m.fill()
	if m.steal() {
		m.fill()
	}
	return m.result()
}

// matcher is the state of one Match.
type matcher struct {
	jobs  []*job // oldest first
	vms   []*candidate
	byJob map[fleet.JobID]*job
	byVM  map[fleet.VMID]*candidate

	classes []*class
	groups  []*group
}

// job is one job with the VM it is matched with.
type job struct {
	*fleet.Job
	class *class // nil: not queued, or none of ours
	vm    *candidate
}

// candidate is one live VM with the job it is matched with.
type candidate struct {
	*fleet.VM
	rank int // see progress
	job  *job
	// held keeps the VM's match although the job is not known (any more): it is busy.
	held fleet.JobID
}

// class is all queued jobs that GitHub cannot tell apart.
type class struct {
	pool   fleet.PoolName
	scope  fleet.Scope
	labels fleet.Labels
	jobs   []*job   // oldest first
	groups []*group // where they may go; exhausted ones are dropped
}

// group is all free VMs that can serve the same classes.
type group struct {
	claim *fleet.Claim // of the first; nil: unclaimed
	pool  fleet.PoolName
	free  []*candidate // most advanced first
}

type classKey struct {
	pool   fleet.PoolName
	scope  fleet.Scope
	labels string
}

func newMatcher(jobs []*fleet.Job, vms []*fleet.VM, poolOf PoolOf) *matcher {
	m := &matcher{
		jobs:  make([]*job, 0, len(jobs)),
		byJob: make(map[fleet.JobID]*job, len(jobs)),
		byVM:  make(map[fleet.VMID]*candidate, len(vms)),
	}
	for _, j := range jobs {
		m.jobs = append(m.jobs, &job{Job: j})
	}
	slices.SortFunc(m.jobs, func(a, b *job) int {
		return cmp.Or(a.CreatedAt.Compare(b.CreatedAt), cmp.Compare(a.ID, b.ID))
	})
	classes := map[classKey]*class{}
	for _, j := range m.jobs {
		m.byJob[j.ID] = j
		pool, scope, ok := poolOf(j.Job)
		if j.Status != fleet.JobQueued || !ok {
			continue
		}
		key := classKey{pool, scope, j.Labels.Key()}
		c := classes[key]
		if c == nil {
			c = &class{pool: pool, scope: scope, labels: j.Labels}
			classes[key] = c
			m.classes = append(m.classes, c)
		}
		c.jobs = append(c.jobs, j)
		j.class = c
	}
	for _, v := range vms {
		if !v.State.Final() {
			m.vms = append(m.vms, &candidate{VM: v, rank: progress(v)})
		}
	}
	slices.SortFunc(m.vms, compareCandidates)
	for _, v := range m.vms {
		m.byVM[v.ID] = v
	}
	return m
}

// compareCandidates puts the most advanced VM first; among equals the one with the
// fewest labels, which the fewest other jobs could use, then the oldest.
func compareCandidates(a, b *candidate) int {
	labels := func(c *candidate) int {
		if c.Claim == nil {
			return 0
		}
		return len(c.Claim.Labels)
	}
	return cmp.Or(
		cmp.Compare(b.rank, a.rank),
		cmp.Compare(labels(a), labels(b)),
		a.PlacedAt.Compare(b.PlacedAt),
		cmp.Compare(a.ID, b.ID),
	)
}

// progress ranks VMs by how soon they can run a job; a claim counts for more than a
// state, since its runner is on its way to GitHub.
func progress(v *fleet.VM) int {
	rank := slices.Index(States, v.State)
	if v.Claim != nil {
		rank += len(States)
	}
	return rank
}

func (m *matcher) match(j *job, v *candidate) { j.vm, v.job = v, j }

// bind follows GitHub's own word: the runner that a job names has that job.
func (m *matcher) bind(fleetName string) {
	for _, j := range m.jobs {
		if j.RunnerName == "" || (j.Status != fleet.JobInProgress && j.Status != fleet.JobCompleted) {
			continue
		}
		id, _, ours := fleet.ParseRunnerName(fleetName, j.RunnerName)
		v := m.byVM[id]
		if !ours || v == nil || v.Claim == nil || v.Claim.Runner != j.RunnerName {
			continue
		}
		// Two jobs on one runner cannot be; if records say so, one in progress goes first.
		if v.job == nil || (v.job.Status == fleet.JobCompleted && j.Status == fleet.JobInProgress) {
			m.match(j, v)
		}
	}
}

// keep leaves the matches that are still possible.
func (m *matcher) keep() {
	held := map[fleet.JobID]bool{}
	for _, v := range m.vms {
		if v.job != nil || v.Job == 0 {
			continue
		}
		j := m.byJob[v.Job]
		switch {
		case j == nil:
			if v.State == fleet.VMBusy && !held[v.Job] {
				v.held = v.Job // it has its job; only the job's record is gone
				held[v.Job] = true
			}
		case j.vm != nil:
		case j.Status == fleet.JobInProgress && j.RunnerName == "" && v.Claim != nil:
			m.match(j, v) // running, GitHub has not said where
		case j.class != nil && m.serves(v, j.class) && !v.Destroy && v.Retire == fleet.RetireNone:
			m.match(j, v)
		}
	}
}

// serves reports whether jobs of the class could run on v.
func (m *matcher) serves(v *candidate, c *class) bool {
	if v.Claim == nil {
		return v.Pool == c.pool
	}
	return v.Claim.Scope == c.scope && Takes(v.Claim.Labels, c.labels)
}

// index sorts the free VMs into groups and tells every class its groups.
func (m *matcher) index() {
	groups := map[classKey]*group{}
	for _, v := range m.vms {
		if v.job != nil || v.held != 0 || v.Destroy || v.Retire != fleet.RetireNone {
			continue
		}
		key := classKey{pool: v.Pool}
		if v.Claim != nil {
			key = classKey{scope: v.Claim.Scope, labels: v.Claim.Labels.Key()}
		}
		g := groups[key]
		if g == nil {
			g = &group{claim: v.Claim, pool: v.Pool}
			groups[key] = g
			m.groups = append(m.groups, g)
		}
		g.free = append(g.free, v)
	}
	byLabel := m.classesByLabel()
	byPool := map[fleet.PoolName][]*class{}
	for _, c := range m.classes {
		byPool[c.pool] = append(byPool[c.pool], c)
	}
	for _, g := range m.groups {
		if g.claim == nil {
			for _, c := range byPool[g.pool] {
				c.groups = append(c.groups, g)
			}
			continue
		}
		for _, c := range g.classes(byLabel) {
			c.groups = append(c.groups, g)
		}
	}
}

// classesByLabel files each class under its rarest label, so that a runner looks only
// at classes that share a telling label with it ("self-hosted" is in nearly all).
func (m *matcher) classesByLabel() map[string][]*class {
	count := map[string]int{}
	for _, c := range m.classes {
		for _, l := range c.labels {
			count[l]++
		}
	}
	filed := map[string][]*class{}
	for _, c := range m.classes {
		rarest := "" // a job without labels fits everywhere
		for _, l := range c.labels {
			if rarest == "" || count[l] < count[rarest] {
				rarest = l
			}
		}
		filed[rarest] = append(filed[rarest], c)
	}
	return filed
}

// classes are those that a claimed group could serve.
func (g *group) classes(byLabel map[string][]*class) []*class {
	var found []*class
	see := func(label string) {
		for _, c := range byLabel[label] {
			if g.claim.Scope == c.scope && Takes(g.claim.Labels, c.labels) {
				found = append(found, c)
			}
		}
	}
	see("")
	for _, l := range g.claim.Labels {
		see(l)
	}
	return found
}

// fill gives the oldest unmatched job the most advanced free VM, and so on.
func (m *matcher) fill() {
	for _, j := range m.jobs {
		if j.class == nil || j.vm != nil {
			continue
		}
		if v := j.class.take(); v != nil {
			m.match(j, v)
		}
	}
}

// take removes and returns the most advanced VM that the class can have; nil: none.
func (c *class) take() *candidate {
	c.groups = slices.DeleteFunc(c.groups, func(g *group) bool { return len(g.free) == 0 })
	if len(c.groups) == 0 {
		return nil
	}
	best := slices.MinFunc(c.groups, func(a, b *group) int { return compareCandidates(a.free[0], b.free[0]) })
	v := best.free[0]
	best.free = best.free[1:]
	return v
}

// steal gives claimed VMs that are still idle jobs from unclaimed ones, which become
// free; it reports whether it did.
func (m *matcher) steal() bool {
	byLabel := m.classesByLabel()
	freed := map[fleet.PoolName][]*candidate{}
	for _, g := range m.groups {
		if g.claim == nil || len(g.free) == 0 {
			continue
		}
		for _, c := range g.classes(byLabel) {
			for _, j := range c.jobs {
				if len(g.free) == 0 {
					break
				}
				if j.vm == nil || j.vm.Claim != nil {
					continue
				}
				loser := j.vm
				loser.job = nil
				freed[loser.Pool] = append(freed[loser.Pool], loser)
				m.match(j, g.free[0])
				g.free = g.free[1:]
			}
		}
	}
	for pool, vms := range freed {
		m.release(pool, vms)
	}
	return len(freed) > 0
}

// release makes a group of VMs that lost their jobs, for the classes of their pool.
func (m *matcher) release(pool fleet.PoolName, vms []*candidate) {
	slices.SortFunc(vms, compareCandidates)
	g := &group{pool: pool, free: vms}
	for _, c := range m.classes {
		if c.pool == pool {
			c.groups = append(c.groups, g)
		}
	}
}

func (m *matcher) result() Matching {
	r := Matching{Set: map[fleet.VMID]fleet.JobID{}}
	for _, v := range m.vms {
		matched := v.held
		if v.job != nil {
			matched = v.job.ID
		}
		if matched != v.Job {
			r.Set[v.ID] = matched
		}
		retiring := v.Destroy || v.Retire != fleet.RetireNone
		if matched == 0 && v.State == fleet.VMRegistered && !retiring {
			r.Surplus = append(r.Surplus, v.ID)
		}
	}
	slices.Sort(r.Surplus)
	for _, j := range m.jobs {
		if j.class != nil && j.vm == nil {
			r.Unmet = append(r.Unmet, j.ID)
		}
	}
	return r
}
