package guest

import (
	"context"
	"fmt"
	"sync"
)

// ringSize is how much of the runner's output the agent keeps, in bytes.
const ringSize = 64 << 10

// ring keeps the end of an output for whoever follows it. The writer never waits: a
// follower that is too slow misses something.
type ring struct {
	mu      sync.Mutex
	buf     []byte        // ringSize once something was written; byte n is at n % ringSize
	end     int64         // how much was ever written
	ended   bool          // nothing more comes
	changed chan struct{} // closed at the next change; nil if nobody waits for it
}

func (r *ring) write(p []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.buf == nil {
		r.buf = make([]byte, ringSize)
	}
	r.end += int64(max(0, len(p)-ringSize)) // only the last of it stays
	for rest := p[max(0, len(p)-ringSize):]; len(rest) > 0; {
		n := copy(r.buf[r.end%ringSize:], rest)
		rest = rest[n:]
		r.end += int64(n)
	}
	r.wakeUp()
}

// close says that nothing more comes.
func (r *ring) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ended = true
	r.wakeUp()
}

func (r *ring) wakeUp() {
	if r.changed != nil {
		close(r.changed)
		r.changed = nil
	}
}

// read copies into p what there is from byte number at on, and returns the number from
// which to go on and how many bytes were missed before. If there is nothing, changed is
// closed when that may have changed; it is nil when nothing will come.
func (r *ring) read(p []byte, at int64) (n int, next, missed int64, changed <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if oldest := max(0, r.end-ringSize); at < oldest {
		missed, at = oldest-at, oldest
	}
	for n < len(p) && at < r.end {
		from := at % ringSize
		m := copy(p[n:], r.buf[from:min(ringSize, from+r.end-at)])
		n, at = n+m, at+int64(m)
	}
	if n == 0 && !r.ended {
		if r.changed == nil {
			r.changed = make(chan struct{})
		}
		changed = r.changed
	}
	return n, at, missed, changed
}

// output follows the runner's output to its end.
func (s *session) output(ctx context.Context, r *request) {
	kept := s.agent.awaitOutput(ctx)
	if kept == nil {
		return
	}
	p := make([]byte, maxChunk)
	at := int64(0)
	for following := false; ; following = true {
		n, next, missed, changed := kept.read(p, at)
		if missed > 0 && following {
			s.chunk(ctx, r, kindStdout, fmt.Appendf(nil, "\n[%d bytes of output left out]\n", missed))
		}
		at = next
		switch {
		case n > 0:
			if !s.chunk(ctx, r, kindStdout, p[:n]) {
				return
			}
		case changed == nil:
			s.send(kindDone, r.id, nil)
			return
		default:
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
		}
	}
}

// awaitOutput returns what is kept of the runner's output once there is a runner; nil if
// ctx ends first.
func (a *agent) awaitOutput(ctx context.Context) *ring {
	for {
		a.mu.Lock()
		p, changed := a.process, a.changed
		a.mu.Unlock()
		if p != nil {
			return &p.out.ring
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
	}
}
