package cache_test

import (
	"context"
	"errors"
	"io"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/cache/registrytest"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// refused fails unless a piece is not served.
func refused(t *testing.T, s *cache.Store, d, content fleet.Digest) {
	t.Helper()
	p, err := s.Serve(d, content)
	if err == nil {
		_ = p.Close()
	}
	if !errors.Is(err, cache.ErrNotReady) {
		t.Errorf("what is known to be bad is served: %v", err)
	}
}

// A chunk of a ready image is rotten, and another image has that content, too. The repair
// took the image away under a peer's read, and the chunk was served even after it: now it
// is refused while a piece is open, and what is bad is served from neither image, before
// and after the repair, until it is fetched again.
func TestBadChunkWasServed(t *testing.T) {
	w := newWorld(t)
	hold, _, m := w.push(t, "base", "abc")
	other, _, _ := w.push(t, "other", "xb")
	for _, h := range []fleet.Hold{hold, other} {
		if err := w.store.Pull(t.Context(), h); err != nil {
			t.Fatal(err)
		}
	}
	dir, err := w.store.Path(hold.Digest)
	if err != nil {
		t.Fatal(err)
	}
	spoil(t, filepath.Join(dir, "disk.img"), m.Chunks[1].Offset)
	flaws := checkFlaws(t, w.dir, hold.Digest, 1)
	p, err := w.store.Serve(hold.Digest, m.Chunks[0].Content)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.store.Repair(hold.Digest, flaws); !errors.Is(err, cache.ErrLeased) {
		t.Errorf("repaired while a piece is served: %v", err)
	}
	refused(t, w.store, hold.Digest, m.Chunks[1].Content)
	refused(t, w.store, other.Digest, m.Chunks[1].Content)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if err := w.store.Repair(hold.Digest, flaws); err != nil {
		t.Fatal(err)
	}
	refused(t, w.store, hold.Digest, m.Chunks[1].Content)
	for range 2 {
		served(t, w.store, hold.Digest, m.Chunks[0].Content)
		if err := w.store.Pull(t.Context(), hold); err != nil {
			t.Fatal(err)
		}
	}
	served(t, w.store, hold.Digest, m.Chunks[1].Content)
}

// served reads a piece and holds it to its digest.
func served(t *testing.T, s *cache.Store, d, content fleet.Digest) {
	t.Helper()
	p, err := s.Serve(d, content)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = p.Close() }()
	data, err := io.ReadAll(p)
	if got := image.DigestOf(data); err != nil || got != content {
		t.Errorf("served %s, %v; want %s", got.Short(), err, content.Short())
	}
}

// A pull was interrupted, and the disk under what it brought rots: one chunk, and one place
// where there should be zeros. No repair took that, and the next pull published it. One
// that is repaired fetches what is bad and what was missing.
func TestFlawedPartialWasPublished(t *testing.T) {
	w := newWorld(t)
	hold, disk, m := w.push(t, "base", "ab0c")
	w.reg.Break(m.Chunks[3].Blob, registrytest.Fault{Kind: registrytest.Hang, At: 10, Times: 1})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- w.store.Pull(ctx, hold) }()
	eventually(t, func() bool {
		for _, c := range m.Chunks[:2] {
			p, err := w.store.Serve(hold.Digest, c.Content)
			if err != nil {
				return false
			}
			_ = p.Close()
		}
		return true
	})
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Fatalf("the pull ended with %v", err)
	}
	w.reg.Heal()
	file := filepath.Join(w.dir, "partial", strings.TrimPrefix(string(hold.Digest), "sha256:"), "disk.img")
	spoil(t, file, m.Chunks[1].Offset+3)
	spoil(t, file, m.Chunks[2].Offset+7)
	if err := w.store.Repair(hold.Digest, checkFlaws(t, w.dir, hold.Digest, 2)); err != nil {
		t.Fatal(err)
	}
	refused(t, w.store, hold.Digest, m.Chunks[1].Content)
	if i := only(t, w.store); i.State != fleet.ImagePaused || i.Done >= i.Total {
		t.Errorf("listed as %+v; want paused", i)
	}
	checkFlaws(t, w.dir, hold.Digest, 0)
	w.reg.Reset()
	if err := w.store.Pull(t.Context(), hold); err != nil {
		t.Fatal(err)
	}
	checkDisk(t, w.store, hold.Digest, disk)
	asked := w.reg.Counts().Requests
	if asked[m.Chunks[1].Blob] != 1 || asked[m.Chunks[3].Blob] != 1 || asked[m.Chunks[0].Blob] != 0 {
		t.Errorf("asked for %v", asked)
	}
}

// An import ends before it has looked at a region that should be zeros and is not where it
// came from: a pull, which never looks at those, published that.
func TestImportLeftDirtyZeros(t *testing.T) {
	w := newWorld(t)
	hold, disk, m := w.push(t, "base", "ab0cdefg0")
	_, dir := w.foreignCache(t, hold)
	spoil(t, filepath.Join(dir, "disk.img"), m.Chunks[2].Offset+77)
	spoil(t, filepath.Join(dir, "disk.img"), m.Chunks[8].Offset+chunkSize-1)
	home := t.TempDir()
	store := openStore(t, home, 0)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	_, err := store.Import(ctx, dir, hold.Ref, func(done, _ int64) {
		if done > 0 {
			cancel()
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("the import ended with %v", err)
	}
	deadline, stop := context.WithTimeout(t.Context(), time.Minute)
	defer stop()
	if err := store.Pull(deadline, hold); err != nil {
		t.Fatal(err)
	}
	checkDisk(t, store, hold.Digest, disk)
	checkFlaws(t, home, hold.Digest, 0)
}
