// Package demand learns from the past what the fleet will be asked for: how long jobs
// run, by repository and job name, and how often they ask for each image.
//
// It is accumulators that can be saved: no clock (every observation brings its time),
// no I/O (Save and Load move JSON through a reader and a writer), no goroutines, and
// no locking of its own. It decides nothing; placement asks it when a slot will be
// free, and what an image is worth.
//
// The controller observes every job that was queued and every one that ended, and hands
// Predict and the rates to placement; the simulator does the same in virtual time.
package demand

import (
	"cmp"
	"math"
	"slices"
	"strings"
	"time"
)

const (
	// DefaultMaxKeys bounds the memory: about 200 bytes each, so 4 MB, and more jobs than
	// a fleet of 1,000 Macs has names for.
	DefaultMaxKeys = 20_000
	// weight of a new observation once there are 1/weight of them: a job whose steps
	// changed is known again after about five runs.
	weight = 0.2
	// maxDuration is GitHub's limit for a job on a self-hosted runner.
	maxDuration = 5 * 24 * time.Hour
	// maxName cuts names, which are chosen in workflow files by anyone, in bytes.
	maxName = 256
)

// Basis says on which observations an estimate rests, from the most to the least
// particular.
type Basis string

// The bases, in the order in which Estimate tries them.
const (
	BasisJob        Basis = "job"        // this job name in this repository
	BasisMatrix     Basis = "matrix"     // the job with other matrix values: "test (3)" by "test (1)"
	BasisRepository Basis = "repository" // any job of the repository
	BasisFleet      Basis = "fleet"      // any job at all
)

// Estimate is what is known of a duration.
type Estimate struct {
	Mean   time.Duration // exponentially weighted, recent runs count more
	Spread time.Duration // standard deviation, weighted alike; 0 after one run
	Runs   int           // observations it rests on
	Basis  Basis
}

// key names an accumulator. A key with an empty name is the whole repository's, one
// with an empty repository the fleet's.
type key struct {
	repository string
	name       string
	matrix     bool // name is the part before the matrix values
}

// accumulator holds the weighted mean (seconds) and variance (seconds squared) of n
// observations, the latest at at.
type accumulator struct {
	mean, variance float64
	n              int
	at             time.Time
}

// add moves the averages: plainly over the first runs, with a constant weight then.
func (a *accumulator) add(seconds float64, at time.Time) {
	a.n++
	w := max(1/float64(a.n), weight)
	diff := seconds - a.mean
	a.mean += w * diff
	a.variance = (1 - w) * (a.variance + w*diff*diff)
	if at.After(a.at) {
		a.at = at
	}
}

// Config bounds what is kept.
type Config struct {
	// MaxKeys is how many names are remembered; those not seen for longest go first.
	// 0: DefaultMaxKeys.
	MaxKeys int
}

// Durations remembers how long jobs ran. It is for one goroutine at a time.
type Durations struct {
	max  int
	keys map[key]*accumulator
}

// New returns one without any history.
func New(cfg Config) *Durations {
	return &Durations{max: cmp.Or(cfg.MaxKeys, DefaultMaxKeys), keys: map[key]*accumulator{}}
}

// Observe records that a job of repository ("owner/name", any case) ran for d and
// ended at at. A d that is not positive, or longer than GitHub lets a job run, says
// nothing about the next run and is left out.
func (d *Durations) Observe(repository, name string, ran time.Duration, at time.Time) {
	if ran <= 0 || ran > maxDuration {
		return
	}
	for _, k := range keysOf(repository, name) {
		a := d.keys[k]
		if a == nil {
			a = &accumulator{}
			d.keys[k] = a
		}
		a.add(ran.Seconds(), at)
	}
	d.forget()
}

// Predict is the expected duration of a job; false without any history at all.
// It has the shape that placement.Snapshot wants.
func (d *Durations) Predict(repository, name string) (time.Duration, bool) {
	e, ok := d.Estimate(repository, name)
	return e.Mean, ok
}

// Estimate is Predict with its spread and what it rests on.
func (d *Durations) Estimate(repository, name string) (Estimate, bool) {
	for i, k := range keysOf(repository, name) {
		if a, known := d.keys[k]; known {
			return Estimate{Mean: seconds(a.mean), Spread: seconds(math.Sqrt(a.variance)), Runs: a.n, Basis: bases[i]}, true
		}
	}
	return Estimate{}, false
}

// Latest is when the latest job that was observed had ended; zero without any history.
func (d *Durations) Latest() time.Time {
	var latest time.Time
	for _, a := range d.keys {
		if a.at.After(latest) {
			latest = a.at
		}
	}
	return latest
}

// Len is the number of names remembered.
func (d *Durations) Len() int { return len(d.keys) }

// bases are what the keys of keysOf stand for.
var bases = [4]Basis{BasisJob, BasisMatrix, BasisRepository, BasisFleet}

// keysOf are the accumulators that a job counts in, the most particular first.
func keysOf(repository, name string) [4]key {
	repository, name = cut(strings.ToLower(repository)), cut(name)
	// GitHub names the jobs of a matrix "name (value, value)".
	base, _, _ := strings.Cut(name, " (")
	return [4]key{
		{repository: repository, name: name},
		{repository: repository, name: base, matrix: true},
		{repository: repository},
		{},
	}
}

func cut(s string) string { return strings.ToValidUTF8(s[:min(len(s), maxName)], "") }

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// forget drops the names not seen for longest, a tenth of the bound at a time so that
// the sorting is paid for by many observations.
func (d *Durations) forget() {
	if len(d.keys) <= d.max {
		return
	}
	excess := len(d.keys) - d.max + d.max/10
	// The fleet's own average is the last resort and stays: it sorts first.
	keys := d.sorted()
	if keys[0] == (key{}) {
		keys = keys[1:]
	}
	slices.SortStableFunc(keys, func(a, b key) int { return d.keys[a].at.Compare(d.keys[b].at) })
	for _, k := range keys[:min(excess, len(keys))] {
		delete(d.keys, k)
	}
}

// sorted are the keys by name, so that saving and forgetting do not depend on the
// order of a map.
func (d *Durations) sorted() []key {
	keys := make([]key, 0, len(d.keys))
	for k := range d.keys {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, func(a, b key) int {
		return cmp.Or(cmp.Compare(a.repository, b.repository), cmp.Compare(a.name, b.name), boolCompare(a.matrix, b.matrix))
	})
	return keys
}

func boolCompare(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return 1
	default:
		return -1
	}
}
