package githubtest

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// Run is one run of a workflow, to be queued.
type Run struct {
	Repository string // "owner/name", which must exist
	Workflow   string // its name; "": CI
	Jobs       []JobSpec
}

// JobSpec is what a workflow file says of a job.
type JobSpec struct {
	Name   string
	Labels []string // runs-on
	// Steps are run by bash (the real runner) or sh (testrunner), one after the other,
	// until one fails.
	Steps []string
	// Seconds to sleep after the steps; 0: none.
	Seconds float64
	// Environment is protected: the job waits until Approve; "": none.
	Environment string
	// Matrix makes that many jobs of this one, "name (1)" and so on; 0: one, under its own name.
	Matrix int
}

// run is a run with the jobs of all its attempts.
type run struct {
	id        int64
	number    int
	attempt   int
	repo      *repository
	workflow  string
	jobs      []*job
	createdAt time.Time
}

// job is one job of one attempt. A re-run makes new ones.
type job struct {
	id      fleet.JobID
	run     *run
	attempt int
	spec    JobSpec
	labels  fleet.Labels

	status     fleet.JobStatus
	conclusion string
	deployment *deployment // of a protected environment

	runner     *runner // that it is assigned to or that runs it
	runnerName string  // stays when the runner is gone
	runnerID   int64
	groupID    int64

	starts   int
	stop     bool // cancelled while it runs: the runner is asked to stop
	message  string
	planID   string
	backend  string // the job's id in the Actions service
	steps    []stepRecord
	live     []string // log lines as they were streamed
	uploaded []string // log files

	createdAt   time.Time
	assignedAt  time.Time
	startedAt   time.Time
	completedAt time.Time
	lockedUntil time.Time
}

// deployment is the gate of a protected environment.
type deployment struct {
	id        int64
	createdAt time.Time
	updatedAt time.Time
}

// slice is how many jobs of a run are queued at once: a matrix of thousands trickles in,
// as at GitHub, and others get a word in.
const slice = 64

// QueueRun queues a run and sends the webhooks of its jobs. It returns the run's id and
// the ids of its jobs, in the order of the specification.
func (g *GitHub) QueueRun(r Run) (runID int64, jobs []fleet.JobID, err error) {
	created, err := g.newRun(r)
	if err != nil {
		return 0, nil, err
	}
	var specs []JobSpec
	for _, spec := range r.Jobs {
		specs = append(specs, spec.expand()...)
	}
	for part := range slices.Chunk(specs, slice) {
		jobs = append(jobs, g.queueJobs(created, part)...)
	}
	return created.id, jobs, nil
}

func (g *GitHub) newRun(r Run) (*run, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	repo := g.repositories[strings.ToLower(r.Repository)]
	if repo == nil {
		return nil, fmt.Errorf("queue a run: no repository %q", r.Repository)
	}
	created := &run{
		id: firstRunID + g.id(), number: len(g.runs) + 1, attempt: 1, repo: repo,
		workflow: cmp.Or(r.Workflow, "CI"), createdAt: g.c.Now(),
	}
	g.runs[created.id] = created
	return created, nil
}

func (g *GitHub) queueJobs(r *run, specs []JobSpec) (ids []fleet.JobID) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, spec := range specs {
		ids = append(ids, g.newJob(r, spec).id)
	}
	g.match()
	g.touch()
	return ids
}

// expand makes the jobs of a matrix.
func (s JobSpec) expand() []JobSpec {
	if s.Matrix == 0 {
		return []JobSpec{s}
	}
	all := make([]JobSpec, s.Matrix)
	for i := range all {
		all[i] = s
		all[i].Matrix = 0
		all[i].Name = fmt.Sprintf("%s (%d)", s.Name, i+1)
	}
	return all
}

func (g *GitHub) newJob(r *run, spec JobSpec) *job {
	now := g.c.Now()
	j := &job{
		id: fleet.JobID(firstJobID + g.id()), run: r, attempt: r.attempt, spec: spec,
		labels: fleet.NewLabels(spec.Labels...),
		planID: newUUID(now), backend: newUUID(now), createdAt: now,
	}
	r.jobs = append(r.jobs, j)
	g.jobs[j.id] = j
	g.order = append(g.order, j)
	if spec.Environment != "" {
		j.status = fleet.JobWaiting
		j.deployment = &deployment{id: g.id(), createdAt: now, updatedAt: now}
		g.emit(j, "queued") // action and status differ here, as at GitHub
		g.emit(j, "waiting")
		return j
	}
	g.enqueue(j)
	return j
}

// enqueue makes the job available to runners.
func (g *GitHub) enqueue(j *job) {
	j.status = fleet.JobQueued
	g.queue = append(g.queue, j)
	g.emit(j, "queued")
}

// Approve opens the gate of a waiting job.
func (g *GitHub) Approve(id fleet.JobID) error {
	return g.change(id, "approve", func(j *job) error {
		if j.status != fleet.JobWaiting {
			return fmt.Errorf("it is %s, not waiting", j.status)
		}
		j.deployment.updatedAt = g.c.Now()
		g.enqueue(j)
		g.match()
		return nil
	})
}

// Hold closes the gate of a queued job again: GitHub moves jobs both ways. Its times
// have whole seconds, so a gate that moves twice in one second cannot be told apart.
func (g *GitHub) Hold(id fleet.JobID) error {
	return g.change(id, "hold", func(j *job) error {
		if j.status != fleet.JobQueued || j.runner != nil || j.deployment == nil {
			return fmt.Errorf("it is %s, or has no environment", j.status)
		}
		g.unqueue(j)
		j.status = fleet.JobWaiting
		j.deployment.updatedAt = g.c.Now()
		g.emit(j, "waiting")
		return nil
	})
}

// Cancel ends a job. One that runs is asked to stop through its runner, and completes
// when that says so or when its lock runs out.
func (g *GitHub) Cancel(id fleet.JobID) error {
	return g.change(id, "cancel", func(j *job) error {
		if j.status == fleet.JobCompleted {
			return fmt.Errorf("it is completed")
		}
		g.cancel(j)
		return nil
	})
}

func (g *GitHub) cancel(j *job) {
	if j.status == fleet.JobInProgress {
		j.stop = true
		j.runner.poke()
		return
	}
	g.unqueue(j)
	if j.runner != nil { // given to a runner that has not begun: the runner is idle again
		j.runner.job, j.runner.delivered = nil, false
		j.runner = nil
	}
	g.complete(j, "cancelled")
	g.match()
}

// change applies one act to a job.
func (g *GitHub) change(id fleet.JobID, what string, act func(*job) error) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	j := g.jobs[id]
	if j == nil {
		return fmt.Errorf("%s job %d: there is no such job", what, id)
	}
	if err := act(j); err != nil {
		return fmt.Errorf("%s job %d: %w", what, id, err)
	}
	g.touch()
	return nil
}

// Rerun starts the next attempt of a completed run, with new job ids; with onlyFailed,
// of the jobs that did not succeed.
func (g *GitHub) Rerun(runID int64, onlyFailed bool) ([]fleet.JobID, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	r := g.runs[runID]
	if r == nil {
		return nil, fmt.Errorf("re-run %d: there is no such run", runID)
	}
	last := r.latest()
	for _, j := range last {
		if j.status != fleet.JobCompleted {
			return nil, fmt.Errorf("re-run %d: job %d is %s", runID, j.id, j.status)
		}
	}
	r.attempt++
	var ids []fleet.JobID
	for _, j := range last {
		if !onlyFailed || j.conclusion != "success" {
			ids = append(ids, g.newJob(r, j.spec).id)
		}
	}
	g.match()
	g.touch()
	return ids, nil
}

// latest are the jobs of the last attempt.
func (r *run) latest() []*job {
	var jobs []*job
	for _, j := range r.jobs {
		if j.attempt == r.attempt {
			jobs = append(jobs, j)
		}
	}
	return jobs
}

// state is a run's status and conclusion, from its jobs.
func (r *run) state() (status, conclusion string) {
	conclusion = "success"
	status = "completed"
	for _, j := range r.latest() {
		switch {
		case j.status == fleet.JobInProgress:
			return "in_progress", ""
		case j.status != fleet.JobCompleted:
			status = string(j.status)
		case j.conclusion != "success":
			conclusion = j.conclusion
		}
	}
	if status != "completed" {
		return status, ""
	}
	return status, conclusion
}

// unqueue takes a job out of the queue, if it is there.
func (g *GitHub) unqueue(j *job) {
	if i := slices.Index(g.queue, j); i >= 0 {
		g.queue = slices.Delete(g.queue, i, i+1)
	}
}

// begin is the moment a runner has taken the job.
func (g *GitHub) begin(j *job) {
	now := g.c.Now()
	j.status, j.startedAt, j.lockedUntil = fleet.JobInProgress, now, now.Add(g.c.Lock)
	j.runnerName, j.runnerID, j.groupID = j.runner.name, j.runner.id, j.runner.group
	j.starts++
	g.emit(j, "in_progress")
	g.touch()
}

// complete ends a job; its runner, being ephemeral, goes with it.
func (g *GitHub) complete(j *job, conclusion string) {
	now := g.c.Now()
	j.status, j.conclusion, j.completedAt = fleet.JobCompleted, conclusion, now
	if j.runner != nil {
		g.removeRunner(j.runner)
		j.runner = nil
	}
	g.emit(j, "completed")
	g.touch()
}

// expire lets time pass: assignments that were not taken, locks that were not renewed,
// runners that were never needed.
func (g *GitHub) expire() {
	now := g.c.Now()
	changed := false
	for _, r := range g.sortedRunners() {
		switch j := r.job; {
		case j == nil:
			if g.c.Idle > 0 && now.Sub(r.since) >= g.c.Idle {
				g.removeRunner(r)
				changed = true
			}
		case j.status == fleet.JobQueued && now.Sub(j.assignedAt) >= g.c.Assignment:
			// The runner did not take it. It is thought offline until it asks again.
			r.job, r.delivered, r.online = nil, false, false
			j.runner = nil
			g.queue = append([]*job{j}, g.queue...)
			changed = true
		case j.status == fleet.JobInProgress && !now.Before(j.lockedUntil):
			conclusion := "failure" // the runner lost communication with the server
			if j.stop {
				conclusion = "cancelled"
			}
			g.complete(j, conclusion)
			changed = true
		}
	}
	if changed {
		g.match()
		g.touch()
	}
}
