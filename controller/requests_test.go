package controller

import (
	"context"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/runner"
)

// GitHub limits one organization for an hour: another one's runner is registered all the
// same, and only the first one's job is told of the limit.
func TestLimitOfOneOrganization(t *testing.T) {
	w := newWorld(t)
	w.c.c.Pools[0].Scopes = []fleet.Scope{"acme", "other"}
	w.github.limits, w.github.limited = "acme", w.now.Add(time.Hour)
	w.image()
	w.report("mac-1", fleet.ImageReady)
	w.queue()
	w.pass(0)
	w.move(w.only().ID, runner.Accepted, runner.Answered)
	w.pass(0)
	w.serial++
	other := fleet.Job{
		ID: w.serial, Repository: "other/app", Name: "build", Labels: fleet.NewLabels("self-hosted", "macos"),
		Status: fleet.JobQueued, CreatedAt: w.now, SeenAt: w.now,
	}
	w.tell(other)
	w.pass(time.Second)
	for _, vm := range w.live() {
		if vm.State == fleet.VMPlaced {
			w.move(vm.ID, runner.Accepted, runner.Answered)
		}
	}
	w.pass(time.Second)
	registered := map[fleet.Scope]bool{}
	for _, vm := range w.live() {
		if vm.Claim == nil {
			t.Fatalf("VM %+v has no claim", vm)
		}
		registered[vm.Claim.Scope] = vm.Claim.RunnerID != 0
	}
	if registered["acme"] || !registered["other"] {
		t.Errorf("registered: %v; want a runner for other and none for acme", registered)
	}
}

// GitHub never answers a listing of runners: registrations go on.
func TestSilentListing(t *testing.T) {
	w := newWorld(t)
	w.github.silent = make(chan struct{})
	w.c.c.GhostsEvery = time.Millisecond
	w.image()
	w.report("mac-1", fleet.ImageReady)
	w.queue()
	if err := w.c.Step(t.Context(), w.now); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	ended := make(chan error)
	go func() { ended <- w.c.Errands(ctx) }()
	defer func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	select {
	case <-w.github.silent:
	case <-ctx.Done():
		t.Fatal("no runners are listed")
	}
	w.move(w.only().ID, runner.Accepted, runner.Answered)
	if err := w.c.Step(t.Context(), w.now); err != nil {
		t.Fatal(err)
	}
	for w.only().Claim == nil || w.only().Claim.RunnerID == 0 {
		if !rest(ctx, nil, 10*time.Millisecond) {
			t.Fatal("no runner is registered while the listing is silent")
		}
	}
}
