package parts

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github/githubtest"
	"github.com/paddock-ci/paddock/store"
)

// overheadJobs is how many jobs, one after the other, make one sample.
const overheadJobs = 150

// overheadPace is the least time from one job to the next: 150 registrations a minute
// is what Paddock allows itself at GitHub, and waiting for that is not its overhead.
const overheadPace = 410 * time.Millisecond

// phases of a job's way, in order; each is the time since the one before it.
var phases = []string{"intake", "placed", "booting", "warm", "claimed", "minted", "started"}

// BenchmarkOverhead is Paddock's own part of a job's wait: from the moment at which the
// webhook of a queued job is sent to Paddock's port until the runner's process has
// started. The image is ready on the node; GitHub answers at once. "boot" has no VM
// waiting, so that a clone, a helper, and a guest are made for the job; "idle" has a warm
// VM waiting (min_idle: 1), as a pool has that wants its jobs to start soonest. Jobs come
// one at a time, each to a fleet at rest, at random moments.
//
// The parts of it are reported by their medians: intake (the webhook is answered), placed
// (the pass that places the VM begins), booting (the node takes the order up), warm (the
// guest answers), claimed (the pass that claims the VM begins), minted (GitHub's answer
// is in the store), started (the runner's first instruction).
func BenchmarkOverhead(b *testing.B) {
	for _, redis := range []bool{true, false} {
		for _, idle := range []int{0, 1} {
			name := fmt.Sprintf("store=%s/guest=%s", map[bool]string{true: "redis", false: "embedded"}[redis], []string{"boot", "idle"}[idle])
			b.Run(name, func(b *testing.B) {
				s := newStage(b, redis, idle, githubtest.Faults{})
				c := s.control()
				s.node(c, "mac-1")
				s.oneJob(c, idle) // the first one waits for the pull
				pace := time.NewTicker(overheadPace)
				defer pace.Stop()
				b.ResetTimer()
				var whole []time.Duration
				parts := make([][]time.Duration, len(phases))
				for b.Loop() {
					for range overheadJobs {
						<-pace.C
						way := s.oneJob(c, idle)
						total := time.Duration(0)
						for i, d := range way {
							parts[i] = append(parts[i], d)
							total += d
						}
						whole = append(whole, total)
					}
				}
				spread(b, whole)
				for i, name := range phases {
					b.ReportMetric(quantile(parts[i], 50), name+"-ms")
				}
			})
		}
	}
}

// oneJob waits until the fleet is at rest, queues one job, follows it to its end and
// returns the times between the phases.
func (s *stage) oneJob(c *Control, idle int) []time.Duration {
	s.b.Helper()
	ctx := s.b.Context()
	view := func() *store.View {
		v, err := c.Store().View(ctx)
		if err != nil {
			s.b.Fatal(err)
		}
		return v
	}
	s.until("the fleet is at rest", 30*time.Second, func() bool {
		v, warm := view(), 0
		for _, vm := range v.VMs {
			if vm.State == fleet.VMWarm && vm.Job == 0 {
				warm++
			} else if !vm.State.Final() || vm.Claim != nil {
				return false
			}
		}
		return warm == idle && len(v.Nodes) == 1 && len(v.OpenJobs()) == 0
	})
	// A moment for the node to park its call, and to hit the loops at any point of theirs.
	rest := time.NewTimer(20*time.Millisecond + rand.N(100*time.Millisecond))
	<-rest.C

	id := s.queue(1)[0]
	if _, err := s.github.WaitJob(ctx, id, fleet.JobInProgress); err != nil {
		s.b.Fatal(err)
	}
	started, webhook := s.stamp(), s.poster.queued()
	var vm *fleet.VM
	s.until("the VM is known by its job", 10*time.Second, func() bool {
		for _, known := range view().VMs {
			if known.Job == id {
				vm = known
			}
		}
		return vm != nil && vm.Claim != nil && vm.Claim.Started
	})
	events, err := c.Store().Events(ctx, store.EventFilter{VM: vm.ID})
	if err != nil {
		s.b.Fatal(err)
	}
	var minted time.Time
	for _, e := range events {
		if e.Kind == "runner.registered" {
			minted = e.At
		}
	}
	if _, err := s.github.WaitJob(ctx, id, fleet.JobCompleted); err != nil {
		s.b.Fatal(err)
	}
	way, last := make([]time.Duration, len(phases)), webhook.sent
	for i, at := range []time.Time{webhook.answered, vm.PlacedAt, vm.BootingAt, vm.WarmAt, vm.Claim.At, minted, started} {
		// What a waiting VM had behind it before the job came took none of the job's time.
		if i > 0 && i < 4 && idle > 0 {
			continue
		}
		way[i], last = at.Sub(last), at
	}
	return way
}
