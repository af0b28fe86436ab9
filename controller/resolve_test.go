package controller

import (
	"context"
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
