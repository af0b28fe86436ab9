package placement

import (
	"fmt"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// A node claims to have thousands of tiny images and no room at all. A pass over it takes a
// blink (by weighing each image against each it took minutes), lets a bounded number go,
// and no more while these stand.
func TestManyImagesOnOneNode(t *testing.T) {
	digest := func(i int) fleet.Digest { return fleet.Digest(fmt.Sprintf("sha256:%064x", i)) }
	s := Snapshot{Now: time.Unix(1e9, 0), Images: map[string]fleet.Image{"r": {Ref: "r", Digest: digest(1 << 40), Bytes: 1, DiskBytes: 1}},
		Pools: []fleet.Pool{{Name: "p", Image: "r", Scopes: []fleet.Scope{"a"}, Labels: fleet.NewLabels("self-hosted")}}}
	n := Node{Reachable: true}
	n.ID, n.Node.Slots = "mac-1", 2
	for i := range 5000 {
		n.Images = append(n.Images, fleet.NodeImage{Digest: digest(i), Ref: "x.example/a:1", State: fleet.ImageReady, DiskBytes: 1})
	}
	s.Nodes = []Node{n}
	began := time.Now()
	plan := Make(s)
	if len(plan.Evict) != maxEvictions {
		t.Errorf("%d images go; want %d", len(plan.Evict), maxEvictions)
	}
	for _, e := range plan.Evict {
		s.Nodes[0].Evict = append(s.Nodes[0].Evict, e.Digest)
	}
	if again := Make(s); len(again.Evict) != maxEvictions || again.Evict[0].Digest != plan.Evict[0].Digest {
		t.Errorf("%d images go while %d are going", len(again.Evict), maxEvictions)
	}
	if told := Evictions(s, "", 1e12); len(told[0].Images) != len(n.Images) {
		t.Errorf("%d rows of %d images", len(told[0].Images), len(n.Images))
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("three passes took %s", took)
	} else {
		t.Logf("three passes took %s", took)
	}
}
