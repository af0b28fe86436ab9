// Package testrunner is a small runner for the simulated GitHub: it reads a JIT config,
// runs the shell steps of one job, and reports their output and their outcome. It speaks
// the same protocol with the Actions service as a real runner, and prints the same lines.
//
// It is not a runner for GitHub: it knows no actions, no expressions and no containers.
// The demo and tests start it in the place of the real runner.
package testrunner

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// Intervals of the protocol.
const (
	renewEvery = time.Minute      // the job's lock lasts ten
	stopWithin = 10 * time.Second // a step that was asked to stop is killed after that
	sayWithin  = 30 * time.Second // the last words, after the context has ended
)

// Run reads a JIT config from jit, waits for one job, runs it, and returns. What the
// real runner prints goes to out. exit is 0 if a job was run, whatever became of it, and
// 1 with an error otherwise: the config cannot be read, or GitHub has removed the runner.
func Run(ctx context.Context, jit io.Reader, out io.Writer) (exit int, err error) {
	config, err := io.ReadAll(io.LimitReader(jit, maxConfig))
	if err != nil {
		return 1, fmt.Errorf("read the JIT config: %w", err)
	}
	r, err := newRunner(strings.TrimSpace(string(config)), out)
	if err != nil {
		return 1, err
	}
	if err := r.logIn(ctx); err != nil {
		return 1, err
	}
	if err := r.openSession(ctx); err != nil {
		return 1, err
	}
	r.say("Listening for Jobs")
	ref, err := r.waitForJob(ctx)
	if err != nil {
		r.closeSession(ctx)
		return 1, err
	}
	job, err := r.acquire(ctx, ref)
	if err != nil {
		r.closeSession(ctx)
		return 1, err
	}
	if err := r.runJob(ctx, job); err != nil {
		return 1, err
	}
	return 0, nil
}

// LogIn trades a JIT config for the runner's token at the Actions service, for tests
// that speak the protocol by hand.
func LogIn(ctx context.Context, jit string) (token string, err error) {
	r, err := newRunner(jit, io.Discard)
	if err != nil {
		return "", err
	}
	if err := r.logIn(ctx); err != nil {
		return "", err
	}
	return r.token, nil
}

// runner is one registered runner in one session.
type runner struct {
	files   files
	http    *http.Client
	token   string // of the runner, for the broker
	session string
	out     io.Writer
}

// say prints as the real runner does: time, colon, text.
func (r *runner) say(format string, args ...any) {
	_, _ = fmt.Fprintf(r.out, "%s: %s\n", time.Now().UTC().Format("2006-01-02 15:04:05Z"), fmt.Sprintf(format, args...))
}

// logIn trades the config's key for a token.
func (r *runner) logIn(ctx context.Context) error {
	assertion, err := r.files.assertion(time.Now())
	if err != nil {
		return err
	}
	form := url.Values{
		"grant_type":            {"client_credentials"},
		"client_assertion_type": {"urn:ietf:params:oauth:client-assertion-type:jwt-bearer"},
		"client_assertion":      {assertion},
	}
	var granted struct {
		AccessToken string `json:"access_token"`
	}
	err = r.do(ctx, http.MethodPost, r.files.credentials.Data.AuthorizationURL, "", form, &granted)
	if err != nil {
		return fmt.Errorf("log in: %w", err)
	}
	r.token = granted.AccessToken
	return nil
}

func (r *runner) openSession(ctx context.Context) error {
	var session struct {
		SessionID string `json:"sessionId"`
	}
	asked := map[string]any{"ownerName": "RUNNER", "agent": map[string]any{"name": r.files.runner.AgentName}}
	if err := r.do(ctx, http.MethodPost, r.files.runner.ServerURLV2+"/session", r.token, asked, &session); err != nil {
		return fmt.Errorf("open a session: %w", err)
	}
	r.session = session.SessionID
	return nil
}

// closeSession takes leave, so that no job is given to nobody.
func (r *runner) closeSession(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), sayWithin)
	defer cancel()
	_ = r.do(ctx, http.MethodDelete, r.files.runner.ServerURLV2+"/session", r.token, nil, nil) // it ends by itself, too
}

// envelope is a message of the broker: JSON within JSON.
type envelope struct {
	Type string `json:"messageType"`
	Body string `json:"body"`
}

// reference is the message that a job waits to be acquired.
type reference struct {
	ID     string `json:"runner_request_id"`
	RunURL string `json:"run_service_url"`
}

// poll asks for one message and waits as long as the broker holds the request.
func (r *runner) poll(ctx context.Context, status string) (envelope, error) {
	query := url.Values{"sessionId": {r.session}, "status": {status}, "runnerVersion": {"3.0.0"}, "disableUpdate": {"true"}}
	var m envelope
	err := r.do(ctx, http.MethodGet, r.files.runner.ServerURLV2+"/message?"+query.Encode(), r.token, nil, &m)
	return m, err
}

// waitForJob polls until a job's reference comes, and acknowledges it.
func (r *runner) waitForJob(ctx context.Context) (ref reference, err error) {
	for {
		m, err := r.poll(ctx, "Online")
		if err != nil {
			return ref, fmt.Errorf("wait for a job: %w", err)
		}
		if m.Type != "RunnerJobRequest" {
			continue
		}
		if err := json.Unmarshal([]byte(m.Body), &ref); err != nil {
			return ref, fmt.Errorf("wait for a job: read the message: %w", err)
		}
		where := r.files.runner.ServerURLV2 + "/acknowledge?sessionId=" + url.QueryEscape(r.session)
		if err := r.do(ctx, http.MethodPost, where, r.token, map[string]string{"runnerRequestId": ref.ID}, nil); err != nil {
			return ref, fmt.Errorf("acknowledge the job: %w", err)
		}
		return ref, nil
	}
}

// acquire takes the job over; from here on it is running.
func (r *runner) acquire(ctx context.Context, ref reference) (*job, error) {
	j := &job{runner: r, url: ref.RunURL}
	asked := map[string]string{"jobMessageId": ref.ID, "streamId": ref.ID}
	if err := r.do(ctx, http.MethodPost, ref.RunURL+"/acquirejob", r.token, asked, &j.request); err != nil {
		return nil, fmt.Errorf("acquire the job: %w", err)
	}
	for _, e := range j.request.Resources.Endpoints {
		if e.Name == "SystemVssConnection" {
			j.token = e.Authorization.Parameters["AccessToken"]
			return j, nil
		}
	}
	return nil, errors.New("acquire the job: its message carries no token")
}

// maxAnswer bounds an answer of the service: the largest is a job with its scripts.
const maxAnswer = 16 << 20

// do sends a request, JSON or a form, and decodes the answer; 202 and 204 have none.
func (r *runner) do(ctx context.Context, method, where, token string, body, answer any) error {
	var reader io.Reader
	kind := "application/json; charset=utf-8"
	switch body := body.(type) {
	case nil:
	case url.Values:
		reader, kind = strings.NewReader(body.Encode()), "application/x-www-form-urlencoded"
	default:
		encoded, err := json.Marshal(body)
		if err != nil {
			return err
		}
		reader = bytes.NewReader(encoded)
	}
	request, err := http.NewRequestWithContext(ctx, method, where, reader)
	if err != nil {
		return err
	}
	request.Header.Set("Content-Type", kind)
	if token != "" {
		request.Header.Set("Authorization", "Bearer "+token)
	}
	response, err := r.http.Do(request)
	if err != nil {
		return err
	}
	defer func() { _ = response.Body.Close() }()
	content, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer))
	if err != nil {
		return err
	}
	if response.StatusCode >= http.StatusBadRequest {
		return fmt.Errorf("%s: %s", response.Status, content)
	}
	if answer == nil || response.StatusCode == http.StatusAccepted || response.StatusCode == http.StatusNoContent {
		return nil
	}
	return json.Unmarshal(content, answer)
}
