package testrunner

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"sync"
	"time"
)

// job is one acquired job.
type job struct {
	runner  *runner
	url     string // of the run service
	token   string // of the job
	request request
}

// request is what the service says of a job, as far as it is used here.
type request struct {
	Plan           struct{ PlanID string }
	Timeline       struct{ ID string }
	JobID          string
	JobDisplayName string
	Resources      struct {
		Endpoints []struct {
			Name          string
			Authorization struct{ Parameters map[string]string }
		}
	}
	Steps []step
}

// step is one shell step.
type step struct {
	ID               string
	DisplayNameToken string
	Inputs           struct {
		Map []struct{ Key, Value string }
	}
}

func (s step) script() string {
	for _, pair := range s.Inputs.Map {
		if pair.Key == "script" {
			return pair.Value
		}
	}
	return ""
}

// record is a step's line in the job's timeline.
type record struct {
	ID, Type, Name, State string
	StartTime             time.Time
	FinishTime            *time.Time
	Result                *string
	Order                 int
}

// Results as the real runner writes them.
const (
	succeeded = "Succeeded"
	failed    = "Failed"
	canceled  = "Canceled"
)

// runJob runs the steps, until one fails or GitHub wants the job to stop, and reports
// the outcome. When ctx ends, the job is reported as cancelled.
func (r *runner) runJob(ctx context.Context, j *job) error {
	r.say("Running job: %s", j.request.JobDisplayName)
	steps, stop := context.WithCancel(ctx)
	var background sync.WaitGroup
	background.Go(func() { j.renew(steps) })
	background.Go(func() { r.watch(steps, stop) })
	result := j.runSteps(steps)
	stop()
	background.Wait()

	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), sayWithin)
	defer cancel()
	done := map[string]any{"planId": j.request.Plan.PlanID, "jobId": j.request.JobID, "conclusion": result}
	if err := r.do(ctx, http.MethodPost, j.url+"/completejob", j.token, done, nil); err != nil {
		return fmt.Errorf("complete job %s: %w", j.request.JobDisplayName, err)
	}
	r.say("Job %s completed with result: %s", j.request.JobDisplayName, result)
	return nil
}

// renew keeps the job's lock while it runs.
func (j *job) renew(ctx context.Context) {
	ticker := time.NewTicker(renewEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			// One renewal may fail: the lock outlives ten of them.
			_ = j.runner.do(ctx, http.MethodPost, j.url+"/renewjob", j.token,
				map[string]string{"planId": j.request.Plan.PlanID, "jobId": j.request.JobID}, nil)
		}
	}
}

// watch polls while the job runs, for the wish that it stops.
func (r *runner) watch(ctx context.Context, stop context.CancelFunc) {
	for ctx.Err() == nil {
		m, err := r.poll(ctx, "Busy")
		switch {
		case err != nil: // the job goes on without; its lock tells whether it still may
			return
		case m.Type == "JobCancellation":
			stop()
			return
		}
	}
}

// runSteps runs the steps in order and returns the job's result.
func (j *job) runSteps(ctx context.Context) string {
	var timeline []*record
	result := succeeded
	for i, s := range j.request.Steps {
		rec := &record{ID: s.ID, Type: "Task", Name: s.DisplayNameToken, State: "InProgress", StartTime: time.Now().UTC(), Order: i + 1}
		timeline = append(timeline, rec)
		j.report(ctx, timeline)
		result = j.runStep(ctx, s)
		now := time.Now().UTC()
		rec.State, rec.FinishTime, rec.Result = "Completed", &now, &result
		j.report(ctx, timeline)
		if result != succeeded {
			break
		}
	}
	return result
}

// report sends the timeline. It is for people who look on: a loss changes nothing.
func (j *job) report(ctx context.Context, timeline []*record) {
	_ = j.runner.do(context.WithoutCancel(ctx), http.MethodPatch,
		fmt.Sprintf("%s/_apis/distributedtask/plans/%s/timelines/%s/records", j.url, j.request.Plan.PlanID, j.request.Timeline.ID),
		j.token, map[string]any{"count": len(timeline), "value": timeline}, nil)
}

// runStep runs one script by sh and sends what it writes.
func (j *job) runStep(ctx context.Context, s step) string {
	command := exec.CommandContext(ctx, "sh", "-e", "-c", s.script())
	command.WaitDelay = stopWithin
	reader, writer := io.Pipe()
	command.Stdout, command.Stderr = writer, writer
	var sender sync.WaitGroup
	sender.Go(func() { j.stream(context.WithoutCancel(ctx), s.ID, reader) })
	err := command.Run()
	_ = writer.Close() // never fails
	sender.Wait()
	switch {
	case ctx.Err() != nil:
		return canceled
	case err != nil:
		j.lines(context.WithoutCancel(ctx), s.ID, []string{"##[error]Process completed with " + err.Error() + "."})
		return failed
	}
	return succeeded
}

// stream sends output line by line; what is there at once goes at once.
func (j *job) stream(ctx context.Context, step string, output io.Reader) {
	reader := bufio.NewReader(output)
	var batch []string
	for {
		line, err := reader.ReadString('\n')
		if line != "" {
			batch = append(batch, trimNewline(line))
		}
		if len(batch) > 0 && (err != nil || reader.Buffered() == 0) {
			j.lines(ctx, step, batch)
			batch = nil
		}
		if err != nil {
			return
		}
	}
}

func trimNewline(line string) string {
	if n := len(line); line[n-1] == '\n' {
		return line[:n-1]
	}
	return line
}

// lines sends log lines; like the timeline they are for people.
func (j *job) lines(ctx context.Context, step string, lines []string) {
	_ = j.runner.do(ctx, http.MethodPost,
		fmt.Sprintf("%s/_apis/distributedtask/plans/%s/timelines/%s/records/%s/feed", j.url, j.request.Plan.PlanID, j.request.Timeline.ID, step),
		j.token, map[string]any{"count": len(lines), "value": lines, "stepId": step}, nil)
}
