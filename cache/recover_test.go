package cache

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/paddock-ci/paddock/fleet"
)

// What a crash may leave is resumed or removed at the next start; whole images stay.
func TestRecovery(t *testing.T) {
	shelf := newShelf()
	store := openShelf(t, shelf)
	good, _ := shelf.put(t, "A")
	half, m := shelf.put(t, "BC")
	spoilt, _ := shelf.put(t, "D")
	for _, h := range []fleet.Hold{good, half, spoilt} {
		if err := store.Pull(t.Context(), h); err != nil {
			t.Fatal(err)
		}
	}
	at := store.dir
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
	write := func(path, data string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// half is put back to partial, with one chunk in the journal and half a line more.
	if err := os.Rename(at.image(half.Digest), at.partial(half.Digest)); err != nil {
		t.Fatal(err)
	}
	first, second := note{item: itemOf(m.Chunks[0])}.String(), note{item: itemOf(m.Chunks[1])}.String()
	write(filepath.Join(at.partial(half.Digest), journalFile), first+second[:20])
	if err := os.Truncate(filepath.Join(at.image(spoilt.Digest), diskFile), 100); err != nil {
		t.Fatal(err)
	}
	write(filepath.Join(string(at), "images", "notes", "x"), "x")
	write(filepath.Join(at.partial("sha256:"+fleet.Digest(strings.Repeat("e", 64))), journalFile), "")
	write(filepath.Join(string(at), "trash", "old.XYZ", diskFile), "x")
	write(at.lease(half.Digest, "vm"), "")

	store, err := Open(Config{Dir: string(at), Sources: []Source{shelf}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = store.Close() }()
	if a, b, c := store.state(good.Digest), store.state(half.Digest), store.state(spoilt.Digest); a != fleet.ImageReady || b != fleet.ImagePaused || c != gone {
		t.Errorf("states %q, %q, %q; want ready, paused, none", a, b, c)
	}
	for kind, want := range map[string]int{"images": 1, "partial": 1, "trash": 0, "leases": 0} {
		names, err := os.ReadDir(filepath.Join(string(at), kind))
		if err != nil || len(names) != want {
			t.Errorf("%s holds %v (%v); want %d", kind, names, err, want)
		}
	}
	shelf.asked = nil
	if err := store.Pull(t.Context(), half); err != nil {
		t.Fatal(err)
	}
	want := []fleet.Digest{m.Config.Digest, m.NVRAM.Digest, m.Chunks[1].Blob}
	slices.Sort(want)
	slices.Sort(shelf.asked)
	if !slices.Equal(shelf.asked, want) {
		t.Errorf("asked for %v; want %v", shelf.asked, want)
	}
}

// An image cannot be read at the start: a link that leads to itself stands for a disk
// that fails or a shortage of files. Open fails and names the image, which is kept; when
// it can be read again, it is ready. A partial image is no different.
func TestUnreadableImageWasThrownAway(t *testing.T) {
	for _, kind := range []string{"images", "partial"} {
		t.Run(kind, func(t *testing.T) {
			shelf := newShelf()
			store := openShelf(t, shelf)
			h, _ := shelf.put(t, "A")
			if err := store.Pull(t.Context(), h); err != nil {
				t.Fatal(err)
			}
			at, want := store.dir, fleet.ImageReady
			if err := store.Close(); err != nil {
				t.Fatal(err)
			}
			if kind == "partial" {
				want = fleet.ImagePaused
				if err := os.Rename(at.image(h.Digest), at.partial(h.Digest)); err != nil {
					t.Fatal(err)
				}
			}
			manifest := filepath.Join(at.of(kind, h.Digest), manifestFile)
			if err := os.Rename(manifest, manifest+".aside"); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(manifestFile, manifest); err != nil {
				t.Fatal(err)
			}
			if broken, err := Open(Config{Dir: string(at)}); !errors.Is(err, syscall.ELOOP) || !strings.Contains(err.Error(), h.Digest.Short()) {
				if err == nil {
					_ = broken.Close()
				}
				t.Fatalf("opened with an image that cannot be read: %v; want %v and its name", err, syscall.ELOOP)
			}
			if err := os.Rename(manifest+".aside", manifest); err != nil {
				t.Fatal(err)
			}
			again, err := Open(Config{Dir: string(at)})
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = again.Close() }()
			if got := again.state(h.Digest); got != want {
				t.Errorf("the image is %q when it can be read again; want %q", got, want)
			}
		})
	}
}
