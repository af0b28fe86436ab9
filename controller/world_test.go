package controller

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github"
	"github.com/paddock-ci/paddock/runner"
	"github.com/paddock-ci/paddock/store"
)

// The cast of these tests: organization acme, whose jobs ask for [self-hosted, macos];
// one pool, sequoia, with one image; nodes mac-1 and mac-2 with two slots each, whose
// part is played by the test: it reports what an agent would. The store is the embedded
// one and time stands still unless the test moves it.
type world struct {
	t      *testing.T
	store  *store.Store
	github *registrar
	c      *Controller
	now    time.Time
	serial fleet.JobID
}

const (
	testImage = fleet.Digest("sha256:1111111111111111111111111111111111111111111111111111111111111111")
	testRef   = "registry.example/acme/sequoia:1"
)

func newWorld(t *testing.T) *world {
	t.Helper()
	s, err := store.OpenEmbedded(t.Context(), store.EmbeddedConfig{})
	if err != nil {
		t.Fatal(err)
	}
	return newWorldOn(t, s)
}

func newWorldOn(t *testing.T, s *store.Store) *world {
	t.Helper()
	t.Cleanup(func() { _ = s.Close() })
	w := &world{t: t, store: s, github: &registrar{}, now: time.Now().Truncate(time.Millisecond)}
	s.SetTime(w.now)
	w.c = w.controller("one")
	return w
}

func (w *world) controller(who string) *Controller {
	w.t.Helper()
	c, err := New(Config{
		Store: w.store, GitHub: w.github, Fleet: "test", Who: who,
		Seal: func(secret string, vm fleet.VMID, runner string) (string, error) { return "sealed:" + secret, nil },
		Pools: []fleet.Pool{{
			Name: "sequoia", Scopes: []fleet.Scope{"acme"}, Labels: fleet.NewLabels("self-hosted", "macOS"),
			Image: testRef, Growth: 1,
		}},
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return c
}

// pass moves time and runs a Step and the errands that follow from it.
func (w *world) pass(later time.Duration) {
	w.t.Helper()
	w.now = w.now.Add(later)
	w.store.SetTime(w.now)
	if err := w.c.Step(w.t.Context(), w.now); err != nil {
		w.t.Fatal("step:", err)
	}
	w.errands()
}

func (w *world) errands() {
	w.t.Helper()
	term, leading := w.c.currentTerm()
	if !leading {
		return
	}
	var running sync.WaitGroup
	w.c.setOut(w.t.Context(), turn{term, w.now}, make(chan struct{}, errandsAtOnce), &running)
	running.Wait()
}

func (w *world) image() {
	w.t.Helper()
	w.commit(store.Txn{Images: []fleet.Image{{Ref: testRef, Digest: testImage, Bytes: 20e9, DiskBytes: 50e9}}})
}

func (w *world) commit(txn store.Txn) {
	w.t.Helper()
	if err := w.store.Commit(w.t.Context(), txn); err != nil {
		w.t.Fatal(err)
	}
}

// report is a node's sync: it is alive now and has the image in the given state.
func (w *world) report(id fleet.NodeID, image fleet.ImageState) {
	w.t.Helper()
	n := fleet.Node{ID: id, Arch: "arm64", OS: "darwin", Slots: 2, DiskFree: 500e9, PullRate: 100e6, SeenAt: w.now, Session: "s"}
	if known := w.view().Nodes[id]; known != nil {
		n.Rev = known.Rev
	}
	if image != "" {
		n.Images = []fleet.NodeImage{{Digest: testImage, Ref: testRef, State: image, Total: 20e9}}
	}
	w.commit(store.Txn{Nodes: []fleet.Node{n}})
}

// tell is GitHub's news of a job.
func (w *world) tell(job fleet.Job) {
	w.t.Helper()
	if _, err := w.store.MergeJob(w.t.Context(), store.Delivery{At: w.now, Job: job}); err != nil {
		w.t.Fatal(err)
	}
}

// queue makes a new queued job.
func (w *world) queue() fleet.Job {
	w.t.Helper()
	w.serial++
	job := fleet.Job{
		ID: w.serial, Repository: "acme/app", Name: "build", Labels: fleet.NewLabels("self-hosted", "macos"),
		Status: fleet.JobQueued, CreatedAt: w.now, SeenAt: w.now,
	}
	w.tell(job)
	return job
}

// move is a node's word on a VM, by the table of its life.
func (w *world) move(id fleet.VMID, events ...runner.Event) {
	w.t.Helper()
	for _, e := range events {
		vm, ok := runner.Apply(*w.view().VMs[id], e, w.now)
		if !ok {
			w.t.Fatalf("VM %s is %s, to which %q does not happen", id, vm.State, e)
		}
		w.commit(store.Txn{VMs: []fleet.VM{vm}})
	}
}

func (w *world) view() *store.View {
	w.t.Helper()
	v, err := w.store.View(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	return v
}

// live returns the VMs that are not finished, by id.
func (w *world) live() []*fleet.VM {
	w.t.Helper()
	var vms []*fleet.VM
	for _, vm := range w.view().VMs {
		if !vm.State.Final() {
			vms = append(vms, vm)
		}
	}
	slices.SortFunc(vms, func(a, b *fleet.VM) int { return strings.Compare(string(a.ID), string(b.ID)) })
	return vms
}

// only returns the one live VM.
func (w *world) only() *fleet.VM {
	w.t.Helper()
	vms := w.live()
	if len(vms) != 1 {
		w.t.Fatalf("%d live VMs, want one", len(vms))
	}
	return vms[0]
}

// registered brings one VM with a runner for one job on mac-1 to life.
func (w *world) registered() (*fleet.VM, fleet.Job) {
	w.t.Helper()
	w.image()
	w.report("mac-1", fleet.ImageReady)
	job := w.queue()
	w.pass(0)
	w.move(w.only().ID, runner.Accepted, runner.Answered)
	w.pass(0)
	w.move(w.only().ID, runner.Started)
	return w.only(), job
}

// registrar is GitHub's register of runners in a few lines: names are unique, a busy
// runner is not removed, and an answer can be lost after the work was done.
type registrar struct {
	mu      sync.Mutex
	serial  int64
	runners map[string]github.Runner
	lose    bool
	limited time.Time
	limits  fleet.Scope // where; "": everywhere
	calls   []string
	jobs    map[fleet.JobID]fleet.Job // that can be asked for
	jobErr  error                     // the answer when one is asked for; nil: the job
	listed  func()                    // before runners are listed; nil: nothing
	silent  chan struct{}             // closed by the one listing, which never ends; nil: it does
	refuses fleet.Scope               // where the App is not installed; "": nowhere
}

var errLost = errors.New("connection reset")

func (r *registrar) MintRunner(_ context.Context, scope fleet.Scope, name string, _ int64, labels fleet.Labels) (github.Minted, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls = append(r.calls, fmt.Sprintf("register %s at %s", name, scope))
	if !r.limited.IsZero() && (r.limits == "" || r.limits == scope) {
		return github.Minted{}, &github.RateLimited{Until: r.limited}
	}
	if scope == r.refuses {
		return github.Minted{}, github.ErrNoInstallation
	}
	if _, taken := r.runners[name]; taken {
		return github.Minted{}, github.ErrNameTaken
	}
	if r.runners == nil {
		r.runners = map[string]github.Runner{}
	}
	r.serial++
	r.runners[name] = github.Runner{ID: r.serial, Name: name, Status: "offline", Labels: labels}
	if r.lose {
		r.lose = false
		return github.Minted{}, errLost
	}
	return github.Minted{RunnerID: r.serial, JIT: "jit of " + name}, nil
}

func (r *registrar) FindRunner(_ context.Context, _ fleet.Scope, name string) (github.Runner, bool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	found, ok := r.runners[name]
	return found, ok, nil
}

func (r *registrar) Runners(ctx context.Context, _ fleet.Scope) ([]github.Runner, error) {
	if r.silent != nil {
		close(r.silent)
		<-ctx.Done()
		return nil, ctx.Err()
	}
	if r.listed != nil {
		r.listed()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	var all []github.Runner
	for _, one := range r.runners {
		all = append(all, one)
	}
	return all, nil
}

func (r *registrar) RemoveRunner(_ context.Context, _ fleet.Scope, id int64) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for name, one := range r.runners {
		if one.ID != id {
			continue
		}
		r.calls = append(r.calls, "remove "+name)
		if one.Busy {
			return github.ErrBusy
		}
		delete(r.runners, name)
	}
	return nil
}

func (r *registrar) Job(_ context.Context, _ string, id fleet.JobID) (fleet.Job, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls = append(r.calls, fmt.Sprintf("job %d", id))
	if r.jobErr != nil {
		return fleet.Job{}, r.jobErr
	}
	job, known := r.jobs[id]
	if !known {
		return fleet.Job{}, github.ErrNotFound
	}
	return job, nil
}

// set changes a registered runner.
func (r *registrar) set(name string, change func(*github.Runner)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	one := r.runners[name]
	change(&one)
	r.runners[name] = one
}

func (r *registrar) names() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var names []string
	for name := range r.runners {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}
