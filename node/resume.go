package node

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/paddock-ci/paddock/fleet"
)

// resume goes on with the VMs of the journal, whatever state the agent before this one
// left them in, and cleans up what nothing speaks for.
func (a *Agent) resume(lives context.Context) error {
	records, problems, err := a.journal.load()
	if err != nil {
		return err
	}
	for _, p := range problems {
		a.log.Error("a journal file is no record of this node and was moved aside", "error", p)
	}
	ours := map[fleet.VMID]bool{}
	var holders []string
	for _, r := range records {
		ours[r.Report.ID] = true
		if r.Report.State != fleet.VMDone {
			holders = append(holders, string(r.Report.ID))
		}
	}
	strangers, err := a.strangers(lives, ours)
	if err != nil {
		return err
	}
	if err := a.sweepClones(ours, strangers); err != nil {
		return err
	}
	a.starts.open()
	if err := a.states.open(); err != nil {
		return err
	}
	for _, r := range records {
		if r.Seat != nil && r.Report.State != fleet.VMDone {
			a.states.hold(r.Report.ID, *r.Seat)
		}
	}
	if len(strangers) > 0 {
		a.states.bar() // one of them may have the identity of any state
	}
	a.states.prune(a.c.Images.List())
	a.archives.evict("")
	if s, ok := a.c.Images.(Sweeper); ok {
		if err := s.Sweep(holders); err != nil {
			return fmt.Errorf("releasing images that nothing holds any more: %w", err)
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, r := range records {
		l := newLife(r)
		l.resumed, l.begun = true, true
		if r.Report.Runner != nil {
			l.handed = r.Report.Runner.Name
		}
		if r.Report.State == fleet.VMDone {
			a.vms[r.Report.ID] = l // until the controller has applied it
			continue
		}
		a.log.Info("a VM from the journal goes on", "vm", r.Report.ID, "state", r.Report.State)
		a.begin(lives, l)
	}
	return nil
}

// strangers are machines that run here and that no journal entry speaks for. They may
// have a job: an absence does not end a VM, so they are left alone and named. What is
// left of one that has ended is removed; its clone goes with those that no VM has.
func (a *Agent) strangers(ctx context.Context, ours map[fleet.VMID]bool) (map[fleet.VMID]bool, error) {
	ids, err := a.c.Machines.List()
	if err != nil {
		return nil, fmt.Errorf("listing the machines that run here: %w", err)
	}
	found := map[fleet.VMID]bool{}
	for _, id := range ids {
		if ours[id] {
			continue
		}
		if a.clear(ctx, id) {
			continue
		}
		found[id] = true
		a.log.Error("a machine that the journal does not know is left alone; if nobody misses it, end its helper process", "vm", id)
	}
	return found, nil
}

// clear removes what is left of a machine that has ended, and reports whether it had.
func (a *Agent) clear(ctx context.Context, id fleet.VMID) bool {
	ctx, cancel := context.WithTimeout(ctx, undoTime)
	defer cancel()
	m, err := a.c.Machines.Adopt(ctx, id)
	if err != nil || !hasEnded(ctx, m) {
		return false
	}
	if err := m.Destroy(ctx); err != nil {
		a.log.Error("what is left of a machine that has ended was not removed", "vm", id, "error", err)
		return false
	}
	a.log.Warn("what was left of a machine that the journal does not know was removed: it had ended", "vm", id)
	return true
}

// sweepClones removes clones whose VM was acknowledged as done or never began.
func (a *Agent) sweepClones(ours, strangers map[fleet.VMID]bool) error {
	entries, err := os.ReadDir(a.clones())
	if err != nil {
		return fmt.Errorf("reading the clones' directory: %w", err)
	}
	for _, e := range entries {
		id := fleet.VMID(e.Name())
		if ours[id] || strangers[id] {
			continue
		}
		a.log.Warn("a clone that no VM has is removed", "vm", id)
		if err := removeTree(filepath.Join(a.clones(), e.Name())); err != nil {
			return fmt.Errorf("removing a clone that no VM has: %w", err)
		}
	}
	return nil
}
