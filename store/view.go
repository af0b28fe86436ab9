package store

import (
	"cmp"
	"slices"
	"sync"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// View is a consistent picture of the store at one revision. It is shared and must
// not be modified, nor what it points to: copy a record before changing it.
type View struct {
	Incarnation string
	Born        time.Time // when this incarnation was made, by the store's clock
	Revision    int64

	Jobs   map[fleet.JobID]*fleet.Job // open ones, and completed ones until they are dropped
	VMs    map[fleet.VMID]*fleet.VM
	Nodes  map[fleet.NodeID]*fleet.Node
	Images map[string]*fleet.Image // by Ref
	Orders map[fleet.NodeID]*fleet.Orders
	// Pending are by ID; some may be past their deadline, see Pending.
	Pending map[string]*Pending

	open   []*fleet.Job // sorted by older
	byNode func() map[fleet.NodeID][]*fleet.VM
}

// OpenJobs returns the jobs that are not completed, the oldest first.
func (v *View) OpenJobs() []*fleet.Job { return slices.Clone(v.open) }

// VMsOn returns a node's VMs, sorted by ID.
func (v *View) VMsOn(n fleet.NodeID) []*fleet.VM { return slices.Clone(v.byNode()[n]) }

// index prepares the index of VMs by node, made at the first call of VMsOn.
func (v *View) index() {
	v.byNode = sync.OnceValue(func() map[fleet.NodeID][]*fleet.VM {
		on := map[fleet.NodeID][]*fleet.VM{}
		for _, vm := range v.VMs {
			on[vm.Node] = append(on[vm.Node], vm)
		}
		for _, vms := range on {
			slices.SortFunc(vms, func(a, b *fleet.VM) int { return cmp.Compare(a.ID, b.ID) })
		}
		return on
	})
}

// older orders jobs by CreatedAt, then by ID.
func older(a, b *fleet.Job) int {
	return cmp.Or(a.CreatedAt.Compare(b.CreatedAt), cmp.Compare(a.ID, b.ID))
}

func isOpen(j *fleet.Job) bool { return j != nil && !fleet.StatusRanks[j.Status].Final }

// rebuildAbove is the number of changed jobs above which sorting all open jobs anew
// is cheaper than moving them one by one.
const rebuildAbove = 64

// reopen brings the sorted list of open jobs from one set of jobs to the next.
func reopen(open []*fleet.Job, was, now map[fleet.JobID]*fleet.Job, changed []fleet.JobID) []*fleet.Job {
	if len(changed) == 0 {
		return open
	}
	if len(changed) > rebuildAbove {
		open = make([]*fleet.Job, 0, len(now))
		for _, j := range now {
			if isOpen(j) {
				open = append(open, j)
			}
		}
		slices.SortFunc(open, older)
		return open
	}
	next := make([]*fleet.Job, len(open), len(open)+len(changed))
	copy(next, open)
	for _, id := range changed {
		if j := was[id]; isOpen(j) {
			if i, found := slices.BinarySearchFunc(next, j, older); found {
				next = slices.Delete(next, i, i+1)
			}
		}
		if j := now[id]; isOpen(j) {
			i, _ := slices.BinarySearchFunc(next, j, older)
			next = slices.Insert(next, i, j)
		}
	}
	return next
}
