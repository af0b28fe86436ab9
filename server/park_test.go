package server

import (
	"testing"
	"time"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
)

func TestParking(t *testing.T) {
	h := newHouse(t)
	m := h.mac("mac1")
	m.say()

	t.Run("an order answers", func(t *testing.T) {
		answered := make(chan api.SyncReply, 1)
		go func() {
			reply, err := m.try(20 * time.Second)
			if err != nil {
				t.Error(err)
			}
			answered <- reply
		}()
		h.waitParked(t)
		h.queue(8) // concerns no node
		h.place("vmbbbbbb", "mac2")
		select {
		case reply := <-answered:
			t.Fatalf("woken by what concerns others: %+v", reply)
		default:
		}
		h.place("vmaaaaaa", "mac1")
		if reply := <-answered; len(reply.Run) != 1 {
			t.Errorf("%+v", reply)
		}
	})
	t.Run("news at once if the node has other orders", func(t *testing.T) {
		m.have = "old"
		if reply, err := m.try(20 * time.Second); err != nil || len(reply.Run) != 1 {
			t.Errorf("%+v, %v", reply, err)
		}
	})
	t.Run("the time runs out", func(t *testing.T) {
		have := m.have
		if reply, err := m.try(30 * time.Millisecond); err != nil || reply.Revision != have {
			t.Errorf("%+v, %v", reply, err)
		}
	})
	t.Run("a change of hints wakes it but does not answer", func(t *testing.T) {
		answered := make(chan api.SyncReply, 1)
		go func() {
			reply, err := m.try(20 * time.Second)
			if err != nil {
				t.Error(err)
			}
			answered <- reply
		}()
		h.waitParked(t)
		h.change("vmaaaaaa", func(vm *fleet.VM) { vm.Job = 9 })
		h.change("vmaaaaaa", func(vm *fleet.VM) { vm.Destroy = true })
		if reply := <-answered; len(reply.Destroy) != 1 {
			t.Errorf("%+v", reply)
		}
	})
	t.Run("a shutdown answers", func(t *testing.T) {
		answered := make(chan error, 1)
		go func() {
			_, err := m.try(20 * time.Second)
			answered <- err
		}()
		h.waitParked(t)
		h.server.Drain()
		h.server.Drain()
		if err := <-answered; err != nil {
			t.Error(err)
		}
	})
}

// waitParked waits until a sync is parked.
func (h *house) waitParked(t *testing.T) {
	t.Helper()
	h.waitParkedN(t, 1)
}

// waitParkedN waits until so many are parked.
func (h *house) waitParkedN(t *testing.T, n float64) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		families, err := h.server.c.Metrics.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			if f.GetName() == "paddock_syncs_parked" && f.GetMetric()[0].GetGauge().GetValue() >= n {
				return
			}
		}
		select {
		case <-tick.C:
		case <-t.Context().Done():
			t.Fatal("nothing was parked")
		}
	}
}
