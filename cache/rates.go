package cache

import (
	"math"
	"sync"
	"time"
)

// sampleTime is how much active time makes a sample, and sampleWeight what a new one of
// that length counts: after about ten seconds a changed link is believed.
const (
	sampleTime   = 2 * time.Second
	sampleWeight = 0.3
)

// meter measures bytes per second over the time in which a pull is active.
type meter struct {
	mu    sync.Mutex
	bytes int64         // since the last sample
	spent time.Duration // active time since the last sample, up to since
	since time.Time     // zero: nothing is active
	rate  float64       // bytes per second, smoothed over samples
}

func (m *meter) add(n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.bytes += n
	if !m.since.IsZero() && m.spent+time.Since(m.since) >= sampleTime {
		m.fold()
	}
}

// run starts and stops the clock; a stop folds what there is, so that a fast pull of a
// small image is measured too.
func (m *meter) run(active bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case active && m.since.IsZero():
		m.since = time.Now()
	case !active && !m.since.IsZero():
		m.fold()
		m.since = time.Time{}
	}
}

// fold takes a sample; m.mu is held and the clock runs.
func (m *meter) fold() {
	now := time.Now()
	m.spent += now.Sub(m.since)
	m.since = now
	if m.bytes == 0 || m.spent <= 0 {
		return
	}
	sample := float64(m.bytes) / m.spent.Seconds()
	if m.rate == 0 {
		m.rate = sample
	} else {
		m.rate += sampleWeight * (sample - m.rate)
	}
	m.bytes, m.spent = 0, 0
}

func (m *meter) value() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return int64(m.rate)
}

// priors are what a source of each kind is taken to bring while nothing of it is
// measured, in bytes per second: guesses for a gigabit network at home in a rack, whose
// line out is slower. What counts is their order.
var priors = map[Kind]float64{KindRegistry: 25e6, KindMirror: 60e6, KindStore: 100e6, KindPeer: 80e6}

const (
	// paceBytes are enough for a sample that is shorter than sampleTime: less would
	// measure the way there and back.
	paceBytes = 4 << 20
	// paceHalf is the time after which half of what was measured is forgotten while
	// nothing moves: a source that was slow once is tried again.
	paceHalf = time.Minute
	// paceFloor keeps estimates finite, in bytes per second.
	paceFloor = 1 << 10
	// restFirst is how long a source that failed is left alone, doubled for each further
	// failure up to restMost.
	restFirst = 5 * time.Second
	restMost  = 5 * time.Minute
)

// track is what a store knows of one source: how fast it is, and whether it rests.
type track struct {
	prior float64
	rate  float64       // bytes per second of all its streams together; 0: nothing is measured
	bytes int64         // since the last sample
	spent time.Duration // with a stream open since the last sample, up to since
	since time.Time     // while running
	idle  time.Time     // since when nothing runs
	// running is how many streams are open and may move bytes.
	running int

	users    int // supplies that are under way
	failures int // in a row
	rest     time.Time
}

// start and stop are around the time in which a stream may move bytes.
func (t *track) start(now time.Time) {
	if t.running == 0 {
		if t.rate > 0 {
			t.rate = t.remembered(now)
		}
		t.since = now
	}
	t.running++
}

func (t *track) stop(now time.Time) {
	t.fold(now)
	if t.running--; t.running > 0 {
		return
	}
	t.idle = now
	if t.rate == 0 && t.spent >= sampleTime { // not one byte came
		t.rate = max(t.prior*fading(t.spent), paceFloor)
		t.bytes, t.spent = 0, 0
	}
}

// fold takes a sample when there is enough for one.
func (t *track) fold(now time.Time) {
	if t.running == 0 {
		return
	}
	t.spent += now.Sub(t.since)
	t.since = now
	if t.bytes < paceBytes && t.spent < sampleTime || t.spent < time.Millisecond {
		return
	}
	if t.rate == 0 && t.bytes == 0 {
		return // value makes less of the prior, the longer this lasts
	}
	sample := float64(t.bytes) / t.spent.Seconds()
	if t.rate == 0 {
		t.rate = max(sample, paceFloor)
	} else {
		t.rate = max(sample+(t.rate-sample)*fading(t.spent), paceFloor)
	}
	t.bytes, t.spent = 0, 0
}

// fading is what an older value still counts after a sample of that length.
func fading(spent time.Duration) float64 {
	return math.Pow(1-sampleWeight, spent.Seconds()/sampleTime.Seconds())
}

// remembered is the measured rate, as far as it is not forgotten.
func (t *track) remembered(now time.Time) float64 {
	kept := math.Exp2(-now.Sub(t.idle).Seconds() / paceHalf.Seconds())
	return t.prior + (t.rate-t.prior)*kept
}

// value is what the source is expected to bring, in bytes per second.
func (t *track) value(now time.Time) float64 {
	t.fold(now)
	switch {
	case t.rate == 0:
		return max(t.prior*fading(t.spent), paceFloor)
	case t.running == 0:
		return max(t.remembered(now), paceFloor)
	default:
		return t.rate
	}
}

// awake reports whether a source may be chosen while there are others. One that has
// failed is tried by one stream first.
func (t *track) awake(now time.Time) bool {
	return !now.Before(t.rest) && (t.failures == 0 || t.users == 0)
}

// failed lets a source rest, at least until it wants to be asked again. Streams that fail
// together are one failure.
func (t *track) failed(now time.Time, err error) {
	if !now.Before(t.rest) {
		t.rest = now.Add(min(restFirst<<min(t.failures, 10), restMost))
		t.failures++
	}
	if until := retryAt(err); until.After(t.rest) {
		t.rest = until
	}
}

// tracks are what a store knows of all its sources, by name.
type tracks struct {
	mu    sync.Mutex
	of    map[string]*track
	moved map[string]int64 // bytes in all
}

// track finds or makes that of a source; t.mu is held.
func (t *tracks) track(s Source) *track {
	known := t.of[s.Name()]
	if known == nil {
		known = &track{prior: priors[s.Kind()]}
		if known.prior == 0 {
			known.prior = priors[KindRegistry]
		}
		t.of[s.Name()] = known
	}
	return known
}

// with does something to the track of a source.
func (t *tracks) with(s Source, do func(*track, time.Time)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	do(t.track(s), time.Now())
}

// look is what the choice needs to know of a source: its rate in bytes per second, and
// whether it is awake.
func (t *tracks) look(s Source) (rate float64, awake bool) {
	t.with(s, func(t *track, now time.Time) { rate, awake = t.value(now), t.awake(now) })
	return rate, awake
}

// add counts bytes that moved.
func (t *tracks) add(s Source, n int64) {
	t.with(s, func(k *track, now time.Time) {
		k.bytes += n
		k.fold(now)
		t.moved[s.Name()] += n
	})
}
