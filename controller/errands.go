package controller

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github"
	"github.com/paddock-ci/paddock/runner"
	"github.com/paddock-ci/paddock/store"
)

const (
	// errandsAtOnce bounds parallel calls; GitHub's secondary limit is 100.
	errandsAtOnce = 8
	// errandTimeout bounds one call with its retries by the transport.
	errandTimeout = 30 * time.Second
	// ghostTimeout bounds the hunt for ghosts in one scope: some pages of runners.
	ghostTimeout = time.Minute
	// conclusionWait is how long a finished VM's runner may still be reported by GitHub
	// as having completed its job, before it is asked after.
	conclusionWait = 30 * time.Second
)

// Errands carries out what VM records say GitHub must be asked, until ctx ends. It is a
// loop beside Run, so that a slow GitHub delays no decision.
func (c *Controller) Errands(ctx context.Context) error {
	var running sync.WaitGroup
	defer running.Wait()
	places := make(chan struct{}, errandsAtOnce)
	running.Go(func() { c.ghosts(ctx) })
	for ctx.Err() == nil {
		changed := c.c.Store.Notify(store.Anything)
		if term, leading := c.currentTerm(); leading {
			c.setOut(ctx, turn{term, time.Now()}, places, &running)
		}
		if !rest(ctx, changed, tick) {
			break
		}
	}
	return nil
}

// ghosts looks for runners without a VM every GhostsEvery, beside the errands: a GitHub
// that is slow to list runners delays no registration.
func (c *Controller) ghosts(ctx context.Context) {
	for rest(ctx, nil, c.c.GhostsEvery) {
		term, leading := c.currentTerm()
		if !leading {
			continue
		}
		if err := c.removeGhosts(ctx, term); err != nil && ctx.Err() == nil {
			c.c.Log.Warn("looking for runners without a VM", "error", err)
		}
	}
}

// setOut starts an errand for each VM that needs one and has none under way.
func (c *Controller) setOut(ctx context.Context, t turn, places chan struct{}, running *sync.WaitGroup) {
	view, err := c.c.Store.View(ctx)
	if err != nil || view.Incarnation != t.term.Incarnation {
		return
	}
	c.askDoubts(ctx, view, t.now, places, running)
	ended := concluded(view)
	for id, vm := range view.VMs {
		if c.errandFor(ended, vm, t) == nil || !c.begin(id, t.now) {
			continue
		}
		select {
		case places <- struct{}{}:
		case <-ctx.Done():
			c.end(id)
			return
		}
		running.Go(func() {
			defer func() { <-places; c.end(id) }()
			// An answer of GitHub is written down even when we are asked to stop.
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), errandTimeout)
			defer cancel()
			began := time.Now()
			if err := c.run(ctx, t, id); err != nil {
				c.errandFailed(vm, t.now.Add(time.Since(began)), err)
			}
		})
	}
}

// run does what the VM's record asks for now: the view that begin was decided on may be
// older than the errand that ended just before.
func (c *Controller) run(ctx context.Context, t turn, id fleet.VMID) error {
	view, err := c.c.Store.View(ctx)
	if err != nil {
		return err
	}
	vm := view.VMs[id]
	if vm == nil || view.Incarnation != t.term.Incarnation {
		return nil
	}
	if errand := c.errandFor(concluded(view), vm, t); errand != nil {
		return errand(ctx, t, *vm)
	}
	return nil
}

// concluded are the completed jobs, by the runners that ran them.
func concluded(view *store.View) map[string]fleet.JobID {
	ended := map[string]fleet.JobID{}
	for id, job := range view.Jobs {
		if job.Status == fleet.JobCompleted && job.RunnerName != "" {
			ended[job.RunnerName] = id
		}
	}
	return ended
}

// turn is what an errand acts by: the leader's term, and the time when it set out.
type turn struct {
	term store.Term
	now  time.Time
}

type errand func(context.Context, turn, fleet.VM) error

// errandFor is the table of errands: what a VM's record has us ask GitHub, nil if nothing.
//
//	mint    registers a runner: POST …/actions/runners/generate-jitconfig
//	settle  looks for a runner by name (GET …/actions/runners?name=) and deletes it
//	retire  deletes a runner: DELETE …/actions/runners/ID, which refuses if it is busy
//	remove  deletes what a finished VM's runner left, as settle does if its id is not known
//	forget  asks nothing: GitHub has removed the runner with its job
func (c *Controller) errandFor(ended map[string]fleet.JobID, vm *fleet.VM, t turn) errand {
	claim := vm.Claim
	if claim != nil && t.now.Before(c.limitedUntil(claim.Scope)) {
		return nil
	}
	switch {
	case vm.State.Final():
		if claim == nil {
			return nil
		}
		if job, ran := ended[claim.Runner]; ran { // GitHub removed the ephemeral runner with its job
			return func(ctx context.Context, t turn, vm fleet.VM) error { return c.forget(ctx, t, vm, job) }
		}
		if !vm.BusyAt.IsZero() && t.now.Sub(vm.DoneAt) < conclusionWait {
			return nil
		}
		return c.remove
	case vm.Retire != fleet.RetireNone:
		return c.retire
	case claim == nil || claim.Started || claim.RunnerID != 0:
		return nil
	case claim.Epoch != t.term.Epoch || t.now.Sub(claim.At) > claimSettles:
		return c.settle
	default:
		return c.mint
	}
}

// mint registers the runner that a claim intends. The name was written down before the
// call, so whatever becomes of the answer, settle finds the runner.
func (c *Controller) mint(ctx context.Context, t turn, vm fleet.VM) error {
	claim := *vm.Claim
	began := time.Now()
	minted, err := c.c.GitHub.MintRunner(ctx, claim.Scope, claim.Runner, claim.Group, claim.Labels)
	c.metrics.mint.Observe(time.Since(began).Seconds())
	if err != nil {
		var limited *github.RateLimited
		if errors.As(err, &limited) {
			return err // refused before anything was done; repeated when GitHub answers again
		}
		if refused(err) {
			c.bar(claim, t.now, err)
			return c.unclaim(ctx, t, vm, "runner.refused")
		}
		// The name is taken, or nobody knows what was done: look and begin anew.
		return errors.Join(fmt.Errorf("register runner %s: %w", claim.Runner, err), c.settle(ctx, t, vm))
	}
	sealed, err := c.c.Seal(minted.JIT, vm.ID, claim.Runner)
	if err != nil {
		return fmt.Errorf("seal the configuration of runner %s: %w", claim.Runner, err)
	}
	kept, err := c.amend(ctx, t, vm.ID, "runner.registered", func(vm *fleet.VM) bool {
		if vm.Claim == nil || vm.Claim.Runner != claim.Runner || vm.State.Final() {
			return false
		}
		vm.Claim.RunnerID, vm.Claim.Sealed = minted.RunnerID, sealed
		return true
	})
	if err != nil || kept {
		return err
	}
	// The VM is gone; so must be the runner.
	return c.c.GitHub.RemoveRunner(ctx, claim.Scope, minted.RunnerID)
}

// settle ends a claim of which nobody knows how far it came: the runner is looked for by
// the claim's name, deleted if it is there, and the VM is free for a new claim under a
// new name, since a JIT config can be asked for only once.
func (c *Controller) settle(ctx context.Context, t turn, vm fleet.VM) error {
	claim := *vm.Claim
	left, found, err := c.c.GitHub.FindRunner(ctx, claim.Scope, claim.Runner)
	if err != nil && !errors.Is(err, github.ErrNoInstallation) {
		return fmt.Errorf("look for runner %s: %w", claim.Runner, err)
	}
	if found {
		if err := c.c.GitHub.RemoveRunner(ctx, claim.Scope, left.ID); err != nil {
			return fmt.Errorf("delete runner %s: %w", claim.Runner, err)
		}
	}
	return c.unclaim(ctx, t, vm, "runner.settled")
}

// unclaim takes a claim back of which nothing is at GitHub and nothing on the node.
func (c *Controller) unclaim(ctx context.Context, t turn, vm fleet.VM, kind string) error {
	runner := vm.Claim.Runner
	_, err := c.amend(ctx, t, vm.ID, kind, func(vm *fleet.VM) bool {
		if vm.Claim == nil || vm.Claim.Runner != runner || vm.Claim.Started {
			return false
		}
		vm.Claim = nil
		return true
	})
	return err
}

// retire has GitHub delete the runner first. Only when it agrees is the VM destroyed or
// lost; a busy runner's VM stays as it is.
func (c *Controller) retire(ctx context.Context, t turn, vm fleet.VM) error {
	err := c.delete(ctx, vm.Claim)
	busy := errors.Is(err, github.ErrBusy)
	if err != nil && !busy {
		return err
	}
	if busy {
		c.calledBusy(vm.ID, t.now)
	}
	what := map[bool]string{true: "vm.kept", false: "vm.retired"}[busy]
	_, err = c.amend(ctx, t, vm.ID, what, func(vm *fleet.VM) bool {
		kind := vm.Retire
		switch {
		case kind == fleet.RetireNone || vm.State.Final():
			return false
		case busy:
			vm.Retire, vm.Reason = fleet.RetireNone, ""
		case kind == fleet.RetireLose:
			*vm, _ = runner.Apply(*vm, runner.GivenUp, t.now)
			vm.Retire, vm.Claim, vm.Destroy = fleet.RetireNone, nil, true
		default:
			vm.Retire, vm.Destroy, vm.Claim = fleet.RetireNone, true, nil
		}
		return true
	})
	return err
}

// calledBusy notes GitHub's word that a runner is busy. It stands for a while: the job
// may run for hours in which neither the node nor a webhook says so.
func (c *Controller) calledBusy(id fleet.VMID, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	maps.DeleteFunc(c.busy, func(_ fleet.VMID, until time.Time) bool { return now.After(until) })
	c.busy[id] = now.Add(busyStands)
}

// isBusy reports whether GitHub's word that a runner is busy still stands.
func (c *Controller) isBusy(id fleet.VMID, now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return now.Before(c.busy[id])
}

// remove deletes what a finished VM left at GitHub.
func (c *Controller) remove(ctx context.Context, t turn, vm fleet.VM) error {
	if err := c.delete(ctx, vm.Claim); err != nil {
		return err
	}
	return c.forget(ctx, t, vm, vm.Job)
}

// forget clears a finished VM's claim: nothing of it is left at GitHub. The job that it
// ran is put right at the same time: a short one may be over before the VM was matched
// with it, and without the claim nobody could tell any more.
func (c *Controller) forget(ctx context.Context, t turn, vm fleet.VM, job fleet.JobID) error {
	_, err := c.amend(ctx, t, vm.ID, "", func(vm *fleet.VM) bool {
		changed := vm.Claim != nil && vm.State.Final()
		vm.Claim, vm.Job = nil, job
		return changed
	})
	return err
}

// delete removes a claim's runner, by id or, if the id was never learned, by name. No
// claim, no runner.
func (c *Controller) delete(ctx context.Context, claim *fleet.Claim) error {
	if claim == nil {
		return nil
	}
	id := claim.RunnerID
	if id == 0 {
		left, found, err := c.c.GitHub.FindRunner(ctx, claim.Scope, claim.Runner)
		if errors.Is(err, github.ErrNoInstallation) {
			return nil // what is there is out of our hands
		}
		if err != nil || !found {
			return wrap("look for runner "+claim.Runner, err)
		}
		id = left.ID
	}
	err := c.c.GitHub.RemoveRunner(ctx, claim.Scope, id)
	if errors.Is(err, github.ErrNoInstallation) {
		return nil
	}
	return wrap("delete runner "+claim.Runner, err)
}

// amend changes a VM's record as it is now, fenced, repeated while its node changes it,
// too. False: change found that there was nothing to do, or the VM is gone.
func (c *Controller) amend(ctx context.Context, t turn, id fleet.VMID, kind string, change func(*fleet.VM) bool) (bool, error) {
	for {
		view, err := c.c.Store.View(ctx)
		if err != nil {
			return false, err
		}
		record := view.VMs[id]
		if record == nil {
			return false, nil
		}
		vm := *record
		if vm.Claim != nil {
			claim := *vm.Claim // the view's own is not to be written to
			vm.Claim = &claim
		}
		if !change(&vm) {
			return false, nil
		}
		txn := store.Txn{Term: &t.term, VMs: []fleet.VM{vm}}
		if kind != "" {
			txn.Events = []fleet.Event{{At: t.now, Kind: kind, VM: id, Node: vm.Node, Job: vm.Job, Actor: "leader", Text: vm.Reason}}
		}
		if err = c.c.Store.Commit(ctx, txn); err == nil {
			return true, nil
		}
		if !errors.Is(err, store.ErrConflict) {
			return false, err
		}
	}
}

// removeGhosts deletes ghosts: runners of this fleet, by name, that are offline and whose
// VM is unknown or finished. Runners of others are never touched. After the store was
// emptied, a VM is not unknown before its node has had the time to tell of it.
func (c *Controller) removeGhosts(ctx context.Context, term store.Term) error {
	if !c.hasSettled(term.Incarnation) {
		return nil
	}
	scopes := map[fleet.Scope]bool{}
	for _, pool := range c.c.Pools {
		for _, s := range pool.Scopes {
			scopes[s] = true
		}
	}
	var failed error
	for scope := range scopes { // one that does not answer keeps the others from nothing
		failed = errors.Join(failed, c.removeGhostsOf(ctx, term, scope))
	}
	return failed
}

func (c *Controller) removeGhostsOf(ctx context.Context, term store.Term, scope fleet.Scope) error {
	ctx, cancel := context.WithTimeout(ctx, ghostTimeout)
	defer cancel()
	runners, err := c.c.GitHub.Runners(ctx, scope)
	if err != nil {
		return err
	}
	// Read after the runners: whose VM is not in it has none, since a VM is written down
	// before its runner is registered.
	view, err := c.c.Store.View(ctx)
	if err != nil || view.Incarnation != term.Incarnation {
		return err
	}
	for _, r := range runners {
		id, _, ours := fleet.ParseRunnerName(c.c.Fleet, r.Name)
		vm := view.VMs[id]
		if !ours || r.Busy || r.Status != "offline" || vm != nil && !vm.State.Final() {
			continue
		}
		if err := c.c.GitHub.RemoveRunner(ctx, scope, r.ID); err != nil && !errors.Is(err, github.ErrBusy) {
			return fmt.Errorf("delete runner %s: %w", r.Name, err)
		}
		c.c.Log.Info("runner.ghost", "runner", r.Name, "scope", scope)
	}
	return nil
}

// begin marks an errand as under way; false if one is.
func (c *Controller) begin(id fleet.VMID, now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.errand[id] || now.Before(c.notBefore[id]) {
		return false
	}
	c.errand[id] = true
	return true
}

func (c *Controller) end(id fleet.VMID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.errand, id)
}

// limitedUntil is when GitHub may be asked again on behalf of the scope's owner. Limits
// are of an installation, and an owner has one.
func (c *Controller) limitedUntil(scope fleet.Scope) time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.limited[strings.ToLower(scope.Owner())]
}

// errandFailed has the errand repeated: when GitHub's limit has passed, else in 2 s.
func (c *Controller) errandFailed(vm *fleet.VM, now time.Time, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for id, at := range c.notBefore { // those passed are of no use any more
		if now.After(at) {
			delete(c.notBefore, id)
		}
	}
	var limited *github.RateLimited
	if errors.As(err, &limited) && vm.Claim != nil {
		c.limited[strings.ToLower(vm.Claim.Scope.Owner())] = limited.Until
	} else {
		c.notBefore[vm.ID] = now.Add(2 * time.Second)
	}
	c.metrics.errandsFailed.Inc()
	c.c.Log.Warn("asking GitHub failed and is repeated", "vm", vm.ID, "node", vm.Node, "error", err)
}
