package github_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github"
	"github.com/paddock-ci/paddock/github/githubtest"
	"github.com/paddock-ci/paddock/github/githubtest/testrunner"
)

var macOS = fleet.NewLabels("self-hosted", "macOS")

// setup is a client of a simulated GitHub with organization acme (acme/app is private,
// acme/open public), person solo and stranger, for whom the App is not installed.
func setup(t *testing.T, c githubtest.Config) (*githubtest.GitHub, *github.Client, *wire) {
	t.Helper()
	c.Repositories = append(c.Repositories, githubtest.Repository{Name: "acme/app"},
		githubtest.Repository{Name: "acme/open", Public: true}, githubtest.Repository{Name: "solo/tool", User: true},
		githubtest.Repository{Name: "stranger/x", Uninstalled: true})
	gh, err := githubtest.New(c)
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(gh)
	t.Cleanup(server.Close)
	w := &wire{}
	client, err := github.New(github.Config{
		AppID: gh.AppID(), PrivateKey: gh.PrivateKey(), BaseURL: server.URL, Transport: w, WritesPerMinute: -1,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if v := gh.Violations(); len(v) != 0 {
			t.Errorf("violations: %q", v)
		}
	})
	return gh, client, w
}

// wire counts what goes over it.
type wire struct{ requests, unchanged atomic.Int64 }

func (w *wire) RoundTrip(r *http.Request) (*http.Response, error) {
	w.requests.Add(1)
	response, err := http.DefaultTransport.RoundTrip(r)
	if err == nil && response.StatusCode == http.StatusNotModified {
		w.unchanged.Add(1)
	}
	return response, err
}

// jit matches the request that registers a runner.
func jit(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, "/generate-jitconfig") }

// A runner's registration from beginning to end, for an organization and for a
// repository, of an organization and of a person.
func TestRunners(t *testing.T) {
	for _, scope := range []fleet.Scope{"acme", "ACME", "acme/app", "solo/tool"} {
		t.Run(string(scope), func(t *testing.T) {
			_, client, _ := setup(t, githubtest.Config{})
			ctx := t.Context()
			minted, err := client.MintRunner(ctx, scope, "paddock-x-1", 1, macOS)
			if err != nil || minted.RunnerID == 0 || minted.JIT == "" {
				t.Fatalf("%v, minted %v", err, minted)
			}
			found, ok, err := client.FindRunner(ctx, scope, "paddock-x-1")
			if err != nil || !ok || found.ID != minted.RunnerID || found.Status != "offline" || found.Busy || found.Labels.Key() != "macos,self-hosted" {
				t.Errorf("%v, found %v %+v", err, ok, found)
			}
			if _, ok, err := client.FindRunner(ctx, scope, "paddock-x"); err != nil || ok {
				t.Errorf("part of a name: %v, %v", ok, err)
			}
			for range 2 { // the second time it is not there, which is as good
				if err := client.RemoveRunner(ctx, scope, minted.RunnerID); err != nil {
					t.Error(err)
				}
			}
			if all, err := client.Runners(ctx, scope); err != nil || len(all) != 0 {
				t.Errorf("%v, left %+v", err, all)
			}
		})
	}
}

// More runners than fit on a page.
func TestRunnersByPages(t *testing.T) {
	_, client, _ := setup(t, githubtest.Config{})
	for i := range 205 {
		if _, err := client.MintRunner(t.Context(), "acme", fmt.Sprintf("r-%d", i), 1, macOS); err != nil {
			t.Fatal(err)
		}
	}
	all, err := client.Runners(t.Context(), "acme")
	seen := map[string]bool{}
	for _, r := range all {
		seen[r.Name] = true
	}
	if err != nil || len(seen) != 205 {
		t.Errorf("%v, %d runners", err, len(seen))
	}
}

// The answer to a registration is lost: the name is taken, the runner is found by it,
// removed, and registered again under the next name.
func TestALostAnswer(t *testing.T) {
	gh, client, _ := setup(t, githubtest.Config{Faults: githubtest.Once(1, jit, githubtest.RequestFault{Lose: true})})
	ctx := t.Context()
	if _, err := client.MintRunner(ctx, "acme", "r-1", 1, macOS); err == nil {
		t.Fatal("the answer was not lost")
	}
	if _, err := client.MintRunner(ctx, "acme", "r-1", 1, macOS); !errors.Is(err, github.ErrNameTaken) {
		t.Fatalf("%v, want ErrNameTaken", err)
	}
	found, ok, err := client.FindRunner(ctx, "acme", "r-1")
	if err != nil || !ok {
		t.Fatalf("%v, found %v", err, ok)
	}
	if err := client.RemoveRunner(ctx, "acme", found.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := client.MintRunner(ctx, "acme", "r-2", 1, macOS); err != nil {
		t.Fatal(err)
	}
	if left := gh.Runners(); len(left) != 1 || left[0].Name != "r-2" {
		t.Errorf("runners %+v", left)
	}
}

// GitHub understands and will not: no such group.
func TestUnprocessable(t *testing.T) {
	_, client, _ := setup(t, githubtest.Config{})
	_, err := client.MintRunner(t.Context(), "acme", "r", 99, macOS)
	if !errors.Is(err, github.ErrUnprocessable) || !strings.Contains(err.Error(), "runner group 99") {
		t.Errorf("%v, want ErrUnprocessable with a hint", err)
	}
}

// A limit is told with its end, requests of the kind are refused here until then without
// being sent, and other kinds are not.
func TestLimits(t *testing.T) {
	inAnHour := time.Now().Add(time.Hour).Truncate(time.Second)
	for _, c := range []struct {
		name  string
		fault githubtest.RequestFault
		until time.Time
	}{
		{"429 with Retry-After", githubtest.RequestFault{Status: 429, RetryAfter: 90 * time.Second}, time.Now().Add(90 * time.Second)},
		{"403 with Retry-After", githubtest.RequestFault{Status: 403, RetryAfter: 90 * time.Second}, time.Now().Add(90 * time.Second)},
		{"429 without a word", githubtest.RequestFault{Status: 429}, time.Now().Add(time.Minute)},
		{"403, nothing remains", githubtest.RequestFault{Status: 403, Exhausted: true, Reset: inAnHour}, inAnHour},
	} {
		t.Run(c.name, func(t *testing.T) {
			gh, client, wire := setup(t, githubtest.Config{})
			ctx := t.Context()
			if _, err := client.MintRunner(ctx, "acme", "first", 1, macOS); err != nil {
				t.Fatal(err) // from here on it is known what registrations are counted as
			}
			gh.SetFaults(githubtest.Once(1, jit, c.fault))
			for range 2 {
				_, err := client.MintRunner(ctx, "acme", "r", 1, macOS)
				var limited *github.RateLimited
				if !errors.As(err, &limited) || limited.Until.Sub(c.until).Abs() > 5*time.Second {
					t.Fatalf("%v, want RateLimited until %v", err, c.until)
				}
			}
			before := wire.requests.Load()
			if _, err := client.MintRunner(ctx, "acme", "r", 1, macOS); err == nil || wire.requests.Load() != before {
				t.Errorf("%v; a request was sent in spite of the limit", err)
			}
			if c.fault.Exhausted {
				return // it was for the resource core: everything
			}
			if _, err := client.Runners(ctx, "acme"); err != nil {
				t.Errorf("another kind of request: %v", err)
			}
			if _, err := client.MintRunner(ctx, "solo/tool", "r", 1, macOS); err != nil {
				t.Errorf("another installation: %v", err)
			}
		})
	}
}

// The last registration of the hour says that nothing remains: registrations stop, and
// everything else goes on. go-github by itself would stop everything.
func TestTheRegistrationsOfTheHourAreSpent(t *testing.T) {
	_, client, _ := setup(t, githubtest.Config{Limit: 3})
	ctx := t.Context()
	for i := range 3 {
		if _, err := client.MintRunner(ctx, "acme", fmt.Sprint("r-", i), 1, macOS); err != nil {
			t.Fatal(err)
		}
	}
	_, err := client.MintRunner(ctx, "acme", "r-3", 1, macOS)
	var limited *github.RateLimited
	if !errors.As(err, &limited) || limited.Resource != "actions_runner_registration" || time.Until(limited.Until) < 50*time.Minute {
		t.Fatalf("%v, want RateLimited for an hour", err)
	}
	for range 2 {
		if _, err := client.Runners(ctx, "acme"); err != nil {
			t.Error(err)
		}
	}
}

// A permission is missing: that is not a limit, and says what GitHub said.
func TestForbidden(t *testing.T) {
	gh, client, _ := setup(t, githubtest.Config{})
	gh.SetFaults(githubtest.Once(1, jit, githubtest.RequestFault{Status: 403}))
	_, err := client.MintRunner(t.Context(), "acme", "r", 1, macOS)
	var limited *github.RateLimited
	var refused *github.Refused
	if errors.As(err, &limited) || !errors.As(err, &refused) || refused.Status != 403 {
		t.Errorf("%v, want Refused with 403", err)
	}
	if _, err := client.MintRunner(t.Context(), "acme", "r", 1, macOS); err != nil {
		t.Errorf("the next one: %v", err)
	}
}

// The App is not installed for an owner, there is no such owner, or it was installed anew
// since the client last looked.
func TestInstallations(t *testing.T) {
	gh, client, wire := setup(t, githubtest.Config{})
	ctx := t.Context()
	for _, scope := range []fleet.Scope{"stranger", "stranger/x", "nobody", "nobody/x", "solo"} {
		if _, err := client.MintRunner(ctx, scope, "r", 1, macOS); !errors.Is(err, github.ErrNoInstallation) {
			t.Errorf("%s: %v, want ErrNoInstallation", scope, err)
		}
	}
	before := wire.requests.Load()
	if _, err := client.MintRunner(ctx, "nobody", "r", 1, macOS); !errors.Is(err, github.ErrNoInstallation) || wire.requests.Load() != before {
		t.Errorf("%v, after %d more requests; want it remembered", err, wire.requests.Load()-before)
	}
	if _, err := client.MintRunner(ctx, "acme", "r-1", 1, macOS); err != nil {
		t.Fatal(err)
	}
	gh.Reinstall("acme")
	_, err := client.MintRunner(ctx, "acme", "r-2", 1, macOS)
	if err != nil {
		t.Errorf("after the App was installed anew: %v", err)
	}
}

// Jobs as REST tells them.
func TestJob(t *testing.T) {
	gh, client, _ := setup(t, githubtest.Config{})
	ctx := t.Context()
	for _, c := range []struct {
		repository, environment string
		want                    fleet.JobStatus
		public                  bool
	}{
		{"acme/app", "", fleet.JobQueued, false},
		{"acme/open", "", fleet.JobQueued, true},
		{"solo/tool", "production", fleet.JobWaiting, false},
	} {
		run, ids, err := gh.QueueRun(githubtest.Run{Repository: c.repository, Workflow: "CI", Jobs: []githubtest.JobSpec{
			{Name: "build", Labels: []string{"Self-Hosted", "macOS", "macos"}, Environment: c.environment},
		}})
		if err != nil {
			t.Fatal(err)
		}
		job, err := client.Job(ctx, strings.ToUpper(c.repository), ids[0])
		if err != nil || job.Status != c.want || job.Public != c.public || job.Repository != c.repository ||
			job.RunID != run || job.RunAttempt != 1 || job.Name != "build" || job.Workflow != "CI" ||
			job.Labels.Key() != "macos,self-hosted" || job.CreatedAt.IsZero() || !job.StartedAt.IsZero() {
			t.Errorf("%s: %v, job %+v", c.repository, err, job)
		}
		if _, err := client.Job(ctx, "acme/none", ids[0]); !errors.Is(err, github.ErrNotFound) && !errors.Is(err, github.ErrNoInstallation) {
			t.Errorf("in a repository that is not there: %v", err)
		}
	}
	if _, err := client.Job(ctx, "acme/app", 1); !errors.Is(err, github.ErrNotFound) {
		t.Errorf("no such job: %v, want ErrNotFound", err)
	}
	if _, err := client.Job(ctx, "acme", 1); err == nil {
		t.Error("an organization is no repository")
	}
}

// The delivery log by pages, newest first, and a payload that can be applied.
func TestDeliveries(t *testing.T) {
	gh, client, _ := setup(t, githubtest.Config{
		Faults: githubtest.Faults{Delivery: func(githubtest.Delivery) githubtest.Fate { return githubtest.Fate{Drop: true} }},
	})
	ctx := t.Context()
	_, ids, err := gh.QueueRun(githubtest.Run{Repository: "acme/open", Jobs: []githubtest.JobSpec{{Name: "m", Labels: macOS, Matrix: 250}}})
	if err != nil {
		t.Fatal(err)
	}
	var all []github.DeliveryInfo
	cursor, pages := "", 0
	for {
		page, next, err := client.Deliveries(ctx, cursor)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, page...)
		pages++
		if cursor = next; cursor == "" {
			break
		}
	}
	if len(all) != 250 || pages != 3 {
		t.Fatalf("%d deliveries on %d pages", len(all), pages)
	}
	for i, d := range all[1:] {
		if d.ID >= all[i].ID {
			t.Fatalf("%d after %d: want the newest first", d.ID, all[i].ID)
		}
	}
	last := all[0]
	info, payload, err := client.Delivery(ctx, last.ID)
	if err != nil || info != last || info.Event != "workflow_job" || info.Action != "queued" || info.StatusCode != 502 {
		t.Errorf("%v, delivery %+v, in the list %+v", err, info, last)
	}
	job, err := github.ParseJob(payload, info.GUID)
	if err != nil || job.ID != ids[249] || !job.Public || job.Status != fleet.JobQueued {
		t.Errorf("%v, job %+v", err, job)
	}
	// The id carries the time of the sending, here to the millisecond.
	if sent := gh.Deliveries()[249].At.UnixMilli(); job.Gate != sent {
		t.Errorf("gate %d, want %d", job.Gate, sent)
	}
	if _, _, err := client.Delivery(ctx, 1); !errors.Is(err, github.ErrNotFound) {
		t.Errorf("no such delivery: %v, want ErrNotFound", err)
	}
}

// What has not changed is asked for conditionally, and answered from memory; what has
// changed is seen.
func TestUnchangedAnswers(t *testing.T) {
	_, client, wire := setup(t, githubtest.Config{})
	ctx := t.Context()
	for i := range 3 {
		for range 2 {
			if all, err := client.Runners(ctx, "acme"); err != nil || len(all) != i {
				t.Errorf("%v, runners %+v, want %d", err, all, i)
			}
		}
		if _, err := client.MintRunner(ctx, "acme", fmt.Sprint("r-", i), 1, macOS); err != nil {
			t.Fatal(err)
		}
	}
	if n := wire.unchanged.Load(); n != 3 {
		t.Errorf("%d answers were 304, want 3", n)
	}
}

// An answer that has not changed costs nothing: with two requests an hour, one may ask on.
func TestUnchangedAnswersAreFree(t *testing.T) {
	_, client, _ := setup(t, githubtest.Config{Limit: 2})
	for range 10 {
		if _, err := client.Runners(t.Context(), "acme"); err != nil {
			t.Fatal(err)
		}
	}
}

// A login that is limited is a limit like any other.
func TestALimitedLogin(t *testing.T) {
	gh, client, _ := setup(t, githubtest.Config{})
	gh.SetFaults(githubtest.Once(1, func(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, "/access_tokens") },
		githubtest.RequestFault{Status: 429, RetryAfter: 30 * time.Second}))
	_, err := client.MintRunner(t.Context(), "acme", "r", 1, macOS)
	var limited *github.RateLimited
	if !errors.As(err, &limited) || time.Until(limited.Until) > 31*time.Second {
		t.Errorf("%v, want RateLimited for 30 s", err)
	}
}

// A busy runner is not removed; when its job is done, it is gone.
func TestABusyRunnerStays(t *testing.T) {
	gh, client, _ := setup(t, githubtest.Config{})
	ctx := t.Context()
	_, ids, err := gh.QueueRun(githubtest.Run{Repository: "acme/app", Jobs: []githubtest.JobSpec{
		{Name: "build", Labels: macOS, Steps: []string{"exec sleep 600"}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	minted, err := client.MintRunner(ctx, "acme", "r", 1, macOS)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		_, err := testrunner.Run(ctx, strings.NewReader(minted.JIT), io.Discard)
		ended <- err
	}()
	if _, err := gh.WaitJob(ctx, ids[0], fleet.JobInProgress); err != nil {
		t.Fatal(err)
	}
	if err := client.RemoveRunner(ctx, "acme", minted.RunnerID); !errors.Is(err, github.ErrBusy) {
		t.Errorf("%v, want ErrBusy", err)
	}
	found, ok, err := client.FindRunner(ctx, "acme", "r")
	if err != nil || !ok || !found.Busy || found.Status != "online" {
		t.Errorf("%v, found %v %+v", err, ok, found)
	}
	if err := gh.Cancel(ids[0]); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if err := client.RemoveRunner(ctx, "acme", minted.RunnerID); err != nil {
		t.Errorf("after its job: %v", err)
	}
}

// A request ends with its context.
func TestACancelledContext(t *testing.T) {
	_, client, _ := setup(t, githubtest.Config{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := client.Runners(ctx, "acme"); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want context.Canceled", err)
	}
}

// The configuration's mistakes, each with a message of its own, none with the key in it.
func TestNew(t *testing.T) {
	gh, err := githubtest.New(githubtest.Config{})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		c    github.Config
		says string
	}{
		{"no id", github.Config{PrivateKey: gh.PrivateKey()}, "no id"},
		{"no key", github.Config{AppID: 1}, "not an RSA key in PEM"},
		{"a broken key", github.Config{AppID: 1, PrivateKey: gh.PrivateKey()[:200]}, "not an RSA key in PEM"},
		{"a base URL without a host", github.Config{AppID: 1, PrivateKey: gh.PrivateKey(), BaseURL: "github.example"}, "want https://"},
	} {
		if _, err := github.New(c.c); err == nil || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), "BEGIN") {
			t.Errorf("%s: %v, want %q", c.name, err, c.says)
		}
	}
	if _, err := github.New(github.Config{AppID: 1, PrivateKey: gh.PrivateKey()}); err != nil {
		t.Error(err)
	}
}

// A minted runner's secret does not come out when it is printed.
func TestSecretsAreNotPrinted(t *testing.T) {
	m := github.Minted{RunnerID: 7, JIT: "the secret"}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s"} {
		if s := fmt.Sprintf(verb, m); strings.Contains(s, "secret") || !strings.Contains(s, "7") {
			t.Errorf("%s prints %q", verb, s)
		}
	}
}
