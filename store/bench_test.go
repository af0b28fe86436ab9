package store_test

import (
	"context"
	"fmt"
	"runtime"
	"sync/atomic"
	"testing"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
)

// queue merges n queued jobs, as fast as it goes.
func queue(b *testing.B, s *store.Store, n int) {
	b.Helper()
	for id := range n {
		merge(b, s, realistic(fleet.JobID(80_000_000_000+id)))
	}
}

// realistic is a job with names of the usual length.
func realistic(id fleet.JobID) store.Delivery {
	d := job(id, fleet.JobQueued, 1_770_000_000_000)
	d.ID = "72d3162e-cc78-11e3-81ab-4c9367dc0958"
	d.Job.RunID = 21_000_000_000 + int64(id)
	d.Job.Repository = "octo-organization/mobile-application"
	d.Job.Name = "build and test (Release, iPhone 17 Pro, en_US)"
	d.Job.Workflow = "Continuous integration"
	d.Job.Labels = fleet.NewLabels("self-hosted", "macOS", "sequoia-xcode16")
	d.Job.Installation = 60_000_000
	return d
}

// BenchmarkMergeJob is what one delivery costs on a real Redis: every second call
// brings a new job, the others move or repeat one.
func BenchmarkMergeJob(b *testing.B) {
	s, _ := openRedis(b, store.Config{})
	var last atomic.Int64
	b.SetParallelism(16) // 32 connections on 2 cores
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			n := last.Add(1)
			d := realistic(fleet.JobID(80_000_000_000 + n/2))
			if n%4 == 3 {
				d.Job.Status = fleet.JobInProgress
			}
			if _, err := s.MergeJob(context.Background(), d); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "merges/s")
}

// BenchmarkView is one view after one change among 12,000 jobs, without the change.
func BenchmarkView(b *testing.B) {
	const jobs = 12_000
	s, ctl := openRedis(b, store.Config{})
	empty := ctl.Memory(b)
	heap := heapBytes()
	queue(b, s, jobs)
	view(b, s)
	inRedis, inMirror := float64(ctl.Memory(b)-empty)/jobs, float64(heapBytes()-heap)/jobs
	n := int64(0)
	for b.Loop() {
		b.StopTimer()
		n++
		d := realistic(fleet.JobID(80_000_000_000 + n%jobs))
		d.Job.Gate += n
		merge(b, s, d)
		b.StartTimer()
		view(b, s)
	}
	b.ReportMetric(inRedis, "redis-B/job")
	b.ReportMetric(inMirror, "mirror-B/job")
}

func heapBytes() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// BenchmarkViewSame is a view of 12,000 jobs of which none changed.
func BenchmarkViewSame(b *testing.B) {
	s, _ := openRedis(b, store.Config{})
	queue(b, s, 12_000)
	view(b, s)
	for b.Loop() {
		view(b, s)
	}
}

// BenchmarkReport is one node's report, its record rewritten, out of 1,000 nodes that
// report at the same time, each having read the view before.
func BenchmarkReport(b *testing.B) {
	const nodes = 1_000
	s, _ := openRedis(b, store.Config{})
	var txn store.Txn
	for i := range nodes {
		txn.Nodes = append(txn.Nodes, fleet.Node{ID: fleet.NodeID(fmt.Sprintf("mac-%d", i)), Slots: 2, Images: make([]fleet.NodeImage, 5)})
	}
	if err := s.Commit(b.Context(), txn); err != nil {
		b.Fatal(err)
	}
	var last atomic.Int64
	b.SetParallelism(16)
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			n := last.Add(1)
			v, err := s.View(context.Background())
			if err != nil {
				b.Error(err)
				return
			}
			node := *v.Nodes[fleet.NodeID(fmt.Sprintf("mac-%d", n%nodes))]
			node.Sequence, node.DiskFree = n, n
			err = s.Commit(context.Background(), store.Txn{
				Report: &store.Report{Node: node.ID, Session: "one", Sequence: n}, Nodes: []fleet.Node{node}, Quiet: true,
			})
			if err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "reports/s")
}
