package node

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/runner/guest/self"
	"github.com/paddock-ci/paddock/vm"
)

// say writes a launcher's lines into a VM's share.
func (s *stand) say(t *testing.T, id fleet.VMID, text string) (out string) {
	t.Helper()
	s.yard.mu.Lock()
	defer s.yard.mu.Unlock()
	for _, m := range s.yard.machines[id].spec.Mounts {
		if m.Name == self.MountOut {
			out = m.Path
		}
	}
	if err := os.WriteFile(filepath.Join(out, "status"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return out
}

// TestGuestThatFillsItsShare: it is ended as soon as that is seen, before its first word
// and with a job, and not when its lifetime is over.
func TestGuestThatFillsItsShare(t *testing.T) {
	for _, busy := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			s := newStand(t)
			order := s.order("aaaaaaaa", jobGood)
			order.Bootstrap = fleet.BootstrapSelf
			s.office.place(order)
			stop := s.agent(t)
			s.office.awaitState(t, order.ID, fleet.VMBooting)
			synctest.Wait() // its machine is up
			out := s.say(t, order.ID, "")
			if busy {
				s.say(t, order.ID, "ready\n")
				s.office.awaitState(t, order.ID, fleet.VMWarm)
				s.say(t, order.ID, "ready\nrunning\nbusy build\n")
				s.office.order(func() { s.office.start[order.ID] = runnerOrder(order.ID) })
				s.office.awaitState(t, order.ID, fleet.VMBusy)
			}
			begun := time.Now()
			hidden := filepath.Join(out, "sub")
			if err := errors.Join(os.Mkdir(hidden, 0o700), os.WriteFile(filepath.Join(hidden, "x"), nil, 0o600), os.Truncate(filepath.Join(hidden, "x"), 1<<40)); err != nil {
				t.Fatal(err)
			}
			got := s.office.awaitState(t, order.ID, fleet.VMDone)
			if !got.Failed || !strings.Contains(got.Reason, "misuses its share") || time.Since(begun) > 10*time.Second {
				t.Errorf("busy %v: done after %v because %q, failed %v", busy, time.Since(begun), got.Reason, got.Failed)
			}
			stop()
			s.checkEmpty(t)
		})
	}
}

// TestAnotherRunnerInTheGuest: the connection is lost, and when it is there again the
// guest has a runner that this node did not start.
func TestAnotherRunnerInTheGuest(t *testing.T) {
	s := newStand(t)
	a, err := New(Config{ID: "mac-1", Dir: s.dir, Machines: s.yard, Images: s.shelf, Sync: s.office.Sync, Log: s.log})
	if err != nil {
		t.Fatal(err)
	}
	order := s.order("aaaaaaaa", jobGood)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, vm.DiskFile), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	m, err := s.yard.Boot(ctx, vm.Spec{ID: order.ID, Dir: dir, Agent: true})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = m.Destroy(ctx) }()
	conn, err := m.Dial(ctx)
	if err != nil {
		t.Fatal(err)
	}
	other := guest.New(conn)
	defer func() { _ = other.Close() }()
	if err := other.Start(ctx, guest.Run{Name: "other", Argv: []string{"true"}}); err != nil {
		t.Fatal(err)
	}
	dead, _ := net.Pipe()
	l := newLife(record{Report: api.VMReport{ID: order.ID, Order: order, State: fleet.VMBusy, Runner: theRunner()}})
	l.machine, l.guest = m, guest.New(dead)
	_ = dead.Close()
	defer l.hangUp()
	var end *ending
	if err := a.watch(ctx, l); !errors.As(err, &end) || !end.Failed || !strings.Contains(end.Reason, "did not survive") {
		t.Errorf("the watch ended with %v", err)
	}
}
