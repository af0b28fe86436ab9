package cache_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/paddock-ci/paddock/cache"
)

// A disk rots: a byte of a chunk that occurs twice, in one place; a byte of a chunk; a
// byte where there were zeros; one of the NVRAM. Each is named with its layer and offset.
// After a repair a pull fetches those contents and nothing else.
func TestVerifyRepair(t *testing.T) {
	w := newWorld(t)
	hold, disk, m := w.push(t, "base", "ab0a0c")
	if err := w.store.Pull(t.Context(), hold); err != nil {
		t.Fatal(err)
	}
	checkFlaws(t, w.dir, hold.Digest, 0)
	dir, err := w.store.Path(hold.Digest)
	if err != nil {
		t.Fatal(err)
	}
	spoil(t, filepath.Join(dir, "disk.img"), m.Chunks[3].Offset)
	spoil(t, filepath.Join(dir, "disk.img"), m.Chunks[5].Offset+chunkSize-1)
	spoil(t, filepath.Join(dir, "disk.img"), m.Chunks[4].Offset+100)
	spoil(t, filepath.Join(dir, "nvram.bin"), 2)
	flaws := checkFlaws(t, w.dir, hold.Digest, 4)
	for i, want := range []string{
		"layer 4 (disk offset 393216, 131072 bytes): content ",
		"layer 5 (disk offset 524288, 131072 bytes): not all zero, as it should be",
		"layer 6 (disk offset 655360, 131072 bytes): content ",
		"layer 7 (NVRAM): content ",
	} {
		if got := flaws[i].String(); !strings.HasPrefix(got, want) {
			t.Errorf("flaw %d is %q; want %q", i, got, want)
		}
	}

	release, err := w.store.Lease(hold.Digest, "vm")
	if err != nil {
		t.Fatal(err)
	}
	if err := w.store.Repair(hold.Digest, flaws); !errors.Is(err, cache.ErrLeased) {
		t.Errorf("a leased image was repaired: %v", err)
	}
	if err := release(); err != nil {
		t.Fatal(err)
	}
	if err := w.store.Repair(hold.Digest, nil); err != nil || published(t, w.dir) != 1 {
		t.Errorf("an image without flaws was taken back: %v", err)
	}
	if err := w.store.Repair(hold.Digest, flaws); err != nil {
		t.Fatal(err)
	}
	if published(t, w.dir) != 0 {
		t.Error("a bad image is published")
	}
	w.reg.Reset()
	if err := w.store.Close(); err != nil { // what is left is found again
		t.Fatal(err)
	}
	store := openStore(t, w.dir, 0)
	if err := store.Pull(t.Context(), hold); err != nil {
		t.Fatal(err)
	}
	checkDisk(t, store, hold.Digest, disk)
	checkFlaws(t, w.dir, hold.Digest, 0)
	asked := w.reg.Counts().Requests
	if len(asked) != 3 || asked[m.Chunks[0].Blob] != 1 || asked[m.Chunks[5].Blob] != 1 || asked[m.NVRAM.Digest] != 1 {
		t.Errorf("the pull asked for %v", asked)
	}
}

// What cannot be verified is an error, and no flaw.
func TestVerifyFails(t *testing.T) {
	w := newWorld(t)
	hold, _, _ := w.push(t, "base", "abcdefgh")
	v := look(t, w.dir)
	if _, err := v.Verify(t.Context(), hold.Digest, nil); !errors.Is(err, cache.ErrNotReady) {
		t.Errorf("an image that is not here: %v", err)
	}
	if err := w.store.Pull(t.Context(), hold); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	if _, err := v.Verify(ctx, hold.Digest, func(int64, int64) { cancel() }); !errors.Is(err, context.Canceled) {
		t.Errorf("an interrupted one: %v", err)
	}
	dir, err := w.store.Path(hold.Digest)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(dir, "disk.img"), 5000); err != nil {
		t.Fatal(err)
	}
	if _, err := v.Verify(t.Context(), hold.Digest, nil); err == nil || !strings.Contains(err.Error(), "disk.img has 5000 bytes, the manifest says 1048576") {
		t.Errorf("a cut disk: %v", err)
	}
	if err := os.Remove(filepath.Join(dir, "manifest.json")); err != nil {
		t.Fatal(err)
	}
	if _, err := v.Verify(t.Context(), hold.Digest, nil); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("without a manifest: %v", err)
	}
}
