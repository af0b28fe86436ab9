package github

import (
	"context"
	"fmt"
	"net/http"
	"time"

	gh "github.com/google/go-github/v62/github"

	"github.com/paddock-ci/paddock/fleet"
)

// DeliveryInfo is one entry of the App's delivery log, which GitHub keeps for three days.
type DeliveryInfo struct {
	ID     int64     // grows with time
	GUID   string    // the X-GitHub-Delivery header; the same for redeliveries
	At     time.Time // when it was sent, in whole seconds
	Event  string    // workflow_job, installation, …
	Action string    // "" for events without one
	// Status is GitHub's word for the outcome, StatusCode what our answer was. Neither
	// is proof that the delivery was processed.
	Status     string
	StatusCode int
	Redelivery bool
}

// deliveriesPerPage is the most that GitHub gives at once.
const deliveriesPerPage = 100

// Deliveries lists the App's webhook deliveries, newest first, a page at a time: cursor
// is "" for the first and next of the page before for the others; next is "" on the last.
//
// GET /app/hook/deliveries.
func (c *Client) Deliveries(ctx context.Context, cursor string) (page []DeliveryInfo, next string, err error) {
	list, response, err := c.app.Apps.ListHookDeliveries(ctx, &gh.ListCursorOptions{PerPage: deliveriesPerPage, Cursor: cursor})
	if err != nil {
		return nil, "", fmt.Errorf("list webhook deliveries: %w", clean(err))
	}
	for _, d := range list {
		page = append(page, deliveryInfo(d))
	}
	return page, response.Cursor, nil
}

func deliveryInfo(d *gh.HookDelivery) DeliveryInfo {
	return DeliveryInfo{
		ID: d.GetID(), GUID: d.GetGUID(), At: d.GetDeliveredAt().Time, Event: d.GetEvent(), Action: d.GetAction(),
		Status: d.GetStatus(), StatusCode: d.GetStatusCode(), Redelivery: d.GetRedelivery(),
	}
}

// Delivery fetches one delivery with its payload, which can be applied as if it had
// arrived. ErrNotFound if GitHub no longer has it.
//
// GET /app/hook/deliveries/{delivery_id}.
func (c *Client) Delivery(ctx context.Context, id int64) (info DeliveryInfo, payload []byte, err error) {
	d, _, err := c.app.Apps.GetHookDelivery(ctx, id)
	if status(err) == http.StatusNotFound {
		err = ErrNotFound
	}
	if err != nil {
		return DeliveryInfo{}, nil, fmt.Errorf("fetch webhook delivery %d: %w", id, clean(err))
	}
	if d.Request == nil || d.Request.RawPayload == nil {
		return deliveryInfo(d), nil, fmt.Errorf("fetch webhook delivery %d: GitHub sends no payload", id)
	}
	return deliveryInfo(d), *d.Request.RawPayload, nil
}

// Job asks for one job. ErrNotFound if there is none, or none that the App may see. The
// repository is asked for too: a job does not say whether that is public.
//
// GET /repos/{owner}/{repo}/actions/jobs/{job_id} and GET /repos/{owner}/{repo}.
func (c *Client) Job(ctx context.Context, repository string, id fleet.JobID) (fleet.Job, error) {
	scope := fleet.Scope(repository)
	if !scope.IsRepository() {
		return fleet.Job{}, fmt.Errorf("job %d: repository %q: want owner/name", id, repository)
	}
	name := repository[len(scope.Owner())+1:]
	var found fleet.Job
	err := c.as(ctx, scope, func(client *gh.Client) error {
		r, _, err := client.Repositories.Get(ctx, scope.Owner(), name)
		if err != nil {
			return err
		}
		j, _, err := client.Actions.GetWorkflowJobByID(ctx, scope.Owner(), name, int64(id))
		if err != nil {
			return err
		}
		found = restJob(j)
		found.Repository, found.Public = r.GetFullName(), !r.GetPrivate()
		return nil
	})
	if status(err) == http.StatusNotFound {
		err = ErrNotFound
	}
	if err != nil {
		return fleet.Job{}, fmt.Errorf("ask for job %d of %s: %w", id, repository, clean(err))
	}
	if found.Status == "" {
		return fleet.Job{}, fmt.Errorf("ask for job %d of %s: its status is not known here", id, repository)
	}
	return found, nil
}

// restJob makes a job of REST's; the repository is not in it.
func restJob(j *gh.WorkflowJob) fleet.Job {
	return assemble(rawJob{
		ID: j.GetID(), RunID: j.GetRunID(), RunAttempt: int(j.GetRunAttempt()), Name: j.GetName(),
		Workflow: j.WorkflowName, Labels: j.Labels, Conclusion: j.Conclusion, RunnerName: j.RunnerName,
		CreatedAt: timeOf(j.CreatedAt), StartedAt: timeOf(j.StartedAt), CompletedAt: timeOf(j.CompletedAt),
	}, restStatuses[j.GetStatus()])
}

func timeOf(t *gh.Timestamp) *time.Time {
	if t == nil {
		return nil
	}
	return &t.Time
}
