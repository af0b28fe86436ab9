// Package feed brings news of jobs by the ways that are not the webhook: today the
// sweep of GitHub's delivery log; run lists, polls and scale sets have their place
// here. All of them end in the same merge as the webhook, so that news may come twice,
// late and in any order.
//
// It is not a queue and keeps no jobs: what was swept is in the store, and where the
// sweep stands is a cursor beside it, lost with the store on purpose. It decides nothing
// about jobs except whether old news is to be believed.
//
// The programs in cmd run it; without any public endpoint it is the only way in.
//
// One Step, in this order:
//  1. See whether the store is still the one that was swept into; if not, go back to
//     the oldest open job that was known, or 24 hours.
//  2. List the deliveries that are newer than the cursor, newest first, whatever the
//     receiver answered.
//  3. Fetch each one that was not applied before, and merge its job; ask GitHub for the
//     job first if the news is an old "queued" of a job that nobody knows.
//  4. Move the cursor, but not past what could not be applied.
package feed

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github"
	"github.com/paddock-ci/paddock/store"
)

const (
	// defaultEvery: a lost delivery is back within this time and a pass, which is a
	// second or two; well within the 45 s that are promised.
	defaultEvery = 20 * time.Second
	// maxPause between failing passes: an outage of GitHub is looked at this often.
	maxPause = 2 * time.Minute
)

// GitHub is what the feeds ask of GitHub; *github.Client answers.
type GitHub interface {
	// Deliveries lists the App's delivery log, newest first, a page at a time.
	Deliveries(ctx context.Context, cursor string) (page []github.DeliveryInfo, next string, err error)
	// Delivery fetches one with its payload; github.ErrNotFound if it is gone.
	Delivery(ctx context.Context, id int64) (info github.DeliveryInfo, payload []byte, err error)
	// Job asks for one job; github.ErrNotFound if there is none.
	Job(ctx context.Context, repository string, id fleet.JobID) (fleet.Job, error)
}

// Store is what the feeds write to; *store.Store implements it.
type Store interface {
	MergeJob(ctx context.Context, d store.Delivery) (store.Merged, error)
	View(ctx context.Context) (*store.View, error)
	Cursor(ctx context.Context, name string) (string, error)
	SetCursor(ctx context.Context, name, value string) error
}

// Config is what a Feed needs.
type Config struct {
	GitHub GitHub // required
	Store  Store  // required
	// Active says whether this replica sweeps; the leader does, so that two replicas do not
	// spend the App's requests twice. Nil: always.
	Active func() bool
	// Every is the time from one pass to the next; 0: 20 s.
	Every time.Duration
	// Log is told what was recovered and what could not be; nil: discarded.
	Log *slog.Logger
	// Metrics takes the counts of news by feed; nil: not registered.
	Metrics prometheus.Registerer
}

// Feed runs the feeds of one controller. Run and Step are for one goroutine; several
// controllers may sweep at once, which costs requests and nothing else.
type Feed struct {
	c     Config
	news  *news
	sweep *sweep
}

// New makes a Feed. It fails if something required is missing, and if the metrics are
// registered already.
func New(c Config) (*Feed, error) {
	if c.GitHub == nil || c.Store == nil {
		return nil, errors.New("feed: GitHub and Store are required")
	}
	if c.Every == 0 {
		c.Every = defaultEvery
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	c.GitHub = timed{c.GitHub}
	m, err := newMetrics(c.Metrics)
	if err != nil {
		return nil, err
	}
	n := &news{github: c.GitHub, store: c.Store, log: c.Log, metrics: m}
	return &Feed{c: c, news: n, sweep: newSweep(c, n, m)}, nil
}

// Step does one bounded pass. More says that it stopped at its bound: call again at
// once. An error leaves everything where it was; the next Step goes on from there.
func (f *Feed) Step(ctx context.Context, now time.Time) (more bool, err error) {
	return f.sweep.step(ctx, now)
}

// Run steps until ctx ends, and returns its error. Failures are logged and waited out:
// as long as GitHub says, else longer each time.
func (f *Feed) Run(ctx context.Context) error {
	failures := 0
	for {
		now := time.Now()
		var more bool
		var err error
		active := f.c.Active == nil || f.c.Active()
		if active {
			more, err = f.Step(ctx, now)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		pause := f.c.Every
		switch {
		case !active:
			pause = min(pause, time.Second) // a new leader sweeps at once
		case err != nil:
			pause = f.pause(err, failures, now)
			failures++
			f.c.Log.WarnContext(ctx, "sweep of deliveries failed", "error", err, "again_in", pause.Round(time.Second).String())
		case more:
			pause, failures = 0, 0
		default:
			failures = 0
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		}
	}
}

// pause is how long to wait after a failed pass.
func (f *Feed) pause(err error, failures int, now time.Time) time.Duration {
	var limited *github.RateLimited
	if errors.As(err, &limited) {
		return max(limited.Until.Sub(now), time.Second)
	}
	pause := f.c.Every
	for range failures {
		pause = min(2*pause, max(maxPause, f.c.Every))
	}
	return pause
}
