package github

import (
	"context"
	"fmt"
	"net/http"
	"strings"

	gh "github.com/google/go-github/v62/github"

	"github.com/paddock-ci/paddock/fleet"
)

// Minted is a registered just-in-time runner.
type Minted struct {
	// RunnerID is GitHub's number, unique within the scope only.
	RunnerID int64
	// JIT is the runner's configuration with its key: a secret, good for one runner.
	JIT string
}

// String keeps the secret out of logs.
func (m Minted) String() string { return fmt.Sprintf("runner %d", m.RunnerID) }

// GoString keeps the secret out of %#v.
func (m Minted) GoString() string { return m.String() }

// Runner is a registered runner as GitHub sees it.
type Runner struct {
	ID     int64
	Name   string
	Status string // online or offline
	Busy   bool
	Labels fleet.Labels
}

// workFolder is where the runner keeps its checkouts, below its own directory.
const workFolder = "_work"

// MintRunner registers a just-in-time runner under a name that was written down before:
// when the answer is lost, FindRunner finds it. group is the runner group's id, 1 in a
// repository's scope. Errors: ErrNameTaken, ErrUnprocessable, *RateLimited,
// ErrNoInstallation; after any other one the runner may or may not be registered.
//
// POST /orgs/{org}/actions/runners/generate-jitconfig, or …/repos/{owner}/{repo}/….
func (c *Client) MintRunner(ctx context.Context, scope fleet.Scope, name string, group int64, labels fleet.Labels) (Minted, error) {
	folder := workFolder
	asked := &gh.GenerateJITConfigRequest{Name: name, RunnerGroupID: group, Labels: labels, WorkFolder: &folder}
	var config *gh.JITRunnerConfig
	err := c.as(ctx, scope, func(client *gh.Client) (err error) {
		if owner, repository, is := strings.Cut(string(scope), "/"); is {
			config, _, err = client.Actions.GenerateRepoJITConfig(ctx, owner, repository, asked)
		} else {
			config, _, err = client.Actions.GenerateOrgJITConfig(ctx, owner, asked)
		}
		return err
	})
	switch status(err) {
	case http.StatusConflict:
		err = ErrNameTaken
	case http.StatusUnprocessableEntity:
		err = fmt.Errorf("%w (is there a runner group %d that %s may use?): %w", ErrUnprocessable, group, scope, clean(err))
	}
	if err != nil {
		return Minted{}, fmt.Errorf("register runner %s in %s: %w", name, scope, clean(err))
	}
	return Minted{RunnerID: config.GetRunner().GetID(), JIT: config.GetEncodedJITConfig()}, nil
}

// FindRunner looks a runner up by its exact name; ok is false if there is none.
//
// GET …/actions/runners?name=.
func (c *Client) FindRunner(ctx context.Context, scope fleet.Scope, name string) (r Runner, ok bool, err error) {
	runners, _, err := c.runners(ctx, scope, &gh.ListRunnersOptions{Name: &name})
	if err != nil {
		return Runner{}, false, fmt.Errorf("find runner %s in %s: %w", name, scope, err)
	}
	for _, r := range runners {
		if strings.EqualFold(r.Name, name) {
			return r, true, nil
		}
	}
	return Runner{}, false, nil
}

// Runners lists all runners of a scope, foreign ones too.
//
// GET …/actions/runners, by pages of 100.
func (c *Client) Runners(ctx context.Context, scope fleet.Scope) ([]Runner, error) {
	var all []Runner
	options := &gh.ListRunnersOptions{ListOptions: gh.ListOptions{PerPage: 100, Page: 1}}
	for options.Page != 0 {
		part, next, err := c.runners(ctx, scope, options)
		if err != nil {
			return nil, fmt.Errorf("list the runners of %s: %w", scope, err)
		}
		all = append(all, part...)
		options.Page = next
	}
	return all, nil
}

// runners asks for one page, and says which is the next; 0: none.
func (c *Client) runners(ctx context.Context, scope fleet.Scope, options *gh.ListRunnersOptions) ([]Runner, int, error) {
	var part *gh.Runners
	var response *gh.Response
	err := c.as(ctx, scope, func(client *gh.Client) (err error) {
		if owner, repository, is := strings.Cut(string(scope), "/"); is {
			part, response, err = client.Actions.ListRunners(ctx, owner, repository, options)
		} else {
			part, response, err = client.Actions.ListOrganizationRunners(ctx, owner, options)
		}
		return err
	})
	if err != nil {
		return nil, 0, clean(err)
	}
	runners := make([]Runner, 0, len(part.Runners))
	for _, r := range part.Runners {
		labels := make([]string, 0, len(r.Labels))
		for _, l := range r.Labels {
			labels = append(labels, l.GetName())
		}
		runners = append(runners, Runner{
			ID: r.GetID(), Name: r.GetName(), Status: r.GetStatus(), Busy: r.GetBusy(), Labels: fleet.NewLabels(labels...),
		})
	}
	return runners, response.NextPage, nil
}

// RemoveRunner removes a runner, so that GitHub gives it no job any more. It is nil if
// the runner was removed or is not there, and ErrBusy if it has a job: then its VM must
// be kept. This is the only safe way to end a registered VM.
//
// DELETE …/actions/runners/{runner_id}: 204, 404, 422.
func (c *Client) RemoveRunner(ctx context.Context, scope fleet.Scope, id int64) error {
	err := c.as(ctx, scope, func(client *gh.Client) (err error) {
		if owner, repository, is := strings.Cut(string(scope), "/"); is {
			_, err = client.Actions.RemoveRunner(ctx, owner, repository, id)
		} else {
			_, err = client.Actions.RemoveOrganizationRunner(ctx, owner, id)
		}
		return err
	})
	switch status(err) {
	case http.StatusNotFound:
		return nil
	case http.StatusUnprocessableEntity:
		err = ErrBusy
	}
	if err != nil {
		return fmt.Errorf("remove runner %d from %s: %w", id, scope, clean(err))
	}
	return nil
}
