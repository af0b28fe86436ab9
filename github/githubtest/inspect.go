package githubtest

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// Job is a job as it stands.
type Job struct {
	ID         fleet.JobID
	RunID      int64
	Attempt    int
	Repository string
	Workflow   string
	Name       string
	Labels     []string
	Status     fleet.JobStatus
	Conclusion string // success, failure, cancelled; "" before the end
	RunnerName string // of the runner that took it
	// Starts counts how often a runner began it: never more than once, or it ran twice.
	Starts int
	// Log is what its steps wrote, by lines, without times.
	Log string

	QueuedAt, StartedAt, CompletedAt time.Time
}

func (j *job) snapshot() Job {
	log := strings.Join(j.live, "\n")
	if log == "" && len(j.uploaded) > 0 {
		log = j.uploaded[len(j.uploaded)-1] // the last file holds the whole job
	}
	return Job{
		ID: j.id, RunID: j.run.id, Attempt: j.attempt, Repository: j.run.repo.Name, Workflow: j.run.workflow,
		Name: j.spec.Name, Labels: slices.Clone(j.spec.Labels), Status: j.status, Conclusion: j.conclusion,
		RunnerName: j.runnerName, Starts: j.starts, Log: log,
		QueuedAt: j.createdAt, StartedAt: j.startedAt, CompletedAt: j.completedAt,
	}
}

// Runner is a registered runner as it stands.
type Runner struct {
	ID     int64
	Name   string
	Scope  fleet.Scope
	Group  int64
	Labels fleet.Labels
	Online bool
	Busy   bool
	Job    fleet.JobID // that it was given; 0: none
}

// Job returns one job; ok is false if there is none of that id.
func (g *GitHub) Job(id fleet.JobID) (found Job, ok bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	j := g.jobs[id]
	if j == nil {
		return Job{}, false
	}
	return j.snapshot(), true
}

// Jobs are all jobs, oldest first.
func (g *GitHub) Jobs() []Job {
	g.mu.Lock()
	defer g.mu.Unlock()
	jobs := make([]Job, 0, len(g.order))
	for _, j := range g.order {
		jobs = append(jobs, j.snapshot())
	}
	return jobs
}

// Counts are the numbers of jobs by status.
func (g *GitHub) Counts() map[fleet.JobStatus]int {
	g.mu.Lock()
	defer g.mu.Unlock()
	counts := map[fleet.JobStatus]int{}
	for _, j := range g.order {
		counts[j.status]++
	}
	return counts
}

// Runners are the registered runners, by scope and id.
func (g *GitHub) Runners() []Runner {
	g.mu.Lock()
	defer g.mu.Unlock()
	var runners []Runner
	for _, r := range g.sortedRunners() {
		found := Runner{
			ID: r.id, Name: r.name, Scope: r.scope, Group: r.group, Labels: slices.Clone(r.labels),
			Online: r.online, Busy: r.job != nil,
		}
		if r.job != nil {
			found.Job = r.job.id
		}
		runners = append(runners, found)
	}
	return runners
}

// Deliveries is the delivery log, oldest first.
func (g *GitHub) Deliveries() []Delivery {
	g.mu.Lock()
	defer g.mu.Unlock()
	log := make([]Delivery, 0, len(g.deliveries))
	for _, d := range g.deliveries {
		log = append(log, d.snapshot())
	}
	return log
}

// Requests counts the REST requests that were served, by method and path pattern, for
// instance "POST /orgs/{org}/actions/runners/generate-jitconfig".
func (g *GitHub) Requests() map[string]int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return maps.Clone(g.requests)
}

// WaitJob waits until the job has the status, or has gone past it.
func (g *GitHub) WaitJob(ctx context.Context, id fleet.JobID, status fleet.JobStatus) (Job, error) {
	var last Job
	err := g.wait(ctx, func() bool {
		j := g.jobs[id]
		if j == nil {
			return false
		}
		last = j.snapshot()
		return fleet.StatusRanks[j.status].Rank >= fleet.StatusRanks[status].Rank
	})
	if err != nil {
		return last, fmt.Errorf("wait until job %d is %s (it is %s): %w", id, status, last.Status, err)
	}
	return last, nil
}

// WaitIdle waits until no job is open and every webhook has been answered or dropped.
func (g *GitHub) WaitIdle(ctx context.Context) error {
	err := g.wait(ctx, func() bool {
		for _, j := range g.order {
			if j.status != fleet.JobCompleted {
				return false
			}
		}
		return g.delivered()
	})
	if err != nil {
		return fmt.Errorf("wait until all jobs are completed: %w", err)
	}
	return nil
}

// WaitDelivered waits until every webhook has been answered or dropped.
func (g *GitHub) WaitDelivered(ctx context.Context) error {
	if err := g.wait(ctx, g.delivered); err != nil {
		return fmt.Errorf("wait until all webhooks are delivered: %w", err)
	}
	return nil
}

// delivered reports whether no webhook is under way.
func (g *GitHub) delivered() bool { return len(g.outgoing) == 0 && g.underWay == 0 }

// Changed is closed at the next change of anything. Take it before looking.
func (g *GitHub) Changed() <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.changed
}

// wait waits until the condition holds. It is looked at after every change, with the
// simulation locked.
func (g *GitHub) wait(ctx context.Context, condition func() bool) error {
	for {
		g.mu.Lock()
		holds, changed := condition(), g.changed
		g.mu.Unlock()
		if holds {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-changed:
		}
	}
}
