package cache

import (
	"slices"
	"sync/atomic"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// gone is the state of an image that is not listed: before its first pull, after its
// eviction.
const gone fleet.ImageState = ""

// moves is the life of an image on this node: from each state, where it may go.
//
//	gone ─▶ queued ─▶ caching ─▶ verifying ─▶ ready ─▶ evicting ─▶ gone
//	           ▲       │  ▲           │
//	           │       ▼  │           │
//	           ├──── paused ─▶        │      paused and failed may be evicted too
//	           └──── failed ◀─────────┘
var moves = map[fleet.ImageState][]fleet.ImageState{
	// At the start of the agent, images are found ready or half done.
	gone: {fleet.ImageQueued, fleet.ImagePaused, fleet.ImageReady},
	// The turn comes; or the last caller goes before that.
	fleet.ImageQueued: {fleet.ImageCaching, fleet.ImagePaused, fleet.ImageFailed, gone},
	// A more urgent pull takes the turn, or the last caller goes: paused.
	fleet.ImageCaching: {fleet.ImagePaused, fleet.ImageVerifying, fleet.ImageFailed, gone},
	// The turn comes back; or a new caller queues up for what nobody pulled; or the turn
	// went when the last byte had come already.
	fleet.ImagePaused: {fleet.ImageCaching, fleet.ImageQueued, fleet.ImageVerifying, fleet.ImageFailed, fleet.ImageEvicting, gone},
	// All chunks are here; what remains is to publish, which no turn and no caller ends.
	fleet.ImageVerifying: {fleet.ImageReady, fleet.ImageFailed},
	fleet.ImageReady:     {fleet.ImageEvicting},
	// An eviction that fails leaves what there was.
	fleet.ImageEvicting: {gone, fleet.ImageReady, fleet.ImageFailed, fleet.ImagePaused},
	fleet.ImageFailed:   {fleet.ImageQueued, fleet.ImageEvicting},
}

// entry is one image. Its fields are guarded by Store.mu, but for done.
type entry struct {
	fleet.NodeImage
	done   atomic.Int64     // bytes on the wire, of verified chunks and those in flight
	leases map[string]int64 // by holder, the number of the lease

	work     *work  // who pulls or evicts it now; nil: nobody
	turn     *turn  // of the pull under way; nil: none, or it needs no more bytes
	callers  int    // of Pull
	demand   int    // of those, the ones for whom a job waits
	priority int    // the highest that a caller gave
	pins     int    // uses by this process: pieces that are served or reused
	failures int    // in a row
	failed   *Error // the last one, while State is failed

	holding *holding              // what it is made of; nil: not known yet
	have    map[fleet.Digest]bool // contents that are here, while it is partial
}

// work is a pull or eviction that others wait for.
type work struct {
	done chan struct{} // closed at its end, after err is set
	err  error         // errAgain: look again
}

// move is the only place where a state changes; s.mu is held. A move that is not in the
// table is refused (false) and logged: it is a bug of this package, and no reason to
// stop a node.
func (s *Store) move(e *entry, to fleet.ImageState) bool {
	if !slices.Contains(moves[e.State], to) {
		s.log.Error("no such move of an image", "image", e.Digest, "from", e.State, "to", to)
		return false
	}
	e.State = to
	if to != fleet.ImageFailed {
		e.Class, e.Error, e.RetryAt, e.failed = "", "", time.Time{}, nil
	}
	if to == gone && e.callers == 0 {
		delete(s.images, e.Digest)
	}
	s.notify()
	return true
}

// entry finds or makes the entry of an image; s.mu is held.
func (s *Store) entry(d fleet.Digest) *entry {
	e := s.images[d]
	if e == nil {
		e = &entry{leases: make(map[string]int64)}
		e.Digest = d
		s.images[d] = e
	}
	return e
}

// report is the entry as List gives it; s.mu is held.
func (e *entry) report() fleet.NodeImage {
	r := e.NodeImage
	r.Leases = len(e.leases)
	if e.State != fleet.ImageReady && e.State != fleet.ImageEvicting {
		r.Done = min(e.done.Load(), r.Total)
	} else {
		r.Done, r.Total = 0, 0
	}
	return r
}

// fail moves an image to failed, with the time of the next try: not before a source wants
// to be asked again.
func (s *Store) fail(e *entry, err error) *Error {
	// Doubling stops at 64 times: over five minutes at the default of 5 s.
	wait := s.backoff << min(e.failures, 6)
	e.failures++
	failure := &Error{Class: ClassOf(err), Image: e.Digest, RetryAt: time.Now().Add(wait), Err: err}
	if asked := retryAt(err); asked.After(failure.RetryAt) {
		failure.RetryAt = asked
	}
	s.move(e, fleet.ImageFailed)
	e.failed = failure
	e.Class, e.Error, e.RetryAt = string(failure.Class), err.Error(), failure.RetryAt
	s.log.Warn("image pull failed", "image", e.Digest, "class", failure.Class, "retry_at", failure.RetryAt, "error", err)
	return failure
}
