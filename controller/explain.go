package controller

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/placement"
	"github.com/paddock-ci/paddock/runner"
)

// ErrNoJob: the store knows no such job.
var ErrNoJob = errors.New("no such job")

// Explain says why a job waits, or what serves it, from a fresh view and by the same
// functions that decide. Any replica can answer.
func (c *Controller) Explain(ctx context.Context, id fleet.JobID) (placement.Explanation, error) {
	return c.explain(ctx, time.Now(), id)
}

// explain is Explain at the time now.
func (c *Controller) explain(ctx context.Context, now time.Time, id fleet.JobID) (placement.Explanation, error) {
	view, err := c.c.Store.View(ctx)
	if err != nil {
		return placement.Explanation{}, err
	}
	job := view.Jobs[id]
	if job == nil {
		return placement.Explanation{}, fmt.Errorf("%w: %d (hint: `paddock job list` shows those of the last hour)", ErrNoJob, id)
	}
	p := &pass{now: now, view: view, jobs: view.OpenJobs(), vms: map[fleet.VMID]fleet.VM{}, written: map[fleet.VMID]bool{}}
	var vms []*fleet.VM
	for vmID, vm := range view.VMs {
		p.vms[vmID] = *vm
		if !vm.State.Final() && p.reachable(vm.Node) {
			vms = append(vms, vm)
		}
	}
	if vm := p.serving(job); vm != nil {
		return c.served(p, job, vm), nil
	}
	if said := settledWord(job); said != "" {
		return placement.Explanation{Job: id, Age: p.now.Sub(job.CreatedAt), Wait: said}, nil
	}
	pool, scope, refusal := placement.PoolFor(c.c.Pools, *job)
	if refusal.Refused() { // Match leaves it out, as none of ours
		return placement.Explanation{Job: id, Age: p.now.Sub(job.CreatedAt), Refusal: refusal}, nil
	}
	if said, barred := c.isBarred(place{scope, pool.RunnerGroup()}, now); barred {
		return placement.Explanation{Job: id, Pool: pool.Name, Scope: scope, Age: p.now.Sub(job.CreatedAt), Wait: said}, nil
	}
	if c.isDoubted(id) {
		said := "its runner waited in vain; GitHub is being asked whether the job is still queued"
		return placement.Explanation{Job: id, Pool: pool.Name, Scope: scope, Age: p.now.Sub(job.CreatedAt), Wait: said}, nil
	}
	if until, failing := c.failing(p).pools[pool.Name]; failing {
		said := fmt.Sprintf("VMs of pool %s failed on every node; the next try is at %s", pool.Name, until.Format(time.TimeOnly))
		return placement.Explanation{Job: id, Pool: pool.Name, Age: p.now.Sub(job.CreatedAt), Wait: said}, nil
	}
	p.unmet = runner.Match(p.jobs, vms, c.poolOf(now), c.c.Fleet).Unmet
	explanation, found := placement.Explain(c.snapshot(p), id)
	if !found {
		return placement.Explanation{Job: id, Age: p.now.Sub(job.CreatedAt), Wait: "a VM that is coming up will take it"}, nil
	}
	if explanation.Refusal.Reason == placement.ReasonUnresolved {
		explanation.Wait = c.whyUnresolved(pool.Image)
	}
	return explanation, nil
}

// serving is the VM that the job has the best hope of: on a node that reports, and the
// most advanced of those. A queued job hopes for none on a silent node. Nil: there is none.
func (p *pass) serving(job *fleet.Job) *fleet.VM {
	rank := func(vm *fleet.VM) int {
		rank := slices.Index(runner.States, vm.State)
		if vm.Claim != nil {
			rank += len(runner.States)
		}
		if p.reachable(vm.Node) {
			rank += 2 * len(runner.States)
		}
		return rank
	}
	var best *fleet.VM
	for _, vm := range p.view.VMs {
		queued := job.Status == fleet.JobQueued && vm.State != fleet.VMBusy
		if vm.Job != job.ID || vm.State.Final() || queued && !p.reachable(vm.Node) {
			continue
		}
		if best == nil || rank(vm) > rank(best) {
			best = vm
		}
	}
	return best
}

// served tells how far the job's VM is.
func (c *Controller) served(p *pass, job *fleet.Job, vm *fleet.VM) placement.Explanation {
	said := map[fleet.VMState]string{
		fleet.VMPlaced:     "VM %s is placed on %s, which has not begun yet",
		fleet.VMBooting:    "VM %s is booting on %s",
		fleet.VMWarm:       "VM %s is warm on %s; its runner is being registered",
		fleet.VMRegistered: "the runner in VM %s on %s is registered; GitHub gives it the job next",
		fleet.VMBusy:       "VM %s on %s runs it",
	}[vm.State]
	wait := fmt.Sprintf(said, vm.ID, vm.Node)
	if vm.State != fleet.VMWarm || vm.Claim == nil {
		return placement.Explanation{Job: job.ID, Pool: vm.Pool, Age: p.now.Sub(job.CreatedAt), Bound: true, Wait: wait}
	}
	if until := c.limitedUntil(vm.Claim.Scope); p.now.Before(until) {
		wait = fmt.Sprintf("VM %s is warm on %s; GitHub's rate limit holds its runner back until %s", vm.ID, vm.Node, until.Format(time.TimeOnly))
	}
	return placement.Explanation{Job: job.ID, Pool: vm.Pool, Age: p.now.Sub(job.CreatedAt), Bound: true, Wait: wait}
}

// settledWord speaks of jobs that ask for nothing.
func settledWord(job *fleet.Job) string {
	switch job.Status {
	case fleet.JobWaiting:
		return "GitHub holds it back: an approval or a deployment gate is pending"
	case fleet.JobInProgress:
		return fmt.Sprintf("runner %q runs it", job.RunnerName)
	case fleet.JobCompleted:
		return "it is completed: " + job.Conclusion
	case fleet.JobQueued:
	}
	return ""
}
