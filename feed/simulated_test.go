package feed_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/feed"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github"
	"github.com/paddock-ci/paddock/github/githubtest"
	"github.com/paddock-ci/paddock/store"
	"github.com/paddock-ci/paddock/store/storetest"
	"github.com/paddock-ci/paddock/webhook"
)

// The sweep against the simulated GitHub, over real HTTP, with the real webhook beside it.

// site is a simulated GitHub with acme/app, and a store that its webhooks and a feed
// merge into.
type site struct {
	github *githubtest.GitHub
	store  *store.Store
	feed   *feed.Feed
}

func newSite(t *testing.T, s *store.Store, withWebhook bool) *site {
	t.Helper()
	secret := []byte("a secret of the test")
	c := githubtest.Config{Secret: secret, Repositories: []githubtest.Repository{{Name: "acme/app"}}}
	if withWebhook {
		h, err := webhook.New(webhook.Config{Secrets: [][]byte{secret}, Merge: s.MergeJob})
		if err != nil {
			t.Fatal(err)
		}
		hook := httptest.NewServer(h)
		t.Cleanup(hook.Close)
		c.Webhook = hook.URL
	}
	gh, err := githubtest.New(c)
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(gh)
	t.Cleanup(server.Close)
	client, err := github.New(github.Config{AppID: gh.AppID(), PrivateKey: gh.PrivateKey(), BaseURL: server.URL, WritesPerMinute: -1})
	if err != nil {
		t.Fatal(err)
	}
	site := &site{github: gh, store: s, feed: newFeed(t, feed.Config{GitHub: client, Store: s, Every: 50 * time.Millisecond})}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() {
		if err := gh.Run(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("simulated GitHub: %v", err)
		}
	})
	running.Go(func() {
		if err := s.Run(ctx); err != nil && !errors.Is(err, context.Canceled) {
			t.Errorf("store: %v", err)
		}
	})
	t.Cleanup(func() {
		cancel()
		running.Wait()
		for _, v := range gh.Violations() {
			t.Error(v)
		}
	})
	return site
}

// run runs the feed until the test ends.
func (s *site) run(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() {
		if err := s.feed.Run(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("feed: %v", err)
		}
	})
	t.Cleanup(func() { cancel(); running.Wait() })
}

// agrees reports how many jobs the store knows as GitHub does.
func (s *site) agrees(t *testing.T) (same, all int) {
	t.Helper()
	v, err := s.store.View(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	jobs := s.github.Jobs()
	for _, j := range jobs {
		if known := v.Jobs[j.ID]; known != nil && known.Status == j.Status {
			same++
		}
	}
	return same, len(jobs)
}

// waitUntilAgreed waits until the store knows every job as GitHub does.
func (s *site) waitUntilAgreed(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		news := s.store.Notify(store.Anything)
		same, all := s.agrees(t)
		if same == all {
			return
		}
		select {
		case <-news:
		case <-ctx.Done():
			t.Fatalf("the store knows %d of %d jobs as they are", same, all)
		}
	}
}

func (s *site) queue(t *testing.T, jobs int) []fleet.JobID {
	t.Helper()
	_, ids, err := s.github.QueueRun(githubtest.Run{Repository: "acme/app", Jobs: []githubtest.JobSpec{
		{Name: "build", Labels: []string{"self-hosted", "macOS"}, Matrix: jobs},
	}})
	if err != nil {
		t.Fatal(err)
	}
	return ids
}

// One delivery in twenty is lost, one in ten comes twice, three in ten come late.
func TestLostDeliveriesAreRecovered(t *testing.T) {
	s := newSite(t, embedded(t), true)
	s.github.SetFaults(githubtest.Storm{Seed: 1, Drop: 0.05, Double: 0.1, Late: 0.3}.Faults())
	ids := s.queue(t, 200)
	for _, id := range ids[:60] { // cancelled while queued
		if err := s.github.Cancel(id); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.github.WaitDelivered(t.Context()); err != nil {
		t.Fatal(err)
	}
	if same, all := s.agrees(t); same == all {
		t.Fatal("no delivery was lost: the test shows nothing")
	}
	s.run(t)
	s.waitUntilAgreed(t)
}

// Deliveries that GitHub calls delivered and that never arrived, such as those that a
// proxy took.
func TestSilentlyLostDeliveries(t *testing.T) {
	s := newSite(t, embedded(t), true)
	s.github.SetFaults(githubtest.Faults{Delivery: func(githubtest.Delivery) githubtest.Fate {
		return githubtest.Fate{Drop: true, Silent: true}
	}})
	s.queue(t, 20)
	s.run(t)
	s.waitUntilAgreed(t)
}

func TestWithoutAnyPublicEndpoint(t *testing.T) {
	s := newSite(t, embedded(t), false)
	s.run(t)
	ids := s.queue(t, 30)
	s.waitUntilAgreed(t)
	for _, id := range ids[:10] {
		if err := s.github.Cancel(id); err != nil {
			t.Fatal(err)
		}
	}
	s.waitUntilAgreed(t)
}

// FLUSHALL with 60 jobs open and 20 over, in fair weather and with GitHub answering 502
// and 429 now and then.
func TestFlushAll(t *testing.T) {
	for _, fair := range []bool{true, false} {
		t.Run(fmt.Sprintf("fair=%t", fair), func(t *testing.T) {
			url, redis := storetest.StartRedis(t)
			opened, err := store.Open(t.Context(), store.Config{URL: url})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = opened.Close() })
			s := newSite(t, opened, true)
			ids := s.queue(t, 80)
			for _, id := range ids[:20] {
				if err := s.github.Cancel(id); err != nil {
					t.Fatal(err)
				}
			}
			s.run(t)
			s.waitUntilAgreed(t)
			if !fair {
				s.github.SetFaults(githubtest.Faults{Request: unreliable()})
			}
			redis.Flush(t)
			s.waitUntilAgreed(t)
		})
	}
}

// unreliable is a GitHub that refuses every tenth request, by turns with 502 and with
// 429 and a second to wait.
func unreliable() func(*http.Request) githubtest.RequestFault {
	var n atomic.Int64
	return func(*http.Request) githubtest.RequestFault {
		switch n.Add(1) % 20 {
		case 9:
			return githubtest.RequestFault{Status: http.StatusBadGateway}
		case 19:
			return githubtest.RequestFault{Status: http.StatusTooManyRequests, RetryAfter: time.Second}
		}
		return githubtest.RequestFault{}
	}
}
