package node

import (
	"context"
	"errors"
	"time"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
)

// apply does what is new in a reply. What a reply does not name goes on as it was.
func (a *Agent) apply(ctx, lives context.Context, r api.SyncReply) {
	a.forget(r.Applied)
	a.mu.Lock()
	a.will = r
	close(a.applied)
	a.applied = make(chan struct{})
	a.mu.Unlock()

	a.trust(r.PeerKey)
	a.limit()
	a.pulls.want(r.Hold)
	a.run(lives)
	a.destroy(r.Destroy)
	a.start(r.Start)
	a.noteNames(r)
	a.evict(ctx, r)
	a.connectPeople(lives, r.Sessions)
	if r.Credential != "" && a.c.Renewed != nil {
		if err := a.c.Renewed(r.Credential); err != nil {
			a.log.Error("the renewed credential could not be kept; the old one serves until it ends", "error", err)
		}
	}
}

// forget takes VMs out of the journal whose end the controller has applied.
func (a *Agent) forget(applied int64) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for id, l := range a.vms {
		if l.told == 0 || l.told > applied {
			continue
		}
		if err := a.journal.remove(id); err != nil {
			a.log.Error("a finished VM stays in the journal", "vm", id, "error", err)
			continue // and is told again
		}
		delete(a.vms, id)
		a.past[id] = a.c.Now()
	}
	for id, since := range a.past {
		if a.c.Now().Sub(since) > pastTime {
			delete(a.past, id)
		}
	}
}

// pastTime is how long a VM that was acknowledged as done is remembered: no order that
// was written before can come later than that.
const pastTime = time.Hour

// run begins the lives of ordered VMs as far as there are slots. Orders beyond wait in
// the will of the last reply for a slot. A VM that the same reply destroys is begun as
// well: it ends at once, and the controller hears of it.
func (a *Agent) run(lives context.Context) {
	a.mu.Lock()
	defer a.mu.Unlock()
	used := 0
	for _, l := range a.vms {
		if l.record.Report.State != fleet.VMDone {
			used++
		}
	}
	for _, order := range a.will.Run {
		if _, known := a.vms[order.ID]; known {
			continue
		}
		if _, over := a.past[order.ID]; over {
			continue
		}
		if !vmIDPattern.MatchString(string(order.ID)) {
			a.log.Error("an order for a VM whose id cannot be one", "vm", order.ID)
			continue
		}
		if used >= a.c.Slots {
			if !a.waiting[order.ID] {
				a.waiting[order.ID] = true
				a.log.Warn("a VM waits: every slot of this node is taken", "vm", order.ID, "pool", order.Pool, "slots", a.c.Slots)
			}
			continue
		}
		if a.isStopping() {
			return
		}
		used++
		a.begin(lives, newLife(record{Report: api.VMReport{ID: order.ID, Order: order, State: fleet.VMBooting}}))
	}
}

// begin starts the goroutine of one VM; a.mu is held.
func (a *Agent) begin(lives context.Context, l *life) {
	ctx, end := context.WithCancelCause(lives)
	l.end = end
	a.vms[l.order.ID] = l
	delete(a.waiting, l.order.ID)
	if l.record.End != nil {
		end(l.record.End) // it was ending before a crash: nothing but the teardown is left
	}
	a.lives.Go(func() {
		defer end(nil)
		a.live(ctx, l)
		a.run(lives) // its slot may be another's now
	})
}

func (a *Agent) isStopping() bool {
	select {
	case <-a.stopping:
		return true
	default:
		return false
	}
}

// destroy ends the VMs that are named. One that we do not know is not ours to touch, and
// one that is done has ended: of an agent before this one, it has nothing to end.
func (a *Agent) destroy(orders []api.DestroyOrder) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, o := range orders {
		if l, ours := a.vms[o.VM]; ours && l.record.Report.State != fleet.VMDone {
			l.end(&ending{Reason: "destroyed: " + o.Reason})
		}
	}
}

// start hands runners to warm VMs, each once. The JIT config goes to the VM's goroutine
// and nowhere else.
func (a *Agent) start(orders []api.RunnerOrder) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, o := range orders {
		l, ours := a.vms[o.VM]
		if !ours || l.handed == o.Runner.Name {
			continue
		}
		if l.handed != "" {
			a.log.Warn("a second runner for a VM is not started", "vm", o.VM, "runner", o.Runner.Name, "first", l.handed)
			continue
		}
		l.handed = o.Runner.Name
		l.start <- o // has room for the one that is handed
	}
}

// errKept ends the goroutine of a VM that outlives the agent.
var errKept = errors.New("the VM goes on without the agent")

// ending is why a VM's life ends, in words for people.
type ending struct {
	Reason string `json:"reason"`
	// Failed: this node could not boot or serve it.
	Failed bool `json:"failed,omitempty"`
	// late: its guest did not answer in time. crashed: its machine ended by itself.
	late, crashed bool
}

func (e *ending) Error() string { return e.Reason }
