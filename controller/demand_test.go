package controller

import (
	"bytes"
	"math"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/demand"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/placement"
	"github.com/paddock-ci/paddock/store"
)

// seen is the snapshot that a controller would plan by.
func (w *world) seen(c *Controller) placement.Snapshot {
	w.t.Helper()
	view := w.view()
	return c.snapshot(&pass{now: w.now, view: view, vms: map[fleet.VMID]fleet.VM{}, written: map[fleet.VMID]bool{}})
}

// Three jobs ask for the pool's image, one waits for an approval and one is not ours. Each
// counts once, however often it is looked at and after a restart with the saved
// history; a tag that moves takes its demand along; and the last copy of what was
// asked for is protected when no job waits any more.
func TestDemandComesFromJobs(t *testing.T) {
	w := newWorld(t)
	w.image()
	if s := w.seen(w.c); s.Demand != nil {
		t.Errorf("demand without any job: %v", s.Demand)
	}
	for range 3 {
		w.queue()
	}
	for id, change := range map[fleet.JobID]func(*fleet.Job){
		101: func(j *fleet.Job) { j.Status = fleet.JobWaiting },
		102: func(j *fleet.Job) { j.Labels = fleet.NewLabels("self-hosted", "windows") },
	} {
		job := fleet.Job{ID: id, Repository: "acme/app", Labels: fleet.NewLabels("self-hosted", "macos"), Status: fleet.JobQueued, CreatedAt: w.now, SeenAt: w.now}
		change(&job)
		w.tell(job)
	}
	three := 3 * math.Ln2 / 24
	for range 3 {
		w.pass(time.Second)
		if s := w.seen(w.c); math.Abs(s.Demand[testImage]-three) > three/1000 || len(s.Demand) != 1 {
			t.Fatalf("demand is %v, want %v for the pool's image", s.Demand, three)
		}
	}

	var saved bytes.Buffer
	if err := w.c.SaveHistory(&saved); err != nil {
		t.Fatal(err)
	}
	c := w.c.c
	c.Who, c.Durations, c.Demand = "two", demand.New(demand.Config{}), demand.NewImages()
	if err := c.Durations.Load(&saved, c.Demand); err != nil {
		t.Fatal(err)
	}
	next, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	if s := w.seen(next); math.Abs(s.Demand[testImage]-three) > three/1000 {
		t.Errorf("after a restart demand is %v, want %v", s.Demand, three)
	}
	if fresh := w.controller("three"); math.Abs(w.seen(fresh).Demand[testImage]-three) > three/1000 {
		t.Errorf("without a history the store's jobs count: %v", w.seen(fresh).Demand)
	}

	w.shelf("mac-1", 1e9, "")
	for id := range w.view().Jobs {
		job := *w.view().Jobs[id]
		job.Status, job.Conclusion, job.CompletedAt = fleet.JobCompleted, "cancelled", w.now
		w.tell(job)
	}
	told, err := w.c.Evictions(t.Context(), "mac-1", 100e9)
	if err != nil || told[0].Images[0].Stay != placement.StayLast {
		t.Errorf("%+v, %v: want the last copy to stay", told, err)
	}

	w.commit(store.Txn{Images: []fleet.Image{{Ref: testRef, Digest: spare, Bytes: 20e9, DiskBytes: 50e9}}})
	if s := w.seen(w.c); math.Abs(s.Demand[spare]-three) > three/1000 || s.Demand[testImage] != 0 {
		t.Errorf("after the tag moved: %v", s.Demand)
	}
}
