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
	var completed []*fleet.Job
	for _, job := range p.view.Jobs {
		if job.Status == fleet.JobCompleted {
			completed = append(completed, job)
			c.learn(job)
		}
	}
	slices.SortFunc(completed, func(a, b *fleet.Job) int {
		return cmp.Or(b.CompletedAt.Compare(a.CompletedAt), cmp.Compare(b.ID, a.ID))
	})
	for i, job := range completed {
		if i >= jobsKept || p.now.Sub(job.CompletedAt) > jobKept {
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
	_, err := c.c.Store.SweepTombstones(ctx, p.term, p.now.Add(-tombstoneKept))
	return err
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
	if job.StartedAt.IsZero() || job.CompletedAt.IsZero() || job.RunnerName == "" || job.Conclusion == "cancelled" {
		return
	}
	c.history.Lock()
	defer c.history.Unlock()
	if d := job.CompletedAt.Sub(job.StartedAt); d > 0 {
		c.c.Durations.Observe(job.Repository, job.Name, d, job.CompletedAt)
	}
}
