package controller

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// One registry never answers: the image of another one is resolved at once, and the
// silent one is asked with a time limit.
func TestSilentRegistry(t *testing.T) {
	w := newWorld(t)
	other := w.c.c.Pools[0]
	other.Name, other.Image = "silent", "silent.example/acme/sequoia:1"
	w.c.c.Pools = []fleet.Pool{other, w.c.c.Pools[0]}
	limited := make(chan bool, 1)
	w.c.c.Resolve = func(ctx context.Context, ref string) (fleet.Image, error) {
		if ref != other.Image {
			return fleet.Image{Ref: ref, Digest: testImage}, nil
		}
		_, yes := ctx.Deadline()
		limited <- yes
		<-ctx.Done()
		return fleet.Image{}, ctx.Err()
	}
	w.pass(0)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- w.c.resolveDue(ctx, map[string]time.Time{}) }()
	for w.view().Images[testRef] == nil {
		if !rest(t.Context(), nil, 10*time.Millisecond) {
			t.Fatal("the image is not resolved while another registry is silent")
		}
	}
	if !<-limited {
		t.Error("the silent registry is asked without a time limit")
	}
	cancel()
	if err := <-ended; err == nil {
		t.Error("a silent registry is no error")
	}
}

// An image outside the allow-list is refused by Resolve before any request: nothing is
// published or pulled for its pool, a job of the pool is told why, and the other pools go
// on.
func TestRefusedRegistry(t *testing.T) {
	w := newWorld(t)
	other := w.c.c.Pools[0]
	other.Name, other.Image = "elsewhere", "evil.example/acme/sequoia:1"
	w.c.c.Pools = []fleet.Pool{other, w.c.c.Pools[0]}
	w.c.c.Resolve = func(_ context.Context, ref string) (fleet.Image, error) {
		if ref == other.Image {
			return fleet.Image{}, errors.New(ref + " is not in an allowed registry: images.registries lists registry.example")
		}
		return fleet.Image{Ref: ref, Digest: testImage}, nil
	}
	w.pass(0)
	err := w.c.resolveDue(t.Context(), map[string]time.Time{})
	if err == nil || !strings.Contains(err.Error(), "pool elsewhere") || !strings.Contains(err.Error(), "images.registries") {
		t.Errorf("%v", err)
	}
	if why := w.c.whyUnresolved(other.Image); !strings.Contains(why, "images.registries lists registry.example") {
		t.Errorf("explain says %q", why)
	}
	if v := w.view(); v.Images[other.Image] != nil || v.Images[testRef] == nil {
		t.Errorf("resolved: %v", v.Images)
	}
}
