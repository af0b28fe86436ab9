package githubtest_test

import (
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github"
	"github.com/paddock-ci/paddock/github/githubtest"
)

// A step fails, so the job fails, and the steps behind it do not run.
func TestAFailingStep(t *testing.T) {
	f := newFarm(t, githubtest.Config{})
	ctx := soon(t)
	_, id := f.queue(t, "acme/app", githubtest.JobSpec{Name: "build", Steps: []string{"echo before; exit 3", "echo after"}})
	<-f.start(ctx, t, "acme", "r", macOS)
	job, err := f.WaitJob(ctx, id, fleet.JobCompleted)
	if err != nil {
		t.Fatal(err)
	}
	if job.Conclusion != "failure" || !strings.Contains(job.Log, "before") || !strings.Contains(job.Log, "exit status 3") || strings.Contains(job.Log, "after") {
		t.Errorf("job %+v", job)
	}
	f.clean(t)
}

// A job behind an approval gate waits, though webhooks speak of it as queued already;
// approved, it runs. What webhooks tell merges to the truth in any order.
func TestApprovalGate(t *testing.T) {
	f := newFarm(t, githubtest.Config{Senders: 1})
	ctx := soon(t)
	_, id := f.queue(t, "acme/app", githubtest.JobSpec{Name: "deploy", Environment: "production"})
	want := []fleet.JobStatus{fleet.JobWaiting, fleet.JobWaiting}
	if told := f.await(ctx, t, id, 2); !slices.Equal(told, want) {
		t.Errorf("webhooks told %v, want %v", told, want)
	}
	ended := f.start(ctx, t, "acme", "r", macOS)
	if err := f.Approve(id); err != nil {
		t.Fatal(err)
	}
	<-ended
	want = append(want, fleet.JobQueued, fleet.JobInProgress, fleet.JobCompleted)
	if told := f.await(ctx, t, id, 5); !slices.Equal(told, want) {
		t.Errorf("webhooks told %v, want %v", told, want)
	}
	f.mu.Lock()
	news := slices.Clone(f.received)
	f.mu.Unlock()
	slices.Reverse(news)
	merged := news[0]
	for _, j := range news[1:] {
		merged = fleet.MergeJob(merged, j)
	}
	if merged.Status != fleet.JobCompleted || merged.RunnerName != "r" {
		t.Errorf("merged backwards: %+v", merged)
	}
	if err := f.Approve(id); err == nil {
		t.Error("a completed job was approved")
	}
	f.clean(t)
}

// Cancelled while queued, while a runner boots, and while the job runs.
func TestCancel(t *testing.T) {
	f := newFarm(t, githubtest.Config{Senders: 1})
	ctx := soon(t)

	_, queued := f.queue(t, "acme/app", githubtest.JobSpec{Name: "queued"})
	if err := f.Cancel(queued); err != nil {
		t.Fatal(err)
	}
	if job, err := f.WaitJob(ctx, queued, fleet.JobCompleted); err != nil || job.Conclusion != "cancelled" || job.Starts != 0 {
		t.Errorf("%v, job %+v", err, job)
	}

	_, booting := f.queue(t, "acme/app", githubtest.JobSpec{Name: "booting"})
	minted, err := f.client.MintRunner(ctx, "acme", "booting", 1, macOS)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Cancel(booting); err != nil {
		t.Fatal(err)
	}
	if err := f.client.RemoveRunner(ctx, "acme", minted.RunnerID); err != nil {
		t.Errorf("the surplus runner is not removable: %v", err)
	}

	_, running := f.queue(t, "acme/app", githubtest.JobSpec{Name: "running", Steps: []string{"echo begun; exec sleep 600"}})
	ended := f.start(ctx, t, "acme", "running", macOS)
	if _, err := f.WaitJob(ctx, running, fleet.JobInProgress); err != nil {
		t.Fatal(err)
	}
	if err := f.Cancel(running); err != nil {
		t.Fatal(err)
	}
	out := <-ended
	job, err := f.WaitJob(ctx, running, fleet.JobCompleted)
	if err != nil || job.Conclusion != "cancelled" || job.Starts != 1 {
		t.Errorf("%v, job %+v; the runner said %q", err, job, out)
	}
	if err := f.Cancel(running); err == nil {
		t.Error("a completed job was cancelled")
	}
	f.clean(t)
}

// A re-run has new job ids, the same run and the next attempt.
func TestRerun(t *testing.T) {
	f := newFarm(t, githubtest.Config{})
	ctx := soon(t)
	run, id := f.queue(t, "acme/app", githubtest.JobSpec{Name: "build", Steps: []string{"exit 1"}})
	if _, err := f.Rerun(run, false); err == nil {
		t.Error("an open run was re-run")
	}
	<-f.start(ctx, t, "acme", "first", macOS)
	again, err := f.Rerun(run, true)
	if err != nil || len(again) != 1 || again[0] == id {
		t.Fatalf("re-run: %v, jobs %v", err, again)
	}
	<-f.start(ctx, t, "acme", "second", macOS)
	for attempt, id := range map[int]fleet.JobID{1: id, 2: again[0]} {
		job, err := f.client.Job(ctx, "acme/app", id)
		if err != nil || job.RunID != run || job.RunAttempt != attempt || job.Status != fleet.JobCompleted || job.Conclusion != "failure" {
			t.Errorf("attempt %d: %v, job %+v", attempt, err, job)
		}
	}
	f.clean(t)
}

// Another's runner takes the job that ours was made for; ours takes the next one.
func TestAStolenJob(t *testing.T) {
	f := newFarm(t, githubtest.Config{})
	ctx := soon(t)
	_, stolen := f.queue(t, "acme/app", githubtest.JobSpec{Name: "stolen"})
	<-f.start(ctx, t, "acme", "foreign", macOS)
	_, next := f.queue(t, "acme/app", githubtest.JobSpec{Name: "next"})
	<-f.start(ctx, t, "acme", "ours", macOS)
	for id, by := range map[fleet.JobID]string{stolen: "foreign", next: "ours"} {
		if job, _ := f.Job(id); job.RunnerName != by || job.Starts != 1 {
			t.Errorf("job %+v, want it run by %s", job, by)
		}
	}
	f.clean(t)
}

// A matrix of 256 jobs, and a runner for a few of them; each runs at most once.
func TestAMatrixOf256(t *testing.T) {
	f := newFarm(t, githubtest.Config{})
	ctx := soon(t)
	_, ids, err := f.QueueRun(githubtest.Run{Repository: "acme/app", Jobs: []githubtest.JobSpec{{Name: "test", Labels: macOS, Matrix: 256}}})
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range ids {
		f.await(ctx, t, id, 1)
	}
	for _, name := range []string{"a", "b", "c"} {
		<-f.start(ctx, t, "acme", name, macOS)
	}
	if counts := f.Counts(); len(ids) != 256 || counts[fleet.JobCompleted] != 3 || counts[fleet.JobQueued] != 253 {
		t.Errorf("%d jobs, by status %v", len(ids), counts)
	}
	f.clean(t)
}

// Deliveries that are dropped never arrive, and are in the log with their payloads;
// redelivered, they arrive under the same GUID. A silent loss looks like a success there.
func TestDroppedDeliveries(t *testing.T) {
	f := newFarm(t, githubtest.Config{Faults: githubtest.Faults{Delivery: func(d githubtest.Delivery) githubtest.Fate {
		return githubtest.Fate{Drop: true, Silent: d.Job%2 == 0}
	}}})
	ctx := soon(t)
	_, one := f.queue(t, "acme/app", githubtest.JobSpec{Name: "one"})
	_, two := f.queue(t, "acme/app", githubtest.JobSpec{Name: "two"})
	log, next, err := f.client.Deliveries(ctx, "")
	if err != nil || next != "" || len(log) != 2 {
		t.Fatalf("%v, next %q, log %+v", err, next, log)
	}
	for _, info := range log {
		_, payload, err := f.client.Delivery(ctx, info.ID)
		if err != nil {
			t.Fatal(err)
		}
		job, err := github.ParseJob(payload, info.GUID)
		if err != nil || (job.ID != one && job.ID != two) || (info.StatusCode == http.StatusOK) != (job.ID%2 == 0) {
			t.Errorf("%v, job %d in %+v", err, job.ID, info)
		}
		if told := f.statuses(job.ID); len(told) != 0 {
			t.Errorf("it arrived all the same: %v", told)
		}
		if err := f.Redeliver(info.ID); err != nil {
			t.Fatal(err)
		}
		f.await(ctx, t, job.ID, 1)
	}
	if err := f.WaitDelivered(ctx); err != nil {
		t.Fatal(err)
	}
	log, _, err = f.client.Deliveries(ctx, "")
	if err != nil || len(log) != 4 || !log[0].Redelivery || log[0].StatusCode != http.StatusAccepted || log[0].GUID != log[3].GUID && log[0].GUID != log[2].GUID {
		t.Errorf("%v, log after redelivery %+v", err, log)
	}
	f.clean(t)
}

// Delayed deliveries arrive later than the ones behind them; copies arrive twice; a wrong
// installation id is in the payload.
func TestLateDoubledAndWrong(t *testing.T) {
	f := newFarm(t, githubtest.Config{Faults: githubtest.Faults{Delivery: func(d githubtest.Delivery) githubtest.Fate {
		switch d.Action {
		case "queued":
			return githubtest.Fate{Delay: 200 * time.Millisecond}
		case "in_progress":
			return githubtest.Fate{Copies: 2}
		}
		return githubtest.Fate{Installation: 1}
	}}})
	ctx := soon(t)
	_, id := f.queue(t, "acme/app", githubtest.JobSpec{Name: "j"})
	<-f.start(ctx, t, "acme", "r", macOS)
	told := f.await(ctx, t, id, 5)
	if slices.Index(told, fleet.JobQueued) == 0 || len(told) != 5 {
		t.Errorf("webhooks told %v, want queued late and in_progress three times", told)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, j := range f.received {
		if (j.Installation == 1) != (j.Status == fleet.JobCompleted) {
			t.Errorf("installation %d in the webhook of %s", j.Installation, j.Status)
		}
	}
}

// The same seed makes the same weather, and about as bad as was asked for.
func TestStorm(t *testing.T) {
	storm := githubtest.Storm{Seed: 7, Drop: 0.05, Double: 0.1, Late: 0.2, Delay: time.Second}
	one, two := storm.Faults().Delivery, storm.Faults().Delivery
	var dropped, doubled, late int
	for range 10_000 {
		fate := one(githubtest.Delivery{})
		if fate != two(githubtest.Delivery{}) {
			t.Fatal("two storms of one seed differ")
		}
		if fate.Drop {
			dropped++
		}
		doubled += fate.Copies
		if fate.Delay > 0 {
			late++
		}
		if fate.Delay > time.Second {
			t.Fatalf("delay %v", fate.Delay)
		}
	}
	for name, n := range map[string][2]int{"dropped": {dropped, 500}, "doubled": {doubled, 1000}, "late": {late, 2000}} {
		if n[0] < n[1]*8/10 || n[0] > n[1]*12/10 {
			t.Errorf("%d of 10,000 %s, want about %d", n[0], name, n[1])
		}
	}
}

// A runner that was removed while it waited ends with an error that says so.
func TestARemovedRunnerEnds(t *testing.T) {
	f := newFarm(t, githubtest.Config{})
	ctx := soon(t)
	ended := f.start(ctx, t, "acme", "r", macOS)
	runner := f.online(ctx, t, "r")
	if err := f.client.RemoveRunner(ctx, "acme", runner.ID); err != nil {
		t.Fatal(err)
	}
	if out := <-ended; !strings.Contains(out, "Listening for Jobs") || !strings.Contains(out, "wait for a job: 401") {
		t.Errorf("the runner said %q", out)
	}
	f.clean(t)
}
