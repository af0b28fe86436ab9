// Package webhook takes GitHub's signed deliveries, turns news of jobs into a merge
// into the store, and answers at once: 202 is only said when the news is durable.
//
// It is not a client of GitHub and it decides nothing: no call to GitHub and no scan of
// the store is in the way of a request, and whether a job is for this fleet is for
// placement to find out. What it could not make durable it refuses with 503, so that
// feed brings it from the delivery log later; GitHub itself never sends it again.
//
// The programs in cmd mount its Handler where GitHub posts to.
//
// In the order of a request: read the body up to a limit (413), check its signature
// (401), leave aside events that are not about jobs (202), read the job (400), merge it
// (503), answer 202.
package webhook

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync/atomic"
	"time"

	"github.com/gin-gonic/gin"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github"
	"github.com/paddock-ci/paddock/store"
)

// The headers of a delivery.
const (
	signatureHeader = "X-Hub-Signature-256"
	eventHeader     = "X-GitHub-Event"
	deliveryHeader  = "X-GitHub-Delivery"
)

// retryAfter is what a refused sender is told to wait, in seconds: about as long as a
// Redis needs to come back. GitHub does not heed it, proxies and our own tests do.
const retryAfter = "10"

// Config is what a Handler needs.
type Config struct {
	// Secrets: a delivery signed with any of them is authentic, so that a secret can be
	// changed without losing deliveries. At least one, none empty.
	Secrets [][]byte
	// Merge makes one piece of news durable before it returns; usually the MergeJob of a
	// *store.Store. It must heed its context.
	Merge func(ctx context.Context, d store.Delivery) (store.Merged, error)
	// MaxBody is the largest body taken, in bytes; 0: 25 MB, GitHub's own cap.
	MaxBody int64
	// Timeout bounds the reading of a body, the wait for a large one's turn, and Merge; 0: 5 s, half of what
	// GitHub waits for an answer.
	Timeout time.Duration
	// Log is told when the store fails and when it is back; nil: discarded.
	Log *slog.Logger
	// Metrics takes the latency histogram and the counts by outcome; nil: not registered.
	Metrics prometheus.Registerer
	// Now is the clock; nil: time.Now.
	Now func() time.Time
}

// Handler is an http.Handler that takes deliveries by POST under any path. It is safe
// for concurrent use.
type Handler struct {
	c       Config
	keys    []*key
	bodies  bodies
	metrics *metrics
	engine  *gin.Engine
	failing atomic.Bool // the last merge failed: its error is logged once, not per delivery
}

// gin's mode is a global of gin's: set before anything can run.
func init() { gin.SetMode(gin.ReleaseMode) }

// New makes a Handler. It fails if there is no secret or no Merge, and if the metrics
// are registered already.
func New(c Config) (*Handler, error) {
	if len(c.Secrets) == 0 {
		return nil, errors.New("webhook: no secret: set the one that is set in the GitHub App's settings")
	}
	if c.Merge == nil {
		return nil, errors.New("webhook: nowhere to merge jobs into")
	}
	if c.MaxBody == 0 {
		c.MaxBody = 25 << 20
	}
	if c.Timeout == 0 {
		c.Timeout = 5 * time.Second
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	h := &Handler{c: c, engine: gin.New(), bodies: newBodies(c.MaxBody, c.Timeout)}
	for i, secret := range c.Secrets {
		if len(secret) == 0 {
			return nil, fmt.Errorf("webhook: secret %d is empty: anybody could sign with it", i+1)
		}
		h.keys = append(h.keys, newKey(secret))
	}
	var err error
	if h.metrics, err = newMetrics(c.Metrics); err != nil {
		return nil, err
	}
	h.engine.HandleMethodNotAllowed = true
	h.engine.POST("/*path", h.deliver)
	return h, nil
}

// ServeHTTP takes one delivery.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) { h.engine.ServeHTTP(w, r) }

// deliver answers one delivery, and counts how it went.
func (h *Handler) deliver(c *gin.Context) {
	start := h.c.Now()
	o := h.take(c.Writer, c.Request, start)
	a := answers[o]
	header := c.Writer.Header()
	header["Content-Type"] = plainText
	if a.status == http.StatusServiceUnavailable {
		header.Set("Retry-After", retryAfter)
	}
	c.Writer.WriteHeader(a.status)
	_, _ = c.Writer.WriteString(a.text) // GitHub has hung up: nobody is left to tell
	h.metrics.count(o, h.c.Now().Sub(start))
}

// plainText is shared by all answers; nothing writes into it.
var plainText = []string{"text/plain; charset=utf-8"}

// take does the work of one delivery and says how it ended.
func (h *Handler) take(w http.ResponseWriter, r *http.Request, now time.Time) outcome {
	body, refused := h.bodies.read(w, r)
	if refused != accepted {
		return refused
	}
	defer h.bodies.put(body)
	if !authentic(h.keys, r.Header.Get(signatureHeader), body.Bytes()) {
		return unsigned
	}
	if r.Header.Get(eventHeader) != "workflow_job" {
		return ignored
	}
	guid := r.Header.Get(deliveryHeader)
	job, err := github.ParseJob(body.Bytes(), guid)
	if err != nil {
		return h.unreadable(r, guid, err)
	}
	job.SeenAt, job.Feed = now, fleet.FeedWebhook

	ctx, cancel := context.WithTimeout(r.Context(), h.c.Timeout)
	defer cancel()
	merged, err := h.c.Merge(ctx, store.Delivery{ID: guid, At: now, Job: job})
	switch {
	case err != nil:
		h.failed(ctx, guid, err)
		return unavailable
	case h.failing.Load() && h.failing.Swap(false):
		h.c.Log.InfoContext(ctx, "store takes webhooks again", "delivery", guid)
	}
	switch {
	case merged.Ghost:
		return ghost
	case !merged.Changed:
		return unchanged
	}
	return accepted
}

// failed logs the first of a row of failures: with a store down, each delivery fails.
func (h *Handler) failed(ctx context.Context, guid string, err error) {
	if !h.failing.Swap(true) {
		h.c.Log.ErrorContext(ctx, "webhook not made durable, answered 503; the delivery sweep will bring it", "delivery", guid, "error", err)
	}
}

// unreadable logs an authentic delivery that is not about a job as we know them.
func (h *Handler) unreadable(r *http.Request, guid string, err error) outcome {
	hint := "is it GitHub that sends these?"
	if strings.HasPrefix(r.Header.Get("Content-Type"), "application/x-www-form-urlencoded") {
		hint = "set the webhook's content type to application/json"
	}
	h.c.Log.WarnContext(r.Context(), "signed webhook cannot be read", "delivery", guid, "error", err, "hint", hint)
	return malformed
}
