package githubtest_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github/githubtest"
	"github.com/paddock-ci/paddock/github/githubtest/testrunner"
)

// service calls the Actions service by hand.
func (f *farm) service(t *testing.T, token, method, path, body string) (int, string) {
	t.Helper()
	kind := "application/json"
	if strings.HasPrefix(body, "client_assertion=") {
		kind = "application/x-www-form-urlencoded"
	}
	r, err := http.NewRequestWithContext(t.Context(), method, f.url+"/_services/"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+token)
	r.Header.Set("Content-Type", kind)
	response, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = response.Body.Close() }()
	var answer bytes.Buffer
	if _, err := answer.ReadFrom(response.Body); err != nil {
		t.Fatal(err)
	}
	return response.StatusCode, answer.String()
}

// field reads one field of a JSON answer.
func field(t *testing.T, answer, name string) string {
	t.Helper()
	var o map[string]any
	if err := json.Unmarshal([]byte(answer), &o); err != nil {
		t.Fatalf("%v: %s", err, answer)
	}
	return fmt.Sprint(o[name])
}

// Nobody gets in without the key of a runner that is registered, and a stranger's token
// is good for nothing.
func TestTheServiceIsGuarded(t *testing.T) {
	f := newFarm(t, githubtest.Config{})
	for _, c := range []struct {
		method, path, body string
		status             int
	}{
		{"POST", "token", "client_assertion=a.b.c", 400},
		{"POST", "broker/session", `{}`, 401},
		{"GET", "broker/message?sessionId=x", "", 401},
		{"POST", "broker/acknowledge", `{}`, 401},
		{"POST", "run/x/acquirejob", `{}`, 401},
		{"POST", "run/x/completejob", `{}`, 401},
		{"GET", "pipelines/_apis/connectionData", "", 401},
	} {
		if status, answer := f.service(t, "invented", c.method, c.path, c.body); status != c.status {
			t.Errorf("%s %s: %d %s, want %d", c.method, c.path, status, answer, c.status)
		}
	}
}

// The protocol step by step, with the answers lost on the way: what is asked twice is
// answered twice and happens once.
func TestTheProtocol(t *testing.T) {
	f := newFarm(t, githubtest.Config{})
	ctx := soon(t)
	_, id := f.queue(t, "acme/app", githubtest.JobSpec{Name: "build"})
	minted, err := f.client.MintRunner(ctx, "acme", "r", 1, macOS)
	if err != nil {
		t.Fatal(err)
	}
	token, err := testrunner.LogIn(ctx, minted.JIT)
	if err != nil {
		t.Fatal(err)
	}
	status, answer := f.service(t, token, "POST", "broker/session", `{"agent":{"name":"r"}}`)
	if status != 200 {
		t.Fatal(status, answer)
	}
	session := field(t, answer, "sessionId")
	if status, _ := f.service(t, token, "POST", "broker/session", `{"agent":{"name":"r"}}`); status != 409 {
		t.Errorf("a second session: %d, want 409", status)
	}
	if status, _ := f.service(t, token, "GET", "broker/message?sessionId=other", ""); status != 404 {
		t.Errorf("a message for another session: %d, want 404", status)
	}
	var reference struct {
		ID  string `json:"runner_request_id"`
		URL string `json:"run_service_url"`
	}
	for range 2 { // until it is acknowledged, the message comes again
		_, answer = f.service(t, token, "GET", "broker/message?sessionId="+session, "")
		if err := json.Unmarshal([]byte(field(t, answer, "body")), &reference); err != nil {
			t.Fatal(err)
		}
	}
	f.service(t, token, "POST", "broker/acknowledge", `{"runnerRequestId":"`+reference.ID+`"}`)
	run := reference.URL[strings.Index(reference.URL, "run/"):]
	if status, _ := f.service(t, token, "POST", run+"/acquirejob", `{"jobMessageId":"other"}`); status != 404 {
		t.Errorf("another message's job: %d, want 404", status)
	}
	for range 2 {
		if status, answer = f.service(t, token, "POST", run+"/acquirejob", `{"jobMessageId":"`+reference.ID+`"}`); status != 200 {
			t.Fatal(status, answer)
		}
	}
	var job struct {
		Resources struct {
			Endpoints []struct {
				Authorization struct{ Parameters map[string]string }
			}
		}
	}
	if err := json.Unmarshal([]byte(answer), &job); err != nil {
		t.Fatal(err)
	}
	jobToken := job.Resources.Endpoints[0].Authorization.Parameters["AccessToken"]
	if status, _ := f.service(t, token, "POST", run+"/completejob", `{"conclusion":"succeeded"}`); status != 404 {
		t.Errorf("completed with the runner's token: %d, want 404", status)
	}
	if status, _ := f.service(t, jobToken, "POST", run+"/renewjob", `{}`); status != 200 {
		t.Errorf("renewal: %d", status)
	}
	if err := f.client.RemoveRunner(ctx, "acme", minted.RunnerID); err == nil {
		t.Error("a busy runner was removed")
	}
	for range 2 {
		if status, answer := f.service(t, jobToken, "POST", run+"/completejob", `{"conclusion":"failed"}`); status != 200 {
			t.Error(status, answer)
		}
	}
	if j, _ := f.Job(id); j.Starts != 1 || j.Status != fleet.JobCompleted || j.Conclusion != "failure" {
		t.Errorf("job %+v", j)
	}
	if status, _ := f.service(t, token, "GET", "broker/message?sessionId="+session, ""); status != 401 {
		t.Errorf("the runner's token after its job: %d, want 401", status)
	}
	f.clean(t)
}
