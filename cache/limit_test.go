package cache

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// Bytes from outside have a limit of their own; the total holds for all. A limit can be
// lifted while a pull is under way.
func TestLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		shelf := newShelf()
		registry, mirror := newWell("registry", KindRegistry, shelf, 1e9), newWell("mirror", KindMirror, shelf, 1e9)
		outside, inside := openWells(t, Config{}, registry), openWells(t, Config{}, mirror)
		expect := func(what string, took, want time.Duration) {
			t.Helper()
			if took < want*8/10 || took > want*12/10+time.Second/4 {
				t.Errorf("%s: the pull took %s; want %s", what, took, want)
			}
		}
		at := func(s *Store, l Limits, pattern string) (took, whole time.Duration) {
			s.Limit(l)
			h, m := shelf.put(t, pattern)
			return pullTook(t, s, h), time.Duration(float64(m.Bytes()) / 100e3 * float64(time.Second))
		}
		took, whole := at(outside, Limits{Outside: 100e3}, alphabet(0, 30))
		expect("outside", took, whole)
		if rate := outside.Rate(); rate < 80e3 || rate > 120e3 {
			t.Errorf("measured %d bytes per second; want 100000", rate)
		}
		took, _ = at(outside, Limits{}, alphabet(1, 31))
		expect("no limit", took, 0)
		took, whole = at(outside, Limits{Outside: 1e9, Total: 100e3}, alphabet(2, 32))
		expect("total", took, whole)
		took, _ = at(inside, Limits{Outside: 100e3}, alphabet(3, 30))
		expect("a mirror is not outside", took, 0)
		took, whole = at(inside, Limits{Total: 100e3}, alphabet(4, 31))
		expect("total of a mirror", took, whole)

		outside.Limit(Limits{Outside: 20e3})
		time.AfterFunc(10*time.Second, func() { outside.Limit(Limits{}) })
		h, _ := shelf.put(t, alphabet(5, 33))
		expect("lifted after 10 s", pullTook(t, outside, h), 10*time.Second)
	})
}

// Streams are limited while a pull is under way, and freed again.
func TestStreamsAreLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		shelf := newShelf()
		registry := newWell("registry", KindRegistry, shelf, 200e3)
		s := openWells(t, Config{Streams: 4}, registry)
		most := func() int {
			n := 0
			for range 100 {
				time.Sleep(20 * time.Millisecond)
				registry.set(func() { n = max(n, registry.open) })
			}
			return n
		}
		s.Limit(Limits{Streams: 1})
		h, _ := shelf.put(t, alphabet(6, 60))
		ended := make(chan error, 1)
		go func() { ended <- s.Pull(t.Context(), h) }()
		if n := most(); n != 1 {
			t.Errorf("%d streams; want 1", n)
		}
		s.Limit(Limits{Streams: 9})
		if n := most(); n != 4 {
			t.Errorf("%d streams; want the 4 of the configuration", n)
		}
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// A pull that a job waits for hangs on its registry: after a few seconds a pre-warm goes
// ahead, and stops when a byte comes. A pull held up 2.5 minutes by one registry held
// all the others up.
func TestHangingPullHeldItsTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		shelf := newShelf()
		slow, quick := newWell("registry", KindRegistry, shelf, 10e3), newWell("mirror", KindMirror, newShelf(), 10e3)
		s := openWells(t, Config{Streams: 2}, slow, quick)
		urgent, m := shelf.put(t, "A")
		urgent.Demand = true
		free := shelf.hold(m.Chunks[0].Blob)
		s.sources = append(s.sources, shelf) // which hangs where it is held
		slow.fail = &Error{Class: ClassNotFound}
		prewarm, _ := quick.shelf.put(t, alphabet(7, 10))
		ended := make(chan fleet.Digest, 2)
		for _, h := range []fleet.Hold{urgent, prewarm} {
			go func() {
				if err := s.Pull(t.Context(), h); err != nil {
					t.Error(err)
				}
				ended <- h.Digest
			}()
			synctest.Wait()
		}
		expect := func(when string, u, p fleet.ImageState) {
			t.Helper()
			synctest.Wait()
			if a, b := s.state(urgent.Digest), s.state(prewarm.Digest); a != u || b != p {
				t.Errorf("%s: the urgent one is %q, the pre-warm %q; want %q, %q", when, a, b, u, p)
			}
		}
		expect("at first", fleet.ImageCaching, fleet.ImageQueued)
		time.Sleep(idleTurn + time.Second)
		expect("after silence", fleet.ImagePaused, fleet.ImageCaching)
		time.Sleep(2 * time.Second)
		free()
		if d := <-ended; d != urgent.Digest {
			t.Error("the pre-warm ended first")
		}
		expect("after a byte", fleet.ImageReady, fleet.ImageCaching)
		<-ended
	})
}
