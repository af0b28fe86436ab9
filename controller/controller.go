// Package controller decides: which VM is placed on which node, which warm VM gets a
// runner for which job, and which VM is given up.
//
// One pass is Step, run again on every change in the store and at least every second:
//
//  1. lead: take or renew the leader's lease; a follower does nothing more.
//  2. observe: read the store; in a new incarnation wait until the known nodes reported.
//  3. notice: VMs on nodes that are silent for too long, VMs over their deadlines.
//  4. match: jobs and VMs, as GitHub would.
//  5. claim: a matched warm VM takes one queued job's unit of demand.
//  6. choose: a plan for the jobs that have no VM, and its writes: VMs placed, images held.
//  7. sweep: records that nobody needs any more.
//
// Step writes to the store and asks nobody else. What GitHub must be asked (registering
// a runner, deleting one) is written down as an intent on the VM's record and carried
// out by Errands, the second loop here: an errand is one question or request to GitHub
// on behalf of one VM or job. Resolver, the third loop, turns tags into digests.
// Every write is fenced by the leader's term, so two controllers never undo each other.
//
// It is not the node's judge: what lives on a node only the node says, and nothing is
// destroyed because it is missing from a report. Called by cmd; meets the nodes and the
// feeds in the store only.
package controller

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/paddock-ci/paddock/demand"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github"
	"github.com/paddock-ci/paddock/store"
)

// The times of the protocol. They are constants, since a fleet in which two replicas
// disagree on them would fight.
const (
	lease            = 15 * time.Second // of the leader; a crashed one is replaced after it
	tick             = time.Second      // Step runs at least this often, for deadlines
	unreachableAfter = 45 * time.Second // two syncs of 20 s missed, and a little
	lostAfter        = 15 * time.Minute // then its runners are deleted at GitHub
	settleAtMost     = 40 * time.Second // two syncs: how long a new incarnation waits for its nodes
	claimSettles     = 60 * time.Second // a claim older than this is settled by name at GitHub
	busyStands       = time.Minute      // GitHub called a runner busy: it is not asked again sooner
	doneKept         = 10 * time.Minute // a finished VM is shown this long
	jobKept          = time.Hour        // a completed job is shown this long
	jobsKept         = 2000             // and at most this many of them
	tombstoneKept    = 72 * time.Hour   // GitHub redelivers for three days
	sweepEvery       = 10 * time.Minute // of tombstones
)

// GitHub is what the controller asks of GitHub; *github.Client answers.
type GitHub interface {
	MintRunner(ctx context.Context, scope fleet.Scope, name string, group int64, labels fleet.Labels) (github.Minted, error)
	FindRunner(ctx context.Context, scope fleet.Scope, name string) (github.Runner, bool, error)
	Runners(ctx context.Context, scope fleet.Scope) ([]github.Runner, error)
	RemoveRunner(ctx context.Context, scope fleet.Scope, id int64) error
	Job(ctx context.Context, repository string, id fleet.JobID) (fleet.Job, error)
}

// Sealer encrypts a JIT config for one VM and runner; access.Key's Seal.
type Sealer func(secret string, vm fleet.VMID, runner string) (string, error)

// Config of a Controller. Store, GitHub, Seal and Fleet are required.
type Config struct {
	Store  *store.Store
	GitHub GitHub
	Seal   Sealer
	Fleet  string       // part of every runner's name
	Who    string       // this replica in the lease; "": a random name
	Pools  []fleet.Pool // in file order; none: nothing is ever placed

	// Resolve asks a registry what a reference is now; nil: no image is resolved.
	Resolve      func(ctx context.Context, ref string) (fleet.Image, error)
	ResolveEvery time.Duration // 0: 5 min

	// Durations learned so far; nil: none yet. The controller's alone from here on;
	// SaveHistory writes them.
	Durations *demand.Durations
	// Demand by image learned so far, alike.
	Demand *demand.Images

	// GhostsEvery is how often runners without a VM are looked for; 0: 5 min.
	GhostsEvery time.Duration

	Metrics prometheus.Registerer // nil: not exported
	Log     *slog.Logger          // nil: discarded
}

// Controller is the leader of a fleet, or stands by to be.
type Controller struct {
	c       Config
	metrics metrics
	mu      sync.Mutex // guards what Errands and Explain share with Step
	term    store.Term
	leading bool
	limited map[string]time.Time // by lower-case owner: GitHub answers no sooner
	settled string               // the incarnation that has settled

	// What Step remembers between passes; lost with the process, without harm.
	known    map[fleet.NodeID]bool
	learned  map[fleet.JobID]bool
	taught   time.Time            // what ended before is in the history that New was given
	counted  map[fleet.JobID]bool // in Demand; guarded by history
	asked    time.Time            // what was queued before is in the Demand that New was given
	sweptAt  time.Time
	resolved map[string]fleet.Image
	// unresolved is why, by reference; guarded by mu.
	unresolved map[string]string

	history   sync.Mutex               // guards Durations and Demand, which Step, Explain and Save share
	errand    map[fleet.VMID]bool      // under way
	barred    map[place]bar            // where GitHub refuses runners
	busy      map[fleet.VMID]time.Time // GitHub refused to delete the runner; not asked again before
	notBefore map[fleet.VMID]time.Time // of errands that failed
	doubts    map[fleet.JobID]doubt    // jobs that GitHub is to be asked about
}

// New checks the configuration.
func New(c Config) (*Controller, error) {
	if c.Store == nil || c.GitHub == nil || c.Seal == nil {
		return nil, errors.New("controller: Store, GitHub and Seal are required")
	}
	if err := fleet.CheckName("fleet", c.Fleet); err != nil {
		return nil, err
	}
	if c.Who == "" {
		c.Who = string(fleet.NewVMID())
	}
	if c.ResolveEvery == 0 {
		c.ResolveEvery = 5 * time.Minute
	}
	if c.GhostsEvery == 0 {
		c.GhostsEvery = 5 * time.Minute
	}
	if c.Durations == nil {
		c.Durations = demand.New(demand.Config{})
	}
	if c.Demand == nil {
		c.Demand = demand.NewImages()
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return &Controller{
		c: c, metrics: newMetrics(c.Metrics),
		taught: c.Durations.Latest(), known: map[fleet.NodeID]bool{}, learned: map[fleet.JobID]bool{},
		asked: c.Demand.Latest(), counted: map[fleet.JobID]bool{},
		resolved: map[string]fleet.Image{}, unresolved: map[string]string{}, errand: map[fleet.VMID]bool{}, notBefore: map[fleet.VMID]time.Time{}, busy: map[fleet.VMID]time.Time{}, barred: map[place]bar{}, limited: map[string]time.Time{}, doubts: map[fleet.JobID]doubt{},
	}, nil
}

// Run repeats Step until ctx ends, then gives the lease back so that another replica
// need not wait for it to run out.
func (c *Controller) Run(ctx context.Context) error {
	defer c.resign(ctx)
	for ctx.Err() == nil {
		changed := c.c.Store.Notify(store.Anything)
		began := time.Now()
		if err := c.Step(ctx, began); err != nil && ctx.Err() == nil {
			c.c.Log.Error("a pass failed and is repeated", "error", err)
		}
		took := time.Since(began)
		c.metrics.step.Observe(took.Seconds())
		// Rest as long as the pass took: under a storm of webhooks half of a core stays
		// free to take them in.
		if !rest(ctx, nil, min(took, 250*time.Millisecond)) || !rest(ctx, changed, tick) {
			break
		}
	}
	return nil
}

// rest waits for the first of changed, d and ctx; false when ctx ended.
func rest(ctx context.Context, changed <-chan struct{}, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-changed:
	case <-timer.C:
	}
	return true
}

func (c *Controller) resign(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	if err := c.c.Store.Resign(ctx, c.c.Who); err != nil {
		c.c.Log.Warn("the lease was not given back; it runs out by itself", "error", err)
	}
}

// Step is one pass at the time now, as the package comment lists it.
func (c *Controller) Step(ctx context.Context, now time.Time) error {
	term, leader, err := c.c.Store.Lead(ctx, c.c.Who, lease)
	c.setTerm(term, leader && err == nil)
	if err != nil || !leader {
		return wrap("take the lease", err)
	}
	p, err := c.observe(ctx, term, now)
	if err != nil {
		return wrap("observe", err)
	}
	if !p.settled {
		return nil
	}
	for _, act := range []struct {
		what string
		do   func(context.Context, *pass) error
	}{
		{"notice what is lost", c.notice},
		{"match jobs and VMs", c.match},
		{"claim", c.claim},
		{"choose", c.choose},
		{"sweep", c.sweep},
	} {
		if err := act.do(ctx, p); err != nil {
			return wrap(act.what, err)
		}
	}
	return nil
}

// setTerm tells Errands and Explain for which term they act.
func (c *Controller) setTerm(term store.Term, leading bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if leading && !c.leading {
		c.c.Log.Info("leading", "epoch", term.Epoch)
	}
	c.term, c.leading = term, leading
	c.metrics.leader.Set(map[bool]float64{true: 1}[leading])
}

// Leading reports whether this replica led at its last pass.
func (c *Controller) Leading() bool {
	_, leading := c.currentTerm()
	return leading
}

// currentTerm returns the term, if this replica leads.
func (c *Controller) currentTerm() (store.Term, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.term, c.leading
}

// predict is how long a job of that name runs, as far as is known.
func (c *Controller) predict(repository, name string) (time.Duration, bool) {
	c.history.Lock()
	defer c.history.Unlock()
	return c.c.Durations.Predict(repository, name)
}

// SaveHistory writes what was learned of durations and demand, to be loaded at the next start.
func (c *Controller) SaveHistory(w io.Writer) error {
	c.history.Lock()
	defer c.history.Unlock()
	return c.c.Durations.Save(w, c.c.Demand)
}

func wrap(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, err)
}
