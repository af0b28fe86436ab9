package conformance

import (
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/cmd/internal/config"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github/githubtest"
	"github.com/paddock-ci/paddock/github/githubtest/testrunner"
	"github.com/paddock-ci/paddock/store"
	"github.com/paddock-ci/paddock/store/storetest"
)

// What GitHub does with runners: registers, loses, gives away, refuses.

// line is what stands between a Control and GitHub.
type line func(*http.Request) (*http.Response, error)

func (l line) RoundTrip(r *http.Request) (*http.Response, error) { return l(r) }

func isMint(r *http.Request) bool { return strings.HasSuffix(r.URL.Path, "/generate-jitconfig") }

// The runner is registered and the answer is lost: it is found by the name that was
// written down, deleted, and another is registered under the next name.
func TestJITResponseLost(t *testing.T) {
	h := open(t, plan{github: githubtest.Config{Faults: githubtest.Once(1, isMint, githubtest.RequestFault{Lose: true})}})
	id := h.queue(1)[0]
	h.succeeded(id)
	h.empty()
	if job, _ := h.github.Job(id); !strings.HasSuffix(job.RunnerName, "-2") {
		t.Errorf("the job ran on %s, want the VM's second runner", job.RunnerName)
	}
	if n := len(h.placedFor(id)); n != 1 || h.requests(mints) != 2 {
		t.Errorf("%d VMs and %d registrations, want one and two", n, h.requests(mints))
	}
}

// Something on the way repeats the request, so that the answer is 409: the name is taken,
// by the runner that the first request made.
func TestNameTaken(t *testing.T) {
	var repeated, conflicts atomic.Int64
	h := open(t, plan{transport: line(func(r *http.Request) (*http.Response, error) {
		if !isMint(r) || !repeated.CompareAndSwap(0, 1) {
			return http.DefaultTransport.RoundTrip(r)
		}
		first, err := r.GetBody()
		if err != nil {
			return nil, err
		}
		again := r.Clone(r.Context())
		again.Body = first
		answer, err := http.DefaultTransport.RoundTrip(again)
		if err != nil {
			return nil, err
		}
		_, _ = io.Copy(io.Discard, answer.Body)
		_ = answer.Body.Close()
		answer, err = http.DefaultTransport.RoundTrip(r)
		if err == nil && answer.StatusCode == http.StatusConflict {
			conflicts.Add(1)
		}
		return answer, err
	})})
	h.succeeded(h.queue(1)...)
	h.empty()
	if conflicts.Load() != 1 || h.requests(mints) != 3 {
		t.Errorf("%d answers of 409 and %d registrations, want one and three", conflicts.Load(), h.requests(mints))
	}
}

// GitHub limits registrations twice, for a second each: it is left alone meanwhile, and
// the VM waits.
func TestRateLimitedMint(t *testing.T) {
	const wait = time.Second
	var mu sync.Mutex
	var at []time.Time
	h := open(t, plan{})
	h.github.SetFaults(githubtest.Faults{Request: func(r *http.Request) githubtest.RequestFault {
		mu.Lock()
		defer mu.Unlock()
		if !isMint(r) {
			return githubtest.RequestFault{}
		}
		if at = append(at, time.Now()); len(at) > 2 {
			return githubtest.RequestFault{}
		}
		return githubtest.RequestFault{Status: http.StatusTooManyRequests, RetryAfter: wait}
	}})
	id := h.queue(1)[0]
	h.succeeded(id)
	h.empty()
	if n := len(h.placedFor(id)); n != 1 {
		t.Errorf("%d VMs were placed for one job", n)
	}
	if len(at) != 3 {
		t.Fatalf("%d registrations were asked for, want 3", len(at))
	}
	for i, next := range at[1:] {
		if rest := next.Sub(at[i]); rest < wait {
			t.Errorf("asked again after %v, GitHub said %v", rest, wait)
		}
	}
}

// foreign registers a runner that is none of ours and has it wait for a job, as somebody
// else's machine would. It returns when that is online.
func (h *house) foreign(name string) {
	h.t.Helper()
	minted, err := h.client().MintRunner(h.t.Context(), "acme", name, 1, fleet.NewLabels(mac...))
	if err != nil {
		h.t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.WithoutCancel(h.t.Context()))
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = testrunner.Run(ctx, strings.NewReader(minted.JIT), io.Discard) // the job's end tells how it went
	}()
	h.t.Cleanup(func() { stop(); <-done })
	h.until(func() error {
		for _, r := range h.github.Runners() {
			if r.Name == name && r.Online {
				return nil
			}
		}
		return errors.New("the foreign runner is not online")
	})
}

// A runner that is none of ours takes the job: the VM that was meant for it serves the
// next job, or goes, and the stranger is left alone.
func TestForeignRunner(t *testing.T) {
	h := open(t, plan{deadlines: soon, ghosts: 50 * time.Millisecond})
	if _, err := h.client().MintRunner(t.Context(), "acme", "stranger-offline", 1, fleet.NewLabels(mac...)); err != nil {
		t.Fatal(err)
	}
	h.foreign("stranger")
	id := h.run("acme/app", githubtest.JobSpec{Name: "build", Labels: mac, Seconds: 0.5})[0]
	h.succeeded(id)
	if job, _ := h.github.Job(id); job.RunnerName != "stranger" {
		t.Errorf("the job ran on %q, want the stranger", job.RunnerName)
	}
	h.succeeded(h.queue(1)...)
	h.accepted()
	h.empty()
	if left := h.github.Runners(); len(left) != 1 || left[0].Name != "stranger-offline" {
		t.Errorf("runners left: %+v, want the stranger that never came", left)
	}
}

// GitHub gives our runner to another job with the same labels, of which we had not heard:
// in_progress is the first to name it. The VM is that job's from then on, and ours gets
// another.
func TestStolenJob(t *testing.T) {
	var thief atomic.Int64
	h := open(t, plan{none: true})
	h.github.SetFaults(githubtest.Faults{Delivery: func(d githubtest.Delivery) githubtest.Fate {
		return githubtest.Fate{Drop: thief.CompareAndSwap(0, int64(d.Job)) && d.Action == "queued"}
	}})
	ids := h.run("acme/app", githubtest.JobSpec{Name: "build", Labels: mac, Seconds: 0.3, Matrix: 2})
	stolen, ours := ids[0], ids[1]
	h.waitDelivered()
	h.join("mac-1")
	h.startNode("mac-1")
	h.untilView("the VM was not swapped", func(v *viewOf) bool {
		job, known := h.github.Job(stolen)
		if !known || job.RunnerName == "" {
			return false
		}
		id, _, _ := fleet.ParseRunnerName(h.config.Fleet, job.RunnerName)
		vm := v.VMs[id]
		return vm != nil && vm.Job == stolen
	})
	h.succeeded(stolen, ours)
	h.empty()
	if fleet.JobID(thief.Load()) != stolen || len(h.placedFor(ours)) != 2 || len(h.placedFor(stolen)) != 0 {
		t.Errorf("VMs placed for ours %v, for the other %v; want two and none", h.placedFor(ours), h.placedFor(stolen))
	}
}

// cut is a line that is cut for good when the answer to the first registration is on its
// way: GitHub has done the work, and this Control never hears of anything again.
func cut() (http.RoundTripper, <-chan struct{}) {
	minted := make(chan struct{})
	var gone atomic.Bool
	var once sync.Once
	return line(func(r *http.Request) (*http.Response, error) {
		if gone.Load() {
			return nil, errors.New("the line is cut")
		}
		answer, err := http.DefaultTransport.RoundTrip(r)
		if err != nil || !isMint(r) {
			return answer, err
		}
		gone.Store(true)
		_ = answer.Body.Close()
		once.Do(func() { close(minted) })
		return nil, errors.New("the line is cut")
	}), minted
}

func (h *house) wait(c <-chan struct{}, what string) {
	h.t.Helper()
	select {
	case <-c:
	case <-time.After(patience):
		h.t.Fatalf("not within %s: %s", patience, what)
	}
}

// The controller ends between GitHub's registration and its own record of it. The next
// one, on the same data, finds the runner by the name that was written down.
func TestCrashBetweenMintAndSave(t *testing.T) {
	transport, minted := cut()
	h := open(t, plan{transport: transport})
	id := h.queue(1)[0]
	h.wait(minted, "no runner is registered")
	h.control.end(t)
	if left := h.github.Runners(); len(left) != 1 {
		t.Fatalf("runners at GitHub: %+v, want the one nobody knows of", left)
	}
	h.startControl(nil)
	h.succeeded(id)
	h.empty()
}

// The same with a real Redis and a controller that is not dead: another leads while its
// registration hangs, and settles it. Then the late answer arrives.
func TestLateAnswerOfADeposedLeader(t *testing.T) {
	url, _ := storetest.StartRedis(t)
	minted, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	h := open(t, plan{redis: url, transport: line(func(r *http.Request) (*http.Response, error) {
		answer, err := http.DefaultTransport.RoundTrip(r)
		if err == nil && isMint(r) {
			once.Do(func() { close(minted); <-release })
		}
		return answer, err
	})})
	id := h.queue(1)[0]
	h.wait(minted, "no runner is registered")
	first := h.control
	h.config.Listen = "127.0.0.1:0"
	second := h.another(nil)
	first.stop() // it gives up the lease, and waits for its answer
	h.control = second
	h.until(func() error {
		for _, r := range h.github.Runners() {
			if strings.HasSuffix(r.Name, "-1") {
				return errors.New("the runner of the deposed leader is not deleted")
			}
		}
		return nil
	})
	close(release)
	first.end(t)
	// The nodes know the first controller's address: the second one moves there.
	second.end(t)
	h.config.Listen = strings.TrimPrefix(first.part.URL(), "https://")
	h.startControl(nil)
	h.succeeded(id)
	h.empty()
}

// GitHub has not told us, and the guest's runner says nothing, that the job began: when
// the runner seems to wait for too long, GitHub is asked to delete it, refuses, and the
// VM lives on.
func TestBusyDelete(t *testing.T) {
	h := open(t, plan{
		// While GitHub is asked, the job has no VM and may be given another, which is too much.
		deadlines: config.Deadlines{Registered: config.Duration(time.Second), Warm: config.Duration(time.Second)},
		pool:      func(p *config.Pool) { p.Runner[1] = muteRole },
		github: githubtest.Config{Faults: githubtest.Faults{Delivery: func(d githubtest.Delivery) githubtest.Fate {
			return githubtest.Fate{Drop: d.Action == "in_progress"}
		}}},
	})
	id := h.run("acme/app", githubtest.JobSpec{Name: "build", Labels: mac, Seconds: 4})[0]
	h.succeeded(id)
	h.empty()
	events, err := h.control.part.Store().Events(t.Context(), store.EventFilter{Limit: 1000})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(events, func(e fleet.Event) bool { return e.Kind == "vm.kept" }) {
		t.Error("no event tells that the VM was kept")
	}
	if n := h.requests(deletes); n > 5 {
		t.Errorf("GitHub was asked %d times in 4 s to delete a runner that it had said is busy", n)
	}
}

// A runner with a name of ours and no VM is deleted; one that runs a job is not, nor is
// one of another fleet.
func TestGhostRunner(t *testing.T) {
	h := open(t, plan{none: true, ghosts: 50 * time.Millisecond})
	// While nobody looks for ghosts: until it is online, this one is a ghost like any other.
	h.control.end(t)
	h.foreign("paddock-house-aaaaaaaa-1")
	h.startControl(nil)
	busy := h.run("acme/app", githubtest.JobSpec{Name: "build", Labels: mac, Seconds: 1})[0]
	h.waitJob(busy, fleet.JobInProgress)
	for _, name := range []string{"paddock-house-bbbbbbbb-1", "paddock-other-bbbbbbbb-1"} {
		if _, err := h.client().MintRunner(t.Context(), "acme", name, 1, fleet.NewLabels(mac...)); err != nil {
			t.Fatal(err)
		}
	}
	names := func() (names []string) {
		for _, r := range h.github.Runners() {
			names = append(names, r.Name)
		}
		return names
	}
	h.until(func() error {
		if slices.Contains(names(), "paddock-house-bbbbbbbb-1") {
			return errors.New("the ghost is still there")
		}
		return nil
	})
	h.succeeded(busy)
	h.empty()
	if left := names(); !slices.Equal(left, []string{"paddock-other-bbbbbbbb-1"}) {
		t.Errorf("runners left: %v", left)
	}
}

// The controller stops while jobs run, and the next one starts at its address: on the same
// data, or with its store lost as by FLUSHALL, so that jobs come back from GitHub's log and
// VMs from the node. Adopted, none lost, none twice.
func TestControllerRestarted(t *testing.T) {
	for name, lost := range map[string]bool{"same data": false, "store lost": true} {
		t.Run(name, func(t *testing.T) {
			h := open(t, plan{slots: 3, sweep: 200 * time.Millisecond})
			ids := h.run("acme/app", githubtest.JobSpec{Name: "build", Labels: mac, Seconds: 1, Matrix: 6})
			h.waitJob(ids[0], fleet.JobInProgress)
			h.control.end(t)
			if lost {
				if err := os.RemoveAll(filepath.Join(h.dir, "data", "store")); err != nil {
					t.Fatal(err)
				}
			}
			h.startControl(nil)
			h.succeeded(ids...)
			h.empty()
		})
	}
}

// `paddock up` is upgraded: controller and node stop together and start again, the VMs
// live on and are adopted.
func TestUpRestarted(t *testing.T) {
	h := open(t, plan{slots: 3, sweep: 200 * time.Millisecond})
	ids := h.run("acme/app", githubtest.JobSpec{Name: "build", Labels: mac, Seconds: 2, Matrix: 6})
	for _, id := range ids[:3] {
		h.waitJob(id, fleet.JobInProgress)
	}
	h.nodes["mac-1"].keep = true
	h.nodes["mac-1"].end(t)
	h.control.end(t)
	if len(machines(h.dir)) == 0 {
		t.Fatal("the VMs ended with the program")
	}
	more := h.queue(2) // while nobody answers
	h.waitDelivered()
	h.startControl(nil)
	h.startNode("mac-1")
	h.succeeded(append(ids, more...)...)
	h.empty()
}
