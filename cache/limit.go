package cache

import (
	"context"
	"maps"
	"sync/atomic"

	"golang.org/x/time/rate"

	"github.com/paddock-ci/paddock/image"
)

// reusedName is what Moved calls the bytes that no source had to give.
const reusedName = "reused"

// limits are Limits at work.
type limits struct {
	outside, total *rate.Limiter
	streams        atomic.Int64 // 0: no limit
}

func newLimits() *limits {
	return &limits{outside: rate.NewLimiter(rate.Inf, 0), total: rate.NewLimiter(rate.Inf, 0)}
}

// Limit bounds what pulls may move from now on, those under way too.
func (s *Store) Limit(l Limits) {
	setLimit(s.limits.outside, l.Outside)
	setLimit(s.limits.total, l.Total)
	s.limits.streams.Store(int64(max(l.Streams, 0)))
	s.mu.Lock()
	var pulls []*supplies
	for _, t := range s.turns {
		if p := t.supplies.Load(); p != nil {
			pulls = append(pulls, p)
		}
	}
	s.mu.Unlock()
	for _, p := range pulls {
		p.schedule() // more streams may be free now
	}
}

// setLimit sets a bucket to bytes per second; 0: no limit. It holds an eighth of a
// second, so that a limit that is lifted is felt at once by those who wait.
func setLimit(l *rate.Limiter, perSecond int64) {
	if perSecond <= 0 {
		l.SetLimit(rate.Inf)
		return
	}
	l.SetBurst(int(min(max(perSecond/8, 4<<10), 256<<10)))
	l.SetLimit(rate.Limit(perSecond))
}

// allowed is how many streams a pull may have open.
func (s *Store) allowed() int {
	if n := int(s.limits.streams.Load()); n > 0 && n < s.streams {
		return n
	}
	return s.streams
}

// of are the buckets that bytes of a kind of source are taken from.
func (l *limits) of(k Kind) []*rate.Limiter {
	if k == KindRegistry {
		return []*rate.Limiter{l.outside, l.total}
	}
	return []*rate.Limiter{l.total}
}

// most is how much may be read at a time, in bytes.
func (l *limits) most(k Kind) int {
	most := readSize
	for _, b := range l.of(k) {
		if b.Limit() != rate.Inf {
			most = min(most, b.Burst())
		}
	}
	return most
}

// pay waits until n bytes, which have been read, are within the limits.
func (l *limits) pay(ctx context.Context, k Kind, n int) error {
	for _, b := range l.of(k) {
		for left := n; left > 0; {
			if b.Limit() == rate.Inf {
				break
			}
			piece := min(left, b.Burst())
			if err := b.WaitN(ctx, piece); err == nil {
				left -= piece
			} else if ctx.Err() != nil || piece <= b.Burst() {
				return err
			} // else the bucket became smaller meanwhile
		}
	}
	return nil
}

// Moved is how many bytes came from each source since the store was opened, by its name;
// "reused" is what they would have had to give, and was here already.
func (s *Store) Moved() map[string]int64 {
	s.tracks.mu.Lock()
	defer s.tracks.mu.Unlock()
	return maps.Clone(s.tracks.moved)
}

// reused counts a piece that was here already, and a chunk as progress of the pull.
func (f *fetch) reused(c image.Chunk) {
	if c.Index >= 0 {
		f.entry.done.Add(c.BlobSize)
	}
	f.store.tracks.mu.Lock()
	f.store.tracks.moved[reusedName] += c.BlobSize
	f.store.tracks.mu.Unlock()
	f.store.stir()
}
