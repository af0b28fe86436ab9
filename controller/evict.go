package controller

import (
	"context"
	"slices"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/placement"
	"github.com/paddock-ci/paddock/runner"
)

// residence is an image on a node.
type residence struct {
	node  fleet.NodeID
	image fleet.Digest
}

// evictions are those of a plan, with why in words.
type evictions map[residence]string

// events tell which images a node is to let go from now on, and which not any more though
// it still has them.
func (e evictions) events(p *pass, before, next *fleet.Orders) []fleet.Event {
	var events []fleet.Event
	tell := func(kind string, d fleet.Digest, text string) {
		events = append(events, fleet.Event{At: p.now, Kind: kind, Node: next.Node, Image: d, Actor: "leader", Text: text})
	}
	for _, d := range next.Evict {
		if !slices.Contains(before.Evict, d) {
			tell("image.evicting", d, e[residence{next.Node, d}])
		}
	}
	for _, d := range next.Recalled {
		switch {
		case slices.Contains(before.Recalled, d):
		case !p.reachable(next.Node):
			tell("image.recalled", d, "it was to be let go, and the node is silent")
		default:
			tell("image.recalled", d, "it was to be let go, and is in use or needed by now")
		}
	}
	return events
}

// Evictions says which images would leave a node ("": every node), in which order, and
// why the others stay; with free > 0, if so many bytes had to be free there. It looks at a
// fresh view, by the same functions that decide. Any replica can answer.
func (c *Controller) Evictions(ctx context.Context, node fleet.NodeID, free int64) ([]placement.NodeEvictions, error) {
	view, err := c.c.Store.View(ctx)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	p := &pass{now: now, view: view, jobs: view.OpenJobs(), vms: map[fleet.VMID]fleet.VM{}, written: map[fleet.VMID]bool{}}
	var vms []*fleet.VM
	for id, vm := range view.VMs {
		p.vms[id] = *vm
		if !vm.State.Final() && p.reachable(vm.Node) {
			vms = append(vms, vm)
		}
	}
	p.unmet = runner.Match(p.jobs, vms, c.poolOf(now), c.c.Fleet).Unmet
	return placement.Evictions(c.snapshot(p), node, free), nil
}
