package controller

import (
	"context"
	"fmt"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/placement"
	"github.com/paddock-ci/paddock/runner"
)

// match brings VM.Job up to date with what GitHub says and what is queued. A match is
// provisional until in_progress names the runner. VMs on unreachable nodes keep their
// state but get nothing new, and a queued job counts on them no more.
func (c *Controller) match(ctx context.Context, p *pass) error {
	if err := c.releaseUnreachable(ctx, p); err != nil {
		return err
	}
	vms := make([]*fleet.VM, 0, len(p.vms))
	for _, vm := range p.untouched() {
		if !vm.State.Final() && (p.reachable(vm.Node) || vm.State == fleet.VMBusy) {
			vms = append(vms, &vm)
		}
	}
	matching := runner.Match(append(c.ended(p, vms), p.jobs...), vms, c.poolOf(p.now), c.c.Fleet)
	p.unmet, p.surplus = matching.Unmet, matching.Surplus
	for _, vm := range vms {
		job, changed := matching.Set[vm.ID]
		if !changed {
			continue
		}
		next, e := *vm, fleet.Event{Kind: "vm.matched", Job: job, Text: fmt.Sprintf("VM %s is meant for job %d", vm.ID, job)}
		if job == 0 {
			e = fleet.Event{Kind: "vm.released", Job: vm.Job, Text: fmt.Sprintf("VM %s is free of job %d", vm.ID, vm.Job)}
		}
		next.Job = job
		if _, err := c.write(ctx, p, next, e); err != nil {
			return err
		}
	}
	return nil
}

// releaseUnreachable takes queued jobs from claimed VMs whose nodes are silent. Such a
// job's unit of demand is held by its claimed VM; while a dead Mac's VM has it, no other
// VM can be claimed for the job, however warm it stands.
func (c *Controller) releaseUnreachable(ctx context.Context, p *pass) error {
	for _, vm := range p.untouched() {
		if vm.Job == 0 || vm.Claim == nil || vm.State.Final() || vm.State == fleet.VMBusy || p.reachable(vm.Node) {
			continue
		}
		if job := p.view.Jobs[vm.Job]; job != nil && job.Status != fleet.JobQueued {
			continue // GitHub says that it runs or is over: it may well be there
		}
		e := fleet.Event{Kind: "vm.released", Job: vm.Job, Text: fmt.Sprintf("node %s is silent: job %d goes elsewhere", vm.Node, vm.Job)}
		vm.Job = 0
		if _, err := c.write(ctx, p, vm, e); err != nil {
			return err
		}
	}
	return nil
}

// ended are the completed jobs that ran in VMs which live on. GitHub may say that a job
// is completed before its node says that the runner was busy at all: such a VM has had
// its job, is no other job's, and no surplus either.
func (c *Controller) ended(p *pass, vms []*fleet.VM) []*fleet.Job {
	runners := map[string]bool{}
	for _, vm := range vms {
		if vm.Claim != nil {
			runners[vm.Claim.Runner] = true
		}
	}
	var jobs []*fleet.Job
	if len(runners) == 0 {
		return nil
	}
	for _, job := range p.view.Jobs {
		if job.Status == fleet.JobCompleted && runners[job.RunnerName] {
			jobs = append(jobs, job)
		}
	}
	return jobs
}

// poolOf finds the pool and scope whose VMs may take a job; none where GitHub refuses
// runners at the time now.
func (c *Controller) poolOf(now time.Time) runner.PoolOf {
	return func(j *fleet.Job) (fleet.PoolName, fleet.Scope, bool) {
		pool, scope, refusal := placement.PoolFor(c.c.Pools, *j)
		if refusal.Refused() {
			return "", "", false
		}
		_, barred := c.isBarred(place{scope, pool.RunnerGroup()}, now)
		return pool.Name, scope, !barred
	}
}

// claim writes the intent to register a runner in each warm VM that a queued job is
// matched with. Intent, VM revision and the job's being queued are one script: a unit
// of demand is taken once, whatever else happens. Errands asks GitHub.
func (c *Controller) claim(ctx context.Context, p *pass) error {
	for _, vm := range p.untouched() {
		if vm.State != fleet.VMWarm || vm.Claim != nil || vm.Job == 0 || vm.Destroy || vm.Retire != fleet.RetireNone || !p.reachable(vm.Node) {
			continue
		}
		job := p.view.Jobs[vm.Job]
		if job == nil || job.Status != fleet.JobQueued {
			continue
		}
		pool, scope, refusal := placement.PoolFor(c.c.Pools, *job)
		if refusal.Refused() || pool.Name != vm.Pool {
			continue
		}
		vm.Attempt++
		vm.Claim = &fleet.Claim{
			Scope: scope, Group: pool.RunnerGroup(), Labels: job.Labels,
			Runner: fleet.RunnerName(c.c.Fleet, vm.ID, vm.Attempt), Epoch: p.term.Epoch, At: p.now,
		}
		e := fleet.Event{Kind: "runner.claimed", Text: fmt.Sprintf("runner %s is to be registered at %s", vm.Claim.Runner, scope)}
		if _, err := c.write(ctx, p, vm, e, job.ID); err != nil {
			return err
		}
	}
	return nil
}
