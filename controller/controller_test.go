package controller

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github"
	"github.com/paddock-ci/paddock/placement"
	"github.com/paddock-ci/paddock/runner"
	"github.com/paddock-ci/paddock/store"
	"github.com/paddock-ci/paddock/store/storetest"
)

// The way of one job: placed where the image is ready, claimed when warm, registered,
// and its records clean when it is over.
func TestOneJob(t *testing.T) {
	w := newWorld(t)
	w.image()
	w.report("mac-1", "")
	w.report("mac-2", fleet.ImageReady)
	job := w.queue()

	w.pass(0)
	vm := w.only()
	if vm.Node != "mac-2" || vm.State != fleet.VMPlaced || vm.Job != job.ID || vm.Cold {
		t.Fatalf("placed %+v; want on mac-2, warm, for job %d", vm, job.ID)
	}
	if vm.Claim != nil {
		t.Fatal("a runner is claimed before the guest answers")
	}
	w.move(vm.ID, runner.Accepted, runner.Answered)
	w.pass(0)
	vm = w.only()
	if vm.Claim == nil || vm.Claim.RunnerID == 0 || vm.Claim.Sealed != "sealed:jit of "+vm.Claim.Runner {
		t.Fatalf("claim %+v; want a registered runner with its sealed config", vm.Claim)
	}
	if vm.Claim.Scope != "acme" || vm.Claim.Labels.Key() != "macos,self-hosted" {
		t.Errorf("registered at %s with %v; want acme and exactly the job's labels", vm.Claim.Scope, vm.Claim.Labels)
	}
	w.move(vm.ID, runner.Started, runner.TookJob)
	job.Status, job.RunnerName, job.StartedAt = fleet.JobInProgress, vm.Claim.Runner, w.now
	w.tell(job)
	w.pass(time.Minute)
	w.github.set(vm.Claim.Runner, func(r *github.Runner) { r.Busy = false })
	job.Status, job.Conclusion, job.CompletedAt = fleet.JobCompleted, "success", w.now
	w.tell(job)
	w.move(vm.ID, runner.Ended)
	w.report("mac-2", fleet.ImageReady)
	w.pass(0)
	if done := w.view().VMs[vm.ID]; done == nil || done.Claim != nil {
		t.Errorf("the finished VM is %+v; want it there for a while, without a claim", done)
	}
	if lasts, known := w.c.predict("acme/app", "build"); !known || lasts != time.Minute {
		t.Errorf("learned %v, %v; want a minute", lasts, known)
	}
	w.report("mac-2", fleet.ImageReady)
	w.pass(doneKept + time.Second)
	if w.view().VMs[vm.ID] != nil {
		t.Error("the finished VM's record is still there")
	}
}

// A pull holds no slot: the image is ordered, and the VM placed when it is ready.
func TestColdStart(t *testing.T) {
	w := newWorld(t)
	w.image()
	w.report("mac-1", "")
	w.queue()
	w.pass(0)
	if n := len(w.live()); n != 0 {
		t.Fatalf("%d VMs are placed where no image is", n)
	}
	orders := w.view().Orders["mac-1"]
	if orders == nil || len(orders.Hold) != 1 || orders.Hold[0].Digest != testImage || !orders.Hold[0].Demand {
		t.Fatalf("orders %+v; want the image, on demand", orders)
	}
	w.report("mac-1", fleet.ImageCaching)
	w.pass(time.Second)
	if n := len(w.live()); n != 0 {
		t.Fatalf("%d VMs are placed while the image is pulled", n)
	}
	w.report("mac-1", fleet.ImageReady)
	w.pass(time.Second)
	if vm := w.only(); !vm.Cold {
		t.Error("the job waited for the image, but its start counts as warm")
	}
	if hold := w.view().Orders["mac-1"].Hold; len(hold) != 0 {
		t.Errorf("the order stands after it was fulfilled: %+v", hold)
	}
}

// A node that is silent for 45 s gets nothing new, and its booting VM's job is demand
// again; when it is back in time, it keeps what it has.
func TestUnreachable(t *testing.T) {
	w := newWorld(t)
	w.image()
	w.report("mac-1", fleet.ImageReady)
	w.queue()
	w.pass(0)
	first := w.only()
	w.move(first.ID, runner.Accepted)

	w.now = w.now.Add(60 * time.Second)
	w.report("mac-2", fleet.ImageReady)
	w.pass(0)
	vms := w.live()
	if len(vms) != 2 {
		t.Fatalf("%d live VMs; want the silent node's and one on mac-2", len(vms))
	}
	for _, vm := range vms {
		if vm.Node == "mac-1" && (vm.State != fleet.VMBooting || vm.Destroy || vm.Retire != "") {
			t.Errorf("the silent node's VM was touched: %+v", vm)
		}
	}
	// It is back: nothing was destroyed, and the spare VM is free for another job.
	w.report("mac-1", fleet.ImageReady)
	w.move(first.ID, runner.Answered)
	w.pass(0)
	w.pass(0)
	claims, spare := 0, 0
	for _, vm := range w.live() {
		if vm.Claim != nil {
			claims++
		}
		if vm.Job == 0 {
			spare++
		}
	}
	if claims != 1 || spare != 1 {
		t.Errorf("%d claims and %d spare VMs for one job; want 1 and 1", claims, spare)
	}
}

// A node silent for 20 min: its runner is deleted at GitHub first. GitHub agrees: lost.
func TestLost(t *testing.T) {
	w := newWorld(t)
	vm, _ := w.registered()
	w.pass(20 * time.Minute)
	w.pass(0)
	lost := w.view().VMs[vm.ID]
	if lost == nil || lost.State != fleet.VMLost || !lost.Destroy {
		t.Fatalf("VM %+v; want it lost, and destroyed if it shows up", lost)
	}
	if names := w.github.names(); len(names) != 0 {
		t.Errorf("runners left at GitHub: %v", names)
	}
}

// The same, but GitHub says that the runner is busy: the VM stays as it is.
func TestBusyIsNotLost(t *testing.T) {
	w := newWorld(t)
	vm, _ := w.registered()
	w.github.set(vm.Claim.Runner, func(r *github.Runner) { r.Busy = true })
	w.move(vm.ID, runner.TookJob)
	w.pass(20 * time.Minute)
	w.pass(0)
	kept := w.view().VMs[vm.ID]
	if kept.State != fleet.VMBusy || kept.Destroy {
		t.Errorf("a busy VM was given up: %+v", kept)
	}
	if names := w.github.names(); len(names) != 1 {
		t.Errorf("runners at GitHub: %v; want the busy one", names)
	}
}

// An emptied store: nothing is placed before the nodes that are known have spoken, even
// though the job looks unserved.
func TestEmptiedStore(t *testing.T) {
	url, redis := storetest.StartRedis(t)
	s, err := store.Open(t.Context(), store.Config{URL: url})
	if err != nil {
		t.Fatal(err)
	}
	w := newWorldOn(t, s)
	_, job := w.registered()
	redis.Flush(t)
	w.tell(job)
	w.image()
	w.report("mac-2", fleet.ImageReady)
	w.pass(time.Second)
	if n := len(w.live()); n != 0 {
		t.Fatalf("%d VMs are placed before mac-1 has spoken", n)
	}
	w.report("mac-2", fleet.ImageReady)
	w.pass(settleAtMost)
	if n := len(w.live()); n != 1 {
		t.Fatalf("%d VMs after two sync periods; want one", n)
	}
}

// A node that was taken out of service is not waited for when the store is emptied.
func TestRemovedNodeIsNotAwaited(t *testing.T) {
	url, redis := storetest.StartRedis(t)
	s, err := store.Open(t.Context(), store.Config{URL: url})
	if err != nil {
		t.Fatal(err)
	}
	w := newWorldOn(t, s)
	w.report("mac-1", fleet.ImageReady)
	w.report("mac-2", fleet.ImageReady)
	w.pass(0)
	w.commit(store.Txn{DropNodes: []fleet.NodeID{"mac-1"}})
	w.pass(0)
	redis.Flush(t)
	w.image()
	w.report("mac-2", fleet.ImageReady)
	w.queue()
	w.pass(time.Second)
	if n := len(w.live()); n != 1 {
		t.Errorf("%d VMs; want one at once, without waiting for the removed node", n)
	}
}

// GitHub did the work and the answer was lost: the runner is found by its name, removed,
// and a new one made under a new name.
func TestLostAnswer(t *testing.T) {
	w := newWorld(t)
	w.image()
	w.report("mac-1", fleet.ImageReady)
	w.queue()
	w.pass(0)
	w.github.lose = true
	w.move(w.only().ID, runner.Accepted, runner.Answered)
	w.pass(0)
	if claim := w.only().Claim; claim != nil {
		t.Fatalf("claim %+v; want none after it was settled", claim)
	}
	w.pass(3 * time.Second) // the back-off of 2 s is over
	vm := w.only()
	if vm.Claim == nil || vm.Claim.RunnerID == 0 || vm.Attempt != 2 {
		t.Fatalf("VM %+v; want its second runner", vm)
	}
	if names := w.github.names(); len(names) != 1 || names[0] != vm.Claim.Runner {
		t.Errorf("runners at GitHub: %v; want only %s", names, vm.Claim.Runner)
	}
}

// A leader that crashed between asking and writing down: its successor settles by name.
func TestClaimOfAnotherTerm(t *testing.T) {
	w := newWorld(t)
	w.image()
	w.report("mac-1", fleet.ImageReady)
	w.queue()
	w.pass(0)
	w.move(w.only().ID, runner.Accepted, runner.Answered)
	if err := w.c.Step(t.Context(), w.now); err != nil { // claims, and dies before it writes
		t.Fatal(err)
	}
	first := w.only().Claim.Runner
	if _, err := w.github.MintRunner(t.Context(), "acme", first, 1, nil); err != nil {
		t.Fatal(err)
	}
	w.c = w.controller("two")
	w.report("mac-1", fleet.ImageReady)
	w.pass(lease + time.Second)
	w.pass(0)
	vm := w.only()
	if names := w.github.names(); len(names) != 1 || names[0] == first || vm.Claim == nil || vm.Claim.Runner != names[0] {
		t.Errorf("runners at GitHub %v, claim %+v; want one runner, under a new name", names, vm.Claim)
	}
}

// A rate limit holds errands back until it has passed, and nothing is asked meanwhile.
func TestRateLimit(t *testing.T) {
	w := newWorld(t)
	w.image()
	w.report("mac-1", fleet.ImageReady)
	w.queue()
	w.pass(0)
	w.move(w.only().ID, runner.Accepted, runner.Answered)
	w.github.limited = w.now.Add(20 * time.Second)
	w.pass(0)
	asked := len(w.github.calls)
	w.pass(time.Second)
	if len(w.github.calls) != asked {
		t.Errorf("GitHub was asked during its limit: %v", w.github.calls)
	}
	e, err := w.c.Explain(t.Context(), w.only().Job)
	if err != nil || e.Wait == "" {
		t.Errorf("explain: %+v, %v; want the limit named", e, err)
	}
	w.github.limited = time.Time{}
	w.pass(10 * time.Second) // the lease is renewed on the way
	w.pass(10 * time.Second)
	if claim := w.only().Claim; claim == nil || claim.RunnerID == 0 {
		t.Errorf("claim %+v after the limit; want a runner", claim)
	}
}

// Two replicas: the one without the lease writes nothing, and a deposed one is fenced.
func TestFollower(t *testing.T) {
	w := newWorld(t)
	w.image()
	w.report("mac-1", fleet.ImageReady)
	w.pass(0)
	leader := w.c
	w.c = w.controller("two")
	w.queue()
	w.pass(0)
	if n := len(w.live()); n != 0 {
		t.Fatalf("a follower placed %d VMs", n)
	}
	w.report("mac-1", fleet.ImageReady)
	w.pass(lease + time.Second) // takes over
	if n := len(w.live()); n != 1 {
		t.Fatalf("%d VMs after the takeover; want 1", n)
	}
	term, _ := leader.currentTerm()
	vm := *w.only()
	vm.Destroy = true
	err := w.store.Commit(t.Context(), store.Txn{Term: &term, VMs: []fleet.VM{vm}})
	if err == nil {
		t.Error("the deposed leader's write was taken")
	}
}

// A cancelled job's registered runner serves nobody: it is deleted at GitHub, then its
// VM destroyed. A job that comes in time gets it instead.
func TestSurplus(t *testing.T) {
	w := newWorld(t)
	vm, job := w.registered()
	job.Status, job.Conclusion = fleet.JobCompleted, "cancelled"
	w.tell(job)
	w.pass(time.Second)
	if vm := w.only(); vm.Retire != "" || vm.Destroy {
		t.Fatalf("retired at once: %+v", vm)
	}
	next := w.queue()
	w.pass(time.Second)
	if got := w.only(); got.ID != vm.ID || got.Job != next.ID {
		t.Fatalf("VM %+v; want the same one for job %d", got, next.ID)
	}
	next.Status, next.Conclusion = fleet.JobCompleted, "cancelled"
	w.tell(next)
	w.report("mac-1", fleet.ImageReady)
	w.pass(11 * time.Second)
	w.pass(0)
	if got := w.only(); !got.Destroy || got.Claim != nil {
		t.Errorf("VM %+v; want it destroyed", got)
	}
	if names := w.github.names(); len(names) != 0 {
		t.Errorf("runners at GitHub: %v", names)
	}
}

// VMs that fail one after the other make the pool wait longer each time.
func TestFailingImage(t *testing.T) {
	w := newWorld(t)
	w.image()
	w.report("mac-1", fleet.ImageReady)
	w.queue()
	var waits []time.Duration
	for range 4 {
		w.pass(0)
		vm := *w.only()
		vm, _ = runner.Apply(vm, runner.Accepted, w.now)
		vm, _ = runner.Apply(vm, runner.Ended, w.now)
		vm.Failed = true
		w.commit(store.Txn{VMs: []fleet.VM{vm}})
		failed := w.now
		for len(w.live()) == 0 {
			if w.now.Sub(failed) > time.Minute {
				t.Fatal("the pool is not tried again")
			}
			w.report("mac-1", fleet.ImageReady)
			w.pass(time.Second)
		}
		waits = append(waits, w.now.Sub(failed))
	}
	for i := 1; i < len(waits); i++ {
		if waits[i] < 2*waits[i-1] {
			t.Errorf("waits %v; want each at least double the one before", waits)
		}
	}
}

// Runners of this fleet without a VM are deleted; a foreign one never.
func TestGhosts(t *testing.T) {
	w := newWorld(t)
	w.pass(0)
	for _, name := range []string{"paddock-test-abcdefgh-1", "paddock-other-abcdefgh-1", "somebody"} {
		if _, err := w.github.MintRunner(t.Context(), "acme", name, 1, nil); err != nil {
			t.Fatal(err)
		}
	}
	term, _ := w.c.currentTerm()
	if err := w.c.removeGhosts(t.Context(), term); err != nil {
		t.Fatal(err)
	}
	if names := w.github.names(); len(names) != 2 {
		t.Errorf("runners left: %v; want the two that are not ours", names)
	}
}

// Explain names what stands in the way, in each state of a job's life.
func TestExplain(t *testing.T) {
	w := newWorld(t)
	w.report("mac-1", fleet.ImageReady)
	job := w.queue()
	w.c.noteUnresolved(testRef, errors.New("no such tag"))
	says := func(want string) {
		t.Helper()
		e, err := w.c.Explain(t.Context(), job.ID)
		if err != nil || !strings.Contains(e.Wait, want) {
			t.Errorf("explain says %q, %v; want %q in it", e.Wait, err, want)
		}
	}
	says("no such tag")
	w.image()
	w.pass(0)
	says("which has not begun yet")
	w.move(w.only().ID, runner.Accepted)
	says("is booting on mac-1")
	w.move(w.only().ID, runner.Answered)
	says("is warm on mac-1")
	w.pass(0)
	w.move(w.only().ID, runner.Started)
	says("is registered")
	w.move(w.only().ID, runner.TookJob)
	says("runs it")
	job.Status, job.Conclusion, job.RunnerName = fleet.JobCompleted, "success", w.only().Claim.Runner
	w.tell(job)
	w.move(w.only().ID, runner.Ended)
	says("completed: success")
	if _, err := w.c.Explain(t.Context(), 99); !errors.Is(err, ErrNoJob) {
		t.Errorf("an unknown job: %v", err)
	}
}

// A job that no pool takes is told so, although it is not among the unmet.
func TestExplainNoPool(t *testing.T) {
	w := newWorld(t)
	w.report("mac-1", fleet.ImageReady)
	job := w.queue()
	job.ID, job.Labels = job.ID+1, fleet.NewLabels("self-hosted", "linux")
	w.tell(job)
	e, err := w.c.Explain(t.Context(), job.ID)
	if err != nil || e.Refusal.Reason != placement.ReasonNoPool || e.Wait != "" {
		t.Errorf("explain: %+v, %v; want the refusal %s", e, err, placement.ReasonNoPool)
	}
}

// A pool whose VMs fail holds its own jobs back and nobody else's: they do not move on
// to a pool that comes later in the file.
func TestFailingPoolKeepsItsJobs(t *testing.T) {
	w := newWorld(t)
	later := w.c.c.Pools[0]
	later.Name = "later"
	w.c.c.Pools = append(w.c.c.Pools, later)
	w.image()
	w.report("mac-1", fleet.ImageReady)
	job := w.queue()
	w.pass(0)
	vm, _ := runner.Apply(*w.only(), runner.Ended, w.now)
	vm.Failed = true
	w.commit(store.Txn{VMs: []fleet.VM{vm}})
	w.pass(100 * time.Millisecond)
	for _, vm := range w.live() {
		t.Errorf("VM %s of pool %s took the job of a failing pool", vm.ID, vm.Pool)
	}
	e, err := w.c.Explain(t.Context(), job.ID)
	if err != nil || e.Pool != "sequoia" || !strings.Contains(e.Wait, "the next try is at") {
		t.Errorf("explain: %+v, %v; want pool sequoia's back-off", e, err)
	}
}

// A VM that comes up while the runners are listed is no ghost's, and in a new incarnation
// nobody is a ghost before the nodes have reported.
func TestNoGhosts(t *testing.T) {
	w := newWorld(t)
	w.pass(0)
	var vm *fleet.VM
	w.github.listed = func() { vm, _ = w.registered() }
	term, _ := w.c.currentTerm()
	if err := w.c.removeGhosts(t.Context(), term); err != nil {
		t.Fatal(err)
	}
	if names := w.github.names(); len(names) != 1 || names[0] != vm.Claim.Runner {
		t.Errorf("runners left: %v; want %s, whose VM has just come up", names, vm.Claim.Runner)
	}

	w = newWorld(t)
	if _, err := w.store.UpdateLedger(t.Context(), func(l *store.Ledger) error {
		l.Nodes = map[fleet.NodeID]time.Time{"mac-1": w.now}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	w.pass(0)
	if _, err := w.github.MintRunner(t.Context(), "acme", "paddock-test-abcdefgh-1", 1, nil); err != nil {
		t.Fatal(err)
	}
	term, _ = w.c.currentTerm()
	if err := w.c.removeGhosts(t.Context(), term); err != nil {
		t.Fatal(err)
	}
	if names := w.github.names(); len(names) != 1 {
		t.Errorf("runners left: %v; want the one whose node has not reported yet", names)
	}
}

// Two short jobs are over before GitHub's news of them: each VM had the other's job, and
// its record ends with the one that it ran, without asking GitHub.
func TestTwoShortJobs(t *testing.T) {
	w := newWorld(t)
	w.image()
	w.report("mac-1", fleet.ImageReady)
	jobs := []fleet.Job{w.queue(), w.queue()}
	w.pass(0)
	for _, vm := range w.live() {
		w.move(vm.ID, runner.Accepted, runner.Answered)
	}
	w.pass(0)
	ran := map[fleet.VMID]fleet.JobID{}
	for _, vm := range w.live() {
		w.move(vm.ID, runner.Started, runner.TookJob, runner.Ended)
		job := jobs[2-vm.Job] // jobs 1 and 2: the other one
		job.Status, job.Conclusion, job.RunnerName, job.CompletedAt = fleet.JobCompleted, "success", vm.Claim.Runner, w.now
		w.tell(job)
		ran[vm.ID] = job.ID
	}
	w.pass(0)
	for id, job := range ran {
		if vm := w.view().VMs[id]; vm.Claim != nil || vm.Job != job {
			t.Errorf("VM %+v; want it without a claim and with job %d", vm, job)
		}
	}
	if slices.ContainsFunc(w.github.calls, func(call string) bool { return strings.HasPrefix(call, "remove") }) {
		t.Errorf("calls %v; want nothing removed", w.github.calls)
	}
}

// GitHub refuses runners for one scope: its job lets the VM go to another's, says why it
// waits, and leaves nothing behind.
func TestRefusedScope(t *testing.T) {
	w := newWorld(t)
	w.c.c.Pools[0].Scopes = []fleet.Scope{"other", "acme"}
	w.github.refuses = "other"
	w.image()
	w.report("mac-1", fleet.ImageReady)
	w.serial++
	barred := fleet.Job{
		ID: w.serial, Repository: "other/app", Name: "build", Labels: fleet.NewLabels("self-hosted", "macos"),
		Status: fleet.JobQueued, CreatedAt: w.now, SeenAt: w.now,
	}
	w.tell(barred)
	w.pass(0)
	vm := w.only()
	w.move(vm.ID, runner.Accepted, runner.Answered)
	w.pass(0)
	if got := w.only(); got.Claim != nil {
		t.Fatalf("claim %+v; want none after it was refused", got.Claim)
	}
	next := w.queue()
	w.pass(0) // matched
	w.pass(0) // claimed
	if got := w.only(); got.ID != vm.ID || got.Job != next.ID || got.Claim == nil || got.Claim.Scope != "acme" {
		t.Errorf("VM %+v; want the same one with a runner for job %d", got, next.ID)
	}
	if e, err := w.c.Explain(t.Context(), barred.ID); err != nil || !strings.Contains(e.Wait, "refuses runners at other") {
		t.Errorf("explained as %q, %v; want that GitHub refuses its runners", e.Wait, err)
	}
}
