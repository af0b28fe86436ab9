package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/cache/registrytest"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/placement"
)

// The cast: image b is the newer one of the name r, a the older, o an even older one; x
// has a name that the leader never told what it means.
func TestSuperseded(t *testing.T) {
	now := time.Date(2026, 6, 1, 9, 0, 0, 0, time.UTC)
	images := func(change func(a, b *fleet.NodeImage)) []fleet.NodeImage {
		list := []fleet.NodeImage{
			{Digest: "a", Ref: "r", State: fleet.ImageReady, DiskBytes: 10, UsedAt: now},
			{Digest: "b", Ref: "r", State: fleet.ImageReady, DiskBytes: 10},
			{Digest: "o", Ref: "r", State: fleet.ImageReady, DiskBytes: 10, UsedAt: now.Add(-time.Hour)},
			{Digest: "x", Ref: "s", State: fleet.ImageReady, DiskBytes: 10},
		}
		change(&list[0], &list[1])
		return list
	}
	nothing := func(a, b *fleet.NodeImage) {}
	named := map[string]fleet.Digest{"r": "b"}
	for name, c := range map[string]struct {
		change func(a, b *fleet.NodeImage)
		names  map[string]fleet.Digest
		used   map[fleet.Digest]bool
		short  int64
		want   []fleet.Digest
	}{
		"the oldest is enough":         {nothing, named, nil, 10, []fleet.Digest{"o"}},
		"both are needed":              {nothing, named, nil, 11, []fleet.Digest{"o", "a"}},
		"and nothing else goes":        {nothing, named, nil, 100, []fleet.Digest{"o", "a"}},
		"there is room":                {nothing, named, nil, 0, nil},
		"nobody said what is newer":    {nothing, nil, nil, 100, nil},
		"leased":                       {func(a, _ *fleet.NodeImage) { a.Leases = 1 }, named, nil, 100, []fleet.Digest{"o"}},
		"in use":                       {nothing, named, map[fleet.Digest]bool{"o": true}, 100, []fleet.Digest{"a"}},
		"being pulled":                 {func(a, _ *fleet.NodeImage) { a.State = fleet.ImageCaching }, named, nil, 100, []fleet.Digest{"o"}},
		"the newer is not here":        {func(_, b *fleet.NodeImage) { b.State = fleet.ImageVerifying }, named, nil, 100, nil},
		"the tag went back":            {nothing, map[string]fleet.Digest{"r": "o"}, nil, 100, []fleet.Digest{"b", "a"}},
		"another name means it today":  {nothing, map[string]fleet.Digest{"r": "b", "t": "a"}, nil, 100, []fleet.Digest{"o"}},
		"the same time, so by digest":  {func(a, _ *fleet.NodeImage) { a.UsedAt = now.Add(-time.Hour) }, named, nil, 100, []fleet.Digest{"a", "o"}},
		"its own name means another's": {nothing, map[string]fleet.Digest{"r": "b", "s": "b"}, nil, 100, []fleet.Digest{"x", "o", "a"}},
	} {
		if got := superseded(images(c.change), c.names, c.used, c.short); !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}

// TestEvictAlone: a node that nobody answers lets go of the superseded image when its disk
// fills up, not before it is sure that it is alone, and of nothing else.
func TestEvictAlone(t *testing.T) {
	inBubble(t, func(t *testing.T, s *stand) {
		for _, name := range []string{"old", "new", "other"} {
			s.shelf.images[digest(name)] = &fleet.NodeImage{Digest: digest(name), Ref: "r", State: fleet.ImageReady, DiskBytes: 50e9}
		}
		s.shelf.images[digest("other")].Ref = "s"
		s.free.Store(200e9)
		s.office.hold = []fleet.Hold{{Digest: digest("new"), Ref: "r"}, {Digest: digest("other"), Ref: "s"}}
		stop := s.agent(t)
		s.office.await(t, "a report", func() bool { return len(s.office.last.Node.Images) == 4 }) // with base
		s.office.order(func() { s.office.fail = errors.New("connection refused") })
		has := func() int { return len(s.shelf.List()) }
		time.Sleep(2 * time.Minute)
		if has() != 4 {
			t.Fatalf("%+v with room enough", s.shelf.List())
		}
		s.office.order(func() { s.office.fail = nil })
		time.Sleep(time.Minute) // a call is made every 5 s at least: there is contact again
		s.office.order(func() { s.office.fail = errors.New("connection refused") })
		s.free.Store(10e9)
		time.Sleep(20 * time.Second) // the last answer may be as old again
		if has() != 4 {
			t.Fatalf("%+v after 20 seconds", s.shelf.List())
		}
		time.Sleep(time.Minute)
		left := s.shelf.List()
		if len(left) != 3 || slices.ContainsFunc(left, func(i fleet.NodeImage) bool { return i.Digest == digest("old") }) {
			t.Fatalf("%+v are left on a full disk", left)
		}
		s.office.order(func() { s.office.fail = nil })
		s.office.await(t, "the report says so", func() bool { return len(s.office.last.Node.Images) == 3 })
		stop()
	})
}

// stiff is a shelf on which nothing can be evicted.
type stiff struct {
	*shelf
	tries atomic.Int32
}

func (s *stiff) Evict(fleet.Digest) error {
	s.tries.Add(1)
	return errors.New("input/output error")
}

// TestEvictFails: an eviction that fails is tried again while it is ordered, but not as fast
// as the controller answers; and the image is reported as what it is.
func TestEvictFails(t *testing.T) {
	inBubble(t, func(t *testing.T, s *stand) {
		images := &stiff{shelf: s.shelf}
		s.change = func(c *Config) { c.Images = images }
		s.office.evict = []fleet.Digest{base}
		stop := s.agent(t)
		time.Sleep(10 * time.Minute)
		if n := images.tries.Load(); n < 10 || n > 70 {
			t.Errorf("%d tries in ten minutes", n)
		}
		s.office.await(t, "the image is reported as it is", func() bool { return s.office.last.Node.Images[0].State == fleet.ImageReady })
		stop()
		s.checkEmpty(t)
	})
}

// TestEvictHalfPulled: what is left of a pull that nobody asks for any more goes, though the
// pull is still under way.
func TestEvictHalfPulled(t *testing.T) {
	inBubble(t, func(t *testing.T, s *stand) {
		s.shelf.gate = make(chan struct{}) // never opened
		s.office.hold = []fleet.Hold{hold("a", false, 0), hold("b", false, 0)}
		stop := s.agent(t)
		s.office.await(t, "both are being pulled", func() bool { return len(s.office.last.Node.Images) == 3 })
		s.office.order(func() {
			s.office.hold = []fleet.Hold{hold("b", false, 0)}
			s.office.evict = []fleet.Digest{digest("a"), digest("b")}
		})
		s.office.await(t, "one is gone", func() bool { return len(s.office.last.Node.Images) == 2 })
		time.Sleep(time.Minute)
		last := s.office.latest()
		if _, held := last.Node.Image(digest("b")); !held {
			t.Error("what is asked for was let go")
		}
		stop()
	})
}

// library is a source of several images.
type library []*built

func (l library) of(d fleet.Digest) *built {
	return l[slices.IndexFunc(l, func(b *built) bool { return b.digest == d })]
}

func (library) Name() string                   { return "library" }
func (library) Kind() cache.Kind               { return cache.KindRegistry }
func (library) Has(w cache.Want) (int64, bool) { return w.Chunk.BlobSize, true }
func (l library) Manifest(_ context.Context, _ string, d fleet.Digest) ([]byte, error) {
	return l.of(d).manifest, nil
}

func (l library) Open(_ context.Context, w cache.Want, from int64) (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(l.of(w.Image).blobs[w.Chunk.Blob][from:])), nil
}

// leader decides by the node's last report, as the controller does: how much room there is
// to be for each slot, and what the names mean.
type leader struct {
	office *office
	refs   map[string]fleet.Image
}

// lead has the node's images marked for so many bytes more than are free; it returns what
// was marked.
func (l *leader) lead(more int64) []placement.Eviction {
	var plan placement.Plan
	l.office.order(func() {
		n := placement.Node{Node: l.office.last.Node, Reachable: true, Evict: l.office.evict}
		n.ID = "mac-1"
		pool := fleet.Pool{Name: "p", Image: "registry.example/base:1", Growth: (n.DiskFree+more)/int64(n.Node.Slots) + 1}
		for _, vm := range l.office.last.VMs {
			if vm.State != fleet.VMDone {
				n.Slots = append(n.Slots, placement.Slot{VM: vm.ID, Pool: vm.Order.Pool, State: vm.State, Image: vm.Order.Image})
			}
		}
		plan = placement.Make(placement.Snapshot{Now: time.Now(), Pools: []fleet.Pool{pool}, Images: l.refs, Nodes: []placement.Node{n}})
		l.office.evict = nil
		for _, e := range plan.Evict {
			l.office.evict = append(l.office.evict, e.Digest)
		}
	})
	return plan.Evict
}

// TestEvictTogether: with the real image store and a real VM, the leader's marks lead to
// evictions: the superseded image goes that nobody leases; the one that a VM runs from
// stays as long as it runs; what the name means now stays.
func TestEvictTogether(t *testing.T) {
	m := newMac(t)
	older, newer := build(t, registrytest.Source("ab0c", 64<<10)), build(t, registrytest.Source("ab0d", 64<<10))
	agent, store, err := realAgent(m.dir, m.url, []cache.Source{library{m.image, older, newer}}, slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var running sync.WaitGroup
	running.Go(func() {
		if err := agent.Run(ctx); err != nil {
			t.Errorf("the agent: %v", err)
		}
	})
	listed := func(want ...*built) func() bool {
		return func() bool {
			ready := 0
			for _, b := range want {
				if i, ok := m.office.last.Node.Image(b.digest); ok && i.State == fleet.ImageReady {
					ready++
				}
			}
			return ready == len(want) && len(m.office.last.Node.Images) == len(want)
		}
	}
	m.office.order(func() { m.office.hold = []fleet.Hold{m.image.hold(), older.hold(), newer.hold()} })
	m.office.await(t, "the images are ready", listed(m.image, older, newer))
	m.office.order(func() { m.office.hold = nil; m.office.start["aaaaaaaa"] = runnerOrder("aaaaaaaa") })
	m.office.place(m.order("aaaaaaaa", fmt.Sprintf("while ! test -e %s/over; do sleep 0.1; done", m.dir)))
	m.office.awaitState(t, "aaaaaaaa", fleet.VMBusy)
	m.office.await(t, "the lease is reported", func() bool { i, _ := m.office.last.Node.Image(m.image.digest); return i.Leases > 0 })

	l := leader{m.office, map[string]fleet.Image{newer.hold().Ref: {Ref: newer.hold().Ref, Digest: newer.digest}}}
	marked := l.lead(1 << 40) // more than there is: whatever may go does
	if len(marked) != 1 || marked[0].Digest != older.digest {
		t.Fatalf("marked %+v", marked)
	}
	m.office.await(t, "the older image is gone", listed(m.image, newer))
	if marked = l.lead(1 << 40); len(marked) > 0 {
		t.Errorf("marked %+v while a VM runs", marked)
	}
	m.office.order(func() { m.office.evict = []fleet.Digest{m.image.digest} }) // of a leader that knew better
	if err := store.Evict(m.image.digest); !errors.Is(err, cache.ErrLeased) {
		t.Errorf("evicted under a VM: %v", err)
	}
	m.office.order(func() { m.office.evict = nil })
	if err := os.WriteFile(filepath.Join(m.dir, "over"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if r := m.office.awaitState(t, "aaaaaaaa", fleet.VMDone); r.Reason != "runner exited 0" {
		t.Errorf("%+v", r)
	}
	m.office.await(t, "the lease is given back", func() bool { i, _ := m.office.last.Node.Image(m.image.digest); return i.Leases == 0 })
	if marked = l.lead(1 << 40); len(marked) != 1 || marked[0].Digest != m.image.digest {
		t.Fatalf("marked %+v after the VM", marked)
	}
	m.office.await(t, "only the newest is left", listed(newer))
	stop()
	running.Wait()
	if err := store.Close(); err != nil {
		t.Error(err)
	}
	m.checkEmpty(t)
}
