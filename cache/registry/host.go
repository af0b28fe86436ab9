package registry

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"time"
)

// host is what all downloads from one registry share of what they learnt about it.
type host struct {
	mu    sync.Mutex
	plain bool      // it sends the whole when asked for a range
	until time.Time // before that, it wants to be left alone
}

// host returns what is known of a host, from its first request on.
func (c *Client) host(name string) *host {
	c.mu.Lock()
	defer c.mu.Unlock()
	h := c.hosts[name]
	if h == nil {
		h = &host{}
		c.hosts[name] = h
	}
	return h
}

func (h *host) whole() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.plain
}

func (h *host) answersNoRanges() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.plain = true
}

// leave makes everybody leave the host alone for a while.
func (h *host) leave(d time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if until := time.Now().Add(d); until.After(h.until) {
		h.until = until
	}
}

// errLeave: a host has told another request to come back later.
var errLeave = errors.New("not asked")

// wait returns when the host may be asked, a little spread: it was too much for it that
// all came at once. When that is not soon, it fails at once, and says when.
func (h *host) wait(ctx context.Context) error {
	h.mu.Lock()
	left := time.Until(h.until)
	h.mu.Unlock()
	switch {
	case left <= 0:
		return nil
	case left > maxRetryAfter:
		return retryLater(errLeave, left)
	}
	return sleep(ctx, left+rand.N(left/4+1))
}

// errSlow is a connection on which too little moves.
var errSlow = errors.New("the connection stalled")

// window is how much moved in a span of reading.
type window struct {
	waited time.Duration // for bytes, not counting when nobody asked for any
	got    int64
	slow   bool // the last full span moved less than the floor
}

// add counts one read. A span lasts as long as a stall; the floor is in bytes per second.
func (w *window) add(n int, waited, span time.Duration, floor int64) {
	w.waited += waited
	w.got += int64(n)
	if w.waited < span {
		return
	}
	w.slow = float64(w.got) < float64(floor)*w.waited.Seconds()
	w.waited, w.got = 0, 0
}
