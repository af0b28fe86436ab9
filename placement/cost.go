package placement

import (
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// What is assumed where nothing was measured.
const (
	// DefaultBoot is clone and boot of a macOS guest on Apple Silicon until its agent
	// answers: 6 s is usual.
	DefaultBoot = 6 * time.Second
	// DefaultResume is the same by a saved state, which is read and not booted: about 1 s.
	DefaultResume = time.Second
	// DefaultWaitCap: nobody is overtaken for longer than half an hour.
	DefaultWaitCap = 30 * time.Minute
	// DefaultPullRate in bytes per second: half of what 1 GbE carries, since registries
	// and decoding seldom fill it.
	DefaultPullRate = 60e6
	// DefaultGrowth is the disk kept free for the clone in each slot to grow, in bytes.
	DefaultGrowth = 40e9
)

// What the formula weighs by.
const (
	// unknownEnd stands for how long a job without history runs, or runs on: longer than
	// any sane pull, so that a job that has waited for one pull time in vain then pulls.
	unknownEnd = time.Hour
	// minOverrun and more: a VM over its predicted end is taken to need as long again as
	// it is over, since durations have a heavy tail, and at least this.
	minOverrun = 15 * time.Second
	// maxStart is more than any boot takes that ends well.
	maxStart = time.Hour
	// teardown is the time from the order to destroy an idle VM to its free slot.
	teardown = 5 * time.Second
	// minPull: an image that is not ready takes at least a second to become so; it keeps
	// "all bytes here, being verified" apart from "ready".
	minPull = time.Second
	// heldForPull is for how long a slot may stay empty for a job whose image is about
	// to be ready. For a longer pull the slot is given to whoever can start at once:
	// a pull never holds a slot.
	heldForPull = 2 * time.Minute
	// orderAhead: a pull is ordered when its slot is free at most this long after the
	// image would be ready. Earlier, the choice may well change.
	orderAhead = 10 * time.Minute
	// planAhead is how far ahead slots are reserved. A job whose slot is farther away is
	// shown its best node, but takes nothing from the pass: by then all is planned again
	// many times, and a long queue would cost more than it tells.
	planAhead = time.Hour

	// spreadWeight and failureCost only break ties. A full node looks 0.1 s worse than an
	// empty one; each recent failure costs as much as a boot that fails, up to a minute.
	spreadWeight   = 100 * time.Millisecond
	failureCost    = 5 * time.Second
	maxFailureCost = time.Minute

	// α grows from 0 at half of the slots used to 1 at nine tenths: an idle fleet has
	// bandwidth to spend on starting one job sooner, a full one does not.
	alphaFrom = 0.5
	alphaFull = 0.9
)

// alpha is the weight of a new pull's own time, by the share of slots in use.
func alpha(used, slots int) float64 {
	if slots == 0 {
		return 1
	}
	share := float64(used) / float64(slots)
	return min(1, max(0, (share-alphaFrom)/(alphaFull-alphaFrom)))
}

// transfer is how long bytes take at a rate in bytes per second, to the millisecond.
func transfer(bytes, rate int64) time.Duration {
	return time.Duration(float64(bytes) / float64(rate) * float64(time.Second)).Round(time.Millisecond)
}

// remaining is how long until the slot's VM is gone, and whether that is a guess.
func remaining(s *Slot, now time.Time) (time.Duration, bool) {
	if s.Ends.IsZero() {
		return unknownEnd, true
	}
	left := s.Ends.Sub(now)
	if left < 0 {
		left = -left
	}
	return max(left, minOverrun), false
}

// fits reports whether one VM of the pool could run on the node at all. What is not
// configured or not reported is not compared.
func fits(pool *fleet.Pool, n *Node) bool {
	return (n.CPU == 0 || pool.CPU <= n.CPU) && (n.Memory == 0 || pool.Memory <= n.Memory)
}
