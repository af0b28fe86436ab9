package feed_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/paddock-ci/paddock/feed"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github"
	"github.com/paddock-ci/paddock/store"
	"github.com/paddock-ci/paddock/store/storetest"
)

// The sweep on a small GitHub: a delivery log in memory, whose entries a test writes as
// it likes. It is noon; jobs are numbered, and job 7's deliveries are called "7 queued"
// and so on.

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// entry is one delivery in the log.
type entry struct {
	github.DeliveryInfo
	payload []byte
	err     error // that fetching it fails with
}

// logbook is the small GitHub.
type logbook struct {
	mu      sync.Mutex
	entries []entry // newest last
	jobs    map[fleet.JobID]fleet.Job
	asked   []fleet.JobID // for which Job was called
	fetched []string      // GUIDs
	listed  int           // pages
	listErr error
	jobErr  error
	arrive  func() // called before each page: the log grows while it is read
}

// deliver writes a delivery about a job that was created at the given time.
func (l *logbook) deliver(id int, status fleet.JobStatus, created, at time.Time, code int) *entry {
	payload, err := json.Marshal(map[string]any{
		"action": status,
		"workflow_job": map[string]any{
			"id": id, "run_id": 1, "name": "build", "status": status, "labels": []string{"self-hosted"},
			"created_at": created, "runner_name": nil, "conclusion": nil,
		},
		"repository": map[string]any{"full_name": "octo/hello", "private": true},
	})
	if err != nil {
		panic(err) // strings and numbers can be encoded
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.entries = append(l.entries, entry{payload: payload, DeliveryInfo: github.DeliveryInfo{
		ID: int64(len(l.entries) + 1), GUID: fmt.Sprintf("%d %s", id, status), At: at, Event: "workflow_job",
		Action: string(status), Status: http.StatusText(code), StatusCode: code,
	}})
	return &l.entries[len(l.entries)-1]
}

const pageSize = 100

func (l *logbook) Deliveries(_ context.Context, cursor string) (page []github.DeliveryInfo, next string, err error) {
	if l.arrive != nil {
		l.arrive()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.listed++
	if l.listErr != nil {
		return nil, "", l.listErr
	}
	// Newest first by time; equal times by position.
	sorted := slices.Clone(l.entries)
	slices.Reverse(sorted)
	slices.SortStableFunc(sorted, func(a, b entry) int { return b.At.Compare(a.At) })
	for _, e := range sorted {
		before := cursor == ""
		if !before {
			at, id, _ := strings.Cut(cursor, "/")
			limit, err := time.Parse(time.RFC3339Nano, at)
			if err != nil {
				return nil, "", err
			}
			before = e.At.Before(limit) || e.At.Equal(limit) && fmt.Sprintf("%09d", e.ID) < id
		}
		if !before {
			continue
		}
		if len(page) == pageSize {
			last := page[len(page)-1]
			return page, fmt.Sprintf("%s/%09d", last.At.Format(time.RFC3339Nano), last.ID), nil
		}
		page = append(page, e.DeliveryInfo)
	}
	return page, "", nil
}

func (l *logbook) Delivery(_ context.Context, id int64) (github.DeliveryInfo, []byte, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.entries {
		if e.ID == id {
			l.fetched = append(l.fetched, e.GUID)
			return e.DeliveryInfo, e.payload, e.err
		}
	}
	return github.DeliveryInfo{}, nil, github.ErrNotFound
}

func (l *logbook) Job(_ context.Context, _ string, id fleet.JobID) (fleet.Job, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.asked = append(l.asked, id)
	if l.jobErr != nil {
		return fleet.Job{}, l.jobErr
	}
	if j, known := l.jobs[id]; known {
		return j, nil
	}
	return fleet.Job{}, github.ErrNotFound
}

// takeFetched returns what was fetched since the last call, sorted.
func (l *logbook) takeFetched() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	got := l.fetched
	l.fetched = nil
	slices.Sort(got)
	return got
}

func embedded(t *testing.T) *store.Store {
	t.Helper()
	s, err := store.OpenEmbedded(t.Context(), store.EmbeddedConfig{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func newFeed(t *testing.T, c feed.Config) *feed.Feed {
	t.Helper()
	f, err := feed.New(c)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// sweep steps until there is no more, and returns the number of passes.
func sweep(t *testing.T, f *feed.Feed, now time.Time) int {
	t.Helper()
	for n := 1; ; n++ {
		more, err := f.Step(t.Context(), now)
		if err != nil {
			t.Fatal(err)
		}
		if !more {
			return n
		}
		if n == 100 {
			t.Fatal("100 passes, and still more")
		}
	}
}

// statuses are the jobs in the store, by number.
func statuses(t *testing.T, s *store.Store) map[fleet.JobID]fleet.JobStatus {
	t.Helper()
	v, err := s.View(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	all := map[fleet.JobID]fleet.JobStatus{}
	for id, j := range v.Jobs {
		all[id] = j.Status
	}
	return all
}

func want(t *testing.T, what string, got, want any) {
	t.Helper()
	if g, w := fmt.Sprint(got), fmt.Sprint(want); g != w {
		t.Errorf("%s: %s, want %s", what, g, w)
	}
}

func TestWhateverTheReceiverAnswered(t *testing.T) {
	var log logbook
	s := embedded(t)
	for i, code := range []int{202, 200, 401, 502, 503} {
		log.deliver(i+1, fleet.JobQueued, noon, noon, code)
	}
	failed := log.deliver(6, fleet.JobQueued, noon, noon, 0)
	failed.Status = "failed to connect to host"
	log.deliver(7, fleet.JobQueued, noon, noon, 0) // under way to the webhook: left alone for now
	other := log.deliver(8, fleet.JobQueued, noon, noon, 200)
	other.Event = "check_run"
	f := newFeed(t, feed.Config{GitHub: &log, Store: s})
	sweep(t, f, noon.Add(5*time.Second))
	want(t, "jobs", statuses(t, s), "map[1:queued 2:queued 3:queued 4:queued 5:queued 6:queued]")
	sweep(t, f, noon.Add(25*time.Second))
	want(t, "job under way, never answered", statuses(t, s)[7], fleet.JobQueued)
	v, err := s.View(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want(t, "feed", v.Jobs[1].Feed, fleet.FeedSweep)
}

func TestNothingTwice(t *testing.T) {
	var log logbook
	s := embedded(t)
	log.deliver(1, fleet.JobQueued, noon, noon.Add(-10*time.Minute), 502)
	log.deliver(2, fleet.JobQueued, noon, noon, 502)
	again := log.deliver(2, fleet.JobQueued, noon, noon.Add(time.Second), 502)
	again.Redelivery = true
	f := newFeed(t, feed.Config{GitHub: &log, Store: s})
	sweep(t, f, noon)
	want(t, "first pass fetches", log.takeFetched(), "[1 queued 2 queued]")
	for i := range 9 {
		sweep(t, f, noon.Add(time.Duration(i)*20*time.Second))
	}
	want(t, "later passes fetch", log.takeFetched(), "[]")

	// Another process begins at the cursor, with the overlap.
	sweep(t, newFeed(t, feed.Config{GitHub: &log, Store: s}), noon.Add(time.Minute))
	want(t, "after a restart", log.takeFetched(), "[2 queued]")
}

// GitHub's log is not strictly ordered: an entry turns up that is three minutes older
// than the newest that was applied.
func TestLateEntry(t *testing.T) {
	var log logbook
	s := embedded(t)
	for i := range 250 {
		log.deliver(1000+i, fleet.JobQueued, noon, noon.Add(time.Duration(i-250)*100*time.Millisecond), 202)
	}
	f := newFeed(t, feed.Config{GitHub: &log, Store: s})
	sweep(t, f, noon)
	log.takeFetched()
	log.deliver(1, fleet.JobQueued, noon, noon.Add(-3*time.Minute), 502)
	for i := range 4 {
		sweep(t, f, noon.Add(time.Duration(i)*20*time.Second))
	}
	want(t, "fetched", log.takeFetched(), "[1 queued]")
	want(t, "job", statuses(t, s)[1], fleet.JobQueued)
}

// One delivery cannot be fetched for a while: the others are applied, and the cursor
// waits for it.
func TestCursorWaitsForWhatIsMissed(t *testing.T) {
	var log logbook
	s := embedded(t)
	bad := log.deliver(1, fleet.JobQueued, noon, noon.Add(-4*time.Minute), 502)
	bad.err = errors.New("502 Bad Gateway")
	log.deliver(2, fleet.JobQueued, noon, noon, 502)
	sweep(t, newFeed(t, feed.Config{GitHub: &log, Store: s}), noon)
	want(t, "others", statuses(t, s), "map[2:queued]")
	later := noon.Add(30 * time.Minute)
	log.deliver(3, fleet.JobQueued, later, later, 502)
	log.mu.Lock()
	log.entries[0].err = nil
	log.mu.Unlock()
	log.jobs = map[fleet.JobID]fleet.Job{1: {Status: fleet.JobQueued}}
	sweep(t, newFeed(t, feed.Config{GitHub: &log, Store: s}), later) // another process: nothing but the cursor is known
	want(t, "in the end", statuses(t, s), "map[1:queued 2:queued 3:queued]")
}

func TestGivingUp(t *testing.T) {
	var log logbook
	s := embedded(t)
	bad := log.deliver(1, fleet.JobQueued, noon, noon, 502)
	bad.err = errors.New("500 Internal Server Error")
	f := newFeed(t, feed.Config{GitHub: &log, Store: s})
	for i := range 40 {
		sweep(t, f, noon.Add(time.Duration(i)*20*time.Second))
	}
	want(t, "attempts", len(log.takeFetched()), 30)
}

// An old "queued" is believed only after asking, if nobody here knows the job.
func TestOldNewsIsChecked(t *testing.T) {
	tests := []struct {
		name    string
		status  fleet.JobStatus
		created time.Time
		known   fleet.JobStatus // in the store before; "": not
		told    fleet.JobStatus // by GitHub; "": not found
		jobErr  error
		asked   int
		want    fleet.JobStatus
	}{
		{name: "new", status: fleet.JobQueued, created: noon.Add(-time.Minute), want: fleet.JobQueued},
		{name: "old and true", status: fleet.JobQueued, created: noon.Add(-time.Hour), told: fleet.JobQueued, asked: 1, want: fleet.JobQueued},
		{name: "old and over", status: fleet.JobQueued, created: noon.Add(-time.Hour), told: fleet.JobCompleted, asked: 1, want: fleet.JobCompleted},
		{name: "old and running", status: fleet.JobWaiting, created: noon.Add(-time.Hour), told: fleet.JobInProgress, asked: 1, want: fleet.JobInProgress},
		{name: "old and gone", status: fleet.JobQueued, created: noon.Add(-time.Hour), asked: 1},
		{name: "old, and no permission to ask", status: fleet.JobQueued, created: noon.Add(-time.Hour),
			jobErr: &github.Refused{Status: http.StatusForbidden, Message: "Resource not accessible by integration"}, asked: 1, want: fleet.JobQueued},
		{name: "old and known", status: fleet.JobQueued, created: noon.Add(-time.Hour), known: fleet.JobInProgress, want: fleet.JobInProgress},
		{name: "old, but final", status: fleet.JobCompleted, created: noon.Add(-time.Hour), want: fleet.JobCompleted},
		{name: "old, but running", status: fleet.JobInProgress, created: noon.Add(-time.Hour), want: fleet.JobInProgress},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			log := logbook{jobs: map[fleet.JobID]fleet.Job{}, jobErr: test.jobErr}
			if test.told != "" {
				log.jobs[1] = fleet.Job{ID: 1, Status: test.told, RunnerName: "paddock-x-abcdefgh-1"}
			}
			s := embedded(t)
			if test.known != "" {
				if _, err := s.MergeJob(t.Context(), store.Delivery{At: noon, Job: fleet.Job{ID: 1, Status: test.known, CreatedAt: test.created}}); err != nil {
					t.Fatal(err)
				}
			}
			log.deliver(1, test.status, test.created, noon.Add(-time.Minute), 502)
			sweep(t, newFeed(t, feed.Config{GitHub: &log, Store: s}), noon)
			want(t, "asked", len(log.asked), test.asked)
			want(t, "status", statuses(t, s)[1], test.want)
		})
	}
}

// A log of 2,500 deliveries takes several passes, while new ones arrive all the time;
// those do not wait for the end of it.
func TestLongWayBack(t *testing.T) {
	var log logbook
	s := embedded(t)
	for i := range 2500 {
		log.deliver(1000+i, fleet.JobCompleted, noon, noon.Add(time.Duration(i-2500)*time.Second), 502)
	}
	f := newFeed(t, feed.Config{GitHub: &log, Store: s})
	more, err := f.Step(t.Context(), noon)
	if err != nil || !more {
		t.Fatalf("first pass: more %t, error %v", more, err)
	}
	log.deliver(1, fleet.JobQueued, noon, noon, 502)
	if more, err = f.Step(t.Context(), noon); err != nil || !more {
		t.Fatalf("second pass: more %t, error %v", more, err)
	}
	want(t, "new job after the second pass", statuses(t, s)[1], fleet.JobQueued)
	arrived := 1
	log.arrive = func() {
		arrived++
		log.deliver(arrived, fleet.JobQueued, noon, noon.Add(time.Duration(arrived)*time.Millisecond), 502)
	}
	sweep(t, f, noon)
	log.arrive = nil
	sweep(t, f, noon.Add(20*time.Second))
	want(t, "jobs", len(statuses(t, s)), 2500+arrived)
	want(t, "fetched", len(log.takeFetched()), 2500+arrived)
}

// 250 deliveries arrive at once while a long way back is under way: more than is looked at
// in between. The sweep after it finds the rest.
func TestBurstDuringALongWayBack(t *testing.T) {
	var log logbook
	s := embedded(t)
	for i := range 1500 {
		log.deliver(1000+i, fleet.JobCompleted, noon, noon.Add(time.Duration(i-1500)*time.Second), 502)
	}
	f := newFeed(t, feed.Config{GitHub: &log, Store: s})
	if more, err := f.Step(t.Context(), noon); err != nil || !more {
		t.Fatalf("first pass: more %t, error %v", more, err)
	}
	for i := range 250 {
		log.deliver(1+i, fleet.JobQueued, noon, noon.Add(time.Duration(i)*time.Millisecond), 502)
	}
	sweep(t, f, noon)
	sweep(t, f, noon.Add(20*time.Second))
	want(t, "jobs", len(statuses(t, s)), 1750)
}

// With more deliveries than an App has requests, those that we answered with 202 are
// believed, and only those.
func TestBudget(t *testing.T) {
	var log logbook
	s := embedded(t)
	for i := range 900 {
		code := http.StatusAccepted
		if i%3 == 0 {
			code = http.StatusBadGateway
		}
		log.deliver(1+i, fleet.JobCompleted, noon, noon.Add(time.Duration(i-900)*100*time.Millisecond), code)
	}
	// The store has been swept before, or nobody's 202 would count.
	if _, err := s.Cursor(t.Context(), "deliveries"); err != nil {
		t.Fatal(err)
	}
	if err := s.SetCursor(t.Context(), "deliveries", noon.Add(-time.Hour).Format(time.RFC3339Nano)); err != nil {
		t.Fatal(err)
	}
	metrics := prometheus.NewRegistry()
	sweep(t, newFeed(t, feed.Config{GitHub: &log, Store: s, Metrics: metrics}), noon)
	want(t, "fetched", len(log.takeFetched()), 300+500)
	expected := `
# HELP paddock_feed_recovered_jobs_total Jobs that were first heard of by this feed: their webhooks were lost, or there are none.
# TYPE paddock_feed_recovered_jobs_total counter
paddock_feed_recovered_jobs_total{feed="sweep"} 800
`
	if err := testutil.GatherAndCompare(metrics, strings.NewReader(expected), "paddock_feed_recovered_jobs_total"); err != nil {
		t.Error(err)
	}
	if problems, err := testutil.GatherAndLint(metrics); err != nil || len(problems) > 0 {
		t.Errorf("metrics: %v %v", problems, err)
	}
}

// In an empty store, our own 202 proves nothing: everything is fetched.
func TestBudgetOfAnEmptyStore(t *testing.T) {
	var log logbook
	for i := range 900 {
		log.deliver(1+i, fleet.JobCompleted, noon, noon.Add(time.Duration(i-900)*time.Second), http.StatusAccepted)
	}
	sweep(t, newFeed(t, feed.Config{GitHub: &log, Store: embedded(t)}), noon)
	want(t, "fetched", len(log.takeFetched()), 900)
}

// Redis is emptied. The sweep goes back to the oldest job that was open, and no further;
// our own 202 from before is no proof any more.
func TestEmptiedRedis(t *testing.T) {
	url, redis := storetest.StartRedis(t)
	s, err := store.Open(t.Context(), store.Config{URL: url})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	log := logbook{jobs: map[fleet.JobID]fleet.Job{2: {ID: 2, Status: fleet.JobQueued}, 3: {ID: 3, Status: fleet.JobInProgress, RunnerName: "r"}}}
	ago := func(d time.Duration) time.Time { return noon.Add(-d) }
	log.deliver(1, fleet.JobQueued, ago(6*time.Hour), ago(6*time.Hour), 202)
	log.deliver(1, fleet.JobCompleted, ago(6*time.Hour), ago(5*time.Hour), 202)
	log.deliver(2, fleet.JobQueued, ago(3*time.Hour), ago(3*time.Hour), 202)
	log.deliver(3, fleet.JobQueued, ago(2*time.Hour), ago(2*time.Hour), 202)
	log.deliver(3, fleet.JobInProgress, ago(2*time.Hour), ago(time.Hour), 202)
	log.deliver(4, fleet.JobQueued, noon, noon, 502)
	all := "map[1:completed 2:queued 3:in_progress 4:queued]"
	f := newFeed(t, feed.Config{GitHub: &log, Store: s})
	sweep(t, f, noon)
	want(t, "before", statuses(t, s), all)
	sweep(t, f, noon.Add(20*time.Second))
	log.takeFetched()

	redis.Flush(t)
	sweep(t, f, noon.Add(40*time.Second))
	want(t, "after", statuses(t, s), "map[2:queued 3:in_progress 4:queued]")
	want(t, "fetched", log.takeFetched(), "[2 queued 3 in_progress 3 queued 4 queued]")

	// Emptied again, by a process that knows nothing of what was in it: 24 hours.
	redis.Flush(t)
	sweep(t, newFeed(t, feed.Config{GitHub: &log, Store: s}), noon.Add(time.Minute))
	want(t, "after a restart", statuses(t, s), all)
}

// The store is away: the pass fails, and the next one goes on.
func TestStoreAway(t *testing.T) {
	url, redis := storetest.StartRedis(t)
	s, err := store.Open(t.Context(), store.Config{URL: url})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	var log logbook
	log.deliver(1, fleet.JobQueued, noon, noon, 502)
	f := newFeed(t, feed.Config{GitHub: &log, Store: s})
	redis.Stop(t)
	if _, err := f.Step(t.Context(), noon); !errors.Is(err, store.ErrDown) {
		t.Errorf("with the store away: error %v, want ErrDown", err)
	}
	redis.Start(t)
	sweep(t, f, noon)
	want(t, "afterwards", statuses(t, s), "map[1:queued]")
}

// Run waits as long as GitHub says, and longer each time for other errors.
func TestRunBacksOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log logbook
		var starts []time.Duration
		begin := time.Now()
		log.arrive = func() {
			at := time.Since(begin)
			starts = append(starts, at)
			switch {
			case at < time.Second:
				log.listErr = fmt.Errorf("list: %w", &github.RateLimited{Until: begin.Add(17 * time.Minute), Resource: "core"})
			case at < 20*time.Minute:
				log.listErr = errors.New("502 Bad Gateway")
			default:
				log.listErr = nil
			}
		}
		ctx, cancel := context.WithTimeout(t.Context(), 22*time.Minute+50*time.Second)
		defer cancel()
		f := newFeed(t, feed.Config{GitHub: &log, Store: newMemory()})
		if err := f.Run(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Run ends with %v", err)
		}
		want(t, "passes at", starts, "[0s 17m0s 17m40s 19m0s 21m0s 21m20s 21m40s 22m0s 22m20s 22m40s]")
	})
}

// A replica that does not lead leaves the sweep alone, and sweeps at once when it does.
func TestOnlyTheActiveReplicaSweeps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log logbook
		var starts []time.Duration
		begin := time.Now()
		log.arrive = func() { starts = append(starts, time.Since(begin)) }
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		f := newFeed(t, feed.Config{GitHub: &log, Store: newMemory(), Active: func() bool {
			return time.Since(begin) > 30*time.Second
		}})
		if err := f.Run(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Run ends with %v", err)
		}
		want(t, "passes at", starts, "[31s 51s]")
	})
}

// memory is a store without Redis, for tests in a bubble of time.
type memory struct{ cursor string }

func newMemory() *memory { return &memory{} }

func (*memory) MergeJob(context.Context, store.Delivery) (store.Merged, error) {
	return store.Merged{}, nil
}
func (*memory) View(context.Context) (*store.View, error) {
	return &store.View{Incarnation: "one"}, nil
}
func (m *memory) Cursor(context.Context, string) (string, error) { return m.cursor, nil }
func (m *memory) SetCursor(_ context.Context, _, value string) error {
	m.cursor = value
	return nil
}

func TestUnreadableDeliveryIsPassedOver(t *testing.T) {
	var log logbook
	s := embedded(t)
	bad := log.deliver(1, fleet.JobQueued, noon, noon, 502)
	bad.payload = bytes.Repeat([]byte("{"), 10)
	log.deliver(2, fleet.JobQueued, noon, noon, 502)
	f := newFeed(t, feed.Config{GitHub: &log, Store: s})
	sweep(t, f, noon)
	sweep(t, f, noon.Add(2*time.Minute))
	want(t, "jobs", statuses(t, s), "map[2:queued]")
	want(t, "fetched", log.takeFetched(), "[1 queued 2 queued]")
}

func TestNewRefuses(t *testing.T) {
	for name, c := range map[string]feed.Config{"no store": {GitHub: &logbook{}}, "no GitHub": {Store: newMemory()}} {
		if _, err := feed.New(c); err == nil {
			t.Errorf("%s: want an error", name)
		}
	}
	metrics := prometheus.NewRegistry()
	c := feed.Config{GitHub: &logbook{}, Store: newMemory(), Metrics: metrics}
	newFeed(t, c)
	if _, err := feed.New(c); err == nil {
		t.Error("registered twice: want an error")
	}
}
