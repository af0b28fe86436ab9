package cache

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// A piece comes at 1 KB/s while others come at a good pace: its claim is not renewed, so
// that another node gets it, and is again when the piece comes faster. A pace that our own
// limit imposes is no reason.
func TestSlowPieceIsGivenBack(t *testing.T) {
	now := time.Now()
	p := &pace{since: now}
	second := func(seconds int, bytes int64) bool {
		now = now.Add(time.Duration(seconds) * time.Second)
		p.bytes += bytes
		return p.slow(now, slowPace)
	}
	for i, step := range []struct {
		seconds int
		bytes   int64
		slow    bool
	}{{20, 10, false}, {11, 10, true}, {20, 100 << 20, true}, {11, 0, false}, {29, 0, false}, {1, 0, true}} {
		if got := second(step.seconds, step.bytes); got != step.slow {
			t.Errorf("step %d: slow: %v", i, got)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		for limit, renewed := range map[int64]bool{0: false, 4 << 10: true} {
			shelf := newShelf()
			h, m := shelf.put(t, "A")
			v := newVillage(1)
			s := v.settle(t, "mac", Config{}, newWell("registry", KindRegistry, shelf, 500)) // two minutes for the chunk
			s.Limit(Limits{Outside: limit})
			pullTook(t, s, h)
			late := 0
			for i, a := range v.asks["mac"] {
				if v.at["mac"][i].Sub(v.at["mac"][0]) > movingTime+askMost && slices.Contains(a.Fetching, m.Chunks[0].Index) {
					late++
				}
			}
			if (late > 0) != renewed {
				t.Errorf("limit %d: a claim was renewed %d times after the piece was slow", limit, late)
			}
		}
	})
}

// A piece has waited for five minutes, as a mirror that has it rests: it is insisted on.
func TestLongWaitInsists(t *testing.T) {
	c := newCrowd(t, 2, 1)
	x := c.waiting[1]
	rests := &sight{source: &rumour{name: "mirror", kind: KindMirror, has: func(int) bool { return true }}, name: "mirror", kind: KindMirror, rate: 1e6}
	c.supplies.mu.Lock()
	defer c.supplies.mu.Unlock()
	for waited, want := range map[time.Duration]wish{insistAnyway - time.Minute: wishWant, insistAnyway + time.Second: wishInsist} {
		x.since = time.Now().Add(-waited)
		if _, _, err := c.supplies.pick(append(c.supplies.sights(), rests), x); err != nil || x.wish != want {
			t.Errorf("after %s it wishes %q, %v; want %q", waited, x.wish, err, want)
		}
	}
}
