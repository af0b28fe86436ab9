package controller

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/placement"
	"github.com/paddock-ci/paddock/store"
)

// spare is an image that no pool uses.
const spare = fleet.Digest("sha256:2222222222222222222222222222222222222222222222222222222222222222")

// shelf is a node's report with the pool's image and, unless it is gone, the spare one.
func (w *world) shelf(id fleet.NodeID, free int64, state fleet.ImageState) {
	w.t.Helper()
	n := fleet.Node{ID: id, Arch: "arm64", OS: "darwin", Slots: 2, DiskFree: free, PullRate: 100e6, SeenAt: w.now, Session: "s",
		Images: []fleet.NodeImage{{Digest: testImage, Ref: testRef, State: fleet.ImageReady, DiskBytes: 50e9}}}
	if known := w.view().Nodes[id]; known != nil {
		n.Rev = known.Rev
	}
	if state != "" {
		n.Images = append(n.Images, fleet.NodeImage{Digest: spare, Ref: "registry.example/acme/old:1", State: state, DiskBytes: 30e9})
	}
	w.commit(store.Txn{Nodes: []fleet.Node{n}})
}

func (w *world) orders(id fleet.NodeID) fleet.Orders {
	w.t.Helper()
	if o := w.view().Orders[id]; o != nil {
		return *o
	}
	return fleet.Orders{}
}

// told are the texts of the events of a kind, oldest first.
func (w *world) told(kind string) []string {
	w.t.Helper()
	events, err := w.store.Events(w.t.Context(), store.EventFilter{Node: "mac-1", Limit: 1000})
	if err != nil {
		w.t.Fatal(err)
	}
	var texts []string
	for _, e := range slices.Backward(events) {
		if e.Kind == kind {
			texts = append(texts, e.Text)
		}
	}
	return texts
}

// TestEvictionLife: an image that nobody misses is ordered out once its node has too
// little room for clones, with the reason in words, and the order stands until it is gone. On
// a node that is silent it is recalled, and in doubt until the node has reported.
func TestEvictionLife(t *testing.T) {
	w := newWorld(t)
	w.c.c.Pools[0].Growth = 20e9
	w.image()
	w.shelf("mac-1", 100e9, fleet.ImageReady)
	w.pass(0)
	if o := w.orders("mac-1"); len(o.Evict) > 0 {
		t.Fatalf("%+v with room enough", o)
	}
	w.shelf("mac-1", 30e9, fleet.ImageReady)
	w.pass(time.Second)
	if o := w.orders("mac-1"); !slices.Equal(o.Evict, []fleet.Digest{spare}) {
		t.Fatalf("%+v with 30 of 40 GB left", o)
	}
	if told := w.told("image.evicting"); len(told) != 1 || told[0] != "room for clones to grow, 10.0 GB short: no pool uses it, never used" {
		t.Errorf("told %q", told)
	}

	w.shelf("mac-1", 100e9, fleet.ImageReady) // another file has gone meanwhile
	w.pass(time.Second)
	if o := w.orders("mac-1"); !slices.Equal(o.Evict, []fleet.Digest{spare}) || len(o.Recalled) > 0 || len(w.told("image.evicting")) != 1 {
		t.Fatalf("%+v: the node may be about to let it go", o)
	}

	w.pass(unreachableAfter)
	if o := w.orders("mac-1"); len(o.Evict) > 0 || !slices.Equal(o.Recalled, []fleet.Digest{spare}) {
		t.Fatalf("%+v on a silent node", o)
	}
	rev := w.orders("mac-1").Rev
	w.pass(time.Second)
	if o := w.orders("mac-1"); o.Rev != rev || len(w.told("image.recalled")) != 1 {
		t.Errorf("written again without a change: %+v", o)
	}
	w.shelf("mac-1", 30e9, fleet.ImageEvicting) // it had read the order
	w.pass(time.Second)
	if o := w.orders("mac-1"); len(o.Evict)+len(o.Recalled) > 0 {
		t.Errorf("%+v of an image that is going", o)
	}
}

// TestEvictionsAsk: any replica says what would go, from a fresh view, and says nothing to
// the node.
func TestEvictionsAsk(t *testing.T) {
	w := newWorld(t)
	w.c.c.Pools[0].Growth = 20e9
	w.image()
	w.shelf("mac-1", 100e9, fleet.ImageReady)
	w.shelf("mac-2", 10e9, "")
	w.pass(0)
	other := w.controller("two")
	other.c.Pools[0].Growth = 20e9
	told, err := other.Evictions(t.Context(), "mac-1", 180e9)
	if err != nil || len(told) != 1 {
		t.Fatalf("%+v, %v", told, err)
	}
	n := told[0]
	if n.Growth != 40e9 || n.Free != 180e9 || len(n.Images) != 2 {
		t.Fatalf("%+v", n)
	}
	for i, want := range []placement.ImageEviction{{Digest: spare, Fate: placement.FateGoes, Turn: 1}, {Digest: testImage, Fate: placement.FateGoes, Turn: 2}} {
		if got := n.Images[i]; got.Digest != want.Digest || got.Fate != want.Fate || got.Turn != want.Turn || got.Why == "" {
			t.Errorf("%+v, want %+v", got, want)
		}
	}
	w.queue()
	if told, err = w.c.Evictions(t.Context(), "", 180e9); err != nil || len(told) != 2 {
		t.Fatalf("%+v, %v", told, err)
	}
	if last := told[0].Images[1]; last.Digest != testImage || last.Stay != placement.StayNeeded {
		t.Errorf("the job's image: %+v", last)
	}
	if o := w.orders("mac-1"); len(o.Evict) > 0 || strings.Join(w.told("image.evicting"), "") != "" {
		t.Errorf("asking had an effect: %+v", o)
	}
}
