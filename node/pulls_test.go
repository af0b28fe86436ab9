package node

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// digest makes a digest of one repeated hex digit.
func digest(hex string) fleet.Digest { return fleet.Digest("sha256:" + strings.Repeat(hex, 64)) }

func hold(hex string, demand bool, priority int) fleet.Hold {
	return fleet.Hold{Digest: digest(hex), Ref: "registry/" + hex + ":latest", Demand: demand, Priority: priority}
}

// began returns which pulls have begun, by their digits, in order.
func (s *shelf) began() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	order := ""
	for _, d := range s.pulls {
		order += string(d[len(d)-1])
	}
	return order
}

// TestPullOrder: demands begin before pre-warms, higher priorities before lower ones,
// and what is ready is not pulled.
func TestPullOrder(t *testing.T) {
	inBubble(t, func(t *testing.T, s *stand) {
		s.office.hold = []fleet.Hold{hold("a", false, 1), hold("b", false, 9), hold("c", true, 0), hold("1", true, 0)}
		stop := s.agent(t)
		s.office.await(t, "all are ready", func() bool {
			return !slices.ContainsFunc(s.office.last.Node.Images, func(i fleet.NodeImage) bool { return i.State != fleet.ImageReady }) &&
				len(s.office.last.Node.Images) == 4
		})
		time.Sleep(time.Hour)
		stop()
		// They begin together; which goroutine comes first is not ours to say.
		if got := s.shelf.began(); len(got) != 3 || strings.Contains(got, "1") {
			t.Errorf("pulled %q", got)
		}
	})
	var order []fleet.Digest
	p := newPuller(newShelf(), time.Now, func() {}, nil)
	p.want([]fleet.Hold{hold("a", false, 1), hold("b", false, 9), hold("c", true, 0), hold("d", true, 3)})
	for _, h := range p.wanted {
		order = append(order, h.Digest)
	}
	if want := []fleet.Digest{digest("d"), digest("c"), digest("b"), digest("a")}; !slices.Equal(order, want) {
		t.Errorf("order %v", order)
	}
}

// TestPullBound: pre-warms beyond the bound are reported as queued and do not keep a
// demand waiting; one that a job comes to wait for is asked for again, as a demand.
func TestPullBound(t *testing.T) {
	inBubble(t, func(t *testing.T, s *stand) {
		s.shelf.gate = make(chan struct{})
		var holds []fleet.Hold
		for i := range maxPulls + 3 {
			holds = append(holds, hold(fmt.Sprintf("%x", i+2), false, -i))
		}
		s.office.hold = holds
		stop := s.agent(t)
		synctest.Wait()
		if n := len(s.shelf.began()); n != maxPulls {
			t.Errorf("%d pre-warms begun; want %d", n, maxPulls)
		}
		s.office.await(t, "three are queued", func() bool {
			n := 0
			for _, i := range s.office.last.Node.Images {
				if i.State == fleet.ImageQueued && strings.HasPrefix(i.Ref, "registry/") {
					n++
				}
			}
			return n == 3
		})
		first, last := holds[0], holds[len(holds)-1]
		first.Demand, last.Demand = true, true
		s.office.order(func() { s.office.hold = []fleet.Hold{first, last} })
		synctest.Wait()
		began := s.shelf.began()[maxPulls:]
		if len(began) != 2 || !strings.Contains(began, "2") || !strings.Contains(began, string(last.Digest[70])) {
			t.Errorf("begun for the demands: %q", began)
		}
		close(s.shelf.gate)
		synctest.Wait()
		stop()
		s.office.check(t)
	})
}

// TestPullFails: a pull that fails is tried again, ever more seldom; the failure is
// reported; when the image is no longer asked for, it rests.
func TestPullFails(t *testing.T) {
	inBubble(t, func(t *testing.T, s *stand) {
		s.shelf.pullErr = errors.New("no such host")
		s.office.hold = []fleet.Hold{hold("a", true, 0)}
		s.agent(t)
		s.office.await(t, "the failure is reported", func() bool {
			i, ok := s.office.last.Node.Image(digest("a"))
			return ok && i.State == fleet.ImageFailed
		})
		time.Sleep(10 * time.Minute)
		n := len(s.shelf.began())
		if n < 8 || n > 20 {
			t.Errorf("%d tries in ten minutes", n)
		}
		s.office.order(func() { s.office.hold = nil })
		time.Sleep(10 * time.Minute)
		if more := len(s.shelf.began()) - n; more > 1 {
			t.Errorf("%d tries when nobody wants it", more)
		}
		s.shelf.mu.Lock()
		s.shelf.pullErr = nil
		s.shelf.mu.Unlock()
		s.office.order(func() { s.office.hold = []fleet.Hold{hold("a", true, 0)} })
		began := time.Now()
		s.office.await(t, "it is ready", func() bool {
			i, _ := s.office.last.Node.Image(digest("a"))
			return i.State == fleet.ImageReady
		})
		if took := time.Since(began); took > time.Second {
			t.Errorf("asked for again, it took %v", took)
		}
	})
}

// TestPullLater: the store may put off a failed pull further than we would.
func TestPullLater(t *testing.T) {
	inBubble(t, func(t *testing.T, s *stand) {
		s.shelf.images[digest("a")] = &fleet.NodeImage{Digest: digest("a"), State: fleet.ImageFailed, RetryAt: time.Now().Add(time.Hour)}
		s.office.hold = []fleet.Hold{hold("a", true, 0)}
		s.agent(t)
		time.Sleep(59 * time.Minute)
		if got := s.shelf.began(); got != "" {
			t.Errorf("pulled %q too early", got)
		}
		time.Sleep(2 * time.Minute)
		if got := s.shelf.began(); got != "a" {
			t.Errorf("pulled %q", got)
		}
	})
}

// TestEvict: what may go goes and the list says so; what is leased or asked for stays.
func TestEvict(t *testing.T) {
	inBubble(t, func(t *testing.T, s *stand) {
		s.shelf.images[digest("a")] = &fleet.NodeImage{Digest: digest("a"), State: fleet.ImageReady}
		s.shelf.images[digest("b")] = &fleet.NodeImage{Digest: digest("b"), State: fleet.ImageReady}
		s.office.hold = []fleet.Hold{hold("b", false, 0)}
		s.office.place(s.order("aaaaaaaa", jobGood))
		stop := s.agent(t)
		s.office.awaitState(t, "aaaaaaaa", fleet.VMWarm)
		s.office.order(func() { s.office.evict = []fleet.Digest{digest("a"), digest("b"), base} })
		s.office.await(t, "one is gone", func() bool { return len(s.office.last.Node.Images) == 2 })
		s.office.order(func() { s.office.destroy["aaaaaaaa"] = "surplus" })
		s.office.await(t, "the leased one is gone, too", func() bool { return len(s.office.last.Node.Images) == 1 })
		stop()
		s.checkEmpty(t)
	})
}
