package controller

import (
	"maps"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// spot is a pool on one node; on node "": the pool everywhere.
type spot struct {
	pool fleet.PoolName
	node fleet.NodeID
}

// record is how VMs have fared of late, as far as they are still shown.
type record struct {
	lastWarm   time.Time
	lastFailed time.Time
	failures   int // since lastWarm
}

// backOff is until when no VM is to be placed: 1 s after the first failure in a row,
// then 2 s, 4 s … up to 5 min, so that what is broken does not keep a node busy booting it.
func (r record) backOff() time.Time {
	if r.failures == 0 {
		return time.Time{}
	}
	return r.lastFailed.Add(min(time.Second<<min(r.failures-1, 10), 5*time.Minute))
}

// failing says where VMs have failed one after the other and are not to be tried yet.
type failing struct {
	on    map[fleet.NodeID]map[fleet.PoolName]bool // pools that leave one node alone
	pools map[fleet.PoolName]time.Time             // until when a pool leaves every node alone
}

// failing counts failures by pool and node: one broken Mac must not hold back a pool
// that runs well elsewhere. Where the pool's VMs failed on every node that may take
// them, it is the pool that is broken: then all its failures count together, so that a
// large fleet does not boot a bad image once for each of its nodes again and again.
func (c *Controller) failing(p *pass) failing {
	records := p.records()
	f := failing{on: map[fleet.NodeID]map[fleet.PoolName]bool{}, pools: map[fleet.PoolName]time.Time{}}
	for at, r := range records {
		if at.node == "" || !p.now.Before(r.backOff()) {
			continue
		}
		if f.on[at.node] == nil {
			f.on[at.node] = map[fleet.PoolName]bool{}
		}
		f.on[at.node][at.pool] = true
	}
	for i := range c.c.Pools {
		pool := &c.c.Pools[i]
		until := records[spot{pool.Name, ""}].backOff()
		if p.now.Before(until) && p.failedEverywhere(pool, records) {
			f.pools[pool.Name] = until
		}
	}
	return f
}

// records tallies the VMs that are shown.
func (p *pass) records() map[spot]record {
	records := map[spot]record{}
	each := func(vm *fleet.VM, note func(*record)) {
		for _, at := range []spot{{vm.Pool, vm.Node}, {vm.Pool, ""}} {
			r := records[at]
			note(&r)
			records[at] = r
		}
	}
	for _, vm := range p.view.VMs {
		if !vm.WarmAt.IsZero() {
			each(vm, func(r *record) { r.lastWarm = later(r.lastWarm, vm.WarmAt) })
		}
	}
	for _, vm := range p.view.VMs {
		if !vm.Failed {
			continue
		}
		each(vm, func(r *record) {
			if !vm.DoneAt.Before(r.lastWarm) {
				r.failures++
				r.lastFailed = later(r.lastFailed, vm.DoneAt)
			}
		})
	}
	return records
}

// failedEverywhere: no node that may take the pool's VMs is without a failure of theirs.
func (p *pass) failedEverywhere(pool *fleet.Pool, records map[spot]record) bool {
	for id, node := range p.view.Nodes {
		able := p.reachable(id) && !node.Cordoned && node.Slots > 0 && pool.Nodes.Matches(node)
		if able && records[spot{pool.Name, id}].failures == 0 {
			return false
		}
	}
	return true
}

// at are the pools that leave the node alone; nil: none.
func (f failing) at(node fleet.NodeID) map[fleet.PoolName]bool {
	if len(f.pools) == 0 {
		return f.on[node]
	}
	pools := maps.Clone(f.on[node])
	if pools == nil {
		pools = map[fleet.PoolName]bool{}
	}
	for pool := range f.pools {
		pools[pool] = true
	}
	return pools
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}
