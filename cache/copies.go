package cache

import (
	"context"
)

// copiesAtOnce is how many chunks are read from cached images at a time: one disk is read
// and written, which more would only make seek. copyBuffer is what each has in memory.
const (
	copiesAtOnce = 2
	copyBuffer   = 256 << 10
)

// slot is the right to copy what is here already. A pull has it in its turn only: one that
// is paused would keep the disk from the pull that a job waits for. What is copied is
// opened with a slot, so that a thousand pieces that wait for one have no file open.
type slot struct {
	fetch *fetch
	held  bool
}

// take waits for the pull's turn and a slot.
func (c *slot) take(ctx context.Context) error {
	for !c.held {
		if err := c.fetch.await(ctx); err != nil {
			return err
		}
		select {
		case c.fetch.store.copies <- struct{}{}:
			c.held = true
		case <-ctx.Done():
			return ctx.Err()
		}
		if !c.fetch.store.isFirst(c.fetch.turn) { // it went meanwhile
			c.free()
		}
	}
	return nil
}

// keep gives the slot up while it is another pull's turn. It is called before each read; a
// pull that copies is not one that moves nothing.
func (c *slot) keep(ctx context.Context) error {
	s, t := c.fetch.store, c.fetch.turn
	s.mu.Lock()
	first := t.first
	if first {
		s.useful(t)
	}
	s.mu.Unlock()
	if first {
		return ctx.Err()
	}
	c.free()
	return c.take(ctx)
}

func (c *slot) free() {
	if c.held {
		c.held = false
		<-c.fetch.store.copies
	}
}
