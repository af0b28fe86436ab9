package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// result is what the demo shows at its end.
type result struct {
	Jobs       int      `json:"jobs"`
	Succeeded  int      `json:"succeeded"`     // by GitHub's account, and started once
	Twice      int      `json:"started_twice"` // jobs that more than one runner began
	Rows       []row    `json:"rows"`
	ColdStarts int      `json:"cold_starts"`
	P50        float64  `json:"start_delay_p50_s"`
	P95        float64  `json:"start_delay_p95_s"`
	Pulled     int64    `json:"bytes_pulled"`
	Left       leftover `json:"left"`
	Violations []string `json:"github_violations,omitempty"` // of GitHub's own API description
}

// seen counts the jobs of which Paddock has seen the success.
func (r *result) seen() int {
	n := 0
	for _, row := range r.Rows {
		if row.Status == fleet.JobCompleted && row.Conclusion == "success" {
			n++
		}
	}
	return n
}

// Good: all jobs succeeded, in GitHub's eyes and in Paddock's, none ran twice, nothing
// is left, and GitHub's description was kept to.
func (r *result) Good() bool {
	return r.Succeeded == r.Jobs && r.seen() == r.Jobs && r.Twice == 0 && r.Left.clean() && len(r.Violations) == 0
}

// verdict words what was found, for the end of the last line.
func (r *result) verdict() string {
	var wrong []string
	say := func(n int, what string) {
		if n > 0 {
			wrong = append(wrong, fmt.Sprintf("%d %s", n, what))
		}
	}
	say(r.Jobs-r.Succeeded, "did not succeed")
	say(r.Succeeded-r.seen(), "succeeded after the table was last drawn")
	say(r.Twice, "ran more than once")
	say(len(r.Violations), "requests went against GitHub's API description")
	if r.Left.Unseen != "" {
		wrong = append(wrong, "what is left could not be looked at: "+r.Left.Unseen)
	} else if !r.Left.clean() {
		wrong = append(wrong, "something was left behind")
	}
	if len(wrong) == 0 {
		return "and a clean house"
	}
	return "but " + strings.Join(wrong, ", ")
}

// interrupted is the error of an interrupted showing, by what was found after it.
func (r *result) interrupted(err error) error {
	if r.Left.clean() {
		return errors.New("interrupted; everything was torn down")
	}
	return errors.Join(errors.New("interrupted; not everything was torn down"), err)
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

// measure sums up the rows.
func (r *result) measure() {
	var delays []float64
	for _, row := range r.Rows {
		delays = append(delays, row.delay())
		if row.Start == "cold" {
			r.ColdStarts++
		}
	}
	r.P50, r.P95 = quantile(delays, 0.50), quantile(delays, 0.95)
}

func (r *result) writeJSON(w io.Writer) error {
	encoder := json.NewEncoder(w)
	encoder.SetIndent("", "  ")
	return encoder.Encode(r)
}

// write prints the summary; the last line begins with "12 of 12" if all went well.
func (r *result) write(w io.Writer) {
	_, _ = fmt.Fprintf(w, "\njobs done     %d of %d\ncold starts   %d\nstart delay   p50 %.2f s, p95 %.2f s\nbytes pulled  %.1f MB\n",
		r.Succeeded, r.Jobs, r.ColdStarts, r.P50, r.P95, float64(r.Pulled)/1e6)
	_, _ = fmt.Fprintf(w, "left behind   %d VM processes, %d clones, %d runners at GitHub, %d leases, %d VM records\n",
		r.Left.Processes, r.Left.Clones, r.Left.Runners, r.Left.Leases, r.Left.VMs)
	for _, violation := range r.Violations {
		_, _ = fmt.Fprintln(w, "against GitHub's API description:", violation)
	}
	_, _ = fmt.Fprintf(w, "%d of %d jobs ran, %s\n", r.Succeeded, r.Jobs, r.verdict())
}
