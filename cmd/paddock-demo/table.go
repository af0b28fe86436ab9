package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
)

// row is one job as the table shows it. The four spans follow each other: together they
// are the job's life from its webhook to its end.
type row struct {
	Job      fleet.JobID     `json:"job"`
	Name     string          `json:"name"`
	Image    string          `json:"image"`
	Node     fleet.NodeID    `json:"node"`
	Start    string          `json:"start"` // warm or cold
	Status   fleet.JobStatus `json:"status"`
	Waiting  float64         `json:"waiting_s"`  // for a slot
	Pulling  float64         `json:"pulling_s"`  // for the image
	Starting float64         `json:"starting_s"` // VM placed to the runner having the job
	Running  float64         `json:"running_s"`

	Conclusion string `json:"conclusion"`
}

// delay is what the job's author waits: webhook to the job's start.
func (r row) delay() float64 { return r.Waiting + r.Pulling + r.Starting }

// ran is what a job's VM was, kept when its record is gone from the view.
type ran struct {
	vm      fleet.VM
	ordered time.Time // when the image was ordered for the VM's node; zero: it was there
}

// board follows the jobs of the demo through the controller's store.
type board struct {
	store  *store.Store
	images map[string]string // a label that picks an image → its name
	jobs   map[fleet.JobID]fleet.Job
	served map[fleet.JobID]ran
	orders map[fleet.NodeID]map[fleet.Digest]time.Time
}

func newBoard(s *store.Store, images map[string]string) *board {
	return &board{
		store: s, images: images, jobs: map[fleet.JobID]fleet.Job{}, served: map[fleet.JobID]ran{},
		orders: map[fleet.NodeID]map[fleet.Digest]time.Time{},
	}
}

// look takes in what has changed and returns the rows as of now, in the jobs' order.
func (b *board) look(ctx context.Context, now time.Time) ([]row, error) {
	view, err := b.store.View(ctx)
	if err != nil {
		return nil, err
	}
	for node, orders := range view.Orders {
		for _, h := range orders.Hold {
			if b.orders[node] == nil {
				b.orders[node] = map[fleet.Digest]time.Time{}
			}
			if _, known := b.orders[node][h.Digest]; !known {
				b.orders[node][h.Digest] = now
			}
		}
	}
	for id, job := range view.Jobs {
		b.jobs[id] = *job
	}
	for _, vm := range view.VMs {
		// A VM that lost its job to another runner is not the one that served it.
		if job := b.jobs[vm.Job]; vm.Job != 0 && (job.RunnerName == "" || vm.Claim == nil || vm.Claim.Runner == job.RunnerName) {
			b.served[vm.Job] = ran{vm: *vm, ordered: b.orders[vm.Node][vm.Image]}
		}
	}
	rows := make([]row, 0, len(b.jobs))
	for _, job := range b.jobs {
		rows = append(rows, b.row(job, now))
	}
	slices.SortFunc(rows, func(a, b row) int { return cmp.Compare(a.Job, b.Job) })
	return rows, nil
}

// row splits a job's life. A moment that has not come yet counts as now.
func (b *board) row(job fleet.Job, now time.Time) row {
	r := row{Job: job.ID, Name: job.Name, Status: job.Status, Conclusion: job.Conclusion, Start: "-", Node: "-"}
	for _, label := range job.Labels {
		if image, found := b.images[label]; found {
			r.Image = image
		}
	}
	or := func(t time.Time) time.Time {
		if t.IsZero() {
			return now
		}
		return t
	}
	served, found := b.served[job.ID]
	vm := served.vm
	placed, busy, done := or(vm.PlacedAt), or(vm.BusyAt), or(vm.DoneAt)
	if found {
		r.Node, r.Start = vm.Node, "warm"
	}
	pulling := placed
	if vm.Cold {
		r.Start = "cold"
		if served.ordered.After(job.SeenAt) {
			pulling = served.ordered
		} else {
			pulling = job.SeenAt
		}
	}
	r.Waiting = seconds(job.SeenAt, pulling)
	r.Pulling = seconds(pulling, placed)
	if found {
		r.Starting, r.Running = seconds(placed, busy), seconds(busy, done)
	}
	return r
}

func seconds(from, to time.Time) float64 { return max(0, to.Sub(from).Seconds()) }

// clearRight clears what an earlier drawing left to the right, on a terminal.
const clearRight = "\x1b[K"

// draw writes the table, one line for each job, each ended by end, and returns the
// number of lines.
func draw(w io.Writer, rows []row, end string) int {
	lines := []string{fmt.Sprintf("%-22s %-8s %-6s %-5s %-11s %7s %7s %8s %7s", "JOB", "IMAGE", "NODE", "START", "STATUS", "WAITING", "PULLING", "STARTING", "RUNNING")}
	for _, r := range rows {
		status := string(r.Status)
		if r.Status == fleet.JobCompleted {
			status = r.Conclusion
		}
		lines = append(lines, fmt.Sprintf("%-22s %-8s %-6s %-5s %-11s %6.2fs %6.2fs %7.2fs %6.2fs",
			r.Name, r.Image, r.Node, r.Start, status, r.Waiting, r.Pulling, r.Starting, r.Running))
	}
	_, _ = io.WriteString(w, strings.Join(lines, end)+end)
	return len(lines)
}

// quantile of sorted or unsorted values, by the nearest rank.
func quantile(values []float64, q float64) float64 {
	if len(values) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(values))
	rank := int(math.Ceil(q * float64(len(sorted)))) // from 1
	return sorted[min(max(rank, 1), len(sorted))-1]
}
