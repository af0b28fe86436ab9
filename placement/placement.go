// Package placement decides which node runs which job, and which images have to be
// brought where for that.
//
// It is pure: Make takes a Snapshot, which carries its own time, and returns a Plan.
// It does no I/O, reads no clock, keeps nothing between calls, and equal snapshots
// give equal plans whatever the order of their jobs and nodes. It does not carry the
// plan out, does not match runners with jobs, and knows nothing of GitHub.
//
// A pass goes like this:
//
//  1. Every job finds its pool (PoolFor); jobs without one are refused with a reason.
//  2. Jobs are put in order: those over the wait cap, then by priority, then the
//     repository with the fewest running slots, then age.
//  3. Each job in turn takes the node with the lowest cost:
//     ready = max(slot, image) + start; cost = ready + α · own pull + tie-breaks. A start
//     is from a saved state where the node has one left, else a cold boot, each with the
//     seconds that the node measured.
//  4. A job that can start now (a free slot, the image ready) is bound. Every other one
//     only reserves its choice for the rest of this pass, orders its image if that
//     is missing, and is planned again at the next event (late binding).
//  5. What is left of the free slots goes to the pools' minimum of idle VMs.
//  6. Where clones have too little room to grow, images go that are missed least. So they
//     do for a pull that step 4 or 5 orders; what was ordered out before goes on leaving.
//
// The controller calls Make at every event; Evictions runs the same pass and says of every
// image why it goes or stays; Explain runs the same pass and keeps the
// whole table for one job; the simulator calls both in virtual time.
package placement

import (
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// Snapshot is everything a pass looks at. The caller leaves it alone while the pass
// runs; the plan shares no memory with it that is written to.
type Snapshot struct {
	// Now is the time of the pass; all predicted times are at or after it.
	Now time.Time
	// Pools in file order: the first that fits a job takes it.
	Pools []fleet.Pool
	// Jobs is unmet demand only: queued jobs without a VM matched, in any order.
	Jobs []fleet.Job
	// Nodes in any order; only reachable ones get anything.
	Nodes []Node
	// Images are the resolved tags by Pool.Image. A pool whose image is missing here is
	// refused with ReasonUnresolved.
	Images map[string]fleet.Image
	// Running counts the slots that a repository ("owner/name") occupies, for fairness
	// and for MaxPerRepository. The caller spells each repository as its jobs do.
	Running map[string]int
	// Durations predicts how long a job runs; nil, or false: not known.
	Durations func(repository, name string) (time.Duration, bool)
	// Boot is the time from a bind to a guest that answers by a cold boot, where no node has
	// measured one of the image; 0: DefaultBoot.
	Boot time.Duration
	// WaitCap is the age at which a job goes to the head of the line; 0: DefaultWaitCap.
	WaitCap time.Duration
	// Demand is λ by image, in jobs per hour. Nil: not known, and images go by when they
	// were last used; an image that is not in it has none.
	Demand map[fleet.Digest]float64
	// Pinned images are let go nowhere; the value says who wants that, for people, and may be
	// empty. Nil: none.
	Pinned map[fleet.Digest]string
}

// Node is a node as its last report and the leader's records show it.
type Node struct {
	fleet.Node
	// Reachable nodes reported lately; others get nothing and their slots are not free.
	Reachable bool
	// Slots are the used ones, one for each VM that is not done or lost. Those free are
	// fleet.Node.Slots less their number.
	Slots []Slot
	// Hold is what the node was already ordered to hold: a pull under way or queued that
	// the node may not have reported yet.
	Hold []fleet.Hold
	// Evict is what the node was ordered to let go and still lists. It counts as gone.
	Evict []fleet.Digest
	// Recalled was in Evict, is not any more, and may go nevertheless, since the node has not
	// reported since: it counts as gone, too.
	Recalled []fleet.Digest
	// Pinned images are not let go here; see Snapshot.Pinned.
	Pinned map[fleet.Digest]string
	// Missing are bytes on the wire to fetch for images that share chunks with what else the
	// node has: those still to come or, of a ready one, those to fetch if it had gone. An
	// image not in it costs all its bytes. Nil: nothing shared.
	Missing map[fleet.Digest]int64
	// Failures counts recent failed boots and pulls; 0: healthy.
	Failures int
	// Failing are pools whose VMs failed here one after the other: the node takes no more
	// of them in this pass. Nil: none.
	Failing map[fleet.PoolName]bool
}

// Slot is a slot that a VM occupies.
type Slot struct {
	VM    fleet.VMID
	Pool  fleet.PoolName
	Image fleet.Digest
	State fleet.VMState
	// Job is the job the VM is matched with; 0: none. VMs without one that are placed,
	// booting or warm count towards their pool's minimum of idle VMs.
	Job fleet.JobID
	// Idle VMs are warm, unclaimed and not needed by their pool's jobs: another pool's
	// job may have the slot, for the price of a teardown.
	Idle bool
	// Ends is when the slot is predicted to be free; zero: not known.
	Ends time.Time
}

// Plan is what a pass decided. Its slices are in the order of the decisions.
type Plan struct {
	// Bind are VMs to place now: each has a free slot and a ready image.
	Bind []Binding
	// Hold is every image that a choice of this pass rests on and that is not ready on its
	// node, be the order new or standing. The plan is level-triggered: it repeats an
	// order for as long as it stands. What was ordered before and is not here is no
	// longer waited for; the caller may let such a pull finish.
	Hold []Hold
	// Evict are images to let go, so that the Hold on the same node and the clones there find
	// room, those that are missed least first. It repeats what stands of Node.Evict, before
	// anything new; what is in that and not here is recalled. Never one that is leased,
	// pinned, being fetched or waited for there, nor the last copy of an image in demand.
	Evict []Eviction
	// Evacuate are idle warm VMs of other pools to destroy, so that a job gets their slot.
	// The job is bound by a later pass, when the slot is free.
	Evacuate []fleet.VMID
	// Decisions explain the plan, one for each class of equal jobs.
	Decisions []Decision
}

// Binding places a VM.
type Binding struct {
	Job   fleet.JobID // the job it is meant for; 0: kept idle for its pool
	Pool  fleet.PoolName
	Node  fleet.NodeID
	Image fleet.Digest
	Ref   string // the image as the pool names it
	// Cold: the image came by a pull that jobs waited for (a demand hold for it still
	// stands among the node's orders).
	Cold bool
	// Ready is when the guest is expected to answer.
	Ready time.Time
}

// Hold orders an image for a node.
type Hold struct {
	Node   fleet.NodeID
	Digest fleet.Digest
	Ref    string
	// Demand: a job waits for it. Others are for idle VMs and give way.
	Demand bool
	// Priority of the pool that needs it; higher is more urgent.
	Priority int
	// Why, in words, for events and explain.
	Why string
}

// Eviction lets an image go from a node.
type Eviction struct {
	Node   fleet.NodeID
	Digest fleet.Digest
	Why    string
}

// Decision is what became of a class of equal jobs: same pool, repository and predicted
// duration (to the minute), or the same refusal.
type Decision struct {
	Class string        // for people: "acme/app in pool sequoia, about 12m"
	Jobs  []fleet.JobID // in the order they were planned
	Bound int           // how many of Jobs got a VM in this plan
	// Choice is what the first of Jobs took, nil if every node refused; RunnerUp is the
	// next best node for it, nil if there is none.
	Choice   *Option
	RunnerUp *Option
	// Refusals count nodes by why they were not options; a reason that concerns the job and
	// not a node counts the jobs. Shared between decisions: read only.
	Refusals map[Reason]int
	// Wait says why the first job that was not bound waits; empty: all are bound.
	Wait string
}

// Option is one node weighed for one job. Times are from the snapshot's Now.
type Option struct {
	Node fleet.NodeID `json:"node"`
	// Refusal: the node is not an option, and the figures below are zero.
	Refusal Reason `json:"refusal,omitempty"`

	Slot  time.Duration `json:"slot"`  // until a slot is free; 0: free now
	Image time.Duration `json:"image"` // until the image is ready; 0: ready now
	Boot  time.Duration `json:"boot"`  // from both to a guest that answers, by Tier
	Ready time.Duration `json:"ready"` // max(Slot, Image) + Boot
	Cost  time.Duration `json:"cost"`  // what nodes are compared by

	Tier        fleet.StartTier `json:"tier,omitempty"`         // how the VM would start
	Start       string          `json:"start,omitempty"`        // why so, and where the seconds of Boot are from, in words
	Pull        int64           `json:"pull,omitempty"`         // bytes on the wire until the image is here, without the queue ahead
	NewPull     bool            `json:"new_pull,omitempty"`     // the pull is not under way or ordered yet
	SlotUnknown bool            `json:"slot_unknown,omitempty"` // Slot is a guess: no history says when the VM there ends
	Evacuate    fleet.VMID      `json:"evacuate,omitempty"`     // the idle VM whose slot it would be
}

// Now reports whether a VM can be placed there at once.
func (o *Option) Now() bool { return o.Refusal == "" && o.Slot == 0 && o.Image == 0 }

// Explanation is the whole table for one job, as it was when its turn came in the pass.
type Explanation struct {
	Job   fleet.JobID    `json:"job"`
	Pool  fleet.PoolName `json:"pool,omitempty"`
	Scope fleet.Scope    `json:"scope,omitempty"`
	// Refusal concerns the job itself: no pool takes it, or a limit is reached (then the
	// table is there all the same); zero: neither.
	Refusal Refusal `json:"refusal,omitzero"`
	// Age is the time since the job was created; Duration is what it is predicted to run,
	// 0 if not known.
	Age      time.Duration `json:"age"`
	Duration time.Duration `json:"duration,omitempty"`
	// Ahead counts the jobs that were planned before it in this pass.
	Ahead int `json:"ahead"`
	// Options are all nodes: best first, then those that refuse, by id.
	Options []Option `json:"options,omitempty"`
	// Choice is the option the job took; nil if there was none.
	Choice *Option `json:"choice,omitempty"`
	// Bound: a VM is placed for it. Otherwise Wait says what it waits for.
	Bound bool   `json:"bound"`
	Wait  string `json:"wait,omitempty"`
}
