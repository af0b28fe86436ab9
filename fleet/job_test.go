package fleet

import (
	"fmt"
	"math"
	"testing"
	"time"
)

// The cast: one job; gates are small numbers, 0 is unknown.
func at(status JobStatus, gate int64) Job { return Job{ID: 1, Status: status, Gate: gate} }

func TestMergeJob(t *testing.T) {
	for _, c := range []struct {
		name        string
		known, news Job
		want        Job
	}{
		{"a life goes up", at(JobQueued, 1), at(JobInProgress, 0), at(JobInProgress, 1)},
		{"and on", at(JobInProgress, 1), at(JobCompleted, 3), at(JobCompleted, 1)},
		{"and never down", at(JobInProgress, 1), at(JobQueued, 9), at(JobInProgress, 1)},
		{"completed is final", at(JobCompleted, 1), at(JobQueued, 9), at(JobCompleted, 1)},
		{"a gate opens", at(JobWaiting, 1), at(JobQueued, 2), at(JobQueued, 2)},
		{"a gate closes", at(JobQueued, 1), at(JobWaiting, 2), at(JobWaiting, 2)},
		{"old news of a gate", at(JobQueued, 2), at(JobWaiting, 1), at(JobQueued, 2)},
		{"both at one moment", at(JobWaiting, 2), at(JobQueued, 2), at(JobQueued, 2)},
		{"an unknown queued is believed", at(JobWaiting, 9), at(JobQueued, 0), at(JobQueued, 0)},
		{"and stays", at(JobQueued, 0), at(JobWaiting, 9), at(JobQueued, 0)},
		{"an unknown waiting is not", at(JobQueued, 1), at(JobWaiting, 0), at(JobQueued, 1)},
		{"and goes", at(JobWaiting, 0), at(JobQueued, 1), at(JobQueued, 1)},
		{"unknown both: by rank", at(JobWaiting, 0), at(JobQueued, 0), at(JobQueued, 0)},
		{"the latest gate there is", at(JobWaiting, math.MaxInt64), at(JobQueued, 0), at(JobQueued, 0)},
		{"a time before 1970", at(JobWaiting, -4), at(JobWaiting, -3), at(JobWaiting, 0)},
	} {
		if got := MergeJob(c.known, c.news); got.Status != c.want.Status || got.Gate != c.want.Gate {
			t.Errorf("%s: %s gate %d, want %s gate %d", c.name, got.Status, got.Gate, c.want.Status, c.want.Gate)
		}
	}
}

func TestMergeJobKeepsWhatWasKnown(t *testing.T) {
	seen := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	known := Job{Status: JobInProgress, RunnerName: "a", SeenAt: seen, Feed: FeedWebhook, Name: "old"}
	news := Job{Status: JobCompleted, SeenAt: seen.Add(time.Hour), Feed: FeedSweep, Name: "new", Conclusion: "success"}
	got := MergeJob(known, news)
	if got.RunnerName != "a" || !got.SeenAt.Equal(seen) || got.Feed != FeedWebhook || got.Name != "new" || got.Conclusion != "success" {
		t.Errorf("the end of a job: %+v", got)
	}
	// The other way round the runner's name is still learned.
	if got := MergeJob(news, known); got.RunnerName != "a" || got.Status != JobCompleted || got.Name != "new" {
		t.Errorf("the end first: %+v", got)
	}
	// A later rank may name another runner, the same rank may not.
	if got := MergeJob(known, Job{Status: JobCompleted, RunnerName: "b"}); got.RunnerName != "b" {
		t.Errorf("a higher rank named b: %q", got.RunnerName)
	}
	if got := MergeJob(known, Job{Status: JobInProgress, RunnerName: "b"}); got.RunnerName != "a" {
		t.Errorf("the same rank named b: %q", got.RunnerName)
	}
	// A job that nobody runs has no runner.
	if got := MergeJob(Job{}, Job{Status: JobQueued, RunnerName: "x"}); got.RunnerName != "" {
		t.Errorf("a queued job runs on %q", got.RunnerName)
	}
}

// newsFrom makes up to 8 pieces of news out of bytes.
func newsFrom(seed []byte) []Job {
	statuses := []JobStatus{JobWaiting, JobQueued, JobInProgress, JobCompleted}
	gates := []int64{0, 0, 1, 2, 3, math.MaxInt64 - 1, math.MaxInt64, -1}
	var news []Job
	for _, b := range seed[:min(len(seed), 8)] {
		j := at(statuses[b%4], gates[b/4%8])
		j.RunnerName = []string{"", "r"}[b/32%2]
		news = append(news, j)
	}
	return news
}

// fold merges news in an order.
func fold(news []Job, order []int) Job {
	job := MergeJob(news[order[0]], news[order[0]])
	for _, i := range order[1:] {
		job = MergeJob(job, news[i])
	}
	return job
}

// FuzzMergeJob holds the join to its laws: the order of news does not matter, doubled
// news does nothing, and no job leaves its end.
func FuzzMergeJob(f *testing.F) {
	f.Add([]byte{0, 1, 2, 3}, uint64(1))
	f.Add([]byte{8, 13, 16, 1, 0}, uint64(2))
	f.Add([]byte{20, 25, 28, 29, 33, 38, 3}, uint64(77))
	f.Fuzz(func(t *testing.T, seed []byte, shuffle uint64) {
		news := newsFrom(seed)
		if len(news) == 0 {
			return
		}
		order, other := make([]int, len(news)), make([]int, len(news))
		for i := range order {
			order[i], other[i] = i, i
		}
		for i := len(other) - 1; i > 0; i-- {
			k := int(shuffle % uint64(i+1))
			shuffle /= uint64(i + 1)
			other[i], other[k] = other[k], other[i]
		}
		a, b := fold(news, order), fold(news, other)
		gated := StatusRanks[a.Status].Gated
		if a.Status != b.Status || gated && a.Gate != b.Gate || a.RunnerName != b.RunnerName {
			t.Fatalf("%v in order %v: %s gate %d on %q, in order %v: %s gate %d on %q",
				seed, order, a.Status, a.Gate, a.RunnerName, other, b.Status, b.Gate, b.RunnerName)
		}
		for _, n := range news {
			if again := MergeJob(a, n); fmt.Sprint(again) != fmt.Sprint(a) {
				t.Fatalf("doubled news %v changed %v into %v", n, a, again)
			}
		}
		completed := false
		for _, n := range news {
			completed = completed || n.Status == JobCompleted
		}
		if completed != (a.Status == JobCompleted) {
			t.Fatalf("completed among the news: %v, but the job is %s", completed, a.Status)
		}
	})
}
