package controller

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
)

// resolveRetry is the wait after a registry failed to answer.
const resolveRetry = 10 * time.Second

// Resolver turns the pools' tags into digests, once for the whole fleet and again every
// ResolveEvery, until ctx ends. While a registry is silent, the last answer stands.
func (c *Controller) Resolver(ctx context.Context) error {
	due := map[string]time.Time{}
	for ctx.Err() == nil {
		changed := c.c.Store.Notify(store.Anything)
		if _, leading := c.currentTerm(); leading && c.c.Resolve != nil {
			if err := c.resolveDue(ctx, due); err != nil && ctx.Err() == nil {
				c.c.Log.Warn("images are not resolved yet", "error", err)
			}
		}
		// Woken by changes too, since an emptied store has lost the answers.
		if !rest(ctx, changed, tick) || !rest(ctx, nil, tick/10) {
			break
		}
	}
	return nil
}

// resolveDue resolves what is due or missing in the store.
func (c *Controller) resolveDue(ctx context.Context, due map[string]time.Time) error {
	view, err := c.c.Store.View(ctx)
	if err != nil {
		return err
	}
	var failed error
	for _, pool := range c.c.Pools {
		ref := pool.Image
		image, known := c.resolved[ref]
		if now := time.Now(); !now.Before(due[ref]) {
			fresh, err := c.c.Resolve(ctx, ref)
			c.noteUnresolved(ref, err)
			if err != nil {
				due[ref] = now.Add(resolveRetry)
				failed = errors.Join(failed, fmt.Errorf("resolve the image of pool %s: %w", pool.Name, err))
			} else {
				due[ref] = now.Add(c.c.ResolveEvery)
				c.resolved[ref], image, known = fresh, fresh, true
			}
		}
		if stored := view.Images[ref]; !known || stored != nil && stored.Digest == image.Digest {
			continue
		}
		if err := c.publish(ctx, image); err != nil {
			return err
		}
	}
	return failed
}

func (c *Controller) publish(ctx context.Context, image fleet.Image) error {
	term, leading := c.currentTerm()
	if !leading {
		return nil
	}
	c.c.Log.Info("image.resolved", "image", image.Ref, "digest", image.Digest)
	return c.c.Store.Commit(ctx, store.Txn{Term: &term, Images: []fleet.Image{image}, Events: []fleet.Event{{
		At: time.Now(), Kind: "image.resolved", Image: image.Digest, Actor: "leader", Text: image.Ref,
	}}})
}

// noteUnresolved keeps why a reference could not be resolved, for Explain; nil: it was.
func (c *Controller) noteUnresolved(ref string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err == nil {
		delete(c.unresolved, ref)
		return
	}
	c.unresolved[ref] = err.Error()
}

// whyUnresolved is what the registry said of a reference, as far as this replica asked.
func (c *Controller) whyUnresolved(ref string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if why, asked := c.unresolved[ref]; asked {
		return fmt.Sprintf("image %s: %s", ref, why)
	}
	return fmt.Sprintf("image %s is being looked up at its registry", ref)
}
