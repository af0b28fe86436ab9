package storetest

import (
	"encoding/json"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
)

// histories are sets of news with one outcome, whatever the order.
var histories = []struct {
	name string
	news []store.Delivery
	want fleet.JobStatus
}{
	{"a plain life", []store.Delivery{
		news(fleet.JobQueued, 1), news(fleet.JobInProgress, 2), news(fleet.JobCompleted, 3),
	}, fleet.JobCompleted},
	{"behind an approval gate", []store.Delivery{
		news(fleet.JobWaiting, 1), news(fleet.JobQueued, 2), news(fleet.JobInProgress, 3),
	}, fleet.JobInProgress},
	{"the gate closes again", []store.Delivery{
		news(fleet.JobQueued, 1), news(fleet.JobWaiting, 2),
	}, fleet.JobWaiting},
	{"the gate opens, closes and opens", []store.Delivery{
		news(fleet.JobQueued, 1), news(fleet.JobWaiting, 2), news(fleet.JobQueued, 3),
	}, fleet.JobQueued},
	{"a queued without a gate is believed", []store.Delivery{
		news(fleet.JobWaiting, 1), news(fleet.JobWaiting, 9), news(fleet.JobQueued, 0),
	}, fleet.JobQueued},
	{"a waiting without a gate is not", []store.Delivery{
		news(fleet.JobWaiting, 0), news(fleet.JobQueued, 1),
	}, fleet.JobQueued},
	{"completed first", []store.Delivery{
		news(fleet.JobCompleted, 3), news(fleet.JobQueued, 9), news(fleet.JobWaiting, 0),
	}, fleet.JobCompleted},
}

func mergeOrders(t *testing.T, s *store.Store) {
	id := jobID
	for _, h := range histories {
		for _, order := range permutations(len(h.news)) {
			id++ // each order is a job of its own
			var model fleet.Job
			for i, n := range append(order, order...) {
				d := h.news[n]
				d.Job.ID = id
				m := merge(t, s, d)
				if i == 0 {
					model = fleet.MergeJob(d.Job, d.Job)
				}
				was := model.Status
				model = fleet.MergeJob(model, d.Job)
				if i > 0 && m.Was != was || m.Now != model.Status || m.Ghost {
					t.Fatalf("%s, order %v, news %d: %+v, want %s → %s", h.name, order, i, m, was, model.Status)
				}
				if i >= len(order) && m.Changed {
					t.Fatalf("%s, order %v: doubled news %d changed the job", h.name, order, i)
				}
			}
			if got := view(t, s).Jobs[id].Status; got != h.want {
				t.Errorf("%s, order %v: %s, want %s", h.name, order, got, h.want)
			}
		}
	}
}

// permutations of 0 … n-1.
func permutations(n int) [][]int {
	if n == 0 {
		return [][]int{nil}
	}
	var all [][]int
	for _, p := range permutations(n - 1) {
		for i := range n {
			all = append(all, slices.Insert(slices.Clone(p), i, n-1))
		}
	}
	return all
}

func mergeConcurrently(t *testing.T, s *store.Store) {
	life := []store.Delivery{news(fleet.JobWaiting, 1), news(fleet.JobQueued, 2), news(fleet.JobInProgress, 3), news(fleet.JobCompleted, 4)}
	var group sync.WaitGroup
	var mu sync.Mutex
	fresh := 0
	for i := range 32 {
		group.Go(func() {
			for n := range life {
				m, err := s.MergeJob(t.Context(), life[(n+i)%len(life)])
				if err != nil {
					t.Errorf("MergeJob: %v", err)
				}
				mu.Lock()
				if m.Was == "" {
					fresh++
				}
				mu.Unlock()
			}
		})
	}
	group.Wait()
	if fresh != 1 {
		t.Errorf("the job was new %d times", fresh)
	}
	v := view(t, s)
	if len(v.Jobs) != 1 || v.Jobs[jobID].Status != fleet.JobCompleted {
		t.Errorf("after 32 doubled lives: %v", v.Jobs)
	}
}

func mergeRoundTrip(t *testing.T, s *store.Store) {
	d := news(fleet.JobInProgress, 7)
	d.Job.Name = "build | \"quoted\"\nüber {} []"
	d.Job.RunnerName = "paddock|fleet abc\n1"
	d.Job.RunID = 1<<62 + 1 // beyond a double
	d.Job.Gate = 1<<61 + 1
	d.Job.Labels = fleet.Labels{}
	d.Job.StartedAt = noon.Add(time.Second + 5*time.Nanosecond)
	merge(t, s, d)
	want := d.Job
	want.SeenAt = d.At
	if diff := cmp.Diff(asJSON(t, &want), asJSON(t, view(t, s).Jobs[jobID])); diff != "" {
		t.Errorf("-merged +read:\n%s", diff)
	}
	// The runner's name stays, and so does who brought the news first.
	end := news(fleet.JobCompleted, 9)
	end.At, end.Job.Feed, end.Job.Conclusion = noon.Add(time.Hour), fleet.FeedSweep, "success"
	merge(t, s, end)
	got := view(t, s).Jobs[jobID]
	if got.RunnerName != d.Job.RunnerName || !got.SeenAt.Equal(d.At) || got.Feed != fleet.FeedWebhook || got.Conclusion != "success" {
		t.Errorf("after completed: %+v", got)
	}
}

func asJSON(t *testing.T, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func mergeRefused(t *testing.T, s *store.Store) {
	for _, d := range []store.Delivery{newsOf(jobID, "requested", 1), newsOf(jobID, "", 1), newsOf(0, fleet.JobQueued, 1), newsOf(-4, fleet.JobQueued, 1)} {
		if _, err := s.MergeJob(t.Context(), d); err == nil || errors.Is(err, store.ErrDown) {
			t.Errorf("job %d of status %q: %v, want a refusal", d.Job.ID, d.Job.Status, err)
		}
	}
	if n := len(view(t, s).Jobs); n != 0 {
		t.Errorf("%d jobs were made of it", n)
	}
}

func tombstones(t *testing.T, s *store.Store) {
	merge(t, s, news(fleet.JobQueued, 1))
	merge(t, s, news(fleet.JobCompleted, 3))
	term := lead(t, s, "a")
	commit(t, s, store.Txn{Term: &term, DropJobs: []fleet.JobID{jobID}}, nil)
	for _, status := range []fleet.JobStatus{fleet.JobQueued, fleet.JobInProgress, fleet.JobCompleted} {
		if m := merge(t, s, news(status, 9)); !m.Ghost || m.Changed || m.Now != "" {
			t.Errorf("late %s: %+v, want a ghost", status, m)
		}
	}
	if v := view(t, s); len(v.Jobs) != 0 {
		t.Fatalf("a ghost: %v", v.Jobs[jobID])
	}
	// The store's clock may differ from ours, but hardly by a day.
	day := 24 * time.Hour
	for _, sweep := range []struct {
		before time.Time
		want   int
	}{{time.Now().Add(-day), 0}, {time.Now().Add(day), 1}, {time.Now().Add(day), 0}} {
		if n, err := s.SweepTombstones(t.Context(), term, sweep.before); n != sweep.want || err != nil {
			t.Errorf("SweepTombstones(%s): %d, %v, want %d", sweep.before, n, err, sweep.want)
		}
	}
	if m := merge(t, s, news(fleet.JobQueued, 9)); m.Ghost || !m.Changed {
		t.Errorf("after the sweep: %+v", m)
	}
	old := store.Term{Incarnation: term.Incarnation, Epoch: term.Epoch - 1}
	if _, err := s.SweepTombstones(t.Context(), old, time.Now()); !errors.Is(err, store.ErrFenced) {
		t.Errorf("SweepTombstones of an old term: %v", err)
	}
}

func manyJobs(t *testing.T, s *store.Store) {
	const jobs = 12_000
	var group sync.WaitGroup
	for w := range 16 {
		group.Go(func() {
			for i := w; i < jobs; i += 16 {
				d := newsOf(jobID+fleet.JobID(i), fleet.JobQueued, 1)
				d.Job.CreatedAt = noon.Add(time.Duration(i) * time.Second)
				if _, err := s.MergeJob(t.Context(), d); err != nil {
					t.Errorf("MergeJob: %v", err)
					return
				}
			}
		})
	}
	group.Wait()
	if open := view(t, s).OpenJobs(); len(open) != jobs || open[0].ID != jobID || open[jobs-1].ID != jobID+jobs-1 {
		t.Fatalf("%d open jobs", len(open))
	}
	// One more change costs one record, and the rest is what it was.
	before := view(t, s)
	merge(t, s, newsOf(jobID+5, fleet.JobCompleted, 2))
	after := view(t, s)
	if len(after.OpenJobs()) != jobs-1 || after.Jobs[jobID] != before.Jobs[jobID] || before.Jobs[jobID+5].Status != fleet.JobQueued {
		t.Error("one completed job changed more than itself")
	}
}
