package cache

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// sparseFile is 8 MiB with two islands of data, the second not aligned, and a hole at
// its end.
func sparseFile(t testing.TB, path string) []byte {
	t.Helper()
	want := make([]byte, 8<<20)
	copy(want[1<<20:], bytes.Repeat([]byte("island"), 50_000))
	copy(want[5<<20+777:], "small")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	w := &sparseWriter{file: f, offsets: []int64{0}, clean: true}
	if _, err := w.Write(want); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(int64(len(want))); err != nil {
		t.Fatal(err)
	}
	return want
}

func size(t testing.TB, dir string) int64 {
	t.Helper()
	n, err := allocated(dir)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// Both ways of copying keep the content and the holes.
func TestSparseCopy(t *testing.T) {
	for name, copyTo := range map[string]func(out, in *os.File) error{
		"seek":      func(out, in *os.File) error { return sparseCopy(t.Context(), out, in) },
		"look":      func(out, in *os.File) error { return copyNonZero(t.Context(), out, in, 0, 8<<20) },
		"continued": func(out, in *os.File) error { return copyNonZero(t.Context(), out, in, 4096, 8<<20) },
	} {
		t.Run(name, func(t *testing.T) {
			from, to := t.TempDir(), t.TempDir()
			want := sparseFile(t, filepath.Join(from, "disk"))
			in, err := os.Open(filepath.Join(from, "disk"))
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = in.Close() }()
			out, err := os.Create(filepath.Join(to, "disk"))
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = out.Close() }()
			if err := copyTo(out, in); err != nil {
				t.Fatal(err)
			}
			if err := out.Truncate(int64(len(want))); err != nil {
				t.Fatal(err)
			}
			got, err := os.ReadFile(filepath.Join(to, "disk"))
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("the copy differs (%v)", err)
			}
			if have, most := size(t, to), size(t, from)+64<<10; have > most {
				t.Errorf("the copy has %d bytes on disk; want at most %d", have, most)
			}
		})
	}
}

// cloneImage pulls an image of "A0000000B" and clones it.
func cloneImage(t *testing.T, store *Store, shelf *shelf, grow int64) (image, clone string) {
	t.Helper()
	h, m := shelf.put(t, "A0000000B")
	if err := store.Pull(t.Context(), h); err != nil {
		t.Fatal(err)
	}
	image, err := store.Path(h.Digest)
	if err != nil {
		t.Fatal(err)
	}
	clone = filepath.Join(t.TempDir(), "vm")
	if err := store.Clone(t.Context(), h.Digest, clone, grow); !errors.Is(err, ErrNotLeased) {
		t.Errorf("a clone without a lease: %v; want %v", err, ErrNotLeased)
	}
	release, err := store.Lease(h.Digest, "vm")
	if err != nil {
		t.Fatal(err)
	}
	if err := store.Clone(t.Context(), h.Digest, clone, grow); err != nil {
		t.Fatal(err)
	}
	if err := release(); err != nil {
		t.Fatal(err)
	}
	disk, err := os.Stat(filepath.Join(clone, diskFile))
	if err != nil || disk.Size() != max(m.DiskSize, grow) {
		t.Errorf("the clone's disk is %+v (%v); want %d bytes", disk, err, max(m.DiskSize, grow))
	}
	for _, name := range []string{diskFile, nvramFile, configFile} {
		a, aerr := os.ReadFile(filepath.Join(image, name))
		b, berr := os.ReadFile(filepath.Join(clone, name))
		if aerr != nil || berr != nil || !bytes.HasPrefix(b, a) {
			t.Errorf("%s differs (%v, %v)", name, aerr, berr)
		}
	}
	return image, clone
}

// A clone is the VM's own: sparse, grown by a hole, and writing to it leaves the image
// alone.
func TestClone(t *testing.T) {
	shelf := newShelf()
	store := openShelf(t, shelf)
	image, clone := cloneImage(t, store, shelf, 10<<20)
	before, err := os.ReadFile(filepath.Join(image, diskFile))
	if err != nil {
		t.Fatal(err)
	}
	// Two of nine chunks of 64 KiB have content.
	if have := size(t, clone); have > 256<<10 {
		t.Errorf("the clone has %d bytes on disk; want at most 256 KiB", have)
	}
	f, err := os.OpenFile(filepath.Join(clone, diskFile), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("guest"), 100); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	after, err := os.ReadFile(filepath.Join(image, diskFile))
	if err != nil || !bytes.Equal(before, after) {
		t.Errorf("writing to the clone changed the image (%v)", err)
	}
}

// A clone that fails leaves no directory; one that exists is never touched.
func TestCloneFails(t *testing.T) {
	shelf := newShelf()
	store := openShelf(t, shelf)
	h, _ := shelf.put(t, "A")
	if err := store.Clone(t.Context(), h.Digest, filepath.Join(t.TempDir(), "vm"), 0); !errors.Is(err, ErrNotReady) {
		t.Errorf("of no image: %v; want %v", err, ErrNotReady)
	}
	if err := store.Pull(t.Context(), h); err != nil {
		t.Fatal(err)
	}
	if _, err := store.Lease(h.Digest, "vm"); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "vm")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := store.Clone(ctx, h.Digest, dir, 0); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a failed clone left its directory (%v)", err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := store.Clone(t.Context(), h.Digest, dir, 0); !errors.Is(err, os.ErrExist) {
		t.Errorf("into a directory that exists: %v; want %v", err, os.ErrExist)
	}
	if _, err := os.Stat(dir); err != nil {
		t.Errorf("a directory that existed is gone: %v", err)
	}
}

// Whatever the file system can: it is what a clone there then does, and nothing is left.
func TestCanShare(t *testing.T) {
	dir := t.TempDir()
	can, err := CanShare(dir)
	if err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("it left %v (%v)", left, err)
	}
	src := filepath.Join(dir, "src")
	sparseFile(t, src)
	if shared, err := reflink(src, filepath.Join(dir, "dst")); err != nil || shared != can {
		t.Errorf("clones share: %t (%v), and it said %t", shared, err, can)
	}
	if _, err := CanShare(filepath.Join(dir, "nowhere")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a directory that is not there: %v", err)
	}
}

// BenchmarkClone is the sparse copy of a disk of 8 MiB with 300 KB of data, or its
// reflink where the temporary directory's file system has them.
func BenchmarkClone(b *testing.B) {
	dir := b.TempDir()
	src := filepath.Join(dir, "disk")
	sparseFile(b, src)
	for b.Loop() {
		dst := filepath.Join(dir, "clone")
		if err := CloneFile(b.Context(), src, dst); err != nil {
			b.Fatal(err)
		}
		if err := os.Remove(dst); err != nil {
			b.Fatal(err)
		}
	}
}
