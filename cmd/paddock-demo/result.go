package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// result is what the demo shows at its end.
type result struct {
	Jobs       int      `json:"jobs"`
	Rows       []row    `json:"rows"`
	ColdStarts int      `json:"cold_starts"`
	P50        float64  `json:"start_delay_p50_s"`
	P95        float64  `json:"start_delay_p95_s"`
	Pulled     int64    `json:"bytes_pulled"`
	Left       leftover `json:"left"`
	Violations []string `json:"github_violations,omitempty"` // of GitHub's own API description
}

// leftover counts what must be nothing.
type leftover struct {
	Processes int `json:"vm_processes"`
	Clones    int `json:"clones"`
	Runners   int `json:"runners"`
	Leases    int `json:"leases"`
	VMs       int `json:"live_vms"`
}

func (l leftover) clean() bool { return l == leftover{} }

func (r *result) done() int {
	n := 0
	for _, row := range r.Rows {
		if row.Status == fleet.JobCompleted && row.Conclusion == "success" {
			n++
		}
	}
	return n
}

// Good: all jobs succeeded, nothing is left, and GitHub's description was kept to.
func (r *result) Good() bool {
	return r.done() == r.Jobs && r.Left.clean() && len(r.Violations) == 0
}

// settle waits until the controller, too, has seen the last VM go: the jobs are done a
// moment before the house is clean.
func (d *demo) settle(ctx context.Context, r *result) error {
	frame := time.NewTicker(20 * time.Millisecond)
	defer frame.Stop()
	for {
		view, err := d.control.Store().View(ctx)
		if err != nil {
			return err
		}
		r.Left.VMs = 0
		r.Left.Leases = 0
		for _, vm := range view.VMs {
			if !vm.State.Final() || vm.Claim != nil {
				r.Left.VMs++
			}
		}
		for _, node := range view.Nodes {
			for _, image := range node.Images {
				r.Left.Leases += image.Leases
			}
		}
		if r.Left.VMs == 0 && r.Left.Leases == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d VMs and %d leases are left: %w", r.Left.VMs, r.Left.Leases, ctx.Err())
		case <-frame.C:
		}
	}
}

// inspect looks at the machine and at GitHub themselves, not at what Paddock believes.
func (d *demo) inspect(r *result) {
	r.Left.Processes = len(processesUnder(d.dir))
	r.Left.Runners = len(d.github.Runners())
	for i := range nodes {
		clones, _ := filepath.Glob(filepath.Join(d.dir, fmt.Sprintf("mac-%d", i+1), "clones", "*"))
		r.Left.Clones += len(clones)
	}
	r.Violations = d.github.Violations()
	_, r.Pulled = d.registry.Counts().Total()
	var delays []float64
	for _, row := range r.Rows {
		delays = append(delays, row.delay())
		if row.Start == "cold" {
			r.ColdStarts++
		}
	}
	r.P50, r.P95 = quantile(delays, 0.50), quantile(delays, 0.95)
}

// processesUnder lists processes other than this one that name dir in their arguments or
// work there, as guests and runners do, or write their errors there, as helpers do.
func processesUnder(dir string) []string {
	var found []string
	entries, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range entries {
		if p == fmt.Sprintf("/proc/%d", os.Getpid()) {
			continue
		}
		cmdline, _ := os.ReadFile(filepath.Join(p, "cmdline"))
		cwd, _ := os.Readlink(filepath.Join(p, "cwd"))
		stderr, _ := os.Readlink(filepath.Join(p, "fd/2"))
		if strings.Contains(string(cmdline), dir) || strings.HasPrefix(cwd, dir) || strings.HasPrefix(stderr, dir+"/") {
			found = append(found, p)
		}
	}
	return found
}

func (r *result) writeJSON(w io.Writer) error {
	encoder := json.NewEncoder(w)
	encoder.SetIndent("", "  ")
	return encoder.Encode(r)
}

// write prints the summary; the last line begins with "12 of 12" if all went well.
func (r *result) write(w io.Writer) {
	_, _ = fmt.Fprintf(w, "\njobs done     %d of %d\ncold starts   %d\nstart delay   p50 %.2f s, p95 %.2f s\nbytes pulled  %.1f MB\n",
		r.done(), r.Jobs, r.ColdStarts, r.P50, r.P95, float64(r.Pulled)/1e6)
	_, _ = fmt.Fprintf(w, "left behind   %d VM processes, %d clones, %d runners at GitHub, %d leases, %d VM records\n",
		r.Left.Processes, r.Left.Clones, r.Left.Runners, r.Left.Leases, r.Left.VMs)
	for _, violation := range r.Violations {
		_, _ = fmt.Fprintln(w, "against GitHub's API description:", violation)
	}
	word := "and a clean house"
	if !r.Left.clean() {
		word = "but something was left behind"
	}
	_, _ = fmt.Fprintf(w, "%d of %d jobs ran, %s\n", r.done(), r.Jobs, word)
}
