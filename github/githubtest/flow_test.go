package githubtest_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github"
	"github.com/paddock-ci/paddock/github/githubtest"
	"github.com/paddock-ci/paddock/github/githubtest/testrunner"
)

// secret signs the webhooks of these tests.
var secret = []byte("a secret of the test")

// macOS is what jobs ask for and runners offer here.
var macOS = fleet.NewLabels("self-hosted", "macOS")

// farm is a simulated GitHub with organization acme (repositories acme/app, private,
// and acme/open, public) and person solo (solo/tool), a client, and a receiver of
// webhooks that checks their signatures and keeps the jobs that they tell of.
type farm struct {
	*githubtest.GitHub
	client *github.Client
	url    string

	mu       sync.Mutex
	received []fleet.Job
	news     chan struct{}
}

func newFarm(t *testing.T, c githubtest.Config) *farm {
	t.Helper()
	f := &farm{news: make(chan struct{}, 1)}
	hook := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { f.receive(t, w, r) }))
	t.Cleanup(hook.Close)
	c.Secret, c.Webhook = secret, hook.URL
	c.Repositories = append(c.Repositories, githubtest.Repository{Name: "acme/app"},
		githubtest.Repository{Name: "acme/open", Public: true}, githubtest.Repository{Name: "solo/tool", User: true},
		githubtest.Repository{Name: "stranger/x", Uninstalled: true})
	gh, err := githubtest.New(c)
	if err != nil {
		t.Fatal(err)
	}
	f.GitHub = gh
	server := httptest.NewServer(gh)
	t.Cleanup(server.Close)
	f.url = server.URL
	f.client, err = github.New(github.Config{
		AppID: gh.AppID(), PrivateKey: gh.PrivateKey(), BaseURL: server.URL, WritesPerMinute: -1,
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context())) // it ends in Cleanup, after the last delivery
	ended := make(chan error, 1)
	go func() { ended <- gh.Run(ctx) }()
	t.Cleanup(func() {
		last, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		if err := gh.WaitDelivered(last); err != nil {
			t.Error(err)
		}
		stop()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("Run: %v", err)
		}
	})
	return f
}

// receive is the webhook's receiver.
func (f *farm) receive(t *testing.T, w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		t.Errorf("webhook: %v", err)
	}
	if got, want := r.Header.Get("X-Hub-Signature-256"), githubtest.Sign(secret, body); got != want {
		t.Errorf("webhook signed %q, want %q", got, want)
	}
	if r.Header.Get("X-GitHub-Event") != "workflow_job" || r.Header.Get("X-GitHub-Hook-Installation-Target-ID") != "4711" {
		t.Errorf("webhook headers %v", r.Header)
	}
	job, err := github.ParseJob(body, r.Header.Get("X-GitHub-Delivery"))
	if err != nil {
		t.Errorf("webhook: %v", err)
	}
	f.mu.Lock()
	f.received = append(f.received, job)
	f.mu.Unlock()
	select {
	case f.news <- struct{}{}:
	default:
	}
	w.WriteHeader(http.StatusAccepted)
}

// statuses are the statuses that webhooks told of a job, in the order of their arrival.
func (f *farm) statuses(id fleet.JobID) []fleet.JobStatus {
	f.mu.Lock()
	defer f.mu.Unlock()
	var told []fleet.JobStatus
	for _, j := range f.received {
		if j.ID == id {
			told = append(told, j.Status)
		}
	}
	return told
}

// await waits until webhooks have told n times of the job.
func (f *farm) await(ctx context.Context, t *testing.T, id fleet.JobID, n int) []fleet.JobStatus {
	t.Helper()
	for {
		if told := f.statuses(id); len(told) >= n {
			return told
		}
		select {
		case <-f.news:
		case <-ctx.Done():
			t.Fatalf("job %d: webhooks told %v, want %d of them", id, f.statuses(id), n)
		}
	}
}

// queue queues one job and returns its id.
func (f *farm) queue(t *testing.T, repository string, spec githubtest.JobSpec) (runID int64, id fleet.JobID) {
	t.Helper()
	if spec.Labels == nil {
		spec.Labels = macOS
	}
	run, ids, err := f.QueueRun(githubtest.Run{Repository: repository, Jobs: []githubtest.JobSpec{spec}})
	if err != nil {
		t.Fatal(err)
	}
	return run, ids[0]
}

// start mints a runner and starts it; the channel gets its output when it has ended.
func (f *farm) start(ctx context.Context, t *testing.T, scope fleet.Scope, name string, labels fleet.Labels) <-chan string {
	t.Helper()
	minted, err := f.client.MintRunner(ctx, scope, name, 1, labels)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan string, 1)
	go func() {
		var out bytes.Buffer
		exit, err := testrunner.Run(ctx, strings.NewReader(minted.JIT), &out)
		if exit != 0 {
			out.WriteString(err.Error())
		}
		ended <- out.String()
	}()
	return ended
}

// online waits until the runner has opened its session.
func (f *farm) online(ctx context.Context, t *testing.T, name string) githubtest.Runner {
	t.Helper()
	for {
		changed := f.Changed()
		for _, r := range f.Runners() {
			if r.Name == name && r.Online {
				return r
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			t.Fatalf("runner %s did not come online", name)
		}
	}
}

// clean asserts that all traffic was as GitHub describes itself.
func (f *farm) clean(t *testing.T) {
	t.Helper()
	if v := f.Violations(); len(v) != 0 {
		t.Errorf("violations: %q", v)
	}
}

func soon(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// One job goes the whole way: queued by a webhook, run by a runner, completed.
func TestAJobRunsEndToEnd(t *testing.T) {
	f := newFarm(t, githubtest.Config{Senders: 1})
	ctx := soon(t)
	_, id := f.queue(t, "acme/app", githubtest.JobSpec{Name: "build", Steps: []string{"echo one\necho two >&2", "echo three"}})
	f.await(ctx, t, id, 1)
	out := <-f.start(ctx, t, "acme", "paddock-x-1", macOS)
	job, err := f.WaitJob(ctx, id, fleet.JobCompleted)
	if err != nil {
		t.Fatal(err, out)
	}
	if job.Conclusion != "success" || job.Log != "one\ntwo\nthree" || job.Starts != 1 || job.RunnerName != "paddock-x-1" {
		t.Errorf("job %+v", job)
	}
	if !strings.Contains(out, ": Running job: build\n") || !strings.Contains(out, ": Job build completed with result: Succeeded\n") {
		t.Errorf("the runner said %q", out)
	}
	want := []fleet.JobStatus{fleet.JobQueued, fleet.JobInProgress, fleet.JobCompleted}
	if told := f.await(ctx, t, id, 3); !slices.Equal(told, want) {
		t.Errorf("webhooks told %v, want %v", told, want)
	}
	if left := f.Runners(); len(left) != 0 {
		t.Errorf("an ephemeral runner is left: %+v", left)
	}
	f.clean(t)
}
