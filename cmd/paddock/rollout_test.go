package main

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/cache/registrytest"
)

// rollout is how a new image came to all nodes of a site.
type rollout struct {
	egress float64       // bytes that the registry sent, by the image's
	took   time.Duration // from the first byte asked for to the last node that was ready
}

// rollOut publishes an image of chunks of 1 MiB that nodes are to keep a warm VM of, and
// waits until each of them has it.
func rollOut(t testing.TB, nodes, chunks int, bytesPerSecond int64) rollout {
	t.Helper()
	names := make([]string, nodes)
	for i := range names {
		names[i] = fmt.Sprintf("mac-%d", i+1)
	}
	tw := newTown(t, `slots: 1, peer: {listen: "127.0.0.1:0"}`, fmt.Sprintf(`  - {name: fresh, scopes: [acme], labels: [fresh], image: "REGISTRY/acme/fresh:1", growth: 1MiB, min_idle: %d, runner: ["true"]}`, nodes), names...)
	pattern := make([]rune, chunks)
	for i := range pattern {
		pattern[i] = rune('A' + i)
	}
	tw.registry.Limit(bytesPerSecond)
	tw.registry.Reset()
	digest, err := tw.registry.Push(t.Context(), "acme/fresh", "1", registrytest.Source(string(pattern), 1<<20))
	if err != nil {
		t.Fatal(err)
	}
	client := tw.client()
	var size int64 // of the image, in bytes on the wire
	var began time.Time
	tw.eventually(5*time.Minute, func() error {
		images, err := client.Images(t.Context())
		if err != nil {
			return err
		}
		i := slices.IndexFunc(images, func(i api.ImageRow) bool { return i.Digest == digest })
		if i < 0 {
			return fmt.Errorf("image %s is not known yet", digest.Short())
		}
		size = images[i].Bytes
		if _, sent := tw.registry.Counts().Total(); began.IsZero() && sent > size/1000 {
			began = time.Now()
		}
		if n := images[i].NodesCount; n < nodes {
			return fmt.Errorf("%d of %d nodes have it", n, nodes)
		}
		return nil
	})
	took := time.Since(began)
	_, sent := tw.registry.Counts().Total()
	return rollout{egress: float64(sent) / float64(size), took: took}
}

// An image that three nodes want comes from outside once: the registry sends it, and at
// most a tenth more.
func TestNodesFetchAnImageOnce(t *testing.T) {
	t.Parallel()
	if r := rollOut(t, 3, 40, 8<<20); r.egress > 1.1 {
		t.Errorf("the registry sent %.2f times the image, in %s", r.egress, r.took)
	}
}

// BenchmarkRollout has a new image come to one node and to eight, from a registry that
// sends 25 MB/s to all of them together.
func BenchmarkRollout(b *testing.B) {
	for _, nodes := range []int{1, 8} {
		b.Run(fmt.Sprintf("nodes=%d", nodes), func(b *testing.B) {
			for range b.N {
				r := rollOut(b, nodes, 640, 25e6)
				b.ReportMetric(r.egress, "egress/image")
				b.ReportMetric(r.took.Seconds(), "s/rollout")
			}
		})
	}
}
