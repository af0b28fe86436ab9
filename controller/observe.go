package controller

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/runner"
	"github.com/paddock-ci/paddock/store"
)

// pass is what one Step knows and has written so far. A VM that was written is in vms
// as it is now, but is left alone by the later acts: its revision is the store's.
type pass struct {
	now     time.Time
	term    store.Term
	view    *store.View
	vms     map[fleet.VMID]fleet.VM
	written map[fleet.VMID]bool
	jobs    []*fleet.Job // open, oldest first
	settled bool
	unmet   []fleet.JobID
	surplus []fleet.VMID
}

// observe reads the store. A new incarnation is settled once every node known from the
// ledger or from before has reported, or two sync periods have passed: until then an
// absent VM may only be one whose node has not spoken yet.
func (c *Controller) observe(ctx context.Context, term store.Term, now time.Time) (*pass, error) {
	view, err := c.c.Store.View(ctx)
	if err != nil {
		return nil, err
	}
	if view.Incarnation != term.Incarnation {
		return nil, fmt.Errorf("%w: the store was emptied since the lease was taken", store.ErrFenced)
	}
	p := &pass{now: now, term: term, view: view, jobs: view.OpenJobs(), vms: make(map[fleet.VMID]fleet.VM, len(view.VMs)), written: map[fleet.VMID]bool{}}
	for id, vm := range view.VMs {
		p.vms[id] = *vm
	}
	if !c.hasSettled(view.Incarnation) {
		missing, err := c.missing(ctx, view)
		if err != nil {
			return nil, err
		}
		if len(missing) > 0 && now.Sub(view.Born) < settleAtMost {
			c.c.Log.Debug("a new incarnation waits for its nodes", "missing", len(missing))
			return p, nil
		}
		c.mu.Lock()
		c.settled = view.Incarnation
		c.mu.Unlock()
		c.c.Log.Info("incarnation settled", "incarnation", view.Incarnation, "nodes", len(view.Nodes), "silent", len(missing))
	}
	clear(c.known) // a node that was removed is not waited for again
	for id := range view.Nodes {
		c.known[id] = true
	}
	p.settled = true
	c.observeMetrics(p)
	return p, nil
}

// hasSettled reports whether the nodes have had their time to report in the incarnation.
func (c *Controller) hasSettled(incarnation string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.settled == incarnation
}

// missing lists the nodes that are known but have not reported in this incarnation.
func (c *Controller) missing(ctx context.Context, view *store.View) ([]fleet.NodeID, error) {
	ledger, err := c.c.Store.ReadLedger(ctx)
	if err != nil {
		return nil, fmt.Errorf("read the ledger: %w", err)
	}
	var missing []fleet.NodeID
	for id := range ledger.Nodes {
		c.known[id] = true
	}
	for id := range c.known {
		if view.Nodes[id] == nil {
			missing = append(missing, id)
		}
	}
	return missing, nil
}

// reachable: the node reported of late.
func (p *pass) reachable(id fleet.NodeID) bool {
	node := p.view.Nodes[id]
	return node != nil && p.now.Sub(node.SeenAt) < unreachableAfter
}

// write commits one VM, fenced, with what happened for people to read. A VM that its
// node moved meanwhile (ErrConflict) is left to the next pass, and so is a claim whose
// job is gone.
func (c *Controller) write(ctx context.Context, p *pass, vm fleet.VM, e fleet.Event, queued ...fleet.JobID) (bool, error) {
	e.At, e.VM, e.Node, e.Actor = p.now, vm.ID, vm.Node, "leader"
	if e.Job == 0 {
		e.Job = vm.Job
	}
	txn := store.Txn{Term: &p.term, VMs: []fleet.VM{vm}, Queued: queued}
	if e.Kind != "" {
		txn.Events = []fleet.Event{e}
	}
	err := c.c.Store.Commit(ctx, txn)
	if errors.Is(err, store.ErrConflict) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	p.vms[vm.ID], p.written[vm.ID] = vm, true
	if e.Kind != "" {
		c.c.Log.Info("decided", "event", e.Kind, "vm", vm.ID, "node", vm.Node, "pool", vm.Pool, "job", e.Job, "reason", e.Text)
	}
	return true, nil
}

// untouched returns the VMs that this pass has not written, by id, so that two passes
// over equal stores act alike.
func (p *pass) untouched() []fleet.VM {
	ids := make([]fleet.VMID, 0, len(p.vms))
	for id := range p.vms {
		if !p.written[id] {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	vms := make([]fleet.VM, len(ids))
	for i, id := range ids {
		vms[i] = p.vms[id]
	}
	return vms
}

// notice gives up on VMs whose node is silent for 15 minutes and on those over the
// deadline of their phase. It asks nothing of GitHub: a VM with a runner is marked for
// retiring, and Errands has GitHub say first whether the runner is busy.
func (c *Controller) notice(ctx context.Context, p *pass) error {
	for _, vm := range p.untouched() {
		if vm.State.Final() || vm.Retire != fleet.RetireNone || c.isBusy(vm.ID, p.now) {
			continue
		}
		e, changed := c.overdue(p, &vm)
		if !changed {
			continue
		}
		if _, err := c.write(ctx, p, vm, e); err != nil {
			return err
		}
		c.doubtJob(p, vm)
	}
	return nil
}

// overdue marks vm if its node or its phase has run out of time.
func (c *Controller) overdue(p *pass, vm *fleet.VM) (fleet.Event, bool) {
	if silent := p.silence(vm); silent >= lostAfter {
		vm.Retire, vm.Reason = fleet.RetireLose, fmt.Sprintf("node %s is silent for %s", vm.Node, silent.Round(time.Second))
		return fleet.Event{Kind: "vm.retiring", Text: vm.Reason}, true
	}
	if vm.Destroy || !p.reachable(vm.Node) {
		return fleet.Event{}, false
	}
	at, what := runner.Deadline(*vm, c.deadlines(vm.Pool))
	if at.IsZero() || p.now.Before(at) {
		return fleet.Event{}, false
	}
	// A warm VM that a pool keeps ready is not idle by accident, and one that a job is
	// matched with is about to be claimed. Neither lives longer than others: a job that
	// took it at its end would be cut off.
	if what == "warm" && (vm.Job != 0 || c.keptReady(p, vm.Pool)) {
		return fleet.Event{}, false
	}
	vm.Reason = fmt.Sprintf("over its %s deadline", what)
	// The maximum lifetime ends even a busy VM; its node has the same deadline.
	if vm.Claim == nil || vm.State == fleet.VMBusy {
		vm.Destroy = true
		return fleet.Event{Kind: "vm.destroying", Text: vm.Reason}, true
	}
	vm.Retire = fleet.RetireDestroy
	return fleet.Event{Kind: "vm.retiring", Text: vm.Reason}, true
}

// silence is how long the VM's node has said nothing. A node that this incarnation
// never heard of counts from the incarnation's birth, a younger VM from its placing.
func (p *pass) silence(vm *fleet.VM) time.Duration {
	heard := p.view.Born
	if node := p.view.Nodes[vm.Node]; node != nil {
		heard = node.SeenAt
	}
	if vm.PlacedAt.After(heard) {
		heard = vm.PlacedAt
	}
	return p.now.Sub(heard)
}

func (c *Controller) deadlines(pool fleet.PoolName) fleet.Deadlines {
	if p := c.pool(pool); p != nil {
		return p.Deadlines.WithDefaults()
	}
	return fleet.Deadlines{}.WithDefaults()
}

func (c *Controller) pool(name fleet.PoolName) *fleet.Pool {
	for i := range c.c.Pools {
		if c.c.Pools[i].Name == name {
			return &c.c.Pools[i]
		}
	}
	return nil
}

// keptReady: the pool has no more idle warm VMs than it keeps ready.
func (c *Controller) keptReady(p *pass, name fleet.PoolName) bool {
	pool := c.pool(name)
	if pool == nil {
		return false
	}
	idle := 0
	for _, vm := range p.vms {
		if vm.Pool == name && vm.State == fleet.VMWarm && vm.Claim == nil && vm.Job == 0 && !vm.Destroy {
			idle++
		}
	}
	return idle <= pool.MinIdle
}
