package node

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/fleet"
)

// quay is a peer port without a network.
type quay struct {
	mu      sync.Mutex
	trusted []string
	running int
	ran     int
}

func (q *quay) Run(ctx context.Context) {
	q.mu.Lock()
	q.running++
	q.ran++
	q.mu.Unlock()
	<-ctx.Done()
	q.mu.Lock()
	q.running--
	q.mu.Unlock()
}

func (q *quay) Where() fleet.NodePeer {
	return fleet.NodePeer{Address: "10.0.0.1:7600", Certificate: "c1"}
}

func (q *quay) Trust(key string) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.trusted = append(q.trusted, key)
	if key == "bad" {
		return errors.New("no key")
	}
	return nil
}

// The agent runs the peer port as long as itself, says where it is, and hands it each new
// key once, and has the clock measured; it tells the store the fleet's share, and less of all while a VM has a job.
func TestPeerAndLimits(t *testing.T) {
	var mu sync.Mutex
	var limits []cache.Limits
	told := func() []cache.Limits {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(limits)
	}
	s, q := newStand(t), &quay{}
	clock, err := NewClock(ClockConfig{Ask: func(context.Context) (time.Time, time.Duration, error) { return time.Now().Add(time.Hour), 0, nil }})
	if err != nil {
		t.Fatal(err)
	}
	key, share := "bad", int64(0)
	s.office.more = func(r *api.SyncReply) { r.PeerKey, r.Bandwidth = key, share }
	s.change = func(c *Config) {
		c.Clock = clock
		c.Site, c.Peer, c.Bandwidth, c.BandwidthBusy, c.Streams = "hall", q, 900, 100, 5
		c.Limit = func(l cache.Limits) {
			mu.Lock()
			defer mu.Unlock()
			limits = append(limits, l)
		}
	}
	stop := s.agent(t)
	s.office.await(t, "the node says where it is", func() bool {
		n := s.office.last.Node
		return n.Site == "hall" && n.Peer == fleet.NodePeer{Address: "10.0.0.1:7600", Certificate: "c1"}
	})
	s.office.await(t, "the clock is measured", func() bool { return time.Until(clock.Now()) > 30*time.Minute })
	s.office.order(func() { key, share = "good", 500 })
	s.office.place(s.order("aaaaaaaa", `echo "Running job: build"; sleep 600`))
	s.office.awaitState(t, "aaaaaaaa", fleet.VMWarm)
	s.office.order(func() { s.office.start["aaaaaaaa"] = runnerOrder("aaaaaaaa") })
	s.office.awaitState(t, "aaaaaaaa", fleet.VMBusy)
	s.office.order(func() { s.office.destroy["aaaaaaaa"] = "test" })
	s.office.await(t, "the VM is gone", func() bool { return s.office.gone["aaaaaaaa"] })
	stop()
	want := []cache.Limits{{Total: 900}, {Outside: 500, Total: 900}, {Outside: 500, Total: 100, Streams: 2}, {Outside: 500, Total: 900}}
	if got := told(); !slices.Equal(got, want) {
		t.Errorf("limits %+v, want %+v", got, want)
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	good := slices.Index(q.trusted, "good")
	if q.running != 0 || q.ran != 1 || good < 0 || good != len(q.trusted)-1 {
		t.Errorf("the port ran %d times, runs %d; keys %v", q.ran, q.running, q.trusted)
	}
	s.checkEmpty(t)
}
