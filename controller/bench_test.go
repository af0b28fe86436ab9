package controller

import (
	"fmt"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
)

// BenchmarkStep is one pass over 12,000 queued jobs of 200 repositories, all of which
// wait: on no node at all, and on 1,000 nodes whose two slots each are taken.
func BenchmarkStep(b *testing.B) {
	for _, nodes := range []int{0, 1000} {
		b.Run(fmt.Sprintf("jobs=12000/nodes=%d", nodes), func(b *testing.B) {
			s, err := store.OpenEmbedded(b.Context(), store.EmbeddedConfig{})
			if err != nil {
				b.Fatal(err)
			}
			defer func() { _ = s.Close() }()
			c, err := New(Config{
				Store: s, GitHub: &registrar{}, Fleet: "test",
				Seal: func(secret string, _ fleet.VMID, _ string) (string, error) { return secret, nil },
				Pools: []fleet.Pool{{
					Name: "sequoia", Scopes: []fleet.Scope{"acme"}, Labels: fleet.NewLabels("self-hosted", "macOS"), Image: testRef, Growth: 1,
				}},
			})
			if err != nil {
				b.Fatal(err)
			}
			now := time.Now()
			fill(b, s, nodes, now)
			if err := c.Step(b.Context(), now); err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				if err := c.Step(b.Context(), now); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func fill(b *testing.B, s *store.Store, nodes int, now time.Time) {
	b.Helper()
	const jobs = 12_000
	for i := range jobs + 2*nodes {
		job := fleet.Job{
			ID: fleet.JobID(30_000_000_000 + i), Repository: fmt.Sprintf("acme/app-%d", i%200), Name: fmt.Sprintf("build (%d)", i%7), Workflow: "CI",
			Labels: fleet.NewLabels("self-hosted", "macos"), Status: fleet.JobQueued, CreatedAt: now.Add(time.Duration(i) * -time.Millisecond),
		}
		if i >= jobs { // it runs in a VM
			n := i - jobs
			vm := fleet.VM{
				ID: fleet.NewVMID(), Node: fleet.NodeID(fmt.Sprintf("mac-%d", n/2)), Pool: "sequoia", Image: testImage, State: fleet.VMBusy, Job: job.ID, Attempt: 1,
				PlacedAt: now, BootingAt: now, WarmAt: now, RegisteredAt: now, BusyAt: now,
			}
			vm.Claim = &fleet.Claim{Scope: "acme", Group: 1, Labels: job.Labels, Runner: fleet.RunnerName("test", vm.ID, 1), RunnerID: int64(n + 1), Epoch: 1, At: now, Started: true}
			job.Status, job.RunnerName = fleet.JobInProgress, vm.Claim.Runner
			node := fleet.Node{ID: vm.Node, Slots: 2, DiskFree: 500e9, PullRate: 100e6, SeenAt: now.Add(time.Hour), Images: []fleet.NodeImage{{Digest: testImage, Ref: testRef, State: fleet.ImageReady}}}
			txn := store.Txn{VMs: []fleet.VM{vm}}
			if n%2 == 0 {
				txn.Nodes = []fleet.Node{node}
			}
			if err := s.Commit(b.Context(), txn); err != nil {
				b.Fatal(err)
			}
		}
		if _, err := s.MergeJob(b.Context(), store.Delivery{At: now, Job: job}); err != nil {
			b.Fatal(err)
		}
	}
	if err := s.Commit(b.Context(), store.Txn{Images: []fleet.Image{{Ref: testRef, Digest: testImage, Bytes: 20e9, DiskBytes: 50e9}}}); err != nil {
		b.Fatal(err)
	}
}
