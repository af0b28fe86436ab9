package node

import (
	"context"
	"fmt"
	"net"

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
// its methods say so then. Nobody gets into a guest that may yet be saved, since what they
// did there would be in the state, nor into one from a state that was not woken yet: its
// random numbers are those of others. Its console is there for people meanwhile.
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
	to := contact{order: l.order, machine: l.machine, dir: a.cloneDir(id)}
	if l.record.Seat != nil && l.record.Report.State == fleet.VMBooting {
		to.machine = closed{l.machine, id}
	}
	return to, nil
}

// closed is a machine that people do not get into: without the optional methods, too.
type closed struct {
	vm.Machine
	id fleet.VMID
}

func (c closed) Dial(context.Context) (net.Conn, error) {
	return nil, fmt.Errorf("VM %s is still booting: try again once it is warm; until then, paddock vm console shows what it prints", c.id)
}

// setMachine notes the machine of a VM, for its own goroutine and for contactOf.
func (a *Agent) setMachine(l *life, m vm.Machine) {
	a.mu.Lock()
	defer a.mu.Unlock()
	l.machine = m
}
