package webhook_test

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
	"github.com/paddock-ci/paddock/store/storetest"
	"github.com/paddock-ci/paddock/webhook"
)

// The intake on a real store. The cast: GitHub's example of a queued job, number
// 289782451, and others made from it by another number.

func embedded(t *testing.T) *store.Store {
	t.Helper()
	s, err := store.OpenEmbedded(t.Context(), store.EmbeddedConfig{Dir: t.TempDir()})
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

func view(t *testing.T, s *store.Store) *store.View {
	t.Helper()
	v, err := s.View(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// numbered is the example for another job.
func numbered(tb testing.TB, body []byte, id int) []byte {
	tb.Helper()
	old := []byte(`"id":289782451,`)
	if bytes.Count(body, old) != 1 {
		tb.Fatalf("the example holds its job's number %d times", bytes.Count(body, old))
	}
	return bytes.Replace(body, old, fmt.Appendf(nil, `"id":%d,`, id), 1)
}

func TestThirtyTwoDuplicatesAtOnce(t *testing.T) {
	s := embedded(t)
	h := handler(t, webhook.Config{Merge: s.MergeJob})
	body := examples(t)[0]
	before := view(t, s).Revision
	var senders sync.WaitGroup
	for range 32 {
		senders.Go(func() {
			if w := serve(h, signed(t.Context(), "/", body)); w.Code != http.StatusAccepted {
				t.Errorf("answered %d %s", w.Code, w.Body)
			}
		})
	}
	senders.Wait()
	v := view(t, s)
	if len(v.Jobs) != 1 || v.Revision != before+1 {
		t.Errorf("%d jobs after %d changes, want one after one", len(v.Jobs), v.Revision-before)
	}
}

// Bodies are read into buffers that are used again: what is kept of a job must not be a
// part of one.
func TestJobsAreNotMixedUp(t *testing.T) {
	s := embedded(t)
	h := handler(t, webhook.Config{Merge: s.MergeJob})
	body := examples(t)[0]
	const jobs, first = 200, 1000
	var senders sync.WaitGroup
	for i := range jobs {
		senders.Go(func() {
			own := bytes.Replace(numbered(t, body, first+i), []byte(`"ubuntu-latest"`), fmt.Appendf(nil, `"label-of-%d"`, first+i), 1)
			own = bytes.ReplaceAll(own, []byte("Codertocat/Hello-World"), fmt.Appendf(nil, "%s/hello", strings.Repeat("o", 1+i%40)))
			if w := serve(h, signed(t.Context(), "/", own)); w.Code != http.StatusAccepted {
				t.Errorf("answered %d %s", w.Code, w.Body)
			}
		})
	}
	senders.Wait()
	v := view(t, s)
	if len(v.Jobs) != jobs {
		t.Fatalf("%d jobs, want %d", len(v.Jobs), jobs)
	}
	for id, j := range v.Jobs {
		i := int(id) - first
		if want := strings.Repeat("o", 1+i%40) + "/hello"; j.ID != id || j.Repository != want {
			t.Errorf("job %d is %d of %s, want it of %s", id, j.ID, j.Repository, want)
		}
		if want := fleet.NewLabels(fmt.Sprintf("label-of-%d", id)); !slices.Equal(j.Labels, want) {
			t.Errorf("job %d has labels %q, want %q", id, j.Labels, want)
		}
	}
}

// GitHub keeps no order: whatever comes first, a job ends where it ended.
func TestOrders(t *testing.T) {
	queued := examples(t)[0]
	with := func(status string) []byte {
		b := bytes.Replace(queued, []byte(`"action":"queued"`), []byte(`"action":"`+status+`"`), 1)
		return bytes.Replace(b, []byte(`"status":"queued"`), []byte(`"status":"`+status+`"`), 1)
	}
	for _, order := range [][]string{
		{"queued", "in_progress", "completed"},
		{"completed", "queued"},
		{"completed", "in_progress", "queued", "queued"},
		{"in_progress", "completed", "queued"},
	} {
		t.Run(strings.Join(order, " "), func(t *testing.T) {
			s := embedded(t)
			h := handler(t, webhook.Config{Merge: s.MergeJob})
			for _, status := range order {
				if w := serve(h, signed(t.Context(), "/", with(status))); w.Code != http.StatusAccepted {
					t.Errorf("%s: answered %d %s", status, w.Code, w.Body)
				}
			}
			v := view(t, s)
			if j := v.Jobs[289782451]; j == nil || j.Status != fleet.JobCompleted || len(v.OpenJobs()) != 0 {
				t.Errorf("ends as %+v with %d jobs open, want completed and none", j, len(v.OpenJobs()))
			}
		})
	}
}

// A real Redis that hangs, is away, and is back.
func TestRedisInBadWeather(t *testing.T) {
	url, redis := storetest.StartRedis(t)
	s, err := store.Open(t.Context(), store.Config{URL: url})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	h := handler(t, webhook.Config{Merge: s.MergeJob})
	example := examples(t)[0]
	send := func(id int) (status int, took time.Duration) {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second) // GitHub's patience
		defer cancel()
		start := time.Now()
		w := serve(h, signed(ctx, "/", numbered(t, example, id)))
		return w.Code, time.Since(start)
	}
	steps := []struct {
		name    string
		weather func(testing.TB)
		status  int
	}{
		{"fair", func(testing.TB) {}, http.StatusAccepted},
		{"hanging", redis.Pause, http.StatusServiceUnavailable},
		{"going on", redis.Continue, http.StatusAccepted},
		{"stopped", redis.Stop, http.StatusServiceUnavailable},
		{"started", redis.Start, http.StatusAccepted},
	}
	for i, step := range steps {
		step.weather(t)
		status, took := send(i + 1)
		if status != step.status || took > 5*time.Second {
			t.Errorf("%s: answered %d after %v, want %d within 5 s", step.name, status, took, step.status)
		}
	}
	v := view(t, s)
	for i, step := range steps {
		if step.status == http.StatusAccepted && v.Jobs[fleet.JobID(i+1)] == nil {
			t.Errorf("%s: the job was accepted and is gone", step.name)
		}
	}
}
