package server

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/placement"
)

// Eight people ask at once what would be let go: the passes for that run one after the
// other, and each of the eight has an answer.
func TestEvictionsOneAtATime(t *testing.T) {
	var running, most, passes atomic.Int32
	entered, leave := make(chan struct{}, 8), make(chan struct{})
	h := newHouse(t, func(c *Config) {
		c.Evictions = func(context.Context, fleet.NodeID, int64) ([]placement.NodeEvictions, error) {
			passes.Add(1)
			if now := running.Add(1); now > most.Load() {
				most.Store(now)
			}
			entered <- struct{}{}
			<-leave
			running.Add(-1)
			return []placement.NodeEvictions{}, nil
		}
	})
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			if _, err := h.server.listEvictions(t.Context(), call{}, struct{}{}); err != nil {
				t.Error(err)
			}
		})
	}
	<-entered
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := h.server.listEvictions(gone, call{}, struct{}{}); err == nil {
		t.Error("who had gone away was answered")
	}
	close(leave)
	all.Wait()
	if most.Load() != 1 || passes.Load() != 8 {
		t.Errorf("%d passes, %d at once; want 8, one at a time", passes.Load(), most.Load())
	}
}
