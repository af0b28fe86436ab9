package cache_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/cache/registrytest"
	"github.com/paddock-ci/paddock/fleet"
)

// eventually waits for a minute, which is long for all that it is used for.
func eventually(t *testing.T, is func() bool) {
	t.Helper()
	again := time.NewTicker(5 * time.Millisecond)
	defer again.Stop()
	for deadline := time.Now().Add(time.Minute); !is(); <-again.C {
		if time.Now().After(deadline) {
			t.Fatal("not within a minute")
		}
	}
}

func look(t *testing.T, dir string) *cache.View {
	t.Helper()
	v, err := cache.LookAt(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// While its owner pulls, a store is looked at: one image is ready and leased, one is here
// in part, one is spoilt, one is no image's directory. The plan of a further pull counts
// what is here.
func TestLook(t *testing.T) {
	w := newWorld(t)
	ready, _, readyManifest := w.push(t, "ready", "ab0a")
	if err := w.store.Pull(t.Context(), ready); err != nil {
		t.Fatal(err)
	}
	for _, holder := range []string{"vm two", "vm/one"} {
		if _, err := w.store.Lease(ready.Digest, holder); err != nil {
			t.Fatal(err)
		}
	}
	half, _, halfManifest := w.push(t, "half", "xyz")
	w.reg.Break(halfManifest.Chunks[2].Blob, registrytest.Fault{Kind: registrytest.Hang, At: 40_000})
	ctx, cancel := context.WithCancel(t.Context())
	pulled := make(chan error, 1)
	go func() { pulled <- w.store.Pull(ctx, half) }()
	defer func() {
		cancel()
		if err := <-pulled; err == nil {
			t.Error("a pull that hangs ended well")
		}
	}()
	await(t, w.dir, half.Digest, 2)
	spoilt := filepath.Join(w.dir, "images", strings.Repeat("5", 64))
	for _, dir := range []string{spoilt, filepath.Join(w.dir, "images", "no digest")} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(spoilt, "manifest.json"), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}

	v := look(t, w.dir)
	list, err := v.List()
	if err != nil || len(list) != 3 {
		t.Fatalf("%d images, %v: %+v", len(list), err, list)
	}
	for _, i := range list {
		switch i.Digest {
		case ready.Digest:
			if !i.Ready || i.Err != nil || i.Ref != ready.Ref || i.Done != readyManifest.Bytes() || i.DiskBytes == 0 || strings.Join(i.Leases, ",") != "vm two,vm/one" {
				t.Errorf("the ready one is seen as %+v", i)
			}
		case half.Digest:
			if i.Ready || i.Err != nil || i.Ref != half.Ref || i.Done < halfManifest.Bytes()/2 || i.Done >= halfManifest.Bytes() || len(i.Leases) != 0 {
				t.Errorf("the half one is seen as %+v", i)
			}
		default:
			if i.Err == nil || !strings.Contains(i.Err.Error(), "its manifest has digest") {
				t.Errorf("the spoilt one is seen as %+v", i)
			}
		}
	}
	if _, err := v.Image(fleet.Digest("sha256:" + strings.Repeat("1", 64))); !errors.Is(err, cache.ErrNotReady) {
		t.Errorf("an image that is not here: %v", err)
	}
	if _, err := cache.LookAt(t.TempDir(), nil); !errors.Is(err, cache.ErrNoStore) {
		t.Errorf("an empty directory is a store: %v", err)
	}

	_, _, next := w.push(t, "next", "abq00x")
	plan, err := v.Plan(next)
	if err != nil {
		t.Fatal(err)
	}
	want := next.Chunks[2].BlobSize + next.Chunks[5].BlobSize + next.NVRAM.Size + next.Config.Size
	if len(plan.Chunks) != 2 || plan.Reused != next.Chunks[0].BlobSize+next.Chunks[1].BlobSize || plan.Zero != 2*chunkSize || plan.Requests != want || plan.Kept != 0 || plan.Ready {
		t.Errorf("the plan is %+v", plan)
	}
	if plan, err = v.Plan(halfManifest); err != nil || len(plan.Chunks) != 1 || plan.Kept != halfManifest.Chunks[0].BlobSize+halfManifest.Chunks[1].BlobSize {
		t.Errorf("the plan for the rest is %+v, %v", plan, err)
	}
	if plan, err = v.Plan(readyManifest); err != nil || !plan.Ready {
		t.Errorf("the plan for what is here is %+v, %v", plan, err)
	}
	first, err := v.Image(ready.Digest)
	if err != nil {
		t.Fatal(err)
	}
	if shared, err := v.Sharing(first); err != nil || len(shared) != 0 {
		t.Errorf("shared with %+v, %v", shared, err)
	}
}

// Images come and go as fast as they can while the store is looked at: what is seen is
// whole or not there, and nothing is an error.
func TestLookWhileItChanges(t *testing.T) {
	w := newWorld(t)
	hold, _, _ := w.push(t, "base", "ab")
	other, _, _ := w.push(t, "other", "bc")
	if err := w.store.Pull(t.Context(), other); err != nil {
		t.Fatal(err)
	}
	churned := make(chan error, 1)
	go func() {
		for range 10 {
			if err := errors.Join(w.store.Pull(t.Context(), hold), w.store.Evict(hold.Digest)); err != nil {
				churned <- err
				return
			}
		}
		churned <- nil
	}()
	v, looks, seen := look(t, w.dir), 0, 0
	for ended := false; !ended; looks++ {
		select {
		case err := <-churned:
			if err != nil {
				t.Error(err)
			}
			ended = true
		default:
		}
		list, err := v.List()
		if err != nil || len(list) < 1 {
			t.Fatalf("look %d: %+v, %v", looks, list, err)
		}
		for _, i := range list {
			if i.Err != nil {
				t.Fatalf("look %d: %s is broken: %v", looks, i.Ref, i.Err)
			}
			if i.Digest == hold.Digest {
				seen++
			}
			if i.Ready && i.Digest == hold.Digest {
				flaws, err := v.Verify(t.Context(), i.Digest, nil)
				if len(flaws) > 0 || err != nil && !errors.Is(err, cache.ErrNotReady) && !errors.Is(err, os.ErrNotExist) {
					t.Fatalf("look %d: flaws %v, %v", looks, flaws, err)
				}
			}
		}
	}
	if seen == 0 {
		t.Errorf("%d looks never saw the image that comes and goes", looks)
	}
}
