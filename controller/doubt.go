package controller

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github"
	"github.com/paddock-ci/paddock/store"
)

// A runner that waited its whole deadline without getting the queued job it was made for
// casts doubt on the job: its "completed" may be lost for good, and a VM after the other
// would be booted for a job that nobody has any more. Nothing is placed for a job in
// doubt until GitHub was asked what has become of it. A doubt is lost with the process,
// at the price of one more VM.

// doubtRetry is the wait after GitHub could not say what has become of a job.
const doubtRetry = 10 * time.Second

// doubt is where the question for one job stands.
type doubt struct {
	asking    bool
	notBefore time.Time // the last answer was an error
}

// doubtJob notes that the VM's runner waited for its job in vain.
func (c *Controller) doubtJob(p *pass, vm fleet.VM) {
	job := p.view.Jobs[vm.Job]
	if vm.State != fleet.VMRegistered || job == nil || job.Status != fleet.JobQueued {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, doubted := c.doubts[job.ID]; !doubted {
		c.doubts[job.ID] = doubt{}
	}
}

// isDoubted reports whether GitHub has yet to say what has become of a job.
func (c *Controller) isDoubted(id fleet.JobID) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, doubted := c.doubts[id]
	return doubted
}

// askDoubts asks GitHub about each job in doubt that it is not being asked about.
func (c *Controller) askDoubts(ctx context.Context, view *store.View, now time.Time, places chan struct{}, running *sync.WaitGroup) {
	for _, job := range c.dueDoubts(view, now) {
		select {
		case places <- struct{}{}:
		case <-ctx.Done():
			return
		}
		running.Go(func() {
			defer func() { <-places }()
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), errandTimeout)
			defer cancel()
			c.doubtSettled(job, now, c.askJob(ctx, now, job))
		})
	}
}

// dueDoubts are the jobs to be asked about now, marked as being asked about.
func (c *Controller) dueDoubts(view *store.View, now time.Time) []fleet.Job {
	c.mu.Lock()
	defer c.mu.Unlock()
	var due []fleet.Job
	for id, d := range c.doubts {
		job := view.Jobs[id]
		if d.asking {
			continue
		}
		if job == nil || job.Status != fleet.JobQueued {
			delete(c.doubts, id) // there was news of it
			continue
		}
		if now.Before(d.notBefore) || now.Before(c.limited[ownerOf(job)]) {
			continue
		}
		c.doubts[id] = doubt{asking: true}
		due = append(due, *job)
	}
	return due
}

// ownerOf is the key of the owner's limit.
func ownerOf(job *fleet.Job) string { return strings.ToLower(fleet.Scope(job.Repository).Owner()) }

// askJob asks GitHub for the job and merges the answer, as any other news of it.
func (c *Controller) askJob(ctx context.Context, now time.Time, job fleet.Job) error {
	told, err := c.c.GitHub.Job(ctx, job.Repository, job.ID)
	var refused *github.Refused
	switch {
	case errors.Is(err, github.ErrNotFound):
		// Deleted with its run or its repository: GitHub will never say another word.
		told = fleet.Job{Status: fleet.JobCompleted, Conclusion: "cancelled", CompletedAt: now}
		c.c.Log.Info("GitHub does not know the job any more", "job", job.ID)
	case errors.As(err, &refused) && refused.Status == http.StatusForbidden:
		return nil // the App may not ask: the job is believed to wait
	case err != nil:
		return fmt.Errorf("ask for job %d: %w", job.ID, err)
	}
	if told.Status == job.Status {
		return nil
	}
	news := job
	news.Status, news.Conclusion, news.RunnerName = told.Status, told.Conclusion, told.RunnerName
	news.StartedAt, news.CompletedAt = told.StartedAt, told.CompletedAt
	news.Feed, news.Gate = fleet.FeedPoll, told.Gate
	if news.Status == fleet.JobWaiting && news.Gate == 0 {
		news.Gate = now.UnixMilli() // a gate closed since; GitHub does not say when
	}
	_, err = c.c.Store.MergeJob(ctx, store.Delivery{At: now, Job: news})
	return wrap(fmt.Sprintf("merge job %d", job.ID), err)
}

// doubtSettled ends a job's doubt, or has it asked about again after an error.
func (c *Controller) doubtSettled(job fleet.Job, now time.Time, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err == nil {
		delete(c.doubts, job.ID)
		return
	}
	c.doubts[job.ID] = doubt{notBefore: now.Add(doubtRetry)}
	var limited *github.RateLimited
	if errors.As(err, &limited) {
		c.limited[ownerOf(&job)] = limited.Until
	}
	c.metrics.errandsFailed.Inc()
	c.c.Log.Warn("asking GitHub for a job failed and is repeated", "job", job.ID, "error", err)
}
