package controller

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
)

// sweep learns from completed jobs and drops records that have served: VMs done long
// enough with nothing left at GitHub, completed jobs, old tombstones.
func (c *Controller) sweep(ctx context.Context, p *pass) error {
	txn := store.Txn{Term: &p.term, Quiet: true}
	for _, vm := range p.untouched() {
		if vm.State.Final() && vm.Claim == nil && !p.awaited(vm) && p.now.Sub(vm.DoneAt) > doneKept {
			txn.DropVMs = append(txn.DropVMs, vm.ID)
		}
	}
	needed := p.referred(txn.DropVMs)
	var completed []*fleet.Job
	for _, job := range p.view.Jobs {
		if job.Status == fleet.JobCompleted {
			completed = append(completed, job)
			c.learn(job)
		}
	}
	slices.SortFunc(completed, func(a, b *fleet.Job) int {
		return cmp.Or(overSince(b).Compare(overSince(a)), cmp.Compare(b.ID, a.ID))
	})
	for i, job := range completed {
		if !needed.has(job) && (i >= jobsKept || p.now.Sub(overSince(job)) > jobKept) {
			txn.DropJobs = append(txn.DropJobs, job.ID)
			delete(c.learned, job.ID)
		}
	}
	if len(txn.DropVMs)+len(txn.DropJobs) > 0 {
		if err := c.c.Store.Commit(ctx, txn); err != nil && !errors.Is(err, store.ErrConflict) {
			return err
		}
	}
	if p.now.Sub(c.sweptAt) < sweepEvery {
		return nil
	}
	c.sweptAt = p.now
	if _, err := c.c.Store.SweepChunks(ctx, store.UsualChunks); err != nil {
		return err
	}
	_, err := c.c.Store.SweepTombstones(ctx, p.term, p.now.Add(-tombstoneKept))
	return err
}

// overSince is the time from which a completed job is kept for a while. GitHub's own
// completed_at is null at times, and long past for a job that was recovered late.
func overSince(job *fleet.Job) time.Time {
	return later(later(job.CompletedAt, job.StartedAt), job.SeenAt)
}

// references are the completed jobs that VM records still speak of.
type references struct {
	jobs    map[fleet.JobID]bool
	runners map[string]bool // by the runners that ran them
}

// referred finds what the VMs speak of, besides those that go. Without its job's record a
// finished VM's claim would have GitHub asked for a runner that it has removed.
func (p *pass) referred(gone []fleet.VMID) references {
	r := references{jobs: map[fleet.JobID]bool{}, runners: map[string]bool{}}
	dropped := make(map[fleet.VMID]bool, len(gone))
	for _, id := range gone {
		dropped[id] = true
	}
	for id, vm := range p.vms {
		if dropped[id] {
			continue
		}
		r.jobs[vm.Job] = true
		if vm.Claim != nil {
			r.runners[vm.Claim.Runner] = true
		}
	}
	return r
}

// has reports whether a VM speaks of the job.
func (r references) has(job *fleet.Job) bool {
	return r.jobs[job.ID] || job.RunnerName != "" && r.runners[job.RunnerName]
}

// awaited: a lost VM's record stays until its node had a week to show up again, so that
// the VM is destroyed when it does.
func (p *pass) awaited(vm fleet.VM) bool {
	return vm.State == fleet.VMLost && p.now.Sub(vm.DoneAt) < 7*24*time.Hour
}

// learn takes a completed job's duration into account, once.
func (c *Controller) learn(job *fleet.Job) {
	if c.learned[job.ID] {
		return
	}
	c.learned[job.ID] = true
	if !job.CompletedAt.After(c.taught) {
		return // a controller before this one learned from it
	}
	if job.StartedAt.IsZero() || job.CompletedAt.IsZero() || job.RunnerName == "" || job.Conclusion == "cancelled" {
		return
	}
	c.history.Lock()
	defer c.history.Unlock()
	if d := job.CompletedAt.Sub(job.StartedAt); d > 0 {
		c.c.Durations.Observe(job.Repository, job.Name, d, job.CompletedAt)
	}
}
