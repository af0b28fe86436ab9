package feed

import (
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/paddock-ci/paddock/fleet"
)

// What becomes of a piece of news.
const (
	newsChanged    = "changed"    // the job's record is another one now
	newsUnchanged  = "unchanged"  // the webhook was there first
	newsGhost      = "ghost"      // the job ended long ago
	newsGone       = "gone"       // GitHub has it no more
	newsUnreadable = "unreadable" // not a job as we know them
	newsTrusted    = "trusted"    // our own 202 is believed: no request was left to check it
	newsGivenUp    = "given_up"   // it could not be fetched, time and again
)

// metrics are the numbers of all feeds.
type metrics struct {
	news      *prometheus.CounterVec
	recovered *prometheus.CounterVec
	seconds   prometheus.Histogram
	cursor    prometheus.Gauge
}

// newMetrics registers the numbers, unless at is nil.
func newMetrics(at prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		news: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "paddock_feed_news_total",
			Help: "News of jobs that did not come by webhook, by feed and by what became of it.",
		}, []string{"feed", "outcome"}),
		recovered: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "paddock_feed_recovered_jobs_total",
			Help: "Jobs that were first heard of by this feed: their webhooks were lost, or there are none.",
		}, []string{"feed"}),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "paddock_feed_recovery_seconds",
			Help: "Seconds from a delivery to the merge of its job, for jobs first heard of by the sweep.",
			// Around the 45 s that are promised, then minutes and hours.
			Buckets: []float64{5, 10, 15, 20, 25, 30, 45, 60, 120, 300, 900, 3600, 14400, 86400},
		}),
		cursor: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "paddock_feed_cursor_timestamp_seconds",
			Help: "Everything delivered before this time was applied.",
		}),
	}
	if at == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.news, m.recovered, m.seconds, m.cursor} {
		if err := at.Register(c); err != nil {
			return nil, fmt.Errorf("registering the feed's metrics: %w", err)
		}
	}
	return m, nil
}

func (m *metrics) count(f fleet.Feed, outcome string) {
	m.news.WithLabelValues(string(f), outcome).Inc()
}

// first counts a job that a feed was the first to tell of, sent at the given time.
func (m *metrics) first(f fleet.Feed, late time.Duration) {
	m.recovered.WithLabelValues(string(f)).Inc()
	if f == fleet.FeedSweep {
		m.seconds.Observe(late.Seconds())
	}
}
