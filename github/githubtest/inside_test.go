package githubtest

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// bench is a simulated GitHub with a clock that the test drives and one repository.
type bench struct {
	*GitHub
	now time.Time
}

func newBench(t *testing.T, c Config) *bench {
	t.Helper()
	b := &bench{now: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)}
	c.Now = func() time.Time { return b.now }
	c.Repositories = append(c.Repositories, Repository{Name: "acme/app"}, Repository{Name: "acme/lib"}, Repository{Name: "other/x"})
	g, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	b.GitHub = g
	return b
}

// pass lets time go by.
func (b *bench) pass(d time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.now = b.now.Add(d)
	b.expire()
}

// runner registers a runner and brings it online.
func (b *bench) runner(scope fleet.Scope, name string, group int64, labels ...string) *runner {
	b.mu.Lock()
	defer b.mu.Unlock()
	r := b.register(scope, name, group, fleet.NewLabels(labels...))
	r.session = name
	b.online(r)
	return r
}

// take is what acquirejob does.
func (b *bench) take(r *runner) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.begin(r.job)
}

func (b *bench) one(t *testing.T, repository string, labels ...string) fleet.JobID {
	t.Helper()
	_, ids, err := b.QueueRun(Run{Repository: repository, Jobs: []JobSpec{{Name: "j", Labels: labels}}})
	if err != nil {
		t.Fatal(err)
	}
	return ids[0]
}

// has is the job that the runner was given; 0: none.
func (b *bench) has(r *runner) fleet.JobID {
	b.mu.Lock()
	defer b.mu.Unlock()
	if r.job == nil {
		return 0
	}
	return r.job.id
}

// One runner, one job of acme/app that asks for self-hosted and macOS.
func TestMatching(t *testing.T) {
	groups := []Group{{Org: "acme", ID: 2, Name: "lib only", Repositories: []string{"acme/lib"}}, {Org: "acme", ID: 3, Name: "all"}}
	for _, c := range []struct {
		name   string
		scope  fleet.Scope
		group  int64
		labels []string
		fits   bool
	}{
		{"the same labels", "acme", 1, []string{"self-hosted", "macOS"}, true},
		{"another case", "acme", 1, []string{"SELF-HOSTED", "macos"}, true},
		{"more labels than asked for", "acme", 1, []string{"self-hosted", "macOS", "xcode16"}, true},
		{"a label is missing", "acme", 1, []string{"self-hosted"}, false},
		{"the repository's own runner", "acme/app", 1, []string{"self-hosted", "macOS"}, true},
		{"another repository's runner", "acme/lib", 1, []string{"self-hosted", "macOS"}, false},
		{"another organization's runner", "other", 1, []string{"self-hosted", "macOS"}, false},
		{"a group that the repository may not use", "acme", 2, []string{"self-hosted", "macOS"}, false},
		{"a group for all", "acme", 3, []string{"self-hosted", "macOS"}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t, Config{Groups: groups})
			id := b.one(t, "acme/app", "self-hosted", "macOS")
			r := b.runner(c.scope, "r", c.group, c.labels...)
			if got := b.has(r) == id; got != c.fits {
				t.Errorf("it was given the job: %v, want %v", got, c.fits)
			}
		})
	}
}

// The oldest job goes first, whichever job the runner was made for.
func TestARunnerIsNotBoundToAJob(t *testing.T) {
	b := newBench(t, Config{})
	old, young := b.one(t, "acme/app", "macos"), b.one(t, "acme/lib", "macos")
	if got := b.has(b.runner("acme", "made-for-the-young-one", 1, "macos")); got != old {
		t.Errorf("it was given %d, want the older %d, not %d", got, old, young)
	}
}

// A job is given to a runner that does not take it: after 60 s it is queued again, at the
// head of the queue, and another runner takes it. It starts once.
func TestAnAssignmentThatIsNotTaken(t *testing.T) {
	b := newBench(t, Config{})
	id := b.one(t, "acme/app", "macos")
	dead := b.runner("acme", "dead", 1, "macos")
	later := b.one(t, "acme/app", "macos")
	b.pass(59 * time.Second)
	if b.has(dead) != id {
		t.Fatal("the job was taken back before its time")
	}
	b.pass(time.Second)
	if b.has(dead) != 0 {
		t.Fatal("the job was not taken back")
	}
	alive := b.runner("acme", "alive", 1, "macos")
	if b.has(alive) != id {
		t.Fatalf("the second runner has %d, want %d before %d", b.has(alive), id, later)
	}
	b.take(alive)
	if j, _ := b.Job(id); j.Starts != 1 || j.RunnerName != "alive" || j.Status != fleet.JobInProgress {
		t.Errorf("job %+v", j)
	}
}

// A runner dies with its job: the lock runs out and the job fails. It is not run again.
func TestALockThatIsNotRenewed(t *testing.T) {
	b := newBench(t, Config{})
	id := b.one(t, "acme/app", "macos")
	b.take(b.runner("acme", "r", 1, "macos"))
	b.pass(9 * time.Minute)
	if j, _ := b.Job(id); j.Status != fleet.JobInProgress {
		t.Fatalf("job %+v", j)
	}
	b.pass(time.Minute)
	if j, _ := b.Job(id); j.Status != fleet.JobCompleted || j.Conclusion != "failure" || j.Starts != 1 {
		t.Errorf("job %+v", j)
	}
	if left := b.Runners(); len(left) != 0 {
		t.Errorf("runners %+v", left)
	}
}

// A runner that is never needed is removed when the simulation is told so.
func TestAnIdleRunnerIsRemoved(t *testing.T) {
	b := newBench(t, Config{Idle: 5 * time.Minute})
	b.runner("acme", "idle", 1, "macos")
	b.pass(5 * time.Minute)
	if left := b.Runners(); len(left) != 0 {
		t.Errorf("runners %+v", left)
	}
}

// A job that was given to a runner is cancelled before that takes it: the runner is free
// for the next one.
func TestCancelledWhileAssigned(t *testing.T) {
	b := newBench(t, Config{})
	id := b.one(t, "acme/app", "macos")
	r := b.runner("acme", "r", 1, "macos")
	next := b.one(t, "acme/app", "macos")
	if err := b.Cancel(id); err != nil {
		t.Fatal(err)
	}
	if j, _ := b.Job(id); j.Conclusion != "cancelled" || j.Starts != 0 {
		t.Errorf("job %+v", j)
	}
	if b.has(r) != next {
		t.Errorf("the runner has %d, want %d", b.has(r), next)
	}
}

// The validation is worth nothing if it does not refuse: a response without a required
// field, one with a status that GitHub does not document, a request without labels, and a
// webhook with a field too many are recorded and answered 500.
func TestWhatDoesNotConformIsRefused(t *testing.T) {
	for _, c := range []struct {
		name, request, body string
		spoil               func(*call) answer
		says                string
	}{
		{"a response without a required field", "GET /app", "", func(*call) answer { return ok(object{"id": 1}) }, "node_id"},
		{"an undocumented status", "GET /app", "", func(*call) answer { return answer{status: http.StatusTeapot} }, "status is not supported"},
		{"an error without a body", "GET /app", "", func(*call) answer { return answer{status: http.StatusNotFound} }, "not JSON"},
		{"a request without labels", "POST /orgs/acme/actions/runners/generate-jitconfig", `{"name":"x","runner_group_id":1,"labels":[]}`, nil, "minimum number of items is 1"},
		{"an unknown path", "GET /no/such/path", "", nil, "no matching operation"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t, Config{})
			if c.spoil != nil {
				b.rest = http.NewServeMux()
				b.rest.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { c.spoil(&call{Request: r}).write(w) })
			}
			method, path, _ := strings.Cut(c.request, " ")
			r := httptest.NewRequestWithContext(t.Context(), method, path, strings.NewReader(c.body))
			r.Header.Set("Content-Type", "application/json")
			w := httptest.NewRecorder()
			b.ServeHTTP(w, r)
			if v := b.Violations(); w.Code != http.StatusInternalServerError || len(v) != 1 || !strings.Contains(v[0], c.says) {
				t.Errorf("status %d, violations %q, want one that says %q", w.Code, v, c.says)
			}
		})
	}
	b := newBench(t, Config{})
	b.repositories["acme/app"].raw = []byte(`{"name":"no more than that"}`)
	b.one(t, "acme/app", "macos")
	if v := b.Violations(); len(v) != 1 || !strings.Contains(v[0], "/repository") {
		t.Errorf("violations %q, want one about the webhook's repository", v)
	}
	if log := b.Deliveries(); len(log) != 0 {
		t.Errorf("the wrong webhook was sent all the same: %+v", log)
	}
}

// Delivery ids are UUIDs of version 1 and do not repeat; that they carry their time is
// tested where it is read, with ParseJob.
func TestUUIDs(t *testing.T) {
	at := time.Now()
	seen := map[string]bool{}
	for i := range 1000 {
		id := newUUID(at.Add(time.Duration(i) * time.Microsecond))
		if len(id) != 36 || id[14] != '1' || seen[id] {
			t.Fatalf("%q: not a new UUID of version 1", id)
		}
		seen[id] = true
	}
}
