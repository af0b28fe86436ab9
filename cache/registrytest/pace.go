package registrytest

import (
	"context"
	"sync"
	"time"
)

// pacer spreads bytes over time, for all who send together.
type pacer struct {
	mu   sync.Mutex
	rate int64     // bytes per second; 0: no limit
	next time.Time // when the line is free again
}

func (p *pacer) set(rate int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.rate, p.next = rate, time.Time{}
}

// limited reports whether there is a limit.
func (p *pacer) limited() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.rate > 0
}

// wait returns when n more bytes may go; false: the context ended before.
func (p *pacer) wait(ctx context.Context, n int) bool {
	p.mu.Lock()
	if p.rate <= 0 {
		p.mu.Unlock()
		return true
	}
	// A line that was idle may catch up on the last 20 ms only: what timers are late by.
	p.next = maxTime(p.next, time.Now().Add(-20*time.Millisecond))
	p.next = p.next.Add(time.Duration(float64(n) / float64(p.rate) * float64(time.Second)))
	until := time.Until(p.next)
	p.mu.Unlock()
	if until <= 0 {
		return ctx.Err() == nil
	}
	timer := time.NewTimer(until)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

func maxTime(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
