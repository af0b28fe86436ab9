package node

import (
	"encoding/json"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// startStep rounds what is reported, so that each start is not a change of the report.
const startStep = 100 * time.Millisecond

// starts measures how soon guests answer: for each image and way of starting a running
// mean in which the latest start counts a quarter. A file keeps it for the agent's next
// start; one that is lost or cannot be read costs a few starts until it is known again.
type starts struct {
	path string
	log  *slog.Logger

	mu sync.Mutex
	by map[fleet.Digest]fleet.ImageStart
}

func newStarts(path string, log *slog.Logger) *starts {
	return &starts{path: path, log: log, by: map[fleet.Digest]fleet.ImageStart{}}
}

// maxStarts bounds the file in bytes: an image takes 150.
const maxStarts = 1 << 20

// open reads what agents before this one measured.
func (s *starts) open() {
	data, err := readBounded(s.path, maxStarts)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	read := map[fleet.Digest]fleet.ImageStart{}
	if err == nil {
		err = json.Unmarshal(data, &read)
	}
	if err != nil {
		s.log.Warn("how soon guests answer is measured anew", "error", err)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for d, mean := range read {
		if mean.Cold >= 0 && mean.Saved >= 0 && mean.Cold <= maxMean && mean.Saved <= maxMean {
			s.by[d] = mean
		}
	}
}

// maxMean is longer than any boot is waited for.
const maxMean = 24 * time.Hour

// add counts one start.
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
	if err := s.write(); err != nil {
		s.log.Debug("how soon guests answer was not written down", "error", err)
	}
}

// write replaces the file, without waiting for the disk: a job may wait.
func (s *starts) write() error {
	data, err := json.Marshal(s.by)
	if err == nil {
		err = os.WriteFile(s.path+".new", data, 0o600)
	}
	if err == nil {
		err = os.Rename(s.path+".new", s.path)
	}
	return err
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
