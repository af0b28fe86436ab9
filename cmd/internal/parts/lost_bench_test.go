package parts

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github/githubtest"
)

// BenchmarkLostDeliveries is how long a job is unknown whose webhook was lost: 60 jobs
// are queued at random moments of a minute, every webhook is dropped, and the sweep of
// the delivery log, every 20 s as in production, brings them to the store. It takes 80 s,
// whatever -benchtime says.
func BenchmarkLostDeliveries(b *testing.B) {
	const jobs = 60
	for b.Loop() {
		drop := func(githubtest.Delivery) githubtest.Fate { return githubtest.Fate{Drop: true} }
		s := newStage(b, true, 0, githubtest.Faults{Delivery: drop})
		c := s.control()
		queued := map[fleet.JobID]time.Time{}
		var recovered []time.Duration
		next := time.NewTimer(0)
		look := time.NewTicker(20 * time.Millisecond)
		defer look.Stop()
		for len(recovered) < jobs {
			select {
			case <-next.C:
				for _, id := range s.queue(1) {
					queued[id] = time.Now()
				}
				if len(queued)+len(recovered) < jobs {
					next.Reset(rand.N(2 * time.Second))
				}
			case <-look.C:
				view, err := c.Store().View(b.Context())
				if err != nil {
					b.Fatal(err)
				}
				for id, at := range queued {
					if view.Jobs[id] != nil {
						recovered = append(recovered, time.Since(at))
						delete(queued, id)
					}
				}
			}
		}
		spread(b, recovered)
	}
}
