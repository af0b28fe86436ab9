package controller

import (
	"errors"
	"fmt"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github"
)

// barredFor is how long a place that refused a runner is left alone: as long as the
// client believes that the App is not installed somewhere.
const barredFor = time.Minute

// place is where runners register.
type place struct {
	scope fleet.Scope
	group int64
}

// bar is why a place takes no runner, and until when it is not tried again.
type bar struct {
	until time.Time
	why   string
}

// refused: GitHub did not register the runner for sure, and will not for the next one
// either, until somebody changes something there.
func refused(err error) bool {
	return errors.Is(err, github.ErrNoInstallation) || errors.Is(err, github.ErrUnprocessable)
}

// bar keeps jobs whose runners GitHub refuses from holding VMs that others could use.
func (c *Controller) bar(claim fleet.Claim, now time.Time, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.barred[place{claim.Scope, claim.Group}] = bar{now.Add(barredFor), err.Error()}
	c.metrics.errandsFailed.Inc()
	c.c.Log.Warn("GitHub refuses runners; jobs there wait", "scope", claim.Scope, "group", claim.Group, "again_in", barredFor, "error", err)
}

// isBarred returns why and until when a place is left alone.
func (c *Controller) isBarred(p place, now time.Time) (said string, yes bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	b := c.barred[p]
	if !now.Before(b.until) {
		return "", false
	}
	return fmt.Sprintf("GitHub refuses runners at %s: %s; the next try is at %s", p.scope, b.why, b.until.Format(time.TimeOnly)), true
}
