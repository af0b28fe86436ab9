package conformance

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/cmd/internal/config"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github/githubtest"
	"github.com/paddock-ci/paddock/store"
)

// What the scenarios do with a house, and what they look at.

// mac are the labels that the house's pool serves.
var mac = []string{"self-hosted", "macOS"}

// queue queues n jobs of one run that our pool serves.
func (h *house) queue(n int) []fleet.JobID {
	h.t.Helper()
	return h.run("acme/app", githubtest.JobSpec{Name: "build", Labels: mac, Matrix: n})
}

// run queues a run of one kind of job.
func (h *house) run(repository string, spec githubtest.JobSpec) []fleet.JobID {
	h.t.Helper()
	_, ids, err := h.github.QueueRun(githubtest.Run{Repository: repository, Jobs: []githubtest.JobSpec{spec}})
	if err != nil {
		h.t.Fatal(err)
	}
	return ids
}

func (h *house) cancel(id fleet.JobID) {
	h.t.Helper()
	if err := h.github.Cancel(id); err != nil {
		h.t.Fatal(err)
	}
}

// waitJob waits until GitHub shows the job with the status or a later one.
func (h *house) waitJob(id fleet.JobID, status fleet.JobStatus) githubtest.Job {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), patience)
	defer cancel()
	job, err := h.github.WaitJob(ctx, id, status)
	if err != nil {
		h.t.Fatal(err)
	}
	return job
}

// waitDelivered waits until the receiver has answered every webhook.
func (h *house) waitDelivered() {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), patience)
	defer cancel()
	if err := h.github.WaitDelivered(ctx); err != nil {
		h.t.Fatal(err)
	}
}

// view is what the store holds.
func (h *house) view() *store.View {
	h.t.Helper()
	v, err := h.control.part.Store().View(h.t.Context())
	if err != nil {
		h.t.Fatal(err)
	}
	return v
}

// until repeats a check until it is content.
func (h *house) until(check func() error) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), patience)
	defer cancel()
	again := time.NewTicker(10 * time.Millisecond)
	defer again.Stop()
	for {
		err := check()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			h.t.Fatalf("not within %s: %v", patience, err)
		case <-again.C:
		}
	}
}

// untilView repeats a check of the store until it is content.
func (h *house) untilView(what string, holds func(*store.View) bool) {
	h.t.Helper()
	h.until(func() error {
		if !holds(h.view()) {
			return errors.New(what)
		}
		return nil
	})
}

// succeeded waits until the jobs are over and asserts that each ran, once, to success.
func (h *house) succeeded(ids ...fleet.JobID) {
	h.t.Helper()
	for _, id := range ids {
		job := h.waitJob(id, fleet.JobCompleted)
		if job.Conclusion != "success" || job.Starts != 1 {
			h.t.Errorf("job %d (%s) was started %d times and ended as %q, want once and success", id, job.Name, job.Starts, job.Conclusion)
		}
	}
}

// placedFor are the VMs that were ever placed for one of the jobs, going by the events.
func (h *house) placedFor(ids ...fleet.JobID) []fleet.VMID {
	h.t.Helper()
	events, err := h.control.part.Store().Events(h.t.Context(), store.EventFilter{Limit: 10_000})
	if err != nil {
		h.t.Fatal(err)
	}
	var placed []fleet.VMID
	for _, e := range events {
		if e.Kind == "vm.placed" && slices.Contains(ids, e.Job) {
			placed = append(placed, e.VM)
		}
	}
	return placed
}

// requests counts REST requests of GitHub whose pattern has the ending.
func (h *house) requests(ending string) int {
	n := 0
	for pattern, count := range h.github.Requests() {
		if strings.HasSuffix(pattern, ending) {
			n += count
		}
	}
	return n
}

const (
	mints   = "generate-jitconfig"
	deletes = "runners/{runner_id}"
)

// empty waits until nothing is left of any job, by itself, before nodes are stopped: no
// runner at GitHub, no live VM or claim in the store, no lease, no clone, no process. And
// no job ran twice, and every request was as GitHub describes it.
func (h *house) empty() {
	h.t.Helper()
	for _, job := range h.github.Jobs() {
		if job.Starts > 1 {
			h.t.Errorf("job %d was started %d times", job.ID, job.Starts)
		}
	}
	h.until(func() error {
		var left []error
		for _, r := range h.github.Runners() {
			if _, _, ours := fleet.ParseRunnerName(h.config.Fleet, r.Name); ours {
				left = append(left, fmt.Errorf("runner %+v", r))
			}
		}
		v := h.view()
		for _, vm := range v.VMs {
			if !vm.State.Final() || vm.Claim != nil {
				left = append(left, fmt.Errorf("VM %+v with claim %+v", vm, vm.Claim))
			}
		}
		for _, job := range v.OpenJobs() {
			if at, known := h.github.Job(job.ID); known && at.Status == fleet.JobCompleted {
				left = append(left, fmt.Errorf("job %d is %s in the store, completed at GitHub", job.ID, job.Status))
			}
		}
		for _, node := range v.Nodes {
			for _, image := range node.Images {
				if image.Leases > 0 {
					left = append(left, fmt.Errorf("%d leases on %s", image.Leases, node.ID))
				}
			}
		}
		for name := range h.nodes {
			for _, what := range []string{"clones", "vms"} {
				found, err := filepath.Glob(filepath.Join(h.dir, name, what, "*"))
				if err != nil || len(found) > 0 {
					left = append(left, fmt.Errorf("%s: %v", what, found))
				}
			}
		}
		if p := machines(h.dir); len(p) > 0 {
			left = append(left, fmt.Errorf("processes %v", p))
		}
		return errors.Join(left...)
	})
	for _, v := range h.github.Violations() {
		h.t.Error("against GitHub's API description:", v)
	}
}

// machines lists the processes that work below dir, guests and runners, and those that
// write there what goes wrong, helpers: by their directories in /proc, with their argv.
func machines(dir string) map[string]string {
	found := map[string]string{}
	all, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range all {
		for _, link := range []string{"cwd", "fd/2"} {
			at, err := os.Readlink(filepath.Join(p, link))
			if err == nil && strings.HasPrefix(at, dir+"/") {
				command, _ := os.ReadFile(filepath.Join(p, "cmdline"))
				found[p] = strings.ReplaceAll(string(command), "\x00", " ")
			}
		}
	}
	return found
}

// soon are deadlines with which VMs that nobody needs go within seconds.
var soon = config.Deadlines{Warm: config.Duration(time.Second), Registered: config.Duration(3 * time.Second)}

// viewOf is short for what checks look at.
type viewOf = store.View

// admin calls the controller over the wire.
func (h *house) admin() *api.Client {
	h.t.Helper()
	client, err := h.control.part.Client(access.Admin)
	if err != nil {
		h.t.Fatal(err)
	}
	return client
}

// file reads a file of the house.
func (h *house) file(name string) (string, error) {
	text, err := os.ReadFile(filepath.Join(h.dir, name))
	return string(text), err
}
