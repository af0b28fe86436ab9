package githubtest

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// The part of the Actions service that concerns one running job.

// acquireJob hands the job over: this is where it starts. Asked again by the same
// runner, because the answer was lost, it answers the same and starts nothing.
func (g *GitHub) acquireJob(c *call, who bearer) answer {
	var asked struct {
		Message string `json:"jobMessageId"`
	}
	if err := json.Unmarshal(c.body, &asked); err != nil {
		return refuse(http.StatusBadRequest, err.Error())
	}
	j := who.runner.job
	if j == nil || j.message != asked.Message || j.status == fleet.JobCompleted {
		return refuse(http.StatusNotFound, "job assignment is invalid")
	}
	if j.status == fleet.JobQueued {
		g.begin(j)
	}
	value := secret("job_")
	g.bearers[value] = bearer{runner: who.runner, job: j}
	return ok(j.request(c.base, value))
}

// request is the message that describes a job to its runner.
func (j *job) request(base, token string) object {
	var steps []object
	for i, script := range j.spec.scripts() {
		name, _, _ := strings.Cut(script, "\n")
		steps = append(steps, object{
			"id": newUUID(j.startedAt), "type": "action", "reference": object{"type": "script"},
			"displayNameToken": "Run " + name, "contextName": fmt.Sprintf("__run_%d", i+1), "condition": "success()",
			"inputs": object{"type": 2, "map": []object{{"key": "script", "value": script}}},
		})
	}
	repo := j.run.repo
	return object{
		"messageType": "RunnerJobRequest",
		"plan":        object{"scopeIdentifier": j.planID, "planId": j.planID, "planType": "free", "version": 12},
		"timeline":    object{"id": j.planID}, "jobId": j.backend, "jobDisplayName": j.spec.Name,
		"jobName": "__default", "requestId": int64(j.id), "lockedUntil": j.lockedUntil.UTC().Format(time.RFC3339Nano),
		"resources": object{"endpoints": []object{{
			"name": "SystemVssConnection", "url": base + runPath + "/" + j.planID, "isShared": false, "isReady": true,
			"authorization": object{"scheme": "OAuth", "parameters": object{"AccessToken": token}},
			"data":          object{},
		}}},
		"contextData": object{"github": contextData(map[string]string{
			"event_name": "push", "server_url": base, "api_url": base, "graphql_url": base + "/graphql",
			"workflow": j.run.workflow, "repository": repo.Name, "repository_owner": repo.owner.login,
			"run_id": fmt.Sprint(j.run.id), "run_number": fmt.Sprint(j.run.number), "run_attempt": fmt.Sprint(j.attempt),
			"actor": "octocat", "ref": "refs/heads/main", "sha": head, "token": token,
		})},
		"variables": object{
			"system.github.job":   object{"value": j.spec.Name},
			"system.github.token": object{"value": token, "isSecret": true},
		},
		"mask": []any{}, "environmentVariables": []any{}, "defaults": []any{}, "fileTable": []any{}, "steps": steps,
	}
}

// scripts are the job's steps; sleeping is one more, and a job without steps says hello.
func (s JobSpec) scripts() []string {
	scripts := slices.Clone(s.Steps)
	if s.Seconds > 0 {
		scripts = append(scripts, fmt.Sprintf("sleep %g", s.Seconds))
	}
	if len(scripts) == 0 {
		scripts = []string{"echo hello"}
	}
	return scripts
}

// contextData is a context of expressions in the encoding of job messages: t is the type
// (2: dictionary), d its pairs of key and value.
func contextData(values map[string]string) object {
	pairs := []object{{"k": "event", "v": object{"t": 2, "d": []object{}}}}
	for _, key := range slices.Sorted(maps.Keys(values)) {
		pairs = append(pairs, object{"k": key, "v": values[key]})
	}
	return object{"t": 2, "d": pairs}
}

// running is the job of the token; a job's token is good for nothing else.
func running(c *call, who bearer) (*job, bool) {
	return who.job, who.job != nil && who.job.planID == c.PathValue("plan")
}

var notRunning = refuse(http.StatusNotFound, "TaskOrchestrationPlanNotFoundException: the token is for no such job")

func (g *GitHub) renewJob(c *call, who bearer) answer {
	j, good := running(c, who)
	if !good || j.status != fleet.JobInProgress {
		return notRunning
	}
	j.lockedUntil = g.c.Now().Add(g.c.Lock)
	return ok(object{"lockedUntil": j.lockedUntil.UTC().Format(time.RFC3339Nano)})
}

// conclusions translates what runners say into GitHub's words.
var conclusions = map[string]string{
	"succeeded": "success", "success": "success", "failed": "failure", "failure": "failure",
	"canceled": "cancelled", "cancelled": "cancelled", "skipped": "skipped",
}

// completeJob ends the job, with the conclusion of its runner. A job that was asked to
// stop is cancelled, whatever the runner made of that.
func (g *GitHub) completeJob(c *call, who bearer) answer {
	j, good := running(c, who)
	if !good {
		return notRunning
	}
	var said struct {
		Conclusion string `json:"conclusion"`
	}
	if err := json.Unmarshal(c.body, &said); err != nil {
		return refuse(http.StatusBadRequest, err.Error())
	}
	if j.status != fleet.JobInProgress {
		return ok(object{}) // said again, because the answer was lost
	}
	conclusion := cmp.Or(conclusions[strings.ToLower(said.Conclusion)], "failure")
	if j.stop {
		conclusion = "cancelled"
	}
	g.complete(j, conclusion)
	return ok(object{})
}

// patchTimeline takes the records of the job's steps.
func (g *GitHub) patchTimeline(c *call, who bearer) answer {
	j, good := running(c, who)
	if !good {
		return notRunning
	}
	var records struct {
		Value []struct {
			Type, Name, State string
			StartTime         time.Time
			FinishTime        *time.Time
			Result            *string
		}
	}
	if err := json.Unmarshal(emptyTimes(c.body), &records); err != nil {
		return refuse(http.StatusBadRequest, err.Error())
	}
	j.steps = nil
	for _, r := range records.Value {
		if r.Type != "Task" || strings.EqualFold(r.State, "Pending") {
			continue
		}
		step := stepRecord{name: r.Name, started: r.StartTime}
		if strings.EqualFold(r.State, "Completed") && r.Result != nil {
			step.conclusion, step.finished = cmp.Or(conclusions[strings.ToLower(*r.Result)], "failure"), r.StartTime
			if r.FinishTime != nil {
				step.finished = *r.FinishTime
			}
		}
		j.steps = append(j.steps, step)
	}
	return ok(object{"count": len(records.Value), "value": []any{}})
}

// emptyTimes makes null of the empty strings that runners send for times to come.
func emptyTimes(body []byte) []byte {
	return []byte(strings.NewReplacer(`"StartTime":""`, `"StartTime":null`, `"FinishTime":""`, `"FinishTime":null`).
		Replace(string(body)))
}

// postLines takes log lines as they are written.
func (g *GitHub) postLines(c *call, who bearer) answer {
	j, good := running(c, who)
	if !good {
		return notRunning
	}
	var lines struct{ Value []string }
	if err := json.Unmarshal(c.body, &lines); err != nil {
		return refuse(http.StatusBadRequest, err.Error())
	}
	j.live = append(j.live, lines.Value...)
	g.touch()
	return answer{status: http.StatusNoContent}
}

func (g *GitHub) createLog(c *call, who bearer) answer {
	j, good := running(c, who)
	if !good {
		return notRunning
	}
	j.uploaded = append(j.uploaded, "")
	return ok(object{"id": len(j.uploaded), "path": fmt.Sprintf("logs/%d", len(j.uploaded))})
}

func (g *GitHub) postLog(c *call, who bearer) answer {
	j, good := running(c, who)
	id := int(c.pathID("log"))
	if !good || id < 1 || id > len(j.uploaded) {
		return notRunning
	}
	j.uploaded[id-1] += string(c.body)
	return ok(object{"id": id})
}
