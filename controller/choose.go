package controller

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/placement"
	"github.com/paddock-ci/paddock/store"
)

// choose asks placement for a plan and writes it: VMs first, since a job waits for each,
// then what the nodes are to hold, then surplus runners to retire.
func (c *Controller) choose(ctx context.Context, p *pass) error {
	plan := placement.Make(c.snapshot(p))
	for _, b := range plan.Bind {
		if err := c.place(ctx, p, b); err != nil {
			return err
		}
	}
	for _, id := range plan.Evacuate {
		vm, found := p.vms[id]
		if !found || p.written[id] {
			continue
		}
		vm.Destroy, vm.Reason = true, "its slot is needed by a job of another pool"
		if _, err := c.write(ctx, p, vm, fleet.Event{Kind: "vm.destroying", Text: vm.Reason}); err != nil {
			return err
		}
	}
	if err := c.order(ctx, p, plan); err != nil {
		return err
	}
	return c.retireSurplus(ctx, p)
}

// snapshot is the store's view as placement wants it.
func (c *Controller) snapshot(p *pass) placement.Snapshot {
	s := placement.Snapshot{
		Now: p.now, Images: map[string]fleet.Image{}, Running: map[string]int{},
		Durations: c.predict, Demand: c.demand(p.view, p.now),
	}
	s.Pools = append(s.Pools, c.c.Pools...)
	for _, id := range p.unmet {
		if !c.isDoubted(id) {
			s.Jobs = append(s.Jobs, *p.view.Jobs[id])
		}
	}
	for ref, image := range p.view.Images {
		s.Images[ref] = *image
	}
	slots, failures := map[fleet.NodeID][]placement.Slot{}, map[fleet.NodeID]int{}
	for _, vm := range p.vms {
		if vm.Failed && p.now.Sub(vm.DoneAt) < doneKept {
			failures[vm.Node]++
		}
		if vm.State.Final() {
			continue
		}
		slots[vm.Node] = append(slots[vm.Node], c.slot(p, vm))
		if job := p.view.Jobs[vm.Job]; job != nil {
			s.Running[job.Repository]++
		}
	}
	failing := c.failing(p)
	for id, node := range p.view.Nodes {
		n := placement.Node{Node: *node, Reachable: p.reachable(id), Slots: slots[id], Failures: failures[id], Failing: failing.at(id)}
		if orders := p.view.Orders[id]; orders != nil {
			n.Hold, n.Evict, n.Recalled = orders.Hold, orders.Evict, placement.InDoubt(orders, node)
		}
		slices.SortFunc(n.Slots, func(a, b placement.Slot) int { return cmp.Compare(a.VM, b.VM) })
		s.Nodes = append(s.Nodes, n)
	}
	slices.SortFunc(s.Nodes, func(a, b placement.Node) int { return cmp.Compare(a.ID, b.ID) })
	return s
}

// slot is a VM as placement sees it: when it ends, as far as its job's history tells.
func (c *Controller) slot(p *pass, vm fleet.VM) placement.Slot {
	slot := placement.Slot{VM: vm.ID, Pool: vm.Pool, Image: vm.Image, State: vm.State, Job: vm.Job}
	slot.Idle = vm.State == fleet.VMWarm && vm.Claim == nil && vm.Job == 0 && !vm.Destroy && !p.written[vm.ID]
	job := p.view.Jobs[vm.Job]
	if vm.Destroy {
		slot.Ends = p.now.Add(time.Second)
	} else if job != nil {
		if lasts, known := c.predict(job.Repository, job.Name); known {
			began := vm.BusyAt
			if began.IsZero() {
				began = p.now
			}
			slot.Ends = began.Add(lasts)
		}
	}
	return slot
}

// place writes a new VM. Whoever is first wins: the revision 0 says that no such VM exists.
func (c *Controller) place(ctx context.Context, p *pass, b placement.Binding) error {
	vm := fleet.VM{
		ID: fleet.NewVMID(), Node: b.Node, Pool: b.Pool, Image: b.Image, State: fleet.VMPlaced,
		Job: b.Job, Cold: b.Cold, PlacedAt: p.now,
	}
	e := fleet.Event{Kind: "vm.placed", Image: b.Image, Text: fmt.Sprintf("on %s, image %s %s", b.Node, b.Image.Short(), warmth(b.Cold))}
	var queued []fleet.JobID
	if b.Job != 0 {
		queued = []fleet.JobID{b.Job}
	}
	done, err := c.write(ctx, p, vm, e, queued...)
	if done {
		c.metrics.placed.WithLabelValues(string(b.Pool), warmth(b.Cold)).Inc()
	}
	return err
}

func warmth(cold bool) string {
	if cold {
		return "cold"
	}
	return "warm"
}

// order writes what each node is to hold and may let go. A pull that has begun stays
// ordered while a job needs its image, even if this pass would choose another node: a
// late change of mind would pull twice.
func (c *Controller) order(ctx context.Context, p *pass, plan placement.Plan) error {
	wanted := map[fleet.NodeID]*fleet.Orders{}
	for id := range p.view.Nodes {
		wanted[id] = &fleet.Orders{Node: id}
	}
	for _, h := range plan.Hold {
		o := wanted[h.Node]
		o.Hold = append(o.Hold, fleet.Hold{Digest: h.Digest, Ref: h.Ref, Priority: h.Priority, Demand: h.Demand, Why: h.Why})
	}
	evicted := evictions{}
	for _, e := range plan.Evict {
		wanted[e.Node].Evict = append(wanted[e.Node].Evict, e.Digest)
		evicted[residence{e.Node, e.Digest}] = e.Why
	}
	needed := c.neededImages(p)
	for id, next := range wanted {
		before := &fleet.Orders{}
		if standing := p.view.Orders[id]; standing != nil {
			before = standing
		}
		next.Rev, next.Recalled = before.Rev, placement.Recall(before, p.view.Nodes[id], next.Evict)
		for _, h := range before.Hold {
			next.Hold = keepHold(next.Hold, h, p.view.Nodes[id], needed)
		}
		if slices.EqualFunc(next.Hold, before.Hold, sameHold) && slices.Equal(next.Evict, before.Evict) && slices.Equal(next.Recalled, before.Recalled) {
			continue
		}
		err := c.c.Store.Commit(ctx, store.Txn{Term: &p.term, Orders: []fleet.Orders{*next}, Events: orderEvents(p, before, next, evicted)})
		if err != nil && !errors.Is(err, store.ErrConflict) {
			return err
		}
	}
	return nil
}

// neededImages are the digests that queued jobs wait for.
func (c *Controller) neededImages(p *pass) map[fleet.Digest]bool {
	needed := map[fleet.Digest]bool{}
	for _, id := range p.unmet {
		pool, _, refusal := placement.PoolFor(c.c.Pools, *p.view.Jobs[id])
		if image := p.view.Images[pool.Image]; !refusal.Refused() && image != nil {
			needed[image.Digest] = true
		}
	}
	return needed
}

// keepHold adds a standing order to holds if its pull has begun and a job still needs the
// image. What the plan wants it repeats by itself.
func keepHold(holds []fleet.Hold, standing fleet.Hold, node *fleet.Node, needed map[fleet.Digest]bool) []fleet.Hold {
	image, begun := node.Image(standing.Digest)
	if !begun || image.State == fleet.ImageReady || !needed[standing.Digest] {
		return holds
	}
	if slices.ContainsFunc(holds, func(h fleet.Hold) bool { return h.Digest == standing.Digest }) {
		return holds
	}
	return append(holds, standing)
}

// sameHold ignores Why, which may name another job each time.
func sameHold(a, b fleet.Hold) bool {
	return a.Digest == b.Digest && a.Demand == b.Demand && a.Priority == b.Priority
}

// orderEvents tells what is new in a node's orders.
func orderEvents(p *pass, before, next *fleet.Orders, evicted evictions) []fleet.Event {
	var events []fleet.Event
	for _, h := range next.Hold {
		if !slices.ContainsFunc(before.Hold, func(b fleet.Hold) bool { return b.Digest == h.Digest }) {
			events = append(events, fleet.Event{At: p.now, Kind: "image.ordered", Node: next.Node, Image: h.Digest, Actor: "leader", Text: h.Why})
		}
	}
	return append(events, evicted.events(p, before, next)...)
}

// retireSurplus retires registered runners that no queued job could go to, once they
// had a moment to be matched: GitHub may be about to tell of the job they took.
func (c *Controller) retireSurplus(ctx context.Context, p *pass) error {
	const moment = 10 * time.Second // webhooks of a taken job arrive within a few seconds
	for _, id := range p.surplus {
		vm, found := p.vms[id]
		if !found || p.written[id] || vm.State != fleet.VMRegistered || vm.Retire != fleet.RetireNone || p.now.Sub(vm.RegisteredAt) < moment || c.isBusy(id, p.now) {
			continue
		}
		vm.Retire, vm.Reason = fleet.RetireDestroy, "no queued job is left for its runner"
		if _, err := c.write(ctx, p, vm, fleet.Event{Kind: "vm.retiring", Text: vm.Reason}); err != nil {
			return err
		}
	}
	return nil
}
