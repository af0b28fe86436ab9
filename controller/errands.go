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
		changed := c.Store.Notify(store.Anything)
		if term, leading := c.office(); leading {
			c.setOut(ctx, term, time.Now(), places, &running)
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
	for rest(ctx, nil, c.GhostsEvery) {
		term, leading := c.office()
		if !leading {
			continue
		}
		if err := c.exorcise(ctx, term); err != nil && ctx.Err() == nil {
			c.Log.Warn("looking for runners without a VM", "error", err)
		}
	}
}

// setOut starts an errand for each VM that needs one and has none under way.
func (c *Controller) setOut(ctx context.Context, term store.Term, now time.Time, places chan struct{}, running *sync.WaitGroup) {
	view, err := c.Store.View(ctx)
	if err != nil || view.Incarnation != term.Incarnation {
		return
	}
	c.askDoubts(ctx, view, now, places, running)
	ended := concluded(view)
	for id, vm := range view.VMs {
		if c.errandFor(ended, vm, term, now) == nil || !c.begin(id) {
			continue
		}
		select {
		case places <- struct{}{}:
		case <-ctx.Done():
			c.end(id)
			return
		}
		running.Add(1)
		go func() {
			defer running.Done()
			defer func() { <-places; c.end(id) }()
			// An answer of GitHub is written down even when we are asked to stop.
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), errandTimeout)
			defer cancel()
			if err := c.run(ctx, term, now, id); err != nil {
				c.errandFailed(vm, err)
			}
		}()
	}
}

// run does what the VM's record asks for now: the view that begin was decided on may be
// older than the errand that ended just before.
func (c *Controller) run(ctx context.Context, term store.Term, now time.Time, id fleet.VMID) error {
	view, err := c.Store.View(ctx)
	if err != nil {
		return err
	}
	vm := view.VMs[id]
	if vm == nil || view.Incarnation != term.Incarnation {
		return nil
	}
	if errand := c.errandFor(concluded(view), vm, term, now); errand != nil {
		return errand(ctx, term, *vm)
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

type errand func(context.Context, store.Term, fleet.VM) error

// errandFor is the table of errands: what a VM's record asks of GitHub, nil if nothing.
func (c *Controller) errandFor(ended map[string]fleet.JobID, vm *fleet.VM, term store.Term, now time.Time) errand {
	claim := vm.Claim
	if claim != nil && now.Before(c.limitedUntil(claim.Scope)) {
		return nil
	}
	switch {
	case vm.State.Final():
		if claim == nil || vm.State == fleet.VMLost && claim.RunnerID == 0 {
			return nil
		}
		if job, ran := ended[claim.Runner]; ran { // GitHub removed the ephemeral runner with its job
			return func(ctx context.Context, term store.Term, vm fleet.VM) error { return c.forget(ctx, term, vm, job) }
		}
		if !vm.BusyAt.IsZero() && now.Sub(vm.DoneAt) < conclusionWait {
			return nil
		}
		return c.remove
	case vm.Retire != fleet.RetireNone:
		return c.retire
	case claim == nil || claim.Started || claim.RunnerID != 0:
		return nil
	case claim.Epoch != term.Epoch || now.Sub(claim.At) > claimSettles:
		return c.settle
	default:
		return c.mint
	}
}

// mint registers the runner that a claim intends. The name was written down before the
// call, so whatever becomes of the answer, settle finds the runner.
func (c *Controller) mint(ctx context.Context, term store.Term, vm fleet.VM) error {
	claim := *vm.Claim
	began := time.Now()
	minted, err := c.GitHub.MintRunner(ctx, claim.Scope, claim.Runner, claim.Group, claim.Labels)
	c.metrics.mint.Observe(time.Since(began).Seconds())
	if err != nil {
		var limited *github.RateLimited
		if errors.As(err, &limited) {
			return err // refused before anything was done; repeated when GitHub answers again
		}
		if refused(err) {
			c.bar(claim, err)
			return c.unclaim(ctx, term, vm, "runner.refused")
		}
		// The name is taken, or nobody knows what was done: look and begin anew.
		return errors.Join(fmt.Errorf("register runner %s: %w", claim.Runner, err), c.settle(ctx, term, vm))
	}
	sealed, err := c.Seal(minted.JIT, vm.ID, claim.Runner)
	if err != nil {
		return fmt.Errorf("seal the configuration of runner %s: %w", claim.Runner, err)
	}
	kept, err := c.amend(ctx, term, vm.ID, "runner.registered", func(vm *fleet.VM) bool {
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
	return c.GitHub.RemoveRunner(ctx, claim.Scope, minted.RunnerID)
}

// settle ends a claim of which nobody knows how far it came: the runner is looked for by
// the claim's name, deleted if it is there, and the VM is free for a new claim under a
// new name, since a JIT config can be asked for only once.
func (c *Controller) settle(ctx context.Context, term store.Term, vm fleet.VM) error {
	claim := *vm.Claim
	left, found, err := c.GitHub.FindRunner(ctx, claim.Scope, claim.Runner)
	if err != nil && !errors.Is(err, github.ErrNoInstallation) {
		return fmt.Errorf("look for runner %s: %w", claim.Runner, err)
	}
	if found {
		if err := c.GitHub.RemoveRunner(ctx, claim.Scope, left.ID); err != nil {
			return fmt.Errorf("delete runner %s: %w", claim.Runner, err)
		}
	}
	return c.unclaim(ctx, term, vm, "runner.settled")
}

// unclaim takes a claim back of which nothing is at GitHub and nothing on the node.
func (c *Controller) unclaim(ctx context.Context, term store.Term, vm fleet.VM, kind string) error {
	runner := vm.Claim.Runner
	_, err := c.amend(ctx, term, vm.ID, kind, func(vm *fleet.VM) bool {
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
func (c *Controller) retire(ctx context.Context, term store.Term, vm fleet.VM) error {
	err := c.delete(ctx, vm.Claim)
	busy := errors.Is(err, github.ErrBusy)
	if err != nil && !busy {
		return err
	}
	if busy {
		c.calledBusy(vm.ID)
	}
	what := map[bool]string{true: "vm.kept", false: "vm.retired"}[busy]
	_, err = c.amend(ctx, term, vm.ID, what, func(vm *fleet.VM) bool {
		kind := vm.Retire
		switch {
		case kind == fleet.RetireNone || vm.State.Final():
			return false
		case busy:
			vm.Retire, vm.Reason = fleet.RetireNone, ""
		case kind == fleet.RetireLose:
			*vm, _ = runner.Apply(*vm, runner.GivenUp, time.Now())
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
func (c *Controller) calledBusy(id fleet.VMID) {
	c.deputed.Lock()
	defer c.deputed.Unlock()
	now := time.Now()
	maps.DeleteFunc(c.busy, func(_ fleet.VMID, until time.Time) bool { return now.After(until) })
	c.busy[id] = now.Add(busyStands)
}

// isBusy reports whether GitHub's word that a runner is busy still stands.
func (c *Controller) isBusy(id fleet.VMID, now time.Time) bool {
	c.deputed.Lock()
	defer c.deputed.Unlock()
	return now.Before(c.busy[id])
}

// remove deletes what a finished VM left at GitHub.
func (c *Controller) remove(ctx context.Context, term store.Term, vm fleet.VM) error {
	if err := c.delete(ctx, vm.Claim); err != nil {
		return err
	}
	return c.forget(ctx, term, vm, vm.Job)
}

// forget clears a finished VM's claim: nothing of it is left at GitHub. The job that it
// ran is put right at the same time: a short one may be over before the VM was matched
// with it, and without the claim nobody could tell any more.
func (c *Controller) forget(ctx context.Context, term store.Term, vm fleet.VM, job fleet.JobID) error {
	_, err := c.amend(ctx, term, vm.ID, "", func(vm *fleet.VM) bool {
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
		left, found, err := c.GitHub.FindRunner(ctx, claim.Scope, claim.Runner)
		if errors.Is(err, github.ErrNoInstallation) {
			return nil // what is there is out of our hands
		}
		if err != nil || !found {
			return wrap("look for runner "+claim.Runner, err)
		}
		id = left.ID
	}
	err := c.GitHub.RemoveRunner(ctx, claim.Scope, id)
	if errors.Is(err, github.ErrNoInstallation) {
		return nil
	}
	return wrap("delete runner "+claim.Runner, err)
}

// amend changes a VM's record as it is now, fenced, repeated while its node changes it,
// too. False: change found that there was nothing to do, or the VM is gone.
func (c *Controller) amend(ctx context.Context, term store.Term, id fleet.VMID, kind string, change func(*fleet.VM) bool) (bool, error) {
	for {
		view, err := c.Store.View(ctx)
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
		txn := store.Txn{Term: &term, VMs: []fleet.VM{vm}}
		if kind != "" {
			txn.Events = []fleet.Event{{At: time.Now(), Kind: kind, VM: id, Node: vm.Node, Job: vm.Job, Actor: "leader", Text: vm.Reason}}
		}
		if err = c.Store.Commit(ctx, txn); err == nil {
			return true, nil
		}
		if !errors.Is(err, store.ErrConflict) {
			return false, err
		}
	}
}

// exorcise deletes ghosts: runners of this fleet, by name, that are offline and whose
// VM is unknown or finished. Runners of others are never touched. After the store was
// emptied, a VM is not unknown before its node has had the time to tell of it.
func (c *Controller) exorcise(ctx context.Context, term store.Term) error {
	if !c.hasSettled(term.Incarnation) {
		return nil
	}
	scopes := map[fleet.Scope]bool{}
	for _, pool := range c.Pools {
		for _, s := range pool.Scopes {
			scopes[s] = true
		}
	}
	var failed error
	for scope := range scopes { // one that does not answer keeps the others from nothing
		failed = errors.Join(failed, c.exorciseScope(ctx, term, scope))
	}
	return failed
}

func (c *Controller) exorciseScope(ctx context.Context, term store.Term, scope fleet.Scope) error {
	ctx, cancel := context.WithTimeout(ctx, ghostTimeout)
	defer cancel()
	runners, err := c.GitHub.Runners(ctx, scope)
	if err != nil {
		return err
	}
	// Read after the runners: whose VM is not in it has none, since a VM is written down
	// before its runner is registered.
	view, err := c.Store.View(ctx)
	if err != nil || view.Incarnation != term.Incarnation {
		return err
	}
	for _, r := range runners {
		id, _, ours := fleet.ParseRunnerName(c.Fleet, r.Name)
		vm := view.VMs[id]
		if !ours || r.Busy || r.Status != "offline" || vm != nil && !vm.State.Final() {
			continue
		}
		if err := c.GitHub.RemoveRunner(ctx, scope, r.ID); err != nil && !errors.Is(err, github.ErrBusy) {
			return fmt.Errorf("delete runner %s: %w", r.Name, err)
		}
		c.Log.Info("runner.ghost", "runner", r.Name, "scope", scope)
	}
	return nil
}

// begin marks an errand as under way; false if one is.
func (c *Controller) begin(id fleet.VMID) bool {
	c.deputed.Lock()
	defer c.deputed.Unlock()
	if c.errand[id] || time.Now().Before(c.notBefore[id]) {
		return false
	}
	c.errand[id] = true
	return true
}

func (c *Controller) end(id fleet.VMID) {
	c.deputed.Lock()
	defer c.deputed.Unlock()
	delete(c.errand, id)
}

// limitedUntil is when GitHub may be asked again on behalf of the scope's owner. Limits
// are of an installation, and an owner has one.
func (c *Controller) limitedUntil(scope fleet.Scope) time.Time {
	c.deputed.Lock()
	defer c.deputed.Unlock()
	return c.limited[strings.ToLower(scope.Owner())]
}

// errandFailed has the errand repeated: when GitHub's limit has passed, else in 2 s.
func (c *Controller) errandFailed(vm *fleet.VM, err error) {
	c.deputed.Lock()
	defer c.deputed.Unlock()
	now := time.Now()
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
	c.Log.Warn("asking GitHub failed and is repeated", "runner", vm.ID, "node", vm.Node, "error", err)
}
