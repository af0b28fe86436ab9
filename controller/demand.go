package controller

import (
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/placement"
	"github.com/paddock-ci/paddock/store"
)

// demand is how often jobs ask for each image of a pool, in jobs per hour, as far as this
// replica knows; nil: not at all. Jobs that it has not seen yet are counted first, so that
// a replica without a history knows at least the last hour's, which the store keeps.
func (c *Controller) demand(view *store.View, now time.Time) map[fleet.Digest]float64 {
	c.history.Lock()
	defer c.history.Unlock()
	if c.asked.After(now) {
		c.asked = time.Time{} // the history was written by a clock that was wrong
	}
	for id, job := range view.Jobs {
		if job.Status == fleet.JobWaiting || c.counted[id] {
			continue
		}
		c.counted[id] = true
		queued := job.CreatedAt
		if queued.IsZero() {
			queued = job.SeenAt
		}
		if !queued.After(c.asked) || queued.After(now) {
			continue // it is counted in the saved history; or its time is none
		}
		if job.Status == fleet.JobCompleted && job.RunnerName == "" {
			continue // it may never have been queued
		}
		if pool, _, refusal := placement.PoolFor(c.c.Pools, *job); !refusal.Refused() {
			c.c.Demand.Observe(pool.Image, queued)
		}
	}
	if len(c.counted) > 2*len(view.Jobs)+1000 { // records that the store has dropped
		for id := range c.counted {
			if view.Jobs[id] == nil {
				delete(c.counted, id)
			}
		}
	}
	var rates map[fleet.Digest]float64
	for i := range c.c.Pools {
		image := view.Images[c.c.Pools[i].Image]
		if image == nil || i > 0 && c.namedBefore(i) {
			continue
		}
		if perHour := c.c.Demand.Rate(c.c.Pools[i].Image, now); perHour > 0 {
			if rates == nil {
				rates = map[fleet.Digest]float64{}
			}
			rates[image.Digest] += perHour // two names may mean one image
		}
	}
	return rates
}

// namedBefore reports that a pool before the i-th one has the same image by name.
func (c *Controller) namedBefore(i int) bool {
	for k := range i {
		if c.c.Pools[k].Image == c.c.Pools[i].Image {
			return true
		}
	}
	return false
}
