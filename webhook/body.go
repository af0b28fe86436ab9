package webhook

import (
	"bytes"
	"errors"
	"net/http"
	"sync"
	"time"
)

const (
	// usualBody is above every delivery about a job: those are 7 to 12 KB, with many
	// steps some more. Buffers up to this size are kept for the next delivery.
	usualBody = 64 << 10
	// largeBodies is how many bodies above the usual size are held at once: whoever
	// finds the address can send them, and 25 MB each must not add up.
	largeBodies = 4
)

// body is a request body in memory.
type body struct {
	bytes.Buffer
	large bool // it holds a place among the large ones
}

// bodies reads request bodies into buffers that are used again.
type bodies struct {
	max     int64
	timeout time.Duration
	pool    *sync.Pool
	large   chan struct{} // holds one entry for each large body in memory
}

func newBodies(limit int64, timeout time.Duration) bodies {
	return bodies{
		max:     limit,
		timeout: timeout,
		pool:    &sync.Pool{New: func() any { return &body{} }},
		large:   make(chan struct{}, largeBodies),
	}
}

// read reads the body of r, up to the limit. With accepted the caller owns the body
// until it puts it back; any other outcome comes without one.
func (b *bodies) read(w http.ResponseWriter, r *http.Request) (*body, outcome) {
	if r.ContentLength > b.max {
		w.Header().Set("Connection", "close") // rather than read what nobody wants
		return nil, tooLarge
	}
	// A slow sender holds a connection, and if its body is large a place, no longer than
	// others wait for one. Not every ResponseWriter can set a deadline; net/http's can.
	control := http.NewResponseController(w)
	_ = control.SetReadDeadline(time.Now().Add(b.timeout))
	// A length is not always announced; what has none may be large.
	large := r.ContentLength < 0 || r.ContentLength > usualBody
	if large {
		if !b.enter(r) {
			return nil, unavailable
		}
		_ = control.SetReadDeadline(time.Now().Add(b.timeout))
	}
	got := b.pool.Get().(*body)
	got.Reset()
	got.large = large
	if _, err := got.ReadFrom(http.MaxBytesReader(w, r.Body, b.max)); err != nil {
		b.put(got)
		w.Header().Set("Connection", "close")
		var limit *http.MaxBytesError
		if errors.As(err, &limit) {
			return nil, tooLarge
		}
		return nil, cutOff
	}
	_ = control.SetReadDeadline(time.Time{}) // else it would end the merge, too
	return got, accepted
}

// put gives a body back; the pool keeps no buffer that a large one has grown.
func (b *bodies) put(used *body) {
	if used.large {
		<-b.large
	}
	if used.Cap() <= 2*usualBody {
		b.pool.Put(used)
	}
}

// enter waits for a place among the large bodies.
func (b *bodies) enter(r *http.Request) bool {
	wait := time.NewTimer(b.timeout)
	defer wait.Stop()
	select {
	case b.large <- struct{}{}:
		return true
	case <-wait.C:
	case <-r.Context().Done():
	}
	return false
}
