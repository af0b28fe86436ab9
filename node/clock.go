package node

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"
)

const (
	// clockEvery is how often the controller is asked for its time: a clock that is set
	// anew, here or there, is known a minute later, long before a peer token (10 min) ends.
	clockEvery = time.Minute
	// clockAgain is the pause after it did not answer.
	clockAgain = 10 * time.Second
	// clockLate is what an answer may take and still tell the time: peer tokens allow 5 s.
	clockLate = 4 * time.Second
	// clockOff is how far apart the clocks are when people are told.
	clockOff = 5 * time.Second
)

// ClockConfig of a Clock. Ask is required.
type ClockConfig struct {
	// Ask has the controller's time in whole seconds, cut off, and how long the answer
	// took; *api.Client's Clock.
	Ask func(ctx context.Context) (at time.Time, took time.Duration, err error)
	Now func() time.Time // this host's clock; nil: time.Now
	Log *slog.Logger     // nil: nothing is logged
}

// Clock is the controller's clock as this node can tell it: the host's, corrected by what
// was measured last. What the controller says ends at a time is judged by it, so that a
// Mac with a wrong clock still serves its neighbours. The agent runs it.
type Clock struct {
	c ClockConfig

	mu  sync.Mutex
	off time.Duration // added to the host's clock
	bad bool          // so far apart that it was said
}

// NewClock checks the configuration. Until Run has an answer the host's clock counts.
func NewClock(c ClockConfig) (*Clock, error) {
	if c.Ask == nil {
		return nil, errors.New("clock: Ask is needed")
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return &Clock{c: c}, nil
}

// Now is the controller's time, to about a second.
func (k *Clock) Now() time.Time {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.c.Now().Add(k.off)
}

// Run measures until ctx ends.
func (k *Clock) Run(ctx context.Context) {
	for ctx.Err() == nil {
		if k.Step(ctx) {
			pause(ctx, clockEvery)
		} else {
			pause(ctx, clockAgain)
		}
	}
}

// Step measures once; false: there was no answer that tells the time, and what was known
// goes on counting. That the controller is not reached is for sync to say.
func (k *Clock) Step(ctx context.Context) bool {
	at, took, err := k.c.Ask(ctx)
	if err != nil || took > clockLate {
		return false
	}
	// On the mean half a second is cut off, and half of the time the answer was on its way.
	off := at.Add(time.Second/2 + took/2).Sub(k.c.Now())
	if off.Abs() <= time.Second+took/2 {
		off = 0 // no more than the measure's own error
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.off = off
	switch bad := off.Abs() > clockOff; {
	case bad && !k.bad:
		k.c.Log.Warn("this host's clock and the controller's are apart; tokens of other nodes are judged by the controller's (hint: set both by the network: sudo sntp -sS time.apple.com on macOS, timedatectl set-ntp true on Linux)",
			"behind", off.Round(time.Second))
		k.bad = true
	case !bad && k.bad:
		k.c.Log.Info("this host's clock and the controller's agree again")
		k.bad = false
	}
	return true
}
