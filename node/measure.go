package node

import (
	"sync"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// startStep rounds what is reported, so that each start is not a change of the report.
const startStep = 100 * time.Millisecond

// starts measures how soon guests answer: for each image and way of starting a running
// mean in which the latest start counts a quarter. It is kept in memory: an agent that
// was started again measures anew.
type starts struct {
	mu sync.Mutex
	by map[fleet.Digest]fleet.ImageStart
}

func newStarts() *starts { return &starts{by: map[fleet.Digest]fleet.ImageStart{}} }

func (s *starts) add(image fleet.Digest, tier fleet.StartTier, took time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	mean := s.by[image]
	if tier == fleet.TierSaved {
		mean.Saved = weigh(mean.Saved, took)
	} else {
		mean.Cold = weigh(mean.Cold, took)
	}
	s.by[image] = mean
}

func weigh(mean, took time.Duration) time.Duration {
	if mean == 0 {
		return max(took, 1) // 0 would read as not measured
	}
	return max(mean+(took-mean)/4, 1)
}

// report writes into the list what is known of each image, and forgets the images that
// are not in it. free counts the states that a VM could start from.
func (s *starts) report(images []fleet.NodeImage, free map[fleet.Digest]int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	kept := make(map[fleet.Digest]fleet.ImageStart, len(images))
	for i := range images {
		d := images[i].Digest
		mean, measured := s.by[d]
		if measured {
			kept[d] = mean
		}
		images[i].Start = fleet.ImageStart{Cold: coarse(mean.Cold), Saved: coarse(mean.Saved), States: free[d]}
	}
	s.by = kept
}

// coarse rounds up, so that what was measured is not 0.
func coarse(d time.Duration) time.Duration {
	return (d + startStep - 1) / startStep * startStep
}
