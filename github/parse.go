package github

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// ErrMalformed: the payload of a webhook is not what GitHub sends.
var ErrMalformed = errors.New("malformed workflow_job payload")

// rawJob is what is read of a job, of the forty fields that it has. Pointers are null
// at times.
type rawJob struct {
	ID          int64      `json:"id"`
	RunID       int64      `json:"run_id"`
	RunAttempt  int        `json:"run_attempt"` // 0 in payloads from before attempts were counted
	Name        string     `json:"name"`
	Workflow    *string    `json:"workflow_name"`
	Labels      []string   `json:"labels"`
	Status      string     `json:"status"`
	Conclusion  *string    `json:"conclusion"`
	RunnerName  *string    `json:"runner_name"`
	CreatedAt   *time.Time `json:"created_at"`
	StartedAt   *time.Time `json:"started_at"`
	CompletedAt *time.Time `json:"completed_at"`
}

// rawEvent is what is read of a workflow_job webhook.
type rawEvent struct {
	Action     string  `json:"action"`
	Job        *rawJob `json:"workflow_job"`
	Deployment *struct {
		UpdatedAt *time.Time `json:"updated_at"`
	} `json:"deployment"`
	Repository *struct {
		FullName string `json:"full_name"`
		Private  *bool  `json:"private"`
	} `json:"repository"`
	Installation *struct {
		ID int64 `json:"id"`
	} `json:"installation"`
}

// restStatuses are the statuses that REST knows; a job that is requested or pending may
// not take a runner yet.
var restStatuses = map[string]fleet.JobStatus{
	"requested":   fleet.JobWaiting,
	"pending":     fleet.JobWaiting,
	"waiting":     fleet.JobWaiting,
	"queued":      fleet.JobQueued,
	"in_progress": fleet.JobInProgress,
	"completed":   fleet.JobCompleted,
}

// ParseJob decodes the body of a workflow_job webhook; guid is the delivery's id, from
// the X-GitHub-Delivery header or the delivery log. Errors wrap ErrMalformed. Jobs for
// GitHub's own runners are decoded as well: they are told by their labels.
func ParseJob(payload []byte, guid string) (fleet.Job, error) {
	var event rawEvent
	if err := json.Unmarshal(payload, &event); err != nil {
		return fleet.Job{}, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	switch {
	case event.Job == nil:
		return fleet.Job{}, fmt.Errorf("%w: there is no workflow_job in it", ErrMalformed)
	case event.Job.ID <= 0:
		return fleet.Job{}, fmt.Errorf("%w: job id %d", ErrMalformed, event.Job.ID)
	case event.Repository == nil || !isRepository(event.Repository.FullName):
		return fleet.Job{}, fmt.Errorf("%w: job %d: repository.full_name is not owner/name", ErrMalformed, event.Job.ID)
	}
	status, ok := decide(event.Action, event.Job.Status)
	if !ok {
		return fleet.Job{}, fmt.Errorf("%w: job %d: neither action %.40q nor status %.40q is known",
			ErrMalformed, event.Job.ID, event.Action, event.Job.Status)
	}
	job := assemble(*event.Job, status)
	job.Repository = event.Repository.FullName
	// Public unless GitHub says private: a payload without the word must not let a
	// stranger's job in.
	job.Public = event.Repository.Private == nil || !*event.Repository.Private
	if event.Installation != nil {
		job.Installation = event.Installation.ID
	}
	switch {
	case !fleet.StatusRanks[status].Gated: // its delivery's time says nothing of a gate
	case event.Deployment != nil && event.Deployment.UpdatedAt != nil:
		job.Gate = max(0, event.Deployment.UpdatedAt.UnixMilli())
	default:
		job.Gate = uuidTime(guid)
	}
	return job, nil
}

// isRepository reports whether name is owner/name and nothing else.
func isRepository(name string) bool {
	owner, short, ok := strings.Cut(name, "/")
	return ok && owner != "" && short != "" && !strings.ContainsAny(name, " \t\r\n\x00") && !strings.Contains(short, "/")
}

// decide makes one status of the webhook's action and the job's status, which differ at
// times: GitHub sends action queued with status waiting while a deployment gate is
// closed. Otherwise whatever is further in a job's life is true.
func decide(action, status string) (fleet.JobStatus, bool) {
	a, knownAction := restStatuses[action]
	s, knownStatus := restStatuses[status]
	switch {
	case !knownAction && !knownStatus:
		return "", false
	case !knownAction:
		return s, true
	case !knownStatus:
		return a, true
	}
	ranks := fleet.StatusRanks
	if ranks[a].Gated && ranks[s].Gated && a != s {
		return fleet.JobWaiting, true
	}
	if ranks[s].Rank > ranks[a].Rank {
		return s, true
	}
	return a, true
}

// assemble makes a job of what was read. Fields that mean nothing yet are left out:
// GitHub repeats created_at as started_at of a job that has not started, and names
// runners of queued jobs in old payloads.
func assemble(raw rawJob, status fleet.JobStatus) fleet.Job {
	job := fleet.Job{
		ID: fleet.JobID(raw.ID), RunID: raw.RunID, RunAttempt: max(raw.RunAttempt, 1), Name: raw.Name,
		Workflow: value(raw.Workflow), Labels: fleet.NewLabels(raw.Labels...), Status: status,
		CreatedAt: value(raw.CreatedAt),
	}
	if job.CreatedAt.IsZero() {
		job.CreatedAt = value(raw.StartedAt)
	}
	if status == fleet.JobInProgress || status == fleet.JobCompleted {
		job.RunnerName, job.StartedAt = value(raw.RunnerName), value(raw.StartedAt)
	}
	if status == fleet.JobCompleted {
		job.Conclusion, job.CompletedAt = value(raw.Conclusion), value(raw.CompletedAt)
	}
	return job
}

// value is what a pointer points to, or zero.
func value[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}

// gregorian is the number of 100 ns intervals between the start of the Gregorian
// calendar, from which UUIDs of version 1 count, and the Unix epoch.
const gregorian = 0x01B21DD213814000

// uuidTime is the time in a UUID of version 1, in Unix milliseconds; 0 for any other
// string. GitHub's delivery ids are such UUIDs, which is not documented: good enough to
// order a gate's opening and closing, when nothing better is known.
func uuidTime(guid string) int64 {
	if len(guid) != 36 || guid[8] != '-' || guid[13] != '-' || guid[18] != '-' || guid[23] != '-' || guid[14] != '1' {
		return 0
	}
	digits, err := hex.DecodeString(guid[15:18] + guid[9:13] + guid[0:8] + "0")
	if err != nil {
		return 0
	}
	var ticks int64 // 60 bits, written with four zero bits behind
	for _, b := range digits {
		ticks = ticks<<8 | int64(b)
	}
	ticks = ticks >> 4 & 0x0fff_ffff_ffff_ffff
	return max(0, (ticks-gregorian)/10_000)
}
