package feed

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github"
	"github.com/paddock-ci/paddock/store"
)

// oldNews is the age of a job from which a "queued" of an unknown job is checked: the
// rest of its story may have been told long ago, and forgotten with the store.
const oldNews = 2 * time.Minute

// errStore marks errors of the store: they end a pass, where those of one delivery do
// not.
var errStore = errors.New("store")

// news is where every feed ends: one piece of news becomes a merge. It is safe for
// concurrent use.
type news struct {
	github  GitHub
	store   Store
	log     *slog.Logger
	metrics *metrics

	mu    sync.Mutex
	known map[fleet.JobID]bool // merged in this pass, on top of the view
}

// merge joins a job that a feed heard of, by a delivery sent at the given time.
func (n *news) merge(ctx context.Context, now, sent time.Time, guid string, job fleet.Job) error {
	merged, err := n.store.MergeJob(ctx, store.Delivery{ID: guid, At: now, Job: job})
	if err != nil {
		return fmt.Errorf("merging job %d: %w: %w", job.ID, errStore, err)
	}
	n.mu.Lock()
	n.known[job.ID] = true
	n.mu.Unlock()
	switch {
	case merged.Ghost:
		n.metrics.count(job.Feed, newsGhost)
	case !merged.Changed:
		n.metrics.count(job.Feed, newsUnchanged)
	default:
		n.metrics.count(job.Feed, newsChanged)
		if merged.Was == "" {
			n.metrics.first(job.Feed, now.Sub(sent))
			n.log.InfoContext(ctx, "job recovered", "job", int64(job.ID), "delivery", guid,
				"feed", string(job.Feed), "status", string(merged.Now), "late", now.Sub(sent).Round(time.Second).String())
		}
	}
	return nil
}

// apply fetches one delivery and merges what it tells. A nil error means that the
// delivery is done with, in one way or the other.
func (n *news) apply(ctx context.Context, now time.Time, view *store.View, d github.DeliveryInfo) error {
	_, payload, err := n.github.Delivery(ctx, d.ID)
	if errors.Is(err, github.ErrNotFound) {
		n.metrics.count(fleet.FeedSweep, newsGone)
		return nil
	}
	if err != nil {
		return err
	}
	job, err := github.ParseJob(payload, d.GUID)
	if err != nil {
		n.metrics.count(fleet.FeedSweep, newsUnreadable)
		n.log.WarnContext(ctx, "swept delivery cannot be read", "delivery", d.GUID, "error", err)
		return nil
	}
	job.SeenAt, job.Feed = now, fleet.FeedSweep
	if n.doubtful(job, d, view, now) {
		told, err := n.github.Job(ctx, job.Repository, job.ID)
		var refused *github.Refused
		switch {
		case errors.As(err, &refused) && refused.Status == http.StatusForbidden:
			// The App may not ask: a VM that waits for nothing is better than a job that does.
			told = job
		case errors.Is(err, github.ErrNotFound), errors.Is(err, github.ErrNoInstallation):
			n.metrics.count(fleet.FeedSweep, newsGone)
			return nil
		case err != nil:
			return err
		}
		job = correct(job, told)
	}
	return n.merge(ctx, now, d.At, d.GUID, job)
}

// doubtful reports whether news must not be believed without asking: it says that an
// old job waits for a runner, and nothing is known here of what came after. The job's
// creation is a hint only: a gate may have opened just now; then GitHub says so.
func (n *news) doubtful(job fleet.Job, d github.DeliveryInfo, view *store.View, now time.Time) bool {
	created := job.CreatedAt
	if created.IsZero() {
		created = d.At
	}
	if !fleet.StatusRanks[job.Status].Gated || now.Sub(created) <= oldNews || view.Jobs[job.ID] != nil {
		return false
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return !n.known[job.ID]
}

// correct is old news with what GitHub says now. The rest of the job does not change.
func correct(job, told fleet.Job) fleet.Job {
	if told.Status != job.Status {
		job.Gate = told.Gate // the old one belongs to the old status
	}
	job.Status, job.Conclusion, job.RunnerName = told.Status, told.Conclusion, told.RunnerName
	job.StartedAt, job.CompletedAt = told.StartedAt, told.CompletedAt
	return job
}
