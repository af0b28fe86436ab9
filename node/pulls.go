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

const (
	// maxPulls bounds the pulls begun at once, demands and pre-warms apart: the store
	// gives the line to one of them, so more would only wait there instead of here.
	maxPulls = 8
	// pullPause and pullMost bound the pause before a pull is tried again; the store may
	// ask for a longer one (RetryAt).
	pullPause = time.Second
	pullMost  = 2 * time.Minute
)

// puller begins the pulls that the last reply asked for, most urgent first, and tries
// again what failed. In which order bytes move is the store's business.
type puller struct {
	images Images
	now    func() time.Time
	tell   func()
	log    *slog.Logger
	wake   chan struct{} // holds one value while there may be something to begin

	mu     sync.Mutex
	wanted []fleet.Hold // most urgent first
	active map[pulling]pull
	rests  map[fleet.Digest]rest
}

// pulling names a call of Pull under way. A pre-warm that a job comes to wait for is
// called again as a demand: both calls share the work.
type pulling struct {
	digest fleet.Digest
	demand bool
}

// pull is a call under way; its zero value is none.
type pull struct {
	cancel context.CancelFunc
	done   chan struct{} // closed at its end
}

// rest is the pause after a pull's end, also a good one: the store may have evicted the
// image since, and is not asked in a tight loop.
type rest struct {
	failures int // in a row
	err      error
	until    time.Time
}

func newPuller(images Images, now func() time.Time, tell func(), log *slog.Logger) *puller {
	return &puller{
		images: images, now: now, tell: tell, log: log, wake: make(chan struct{}, 1),
		active: map[pulling]pull{}, rests: map[fleet.Digest]rest{},
	}
}

// want replaces the list of images to hold. A pull under way goes on even if it is no
// longer named; one not yet begun is forgotten, for nothing was done for it.
func (p *puller) want(holds []fleet.Hold) {
	holds = slices.Clone(holds)
	slices.SortStableFunc(holds, func(x, y fleet.Hold) int {
		switch {
		case x.Demand && !y.Demand:
			return -1
		case y.Demand && !x.Demand:
			return 1
		}
		return -cmp.Compare(x.Priority, y.Priority)
	})
	p.mu.Lock()
	p.wanted = holds
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

// run begins pulls until ctx ends, and joins them.
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

// step begins what may begin. If something is to be tried again, it says when to look.
func (p *puller) step(ctx context.Context, pulls *sync.WaitGroup) (wait time.Duration, retry bool) {
	here := map[fleet.Digest]fleet.NodeImage{}
	for _, i := range p.images.List() {
		here[i.Digest] = i
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	count := map[bool]int{}
	for run := range p.active {
		count[run.demand]++
	}
	now := p.now()
	for _, h := range p.wanted {
		run := pulling{h.Digest, h.Demand}
		i := here[h.Digest]
		_, begun := p.active[run]
		_, demanded := p.active[pulling{h.Digest, true}]
		if i.State == fleet.ImageReady || begun || demanded || count[h.Demand] >= maxPulls {
			continue
		}
		until := p.rests[h.Digest].until
		if i.State == fleet.ImageFailed && i.RetryAt.After(until) {
			until = i.RetryAt
		}
		if left := until.Sub(now); left > 0 {
			if !retry || left < wait {
				wait, retry = left, true
			}
			continue
		}
		count[h.Demand]++
		p.begin(ctx, h, run, pulls)
	}
	return wait, retry
}

// begin starts one pull; p.mu is held.
func (p *puller) begin(ctx context.Context, h fleet.Hold, run pulling, pulls *sync.WaitGroup) {
	call, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	p.active[run] = pull{cancel, done}
	p.log.Info("pulling an image", "image", h.Digest.Short(), "ref", h.Ref, "demand", h.Demand, "why", h.Why)
	pulls.Go(func() {
		defer close(done)
		defer cancel()
		err := p.images.Pull(call, h)
		if ctx.Err() != nil {
			return // the agent stops: what was fetched is the store's to keep
		}
		p.ended(h, run, err)
	})
}

// end hangs up the pulls of an image that is not to be held any more, and waits for it.
func (p *puller) end(d fleet.Digest) {
	for _, demand := range []bool{false, true} {
		p.mu.Lock()
		held := slices.ContainsFunc(p.wanted, func(h fleet.Hold) bool { return h.Digest == d })
		call, begun := p.active[pulling{d, demand}]
		p.mu.Unlock()
		if begun && !held {
			call.cancel()
			<-call.done
		}
	}
}

// ended notes the outcome of a pull.
func (p *puller) ended(h fleet.Hold, run pulling, err error) {
	p.mu.Lock()
	delete(p.active, run)
	if err == nil {
		p.rests[h.Digest] = rest{until: p.now().Add(pullPause)}
	} else {
		r := rest{failures: p.rests[h.Digest].failures + 1, err: err}
		r.until = p.now().Add(backoff(r.failures, pullPause, pullMost))
		p.rests[h.Digest] = r
		p.log.Debug("pull failed", "image", h.Digest.Short(), "ref", h.Ref, "failures", r.failures, "error", err)
	}
	p.mu.Unlock()
	p.kick()
	p.tell()
}

// report is the store's list, and what was asked for and has not come to it yet.
func (p *puller) report() []fleet.NodeImage {
	images := slices.Clone(p.images.List())
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, h := range p.wanted {
		if slices.ContainsFunc(images, func(i fleet.NodeImage) bool { return i.Digest == h.Digest }) {
			continue
		}
		i := fleet.NodeImage{Digest: h.Digest, Ref: h.Ref, State: fleet.ImageQueued}
		if r := p.rests[h.Digest]; r.err != nil {
			i.State, i.Error, i.RetryAt = fleet.ImageFailed, r.err.Error(), r.until
		}
		images = append(images, i)
	}
	return images
}
