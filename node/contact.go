package node

import (
	"fmt"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/vm"
)

// contact is what it takes to reach a VM that lives here: connect opens a way of its own
// into the guest, the machine's own methods the others.
type contact struct {
	order   api.VMOrder
	machine vm.Machine
	dir     string // of the clone, where the driver writes the console
}

// contactOf finds a VM whose machine runs here. The machine may end at any moment, and
// its methods say so then.
func (a *Agent) contactOf(id fleet.VMID) (contact, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	l, ours := a.vms[id]
	switch {
	case !ours:
		return contact{}, fmt.Errorf("VM %s is not on this node", id)
	case l.record.Report.State == fleet.VMDone:
		return contact{}, fmt.Errorf("VM %s is done: %s", id, l.record.Report.Reason)
	case l.machine == nil:
		return contact{}, fmt.Errorf("VM %s has no machine yet: try again in a moment", id)
	}
	return contact{order: l.order, machine: l.machine, dir: a.cloneDir(id)}, nil
}

// setMachine notes the machine of a VM, for its own goroutine and for contactOf.
func (a *Agent) setMachine(l *life, m vm.Machine) {
	a.mu.Lock()
	defer a.mu.Unlock()
	l.machine = m
}
