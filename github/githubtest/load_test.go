package githubtest_test

import (
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github/githubtest"
	"github.com/paddock-ci/paddock/github/githubtest/testrunner"
)

// Sixty jobs, eight runners at a time until all are done, in a storm that drops, doubles
// and delays deliveries: every job runs, none twice, every delivery is in the log.
func TestSixtyJobsInAStorm(t *testing.T) {
	storm := githubtest.Storm{Seed: 1, Drop: 0.05, Double: 0.1, Late: 0.3}
	f := newFarm(t, githubtest.Config{Faults: storm.Faults()})
	ctx := soon(t)
	_, ids, err := f.QueueRun(githubtest.Run{Repository: "acme/app", Jobs: []githubtest.JobSpec{
		{Name: "test", Labels: macOS, Steps: []string{"echo done"}, Matrix: 60},
	}})
	if err != nil {
		t.Fatal(err)
	}
	names := make(chan string, len(ids))
	for i := range ids {
		names <- fmt.Sprintf("r-%d", i)
	}
	close(names)
	var runners sync.WaitGroup
	for range 8 {
		runners.Go(func() {
			for name := range names {
				minted, err := f.client.MintRunner(ctx, "acme", name, 1, macOS)
				if err != nil {
					t.Error(err)
					return
				}
				var out strings.Builder
				if _, err := testrunner.Run(ctx, strings.NewReader(minted.JIT), &out); err != nil {
					t.Errorf("%s: %v; it said %q", name, err, out.String())
				}
			}
		})
	}
	runners.Wait()
	if err := f.WaitIdle(ctx); err != nil {
		t.Fatal(err)
	}
	by := map[string]bool{}
	for _, j := range f.Jobs() {
		if j.Status != fleet.JobCompleted || j.Conclusion != "success" || j.Starts != 1 || j.Log != "done" || by[j.RunnerName] {
			t.Errorf("job %+v", j)
		}
		by[j.RunnerName] = true
	}
	if log := f.Deliveries(); len(log) != 3*len(ids) {
		t.Errorf("%d deliveries in the log, want %d", len(log), 3*len(ids))
	}
	if left := f.Runners(); len(left) != 0 {
		t.Errorf("runners %+v", left)
	}
	f.clean(t)
}

// A backlog of 12,000 jobs: how many bytes the simulation keeps for each.
func BenchmarkBacklog(b *testing.B) {
	for b.Loop() {
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		g, err := githubtest.New(githubtest.Config{Repositories: []githubtest.Repository{{Name: "acme/app"}}})
		if err != nil {
			b.Fatal(err)
		}
		if _, _, err := g.QueueRun(githubtest.Run{Repository: "acme/app", Jobs: []githubtest.JobSpec{{Name: "m", Labels: macOS, Matrix: 12_000}}}); err != nil {
			b.Fatal(err)
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/12_000, "B/job")
		runtime.KeepAlive(g)
	}
}
