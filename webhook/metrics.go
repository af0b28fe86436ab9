package webhook

import (
	"fmt"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// outcome is how a delivery ended.
type outcome int

const (
	accepted    outcome = iota // news of a job, durable
	unchanged                  // nothing new: doubled, or overtaken by later news
	ghost                      // late news of a job that ended long ago
	ignored                    // authentic, not about a job: ping, installation, …
	unsigned                   // no signature, or not ours
	malformed                  // signed, and yet not readable
	tooLarge                   // above the limit
	cutOff                     // the sender stopped in the middle
	unavailable                // not durable
	outcomes                   // how many there are
)

// answers is what each outcome is counted as and answered with.
var answers = [outcomes]struct {
	label  string
	status int
	text   string
}{
	accepted:    {"accepted", http.StatusAccepted, "accepted\n"},
	unchanged:   {"unchanged", http.StatusAccepted, "accepted: nothing new\n"},
	ghost:       {"ghost", http.StatusAccepted, "accepted: the job has ended\n"},
	ignored:     {"ignored", http.StatusAccepted, "accepted: not about a job\n"},
	unsigned:    {"unsigned", http.StatusUnauthorized, "no valid X-Hub-Signature-256: is the webhook's secret the one in the configuration?\n"},
	malformed:   {"malformed", http.StatusBadRequest, "not a workflow_job in JSON: is the webhook's content type application/json?\n"},
	tooLarge:    {"too_large", http.StatusRequestEntityTooLarge, "larger than GitHub sends\n"},
	cutOff:      {"cut_off", http.StatusBadRequest, "the body ended early\n"},
	unavailable: {"unavailable", http.StatusServiceUnavailable, "could not be stored: deliver it again, or the delivery sweep will fetch it\n"},
}

// metrics are the numbers of the intake.
type metrics struct {
	seconds prometheus.Histogram
	byLabel [outcomes]prometheus.Counter // looked up once, not per delivery
}

// newMetrics registers the numbers, unless at is nil.
func newMetrics(at prometheus.Registerer) (*metrics, error) {
	m := &metrics{seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "paddock_webhook_seconds",
		Help: "Seconds from a delivery's headers to its answer.",
		// From what a durable merge takes at best to the timeout.
		Buckets: []float64{.0005, .001, .002, .005, .01, .02, .05, .1, .25, .5, 1, 2.5, 5, 10},
	})}
	deliveries := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "paddock_webhook_deliveries_total",
		Help: "Deliveries by how they ended; all but unsigned, malformed, too_large, cut_off and unavailable were answered 202.",
	}, []string{"outcome"})
	for o := range outcomes {
		m.byLabel[o] = deliveries.WithLabelValues(answers[o].label)
	}
	if at == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.seconds, deliveries} {
		if err := at.Register(c); err != nil {
			return nil, fmt.Errorf("registering the webhook's metrics: %w", err)
		}
	}
	return m, nil
}

func (m *metrics) count(o outcome, took time.Duration) {
	m.byLabel[o].Inc()
	m.seconds.Observe(took.Seconds())
}
