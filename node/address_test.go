package node

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
)

// TestAddress: the guest's address is learned beside its job, by whoever can tell it.
func TestAddress(t *testing.T) {
	for _, tt := range []struct {
		name     string
		refusals int
		driver   string
		want     string
		asked    int // questions to the driver
	}{
		{name: "the driver knows", refusals: 1000, driver: "192.168.64.7", want: "192.168.64.7", asked: 1},
		{name: "the driver says what is none", refusals: 1000, driver: "192.168.64.7; rm -rf /", want: "", asked: 2},
		{name: "nobody knows yet", refusals: 1000, want: "", asked: 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newStand(t)
				s.yard.saves, s.yard.refusals, s.yard.address = true, tt.refusals, tt.driver
				s.office.place(s.order("aaaaaaaa", jobLasts))
				stop := s.agent(t)
				s.office.awaitState(t, "aaaaaaaa", fleet.VMWarm)
				s.office.await(t, "the driver was asked", func() bool {
					s.yard.mu.Lock()
					defer s.yard.mu.Unlock()
					return s.yard.addressed >= tt.asked
				})
				// A job begins, whoever still asks for the address.
				s.office.order(func() { s.office.start["aaaaaaaa"] = runnerOrder("aaaaaaaa") })
				if r := s.office.awaitState(t, "aaaaaaaa", fleet.VMBusy); r.Address != tt.want {
					t.Errorf("address %q, want %q", r.Address, tt.want)
				}
				stop()
				if r := s.office.report("aaaaaaaa"); r.State != fleet.VMDone || r.Address != tt.want {
					t.Errorf("%+v", r)
				}
				s.checkEmpty(t)
			})
		})
	}
}

// TestAddressAgain: an agent that was started again reports the address that it had, and
// asks for the one that nobody had told.
func TestAddressAgain(t *testing.T) {
	s := newStand(t)
	s.keep = true
	s.yard.saves, s.yard.refusals, s.yard.address = true, 1<<30, "192.168.64.7"
	has := func(want string) func() bool {
		return func() bool { return s.office.reports["aaaaaaaa"].Address == want }
	}
	s.office.place(s.order("aaaaaaaa", jobLasts))
	stop := s.agent(t)
	s.office.await(t, "its address", has("192.168.64.7"))
	s.office.order(func() { s.office.start["aaaaaaaa"] = runnerOrder("aaaaaaaa") })
	s.office.awaitState(t, "aaaaaaaa", fleet.VMBusy) // which puts it into the journal
	stop()
	session := s.office.latest().Session
	s.office.order(func() { s.office.reports["aaaaaaaa"] = api.VMReport{State: fleet.VMBusy} })
	s.yard.mu.Lock()
	s.yard.address = ""
	s.yard.mu.Unlock()
	s.keep = false
	stop = s.agent(t)
	s.office.await(t, "the next agent says it, too", func() bool { return s.office.last.Session != session && has("192.168.64.7")() })
	stop()
	s.checkEmpty(t)
}

// TestNetworkBeforeRunner: a runner is not started before the guest's network was asked
// for, and is started in the end whatever becomes of that.
func TestNetworkBeforeRunner(t *testing.T) {
	for takes, want := range map[time.Duration]time.Duration{0: 0, 3 * time.Second: 3 * time.Second, time.Hour: networkTime} {
		t.Run(takes.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newStand(t)
				s.yard.saves, s.yard.network = true, takes
				s.office.start["aaaaaaaa"] = runnerOrder("aaaaaaaa")
				s.office.place(s.order("aaaaaaaa", jobLasts))
				stop := s.agent(t)
				r := s.office.awaitState(t, "aaaaaaaa", fleet.VMBusy)
				if took := r.RegisteredAt.Sub(r.WarmAt).Round(time.Second); took != want {
					t.Errorf("its runner came after %v, want %v", took, want)
				}
				stop()
				s.checkEmpty(t)
			})
		})
	}
}

// TestAddressDuringAChange: an address that comes while the VM's record is written is
// not lost.
func TestAddressDuringAChange(t *testing.T) {
	s := newStand(t)
	a, err := New(Config{ID: "mac-1", Dir: s.dir, Machines: s.yard, Images: s.shelf, Sync: s.office.Sync})
	must(t, err)
	order := s.order("aaaaaaaa", "")
	l := newLife(record{Report: api.VMReport{ID: order.ID, Order: order, State: fleet.VMBooting}})
	must(t, a.update(l, func(r *record) {
		a.setAddress(l, "10.0.0.7")
		r.Report.State = fleet.VMWarm
	}))
	if r := a.recordOf(l).Report; r.Address != "10.0.0.7" || r.State != fleet.VMWarm {
		t.Errorf("%+v", r)
	}
}
