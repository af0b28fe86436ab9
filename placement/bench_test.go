package placement

import (
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// large is a fleet as the targets name it: 24 pools with an image each, nodes of two
// slots of which seven in ten are busy, each with four images ready, most of them with
// measured boots and saved states; jobs of 500 repositories in eight job names, half of
// them with a known duration, some images asked for far more often than others.
func large(nodes, jobs int) Snapshot {
	rnd := rand.New(rand.NewPCG(7, 7))
	s := Snapshot{Now: time.Date(2026, 6, 1, 9, 0, 0, 0, time.UTC), Images: map[string]fleet.Image{}, Running: map[string]int{}}
	const pools = 24
	for i := range pools {
		ref := fmt.Sprintf("registry.example/macos:%d", i)
		s.Images[ref] = fleet.Image{Ref: ref, Digest: fleet.Digest(fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(ref)))),
			Bytes: int64(25+rnd.IntN(66)) * 1e9, DiskBytes: int64(40+rnd.IntN(80)) * 1e9}
		s.Pools = append(s.Pools, fleet.Pool{Name: fleet.PoolName(fmt.Sprintf("pool-%d", i)), Scopes: []fleet.Scope{"acme"},
			Labels: fleet.NewLabels("self-hosted", "macos", fmt.Sprintf("image-%d", i)), Image: ref, Priority: i % 3})
	}
	for i := range nodes {
		n := Node{Reachable: rnd.IntN(100) > 0}
		n.ID, n.Node.Slots, n.DiskFree, n.PullRate = fleet.NodeID(fmt.Sprintf("mac-%04d", i)), 2, 200e9, 100e6
		for range 4 {
			image := s.Images[s.Pools[4+rnd.IntN(pools-4)].Image] // the four most wanted ones are nowhere
			if _, has := n.Image(image.Digest); !has {
				n.Images = append(n.Images, fleet.NodeImage{Digest: image.Digest, State: fleet.ImageReady, DiskBytes: image.DiskBytes,
					Start: fleet.ImageStart{Cold: time.Duration(rnd.IntN(20)) * time.Second, Saved: time.Second, States: rnd.IntN(3)}})
			}
		}
		for range 2 {
			if rnd.IntN(10) < 7 {
				n.Slots = append(n.Slots, Slot{VM: "vm", Pool: s.Pools[rnd.IntN(pools)].Name, State: fleet.VMBusy,
					Ends: s.Now.Add(time.Duration(rnd.IntN(1800)) * time.Second)})
			}
		}
		s.Nodes = append(s.Nodes, n)
	}
	for i := range jobs {
		repo := rnd.IntN(500)
		s.Jobs = append(s.Jobs, fleet.Job{ID: fleet.JobID(i + 1), Repository: fmt.Sprintf("acme/repo-%d", repo), Name: fmt.Sprintf("job %d", rnd.IntN(8)),
			Labels:    fleet.NewLabels("self-hosted", "macos", fmt.Sprintf("image-%d", min(repo%pools, rnd.IntN(pools)))),
			CreatedAt: s.Now.Add(-time.Duration(rnd.IntN(3600)) * time.Second)})
	}
	s.Durations = func(repository, name string) (time.Duration, bool) {
		return time.Duration(len(repository)*int(name[4]-'0')) * time.Minute, name[4]%2 == 0
	}
	return s
}

// BenchmarkMake is the table of growth: the target is 50 ms for 1,000 nodes and 10,000
// jobs, and 1 s for ten times the nodes.
func BenchmarkMake(b *testing.B) {
	for _, size := range []struct{ nodes, jobs int }{
		{10, 100}, {100, 1000}, {1000, 1000}, {1000, 2500}, {1000, 5000}, {1000, 10_000}, {2500, 10_000}, {5000, 10_000}, {10_000, 10_000}, {1000, 40_000},
	} {
		s := large(size.nodes, size.jobs)
		b.Run(fmt.Sprintf("nodes=%d/jobs=%d", size.nodes, size.jobs), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				Make(s)
			}
		})
	}
}
