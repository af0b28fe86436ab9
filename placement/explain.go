package placement

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
)

// classKey is equal for jobs that are decided alike.
type classKey struct {
	pool    int
	repo    int
	minutes int    // predicted duration, rounded; 0: not known
	refusal string // of jobs without a pool
}

// decision is the index of the record of the job's class, made if it is the first.
func (p *pass) decision(e *entry) (index int, first bool) {
	key := classKey{pool: e.pool, repo: e.repo, minutes: minutes(e.duration)}
	if e.pool < 0 {
		key = classKey{pool: -1, repo: e.repo, refusal: e.refusal.String()}
	}
	if i, known := p.classes[key]; known {
		return i, false
	}
	p.classes[key] = len(p.plan.Decisions)
	fresh := Decision{Class: p.class(e)}
	if e.pool < 0 {
		fresh.Refusals = map[Reason]int{}
	} else {
		p.fill(&p.pools[e.pool])
		fresh.Refusals = p.pools[e.pool].refusals
	}
	p.plan.Decisions = append(p.plan.Decisions, fresh)
	p.owned = append(p.owned, e.pool < 0)
	return len(p.plan.Decisions) - 1, true
}

// minutes rounds a known duration up, so that 0 stays "not known".
func minutes(d time.Duration) int { return int((d + time.Minute - 1) / time.Minute) }

// class names a class for people.
func (p *pass) class(e *entry) string {
	switch {
	case e.pool < 0 && len(e.job.Labels) == 0:
		return e.job.Repository
	case e.pool < 0:
		return e.job.Repository + " on " + strings.Join(e.job.Labels, ", ")
	case e.duration == 0:
		return e.job.Repository + " in pool " + string(p.pools[e.pool].Name)
	default:
		return e.job.Repository + " in pool " + string(p.pools[e.pool].Name) + ", about " + strconv.Itoa(minutes(e.duration)) + "m"
	}
}

// refuse counts a refusal that concerns a job of the decision. The counts of nodes are
// shared by all of the pool's decisions, so they are copied first.
func (p *pass) refuse(decision int, r Reason) {
	d := &p.plan.Decisions[decision]
	if !p.owned[decision] {
		d.Refusals = maps.Clone(d.Refusals)
		p.owned[decision] = true
	}
	d.Refusals[r]++
}

// runnerUp is the best node besides the choice.
func (p *pass) runnerUp(pool *pool, choice *candidate) *Option {
	c, ok := p.best(pool, false)
	if ok && c.node == choice.node {
		c, ok = p.second(pool)
	}
	if !ok {
		return nil
	}
	o := p.option(pool, &c)
	return &o
}

// tabulate weighs every node for the watched job, before it takes its choice.
func (p *pass) tabulate(e *entry, pool *pool) {
	x := &Explanation{Options: make([]Option, 0, len(p.nodes))}
	for i := range p.nodes {
		c := p.consider(pool, i)
		x.Options = append(x.Options, p.option(pool, &c))
	}
	slices.SortFunc(x.Options, compareOptions)
	p.seen = x
}

// explain completes the watched job's explanation.
func (p *pass) explain(e *entry, watched bool, o outcome) {
	if !watched {
		return
	}
	if e.pool < 0 {
		p.seen = &Explanation{}
	} else {
		p.seen.Pool, p.seen.Scope = p.pools[e.pool].Name, e.scope
	}
	x := p.seen
	x.Job, x.Refusal, x.Age, x.Duration, x.Ahead = e.job.ID, e.refusal, e.age, e.duration, p.ahead
	x.Bound, x.Wait = o.bound, o.wait
	if o.found {
		choice := p.option(&p.pools[e.pool], &o.choice)
		x.Choice = &choice
	}
}

// waits says why a job is not bound, in one line for people.
func (p *pass) waits(e *entry, pool *pool, o *outcome) string {
	if !o.found {
		return "no node: " + listRefusals(pool.refusals)
	}
	c := &o.choice
	n := &p.nodes[c.node]
	s, r := &n.slots[c.slot], &n.have[pool.image]
	slot := about(c.wait)
	if c.far() {
		slot += " at the earliest" // what waits before it is not reserved that far
	}
	if c.saved {
		slot += " for a start from its saved state"
	}
	switch {
	case c.image == 0 && s.idle != "" && s.pool != pool.Name:
		return fmt.Sprintf("for the slot on %s of an idle VM of pool %s, free in %s", n.in.ID, s.pool, slot)
	case c.image == 0 && s.idle != "":
		return fmt.Sprintf("for the idle VM %s of its own pool on %s", s.idle, n.in.ID)
	case c.image == 0 && s.unknown && pool.cheapest > 0 && e.age < pool.cheapest:
		return fmt.Sprintf("for a warm slot on %s until %s old, as long as a pull takes: nobody knows when it is free",
			n.in.ID, about(pool.cheapest))
	case c.image == 0 && s.unknown:
		return fmt.Sprintf("for a slot on %s: nobody knows when it is free", n.in.ID)
	case c.image == 0 && pool.cheapest > 0:
		return fmt.Sprintf("for a warm slot on %s, free in %s; a cold pull would take %s", n.in.ID, slot, about(pool.cheapest))
	case c.image == 0:
		return fmt.Sprintf("for a slot on %s, free in %s", n.in.ID, slot)
	case c.early() && c.newPull:
		return fmt.Sprintf("for a slot on %s, free in %s; its image is pulled nearer the time", n.in.ID, slot)
	case c.wait > c.image:
		return fmt.Sprintf("for a slot on %s, free in %s; its image is pulled meanwhile", n.in.ID, slot)
	case r.delay > 0:
		return fmt.Sprintf("for its image on %s: the last pull failed and is tried again in %s", n.in.ID, about(r.delay))
	case r.presence == moving:
		return fmt.Sprintf("for its image on %s: %s left, ready in %s", n.in.ID, size(r.left), about(c.image))
	default:
		return fmt.Sprintf("for its image on %s: %s to pull, ready in %s", n.in.ID, size(r.left), about(c.image))
	}
}

// listRefusals counts refusals in words, most frequent first.
func listRefusals(counts map[Reason]int) string {
	if len(counts) == 0 {
		return "there are no nodes"
	}
	reasons := make([]Reason, 0, len(counts))
	for r := range counts {
		reasons = append(reasons, r)
	}
	slices.SortFunc(reasons, func(a, b Reason) int {
		return cmp.Or(cmp.Compare(counts[b], counts[a]), cmp.Compare(a, b))
	})
	var parts []string
	for _, r := range reasons {
		parts = append(parts, fmt.Sprintf("%d × %s", counts[r], r.Words()))
	}
	return strings.Join(parts, ", ")
}

// about is a predicted time without false precision: whole seconds.
func about(d time.Duration) string { return "about " + d.Round(time.Second).String() }

// size is bytes for people.
func size(bytes int64) string { return fmt.Sprintf("%.1f GB", float64(bytes)/1e9) }
