package cache

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/paddock-ci/paddock/image"
)

// wish is what a waiting piece asks of the site.
type wish string

const (
	wishNone   wish = ""
	wishWant   wish = "want"   // to be fetched from outside
	wishInsist wish = "insist" // the same, although other nodes are said to have it
)

const (
	// patience is how long the site may be silent before a pull goes on without it.
	patience = 2500 * time.Millisecond
	// askGap is the least time between two questions, so that news of pieces that arrive
	// is told together; half of the 500 ms in which it has to be.
	askGap = 250 * time.Millisecond
	// askMost is the longest time between two; a claim lasts four times as long.
	askMost = 15 * time.Second
	// askAgain is used when the site does not say when to ask.
	askAgain = 2 * time.Second
	// retryGap is the pause after a question that failed.
	retryGap = 500 * time.Millisecond
	// gather is waited before the first question, for the pieces that begin to wait
	// together.
	gather = 10 * time.Millisecond
	// grantTime is how long a grant is good for without bytes: less than the 60 s of a
	// claim, since it is counted from when the question was sent.
	grantTime = 50 * time.Second
	// movingTime is how long after its last byte a piece still counts as being fetched:
	// as long as a registry may stall.
	movingTime = 30 * time.Second
	// insistAfter is how long a piece waits for others before their word that they have
	// it is doubted: nobody whom the site names has it.
	insistAfter = 15 * time.Second
	// insistAnyway is how long a piece waits for whatever it is that others do.
	insistAnyway = 5 * time.Minute
)

// claims is what a pull knows of its site. It is guarded by supplies.mu, but for wake.
type claims struct {
	site  Site
	seed  [2]uint64
	wake  chan struct{} // has room for one
	quiet bool          // its silence was logged

	asked    bool
	have     map[int]bool
	granted  map[int]time.Time // until when
	peers    []Source
	answered bool
	failing  time.Time // since when it does not answer; zero: it does
	alone    bool      // so the pull goes on without it
	held     bool      // another pull had the turn at the last question
}

func newClaims(f *fetch) *claims {
	return &claims{
		site: f.store.site, seed: [2]uint64{rand.Uint64(), rand.Uint64()}, wake: make(chan struct{}, 1),
		have: make(map[int]bool), granted: make(map[int]time.Time),
	}
}

// rank is the place of a piece in this pull's own order.
func (c *claims) rank(piece int) uint64 {
	return rand.NewPCG(c.seed[0], c.seed[1]^uint64(piece)).Uint64()
}

// stir makes the next question come soon.
func (c *claims) stir() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// patient reports whether a piece that nobody has waits for the site's first word.
func (c *claims) patient() bool { return !c.answered && !c.alone }

// holds reports whether a piece is claimed for this node.
func (c *claims) holds(x *waiter) bool { return time.Now().Before(c.granted[x.piece]) }

// exempt reports whether a piece needs no claim: the VM config is smaller than the question.
func (c *claims) exempt(x *waiter) bool { return x.want.Chunk.Index == image.ConfigIndex }

// nearby reports whether other nodes are said to have a piece.
func (c *claims) nearby(x *waiter) bool {
	return slices.ContainsFunc(c.peers, func(s Source) bool { _, ok := s.Has(x.want); return ok })
}

// mayFetch reports whether a piece may be fetched from outside now.
func (p *supplies) mayFetch(x *waiter) bool {
	c := p.claims
	return c == nil || c.alone || c.exempt(x) || c.holds(x)
}

// talk keeps the site informed until the returned function is called.
func (p *supplies) talk(ctx context.Context) (end func()) {
	ctx, cancel := context.WithCancel(ctx)
	var done sync.WaitGroup
	done.Go(func() { p.converse(ctx) })
	return func() {
		cancel()
		done.Wait()
		p.farewell(context.WithoutCancel(ctx))
	}
}

// converse asks the site when there is something to tell or to hear.
func (p *supplies) converse(ctx context.Context) {
	again := gather
	p.claims.stir()
	for wait := time.NewTimer(again); ; wait.Reset(again) {
		select {
		case <-wait.C:
		case <-p.claims.wake:
			if !pause(ctx, min(again, askGap)) {
				return
			}
		case <-ctx.Done():
		}
		wait.Stop()
		if ctx.Err() != nil {
			return
		}
		again = p.consult(ctx)
		p.schedule()
	}
}

// pause waits; false: ctx has ended.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// consult asks once, and returns when to ask again.
func (p *supplies) consult(ctx context.Context) time.Duration {
	select {
	case <-p.claims.wake: // what it would have told is told now
	default:
	}
	ask, offered := p.ask()
	began := time.Now()
	limited, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	answer, err := p.claims.site.Ask(limited, ask)
	if ctx.Err() != nil {
		return retryGap
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	defer p.news()
	c := p.claims
	if err != nil {
		return p.silent(began, err)
	}
	if c.alone {
		p.store.log.Info("the site answers again", "image", ask.Image)
	}
	c.answered, c.alone, c.failing, c.peers = true, false, time.Time{}, answer.Peers
	for _, x := range offered {
		// What was insisted on for want of a node that has it may have come to one since the
		// last answer: then it is fetched there, and the grant is of no use.
		x.denied = !slices.Contains(answer.Grant, x.piece) || x.doubted && c.nearby(x)
		if !x.denied {
			c.granted[x.piece] = began.Add(grantTime)
		}
	}
	if answer.Again <= 0 {
		answer.Again = askAgain
	}
	return min(max(answer.Again, askGap), askMost)
}

// silent notes that the site did not answer; p.mu is held.
func (p *supplies) silent(began time.Time, err error) time.Duration {
	c := p.claims
	if c.failing.IsZero() {
		c.failing = began
	}
	if time.Since(c.failing) < patience-retryGap {
		return retryGap
	}
	if !c.quiet {
		p.store.log.Warn("the site does not answer, so this pull goes on without it", "image", p.image.Digest, "error", err)
		c.quiet = true
	}
	c.alone = true
	return patience
}

// slowPace is how slow a piece may come for its claim to be renewed, in bytes per second:
// 512 MiB take nine hours at it. A registry that trickles is given up at less only.
const slowPace = 16 << 10

// slowest is the pace that counts as slow, in bytes per second, since a pace that our own
// limits impose is no reason; p.mu is held.
func (p *supplies) slowest() float64 {
	slow := float64(slowPace)
	for _, b := range p.store.limits.of(KindRegistry) { // no limit is infinite
		slow = min(slow, float64(b.Limit())/float64(2*p.store.streams))
	}
	return slow
}

// pace is how fast a piece comes, by its bytes since a time.
type pace struct {
	since time.Time
	bytes int64
	is    bool // slow
}

// slow reports whether a piece came at less than so many bytes per second for movingTime;
// what is slow is so until it was faster for as long.
func (p *pace) slow(now time.Time, perSecond float64) bool {
	if spent := now.Sub(p.since); spent >= movingTime {
		p.is = float64(p.bytes) < perSecond*spent.Seconds()
		p.since, p.bytes = now, 0
	}
	return p.is
}

// ask is the next question, and the pieces whose wish it tells.
func (p *supplies) ask() (Ask, []*waiter) {
	moving := p.store.canMove(p.turn)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.claims.asked, p.claims.held = true, !moving
	a := Ask{Ref: p.turn.ref, Image: p.image.Digest, Pieces: p.image.PieceCount()}
	for n := range p.claims.have {
		a.Have = append(a.Have, n)
	}
	slices.Sort(a.Have)
	slow := p.slowest()
	for _, s := range p.open {
		if s.source.Kind() != KindRegistry {
			continue
		}
		if !moving {
			s.pace = pace{since: time.Now()} // what is held back is no slow line
		} else if s.pace.slow(time.Now(), slow) {
			continue // the claim lapses, so that who waits for it may have it
		}
		if time.Since(s.last) < movingTime && !slices.Contains(a.Fetching, s.piece) {
			a.Fetching = append(a.Fetching, s.piece)
			p.claims.granted[s.piece] = time.Now().Add(grantTime)
		}
	}
	if !moving { // in another pull's turn, claims would only keep others from fetching
		return a, nil
	}
	offered := p.wishes()
	for _, x := range offered {
		if x.wish == wishInsist {
			a.Insist = append(a.Insist, x.piece)
		} else {
			a.Want = append(a.Want, x.piece)
		}
		x.told = x.wish
	}
	return a, offered
}

// arrived notes that a piece is here, to be told.
func (p *supplies) arrived(piece int) {
	if p.claims == nil {
		return
	}
	p.mu.Lock()
	p.claims.have[piece] = true
	delete(p.claims.granted, piece)
	p.mu.Unlock()
	p.claims.stir()
}

// farewell gives the claims back. If the site is silent, they lapse by themselves.
func (p *supplies) farewell(ctx context.Context) {
	p.mu.Lock()
	known := p.claims.asked && p.claims.failing.IsZero()
	p.mu.Unlock()
	if !known {
		return
	}
	a, _ := p.ask()
	a.Want, a.Insist, a.Fetching, a.Leave = nil, nil, nil, true
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if _, err := p.claims.site.Ask(ctx, a); err != nil {
		p.store.log.Info("the site was not told that a pull has ended", "image", a.Image, "error", err)
	}
}
