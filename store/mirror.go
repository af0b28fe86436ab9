package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"sync"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// mirror is this process's copy of the records: the last View, brought forward by
// what changed since.
type mirror struct {
	turn   chan struct{} // holds one token while somebody fetches
	failed error         // of the last fetch; belongs to whoever holds the turn

	mu   sync.Mutex
	last *View
	next *flight // the fetch that has not begun, which new callers join
}

// flight is a fetch that several callers wait for.
type flight struct {
	done chan struct{}
	view *View
	err  error
}

// View returns a picture that includes every write committed before the call: one
// round trip, which callers of the same moment share. Without changes it is the same
// pointer as before; with changes it costs the changed records and a copy of the
// maps they are in.
func (s *Store) View(ctx context.Context) (*View, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	m := &s.mirror
	m.mu.Lock()
	f, mine := m.next, false
	if f == nil {
		f, mine = &flight{done: make(chan struct{})}, true
		m.next = f
	}
	m.mu.Unlock()
	if mine {
		// The others must not suffer from the end of this caller; a fetch ends by itself
		// within callTimeout.
		s.fly(context.WithoutCancel(ctx), f)
	}
	select {
	case <-f.done:
		return f.view, f.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// fly waits for the fetch before it and then fetches. From the moment it begins
// nobody joins any more: they could have written after the script ran.
func (s *Store) fly(ctx context.Context, f *flight) {
	m := &s.mirror
	waited := false
	select {
	case m.turn <- struct{}{}:
	default:
		m.turn <- struct{}{}
		waited = true
	}
	defer func() { <-m.turn }()
	m.mu.Lock()
	m.next = nil
	last := m.last
	m.mu.Unlock()
	if waited && errors.Is(m.failed, ErrDown) {
		// The fetch that this one waited for found the store away. To wait for the same
		// again would take twice the time within which callers are promised an answer.
		f.err = m.failed
	} else {
		f.view, f.err = s.fetch(ctx, last)
	}
	m.failed = f.err
	if f.err == nil {
		m.mu.Lock()
		m.last = f.view
		m.mu.Unlock()
	}
	close(f.done)
}

// fetch asks for what changed since last (nil: everything) and applies it.
func (s *Store) fetch(ctx context.Context, last *View) (*View, error) {
	incarnation, revision := "", int64(0)
	if last != nil {
		incarnation, revision = last.Incarnation, last.Revision
	}
	answer, err := s.run(ctx, "read the store", viewScript, incarnation, revision)
	if err != nil {
		return nil, err
	}
	full := number(answer, 3) == 1
	if !full && number(answer, 2) == revision {
		return last, nil
	}
	next := &View{
		Incarnation: text(answer, 0),
		Born:        time.UnixMilli(number(answer, 1)).UTC(),
		Revision:    number(answer, 2),
	}
	if full || last == nil {
		last = new(View)
	}
	s.apply(next, last, answer[4:])
	return next, nil
}

// apply makes next of last and the changed records, triples of member, revision and
// record. Maps without a change are shared.
func (s *Store) apply(next, last *View, records []any) {
	jobs := patch[fleet.JobID, fleet.Job]{was: last.Jobs}
	vms := patch[fleet.VMID, fleet.VM]{was: last.VMs}
	nodes := patch[fleet.NodeID, fleet.Node]{was: last.Nodes}
	images := patch[string, fleet.Image]{was: last.Images}
	orders := patch[fleet.NodeID, fleet.Orders]{was: last.Orders}
	pending := patch[string, Pending]{was: last.Pending}
	for i := 0; i+2 < len(records); i += 3 {
		member, rev, record := text(records, i), revisionOf(text(records, i+1)), text(records, i+2)
		kind, id := member[:1], member[1:]
		var err error
		switch kind {
		case "j":
			var n int64
			if n, err = strconv.ParseInt(id, 10, 64); err == nil {
				err = jobs.put(fleet.JobID(n), record, func() (*fleet.Job, error) { return joinJob(record) })
			}
		case "v":
			err = vms.put(fleet.VMID(id), record, func() (*fleet.VM, error) {
				vm, err := decode[fleet.VM](record)
				vm.Rev = rev
				return vm, err
			})
		case "n":
			err = nodes.put(fleet.NodeID(id), record, func() (*fleet.Node, error) {
				node, err := decode[fleet.Node](record)
				node.Rev = rev
				return node, err
			})
		case "i":
			err = images.put(id, record, func() (*fleet.Image, error) { return decode[fleet.Image](record) })
		case "o":
			err = orders.put(fleet.NodeID(id), record, func() (*fleet.Orders, error) {
				o, err := decode[fleet.Orders](record)
				o.Rev = rev
				return o, err
			})
		case "s":
			err = pending.put(id, record, func() (*Pending, error) { return splitPending(record) })
		default:
			err = fmt.Errorf("unknown kind %q", kind)
		}
		if err != nil {
			// Somebody else's bytes under our keys: one bad record must not hide the others.
			s.log.Error("a record in the store cannot be read and is left out", "member", member, "error", err)
		}
	}
	next.Jobs, next.VMs, next.Nodes = jobs.result(), vms.result(), nodes.result()
	next.Images, next.Orders, next.Pending = images.result(), orders.result(), pending.result()
	next.open = reopen(last.open, last.Jobs, next.Jobs, jobs.changed)
	next.index()
}

// patch copies a map at its first change.
type patch[K comparable, V any] struct {
	was, now map[K]*V
	changed  []K
}

// put applies one changed record; "" deletes it.
func (p *patch[K, V]) put(id K, record string, decode func() (*V, error)) error {
	if p.now == nil {
		if p.now = maps.Clone(p.was); p.now == nil {
			p.now = map[K]*V{}
		}
	}
	p.changed = append(p.changed, id)
	if record == "" {
		delete(p.now, id)
		return nil
	}
	value, err := decode()
	if err != nil {
		delete(p.now, id)
		return err
	}
	p.now[id] = value
	return nil
}

func (p *patch[K, V]) result() map[K]*V {
	if p.now != nil {
		return p.now
	}
	if p.was == nil {
		return map[K]*V{}
	}
	return p.was
}

// decode reads a JSON record; the value is never nil.
func decode[V any](record string) (*V, error) {
	v := new(V)
	err := json.Unmarshal([]byte(record), v)
	return v, err
}

// revisionOf reads a sorted set's score, which servers print with or without an
// exponent.
func revisionOf(score string) int64 {
	f, err := strconv.ParseFloat(score, 64)
	if err != nil {
		return 0
	}
	return int64(f)
}
