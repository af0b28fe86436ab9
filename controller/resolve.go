package controller

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
)

const (
	resolveRetry   = 10 * time.Second // the wait after a registry failed to answer
	resolveTimeout = 30 * time.Second // of one reference: a login and two requests
	resolveAtOnce  = 8                // references; pools share a few registries
)

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

// resolveDue writes down what was resolved before and is missing in the store, and
// resolves what is due. The registries are asked side by side, and each answer is written
// down when it is there: one that is silent delays nobody else's images.
func (c *Controller) resolveDue(ctx context.Context, due map[string]time.Time) error {
	view, err := c.c.Store.View(ctx)
	if err != nil {
		return err
	}
	now, pools := time.Now(), map[string][]string{} // by reference that is due
	for i := range c.c.Pools {
		ref := c.c.Pools[i].Image
		if !now.Before(due[ref]) {
			pools[ref] = append(pools[ref], string(c.c.Pools[i].Name))
		} else if image, known := c.resolved[ref]; known {
			if err := c.publish(ctx, view, image); err != nil {
				return err
			}
		}
	}
	var (
		mu     sync.Mutex // of due, resolved and failed
		failed []error
		group  errgroup.Group
	)
	group.SetLimit(resolveAtOnce)
	for ref, names := range pools {
		group.Go(func() error {
			fresh, err := c.resolve(ctx, view, ref)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				due[ref] = now.Add(resolveRetry)
				failed = append(failed, fmt.Errorf("resolve the image of pool %s: %w", strings.Join(names, ", "), err))
				return nil
			}
			due[ref], c.resolved[ref] = now.Add(c.c.ResolveEvery), fresh
			return nil
		})
	}
	_ = group.Wait() // the errors are in failed
	return errors.Join(failed...)
}

// resolve asks a registry for one reference and writes the answer down.
func (c *Controller) resolve(ctx context.Context, view *store.View, ref string) (fleet.Image, error) {
	asked, cancel := context.WithTimeout(ctx, resolveTimeout)
	defer cancel()
	fresh, err := c.c.Resolve(asked, ref)
	c.noteUnresolved(ref, err)
	if err != nil {
		return fleet.Image{}, err
	}
	return fresh, c.publish(ctx, view, fresh)
}

// publish writes down what a reference is now, unless the store knows.
func (c *Controller) publish(ctx context.Context, view *store.View, image fleet.Image) error {
	term, leading := c.currentTerm()
	if stored := view.Images[image.Ref]; !leading || stored != nil && stored.Digest == image.Digest {
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
