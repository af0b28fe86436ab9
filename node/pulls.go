package node

import (
	"cmp"
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// Pauses between tries of one image's pull. A registry that refuses is asked again, for
// a person may have mended it, but ever more seldom.
const (
	pullPause = 2 * time.Second
	pullMost  = 2 * time.Minute
	// pulledPause is the least time between two pulls of an image that succeeded: the
	// store may have evicted it in between, and must not be asked in a tight loop.
	pulledPause = time.Second
)

// puller brings the images that the last reply asked to hold: one that a job waits for
// at a time, so that it has the whole line, and pre-warms, one at a time, only while no
// job waits; a pre-warm under way then gives way and goes on afterwards.
type puller struct {
	images Images
	now    func() time.Time
	tell   func()
	log    *slog.Logger
	wake   chan struct{} // holds one value while there may be something to begin or stop

	mu     sync.Mutex
	wanted []fleet.Hold // most urgent first
	active map[fleet.Digest]*pulling
	rests  map[fleet.Digest]rest
}

// pulling is a pull under way.
type pulling struct {
	demand bool
	cancel context.CancelFunc
	// yielded: it was cancelled for a demand, which is no failure.
	yielded bool
}

// rest is why an image is not pulled right now.
type rest struct {
	failures int
	err      error // of the last try; nil: it succeeded
	until    time.Time
}

func newPuller(images Images, now func() time.Time, tell func(), log *slog.Logger) *puller {
	return &puller{
		images: images, now: now, tell: tell, log: log, wake: make(chan struct{}, 1),
		active: map[fleet.Digest]*pulling{}, rests: map[fleet.Digest]rest{},
	}
}

// want replaces the list of images to hold. A pull under way goes on even if it is no
// longer named; one not yet begun is forgotten, for nothing was done for it.
func (p *puller) want(holds []fleet.Hold) {
	holds = slices.Clone(holds)
	slices.SortStableFunc(holds, func(x, y fleet.Hold) int {
		if x.Demand != y.Demand {
			if x.Demand {
				return -1
			}
			return 1
		}
		return -cmp.Compare(x.Priority, y.Priority)
	})
	p.mu.Lock()
	p.wanted = holds
	for _, h := range holds {
		if run := p.active[h.Digest]; run != nil && h.Demand {
			run.demand = true // a pre-warm that a job has come to wait for
		}
	}
	for d := range p.rests {
		if !slices.ContainsFunc(holds, func(h fleet.Hold) bool { return h.Digest == d }) {
			delete(p.rests, d) // when it is asked for again, it starts afresh
		}
	}
	p.mu.Unlock()
	p.kick()
}

// kick makes run look again.
func (p *puller) kick() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// run begins and stops pulls until ctx ends, and joins them.
func (p *puller) run(ctx context.Context) {
	var pulls sync.WaitGroup
	defer pulls.Wait()
	again := time.NewTimer(0)
	defer again.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.wake:
		case <-again.C:
		}
		if wait, retry := p.step(ctx, &pulls); retry {
			again.Reset(wait)
		}
	}
}

// step begins what may begin. If something failed and waits, it says when to look again.
func (p *puller) step(ctx context.Context, pulls *sync.WaitGroup) (wait time.Duration, retry bool) {
	ready := map[fleet.Digest]bool{}
	for _, i := range p.images.List() {
		ready[i.Digest] = i.State == fleet.ImageReady
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.now()
	var next *fleet.Hold
	for _, h := range p.wanted { // sorted: the first that may begin is the most urgent
		if ready[h.Digest] || p.active[h.Digest] != nil {
			continue
		}
		if left := p.rests[h.Digest].until.Sub(now); left > 0 {
			if !retry || left < wait {
				wait, retry = left, true
			}
			continue
		}
		next = &h
		break
	}
	if next == nil || !p.mayBegin(*next) {
		return wait, retry
	}
	p.begin(ctx, *next, pulls)
	return wait, retry
}

// mayBegin reports whether there is room for h. If it is a demand and a pre-warm has the
// room, that one is told to give way; its end wakes run.
func (p *puller) mayBegin(h fleet.Hold) bool {
	for _, run := range p.active {
		if h.Demand && !run.demand && !run.yielded {
			run.yielded = true
			run.cancel()
		}
	}
	return len(p.active) == 0
}

// begin starts one pull; p.mu is held.
func (p *puller) begin(ctx context.Context, h fleet.Hold, pulls *sync.WaitGroup) {
	ctx, cancel := context.WithCancel(ctx)
	run := &pulling{demand: h.Demand, cancel: cancel}
	p.active[h.Digest] = run
	p.log.Info("pulling an image", "image", h.Digest.Short(), "ref", h.Ref, "demand", h.Demand, "why", h.Why)
	pulls.Go(func() {
		defer cancel()
		err := p.images.Pull(ctx, h)
		p.ended(ctx, h, run, err)
	})
}

// ended notes the outcome of a pull.
func (p *puller) ended(ctx context.Context, h fleet.Hold, run *pulling, err error) {
	p.mu.Lock()
	delete(p.active, h.Digest)
	switch {
	case err == nil:
		p.rests[h.Digest] = rest{until: p.now().Add(pulledPause)}
	case ctx.Err() != nil:
		delete(p.rests, h.Digest) // it gave way, or the agent stops
	default:
		r := rest{failures: p.rests[h.Digest].failures + 1, err: err}
		r.until = p.now().Add(backoff(r.failures, pullPause, pullMost))
		p.rests[h.Digest] = r
		p.log.Warn("pull failed", "image", h.Digest.Short(), "ref", h.Ref, "failures", r.failures, "error", err)
	}
	p.mu.Unlock()
	p.kick()
	p.tell()
}

// report is the store's list with what only we know: what waits, and when a failed pull
// is tried again.
func (p *puller) report() []fleet.NodeImage {
	images := slices.Clone(p.images.List())
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, h := range p.wanted {
		at := slices.IndexFunc(images, func(i fleet.NodeImage) bool { return i.Digest == h.Digest })
		if at < 0 {
			images = append(images, fleet.NodeImage{Digest: h.Digest, Ref: h.Ref, State: fleet.ImageQueued})
			at = len(images) - 1
		}
		p.annotate(&images[at])
	}
	return images
}

// annotate sets what we know better than the store about an image that is not ready.
func (p *puller) annotate(i *fleet.NodeImage) {
	r := p.rests[i.Digest]
	switch {
	case i.State == fleet.ImageReady || i.State == fleet.ImageEvicting || i.State == fleet.ImageVerifying:
	case p.active[i.Digest] != nil:
		i.State, i.Class, i.Error = fleet.ImageCaching, "", ""
	case r.err != nil:
		i.State, i.RetryAt = fleet.ImageFailed, r.until
		if i.Error == "" {
			i.Error = r.err.Error()
		}
	case i.Done > 0:
		i.State, i.Class, i.Error = fleet.ImagePaused, "", "" // it gave way to a demand
	default:
		i.State, i.Class, i.Error = fleet.ImageQueued, "", ""
	}
}
