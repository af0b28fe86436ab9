package cache

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// write makes a file, and the directories that it is in.
func write(t *testing.T, path, data string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(data), 0o600); err != nil {
		t.Fatal(err)
	}
}

// litter puts files into a store that are none of an image's: those that were to replace
// others, a disk that was to become a clone, and some by other hands.
func litter(t *testing.T, at layout, good, half fleet.Digest) {
	t.Helper()
	for _, path := range []string{
		filepath.Join(at.partial(half), journalFile+tempSuffix), filepath.Join(at.partial(half), diskFile+tempSuffix),
		filepath.Join(at.image(good), "notes.txt"), filepath.Join(string(at), "leases", "notes.txt"),
		filepath.Join(at.leases(good), "notes.txt"), at.lease(good, "kept"),
		filepath.Join(string(at), ".share-123"), filepath.Join(string(at), "README"),
	} {
		write(t, path, "x")
	}
}

// checkSwept checks that the litter was named in the log, and removed if it was in the
// store's own directories.
func checkSwept(t *testing.T, at layout, good, half fleet.Digest, log string) {
	t.Helper()
	for _, name := range []string{
		"notes ", strings.Repeat("e", 64), "old.XYZ", "journal.new", "disk.img.new", "notes.txt", ".share-123", "README",
		strings.TrimPrefix(string(half), "sha256:"),
	} {
		if !strings.Contains(log, "name="+name) {
			t.Errorf("nothing is said of %s in the log:\n%s", name, log)
		}
	}
	image := []string{configFile, diskFile, metaFile, journalFile, manifestFile, nvramFile}
	for path, want := range map[string][]string{
		at.partial(half): image, at.image(good): image, at.leases(good): {"h-kept"},
		string(at): {"README", "images", "leases", "lock", "partial", "trash"},
	} {
		var names []string
		entries, err := os.ReadDir(path)
		for _, e := range entries {
			names = append(names, e.Name())
		}
		if err != nil || !slices.Equal(names, want) {
			t.Errorf("%s holds %v (%v); want %v", path, names, err, want)
		}
	}
}

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
	// half is put back to partial, with one chunk in the journal and half a line more.
	if err := os.Rename(at.image(half.Digest), at.partial(half.Digest)); err != nil {
		t.Fatal(err)
	}
	first, second := note{item: itemOf(m.Chunks[0])}.String(), note{item: itemOf(m.Chunks[1])}.String()
	write(t, filepath.Join(at.partial(half.Digest), journalFile), first+second[:20])
	if err := os.Truncate(filepath.Join(at.image(spoilt.Digest), diskFile), 100); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(string(at), "images", "notes", "x"), "x")
	write(t, filepath.Join(at.partial("sha256:"+fleet.Digest(strings.Repeat("e", 64))), journalFile), "")
	write(t, filepath.Join(string(at), "trash", "old.XYZ", diskFile), "x")
	write(t, at.lease(half.Digest, "vm"), "")
	litter(t, at, good.Digest, half.Digest)

	var log strings.Builder
	store, err := Open(Config{Dir: string(at), Sources: []Source{shelf}, Log: slog.New(slog.NewTextHandler(&log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = store.Close() }()
	checkSwept(t, at, good.Digest, half.Digest, log.String())
	if a, b, c := store.state(good.Digest), store.state(half.Digest), store.state(spoilt.Digest); a != fleet.ImageReady || b != fleet.ImagePaused || c != gone {
		t.Errorf("states %q, %q, %q; want ready, paused, none", a, b, c)
	}
	for kind, want := range map[string]int{"images": 1, "partial": 1, "trash": 0, "leases": 1} {
		names, err := os.ReadDir(filepath.Join(string(at), kind))
		if err != nil || len(names) != want {
			t.Errorf("%s holds %v (%v); want %d", kind, names, err, want)
		}
	}
	shelf.asked = nil
	if err := store.Pull(t.Context(), half); err != nil {
		t.Fatal(err)
	}
	want := []fleet.Digest{m.NVRAM.Digest, m.Chunks[1].Blob} // the VM config is in another image, too
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

// The NVRAM or the VM config of a ready image is of another size, or gone: all of the image
// was thrown away. A pull fetches just that file; a disk of another size is no image.
func TestSmallFlawCostTheWholeImage(t *testing.T) {
	for name, test := range map[string]struct {
		spoil   func(dir string) error
		fetched func(*image.Manifest) []fleet.Digest
	}{
		"short NVRAM": {
			func(dir string) error { return os.Truncate(filepath.Join(dir, nvramFile), 1) },
			func(m *image.Manifest) []fleet.Digest { return []fleet.Digest{m.NVRAM.Digest} },
		},
		"no VM config": {
			func(dir string) error { return os.Remove(filepath.Join(dir, configFile)) },
			func(m *image.Manifest) []fleet.Digest { return []fleet.Digest{m.Config.Digest} },
		},
		"both, one a directory": {
			func(dir string) error {
				return errors.Join(os.Truncate(filepath.Join(dir, configFile), 9), os.Remove(filepath.Join(dir, nvramFile)), os.Mkdir(filepath.Join(dir, nvramFile), 0o700))
			},
			func(m *image.Manifest) []fleet.Digest { return []fleet.Digest{m.Config.Digest, m.NVRAM.Digest} },
		},
		"the disk, too": {
			func(dir string) error {
				return errors.Join(os.Truncate(filepath.Join(dir, diskFile), 100), os.Truncate(filepath.Join(dir, nvramFile), 1))
			},
			func(m *image.Manifest) []fleet.Digest {
				return []fleet.Digest{m.Digest, m.Config.Digest, m.NVRAM.Digest, m.Chunks[0].Blob, m.Chunks[1].Blob}
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			shelf := newShelf()
			store := openShelf(t, shelf)
			h, m := shelf.put(t, "AB")
			if err := store.Pull(t.Context(), h); err != nil {
				t.Fatal(err)
			}
			if err := store.Close(); err != nil {
				t.Fatal(err)
			}
			if err := test.spoil(store.dir.image(h.Digest)); err != nil {
				t.Fatal(err)
			}
			var log strings.Builder
			store, err := Open(Config{Dir: string(store.dir), Sources: []Source{shelf}, Log: slog.New(slog.NewTextHandler(&log, nil))})
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = store.Close() }()
			if said := log.String(); !strings.Contains(said, nvramFile) && !strings.Contains(said, configFile) && !strings.Contains(said, diskFile) {
				t.Errorf("nothing is said of it:\n%s", &log)
			}
			shelf.asked = nil
			if err := store.Pull(t.Context(), h); err != nil {
				t.Fatal(err)
			}
			want := test.fetched(m)
			slices.Sort(want)
			slices.Sort(shelf.asked)
			if !slices.Equal(shelf.asked, want) {
				t.Errorf("asked for %v; want %v", shelf.asked, want)
			}
			if flaws, err := (&View{dir: store.dir, codecs: Formats()}).Verify(t.Context(), h.Digest, nil); err != nil || len(flaws) > 0 {
				t.Errorf("%v, %v", flaws, err)
			}
		})
	}
}
