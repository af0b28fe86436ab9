package cache_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
	"github.com/paddock-ci/paddock/image/tart"
)

// imageFiles are those of an image that another tool keeps, too.
var imageFiles = []string{"manifest.json", "disk.img", "nvram.bin", "config.json"}

// foreignCache pulls an image and lays it out as in a Tart cache: the files below
// host/name/sha256:…, and a link to that by the name of the tag. It returns the root and
// the image's directory.
func (w *world) foreignCache(t *testing.T, h fleet.Hold) (root, dir string) {
	t.Helper()
	if err := w.store.Pull(t.Context(), h); err != nil {
		t.Fatal(err)
	}
	from, err := w.store.Path(h.Digest)
	if err != nil {
		t.Fatal(err)
	}
	root = t.TempDir()
	repository, tag := h.Ref[:strings.LastIndex(h.Ref, ":")], h.Ref[strings.LastIndex(h.Ref, ":")+1:]
	dir = filepath.Join(root, repository, string(h.Digest))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range imageFiles {
		if err := cache.CloneFile(t.Context(), filepath.Join(from, name), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(dir, filepath.Join(filepath.Dir(dir), tag)); err != nil {
		t.Fatal(err)
	}
	w.reg.Reset()
	return root, dir
}

// spoil changes one byte of a file.
func spoil(t *testing.T, path string, at int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, at); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte{b[0] ^ 1}, at); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// contents reads the files of a directory.
func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	names, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		data, err := os.ReadFile(filepath.Join(dir, name.Name()))
		if err != nil {
			t.Fatal(err)
		}
		all[name.Name()] = string(data)
	}
	return all
}

// alone opens a store without any source.
func alone(t *testing.T, dir string) *cache.Store {
	t.Helper()
	store, err := cache.Open(cache.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = store.Close() })
	return store
}

// An image of another tool's cache is taken over by a store that could ask nobody: it is
// ready, verified, as sparse as it was, and the original is left alone.
func TestImport(t *testing.T) {
	w := newWorld(t)
	hold, disk, _ := w.push(t, "base", "ab0a00c")
	root, dir := w.foreignCache(t, hold)
	before := contents(t, dir)
	found, err := cache.Foreigners(root)
	if err != nil {
		t.Fatal(err)
	}
	want := []cache.Foreign{{Dir: dir, Ref: hold.Ref + "@" + string(hold.Digest), Digest: hold.Digest}}
	if !slices.Equal(found, want) {
		t.Fatalf("found %+v, want %+v", found, want)
	}
	home := t.TempDir()
	store := alone(t, home)
	var last [2]int64
	for range 2 { // the second time, it is here
		d, err := store.Import(t.Context(), dir, hold.Ref, func(done, total int64) { last = [2]int64{done, total} })
		if err != nil || d != hold.Digest {
			t.Fatalf("imported %s: %v", d, err)
		}
	}
	if size := int64(len(disk)); last != [2]int64{size, size} {
		t.Errorf("the last progress is %v, want all of %d", last, size)
	}
	checkDisk(t, store, hold.Digest, disk)
	if i := only(t, store); i.State != fleet.ImageReady || i.Ref != hold.Ref || i.DiskBytes == 0 {
		t.Errorf("listed as %+v", i)
	}
	path, err := store.Path(hold.Digest)
	if err != nil {
		t.Fatal(err)
	}
	if have, most := allocated(t, filepath.Join(path, "disk.img")), allocated(t, filepath.Join(dir, "disk.img")); have > most {
		t.Errorf("%d bytes on disk, the original has %d", have, most)
	}
	if after := contents(t, dir); !equalMaps(before, after) {
		t.Error("the original was changed")
	}
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
	checkDisk(t, alone(t, home), hold.Digest, disk)
}

func equalMaps(a, b map[string]string) bool {
	for k := range a {
		if a[k] != b[k] {
			return false
		}
	}
	return len(a) == len(b)
}

// Two chunks of the original are spoilt (one of them in the second of its places), a hole
// has data, and the NVRAM is cut: nothing is published, the error names the first, and a
// pull asks for those parts alone.
func TestImportSpoilt(t *testing.T) {
	w := newWorld(t)
	hold, disk, m := w.push(t, "base", "ab0abcd")
	_, dir := w.foreignCache(t, hold)
	image := filepath.Join(dir, "disk.img")
	spoil(t, image, m.Chunks[3].Offset+70_000) // an a
	spoil(t, image, m.Chunks[5].Offset)        // c
	spoil(t, image, m.Chunks[2].Offset+9)      // zeros
	if err := os.Truncate(filepath.Join(dir, "nvram.bin"), 3); err != nil {
		t.Fatal(err)
	}
	home := t.TempDir()
	store := openStore(t, home, 0)
	_, err := store.Import(t.Context(), dir, hold.Ref, nil)
	var partly *cache.PartlyError
	if !errors.As(err, &partly) || len(partly.Flaws) != 3 || !strings.Contains(err.Error(), "3 of its parts are missing or spoilt where it came from: layer 4 (disk offset 393216, 131072 bytes): content ") {
		t.Fatalf("imported with %v", err)
	}
	if n := published(t, home); n != 0 {
		t.Fatalf("%d images are published", n)
	}
	if i := only(t, store); i.State != fleet.ImagePaused || i.Done == 0 || i.Done >= i.Total {
		t.Errorf("listed as %+v; want paused, in part", i)
	}
	if err := store.Pull(t.Context(), hold); err != nil {
		t.Fatal(err)
	}
	checkDisk(t, store, hold.Digest, disk)
	asked := w.reg.Counts().Requests
	if len(asked) != 3 || asked[m.Chunks[3].Blob] != 1 || asked[m.Chunks[5].Blob] != 1 || asked[m.NVRAM.Digest] != 1 {
		t.Errorf("the pull asked for %v", asked)
	}
	checkFlaws(t, home, hold.Digest, 0)
}

// checkFlaws verifies an image beside the process that has its store open.
func checkFlaws(t *testing.T, dir string, d fleet.Digest, want int) []cache.Flaw {
	t.Helper()
	view, err := cache.LookAt(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	flaws, err := view.Verify(t.Context(), d, nil)
	if err != nil || len(flaws) != want {
		t.Fatalf("%d flaws (%v), %v; want %d", len(flaws), flaws, err, want)
	}
	return flaws
}

// A process is killed (-9) in the middle of an import, when it has verified one chunk of
// four, and what it copied is cut as if that had been under way. The next import goes on,
// and publishes what is whole.
func TestImportKilled(t *testing.T) {
	if dir := os.Getenv(childDir); dir != "" {
		store, err := cache.Open(cache.Config{Dir: dir})
		if err != nil {
			t.Fatal(err)
		}
		_, err = store.Import(t.Context(), os.Getenv("PADDOCK_TEST_CACHE_FROM"), os.Getenv(childRef), func(done, _ int64) {
			if done >= 4*chunkSize { // so that one of two workers has a chunk behind it
				if err := os.WriteFile(filepath.Join(dir, "reached"), nil, 0o600); err != nil {
					t.Error(err)
				}
				select {}
			}
		})
		t.Fatalf("the import that was to be killed ended: %v", err)
	}
	w := newWorld(t)
	hold, disk, m := w.push(t, "base", "abc0def0")
	_, from := w.foreignCache(t, hold)
	home := t.TempDir()
	victim := child(t, "TestImportKilled", childDir+"="+home, childRef+"="+hold.Ref, "PADDOCK_TEST_CACHE_FROM="+from)
	if err := victim.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool { _, err := os.Stat(filepath.Join(home, "reached")); return err == nil })
	if err := victim.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = victim.Wait() // killed
	partial := filepath.Join(home, "partial", strings.TrimPrefix(string(hold.Digest), "sha256:"))
	if err := os.Truncate(filepath.Join(partial, "disk.img"), m.Chunks[6].Offset+10); err != nil {
		t.Fatal(err)
	}
	if n := published(t, home); n != 0 {
		t.Fatalf("%d images are published", n)
	}
	store := alone(t, home)
	if i := only(t, store); i.State != fleet.ImagePaused || i.Done == 0 {
		t.Errorf("found as %+v; want paused, with what was verified", i)
	}
	if _, err := store.Import(t.Context(), from, hold.Ref, nil); err != nil {
		t.Fatal(err)
	}
	checkDisk(t, store, hold.Digest, disk)
	checkFlaws(t, home, hold.Digest, 0)
}

// An import that is interrupted keeps what it has, and the image can be pulled.
func TestImportInterrupted(t *testing.T) {
	w := newWorld(t)
	hold, disk, _ := w.push(t, "base", "abcdef")
	_, from := w.foreignCache(t, hold)
	store := openStore(t, t.TempDir(), 0)
	ctx, cancel := context.WithCancel(t.Context())
	_, err := store.Import(ctx, from, hold.Ref, func(int64, int64) { cancel() })
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("interrupted with %v", err)
	}
	if i := only(t, store); i.State != fleet.ImagePaused {
		t.Errorf("listed as %+v; want paused", i)
	}
	if err := store.Pull(t.Context(), hold); err != nil {
		t.Fatal(err)
	}
	checkDisk(t, store, hold.Digest, disk)
}

// A cache that someone else may have written is read as plain files in their places: no
// link leads out of it, nothing waits on a pipe, and a name that is a digest is held to it.
func TestImportTricks(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, bytes.Repeat([]byte("secret "), 100_000), 0o600); err != nil {
		t.Fatal(err)
	}
	swap := func(name string, by func(path string) error) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			path := filepath.Join(dir, name)
			if err := errors.Join(os.Remove(path), by(path)); err != nil {
				t.Fatal(err)
			}
		}
	}
	link := func(path string) error { return os.Symlink(secret, path) }
	pipe := func(path string) error { return syscall.Mkfifo(path, 0o600) }
	for name, trick := range map[string]struct {
		play func(*testing.T, string)
		want string
	}{
		"manifest is a link":    {swap("manifest.json", link), "is a symbolic link, and files are wanted"},
		"manifest is a pipe":    {swap("manifest.json", pipe), "is no file"},
		"manifest is missing":   {swap("manifest.json", func(string) error { return nil }), "no such file"},
		"manifest of 5 MB":      {swap("manifest.json", func(p string) error { return os.WriteFile(p, make([]byte, 5<<20), 0o600) }), "a manifest of more than 4194304 bytes"},
		"manifest is another":   {swap("manifest.json", func(p string) error { return os.WriteFile(p, []byte("{}"), 0o600) }), "is wanted, which no source gave"},
		"disk is a link":        {swap("disk.img", link), "4 of its parts are missing or spoilt where it came from: layer 1 (disk offset 0, 131072 bytes): " + "DIR/disk.img is a symbolic link"},
		"disk is a pipe":        {swap("disk.img", pipe), "disk.img is no file"},
		"disk is a directory":   {swap("disk.img", func(p string) error { return os.Mkdir(p, 0o700) }), "disk.img is no file"},
		"disk is empty":         {swap("disk.img", func(p string) error { return os.WriteFile(p, nil, 0o600) }), "4 of its parts are missing"},
		"NVRAM is a link":       {swap("nvram.bin", link), "1 of its parts are missing or spoilt where it came from: layer 6 (NVRAM): DIR/nvram.bin is a symbolic link"},
		"config is a pipe":      {swap("config.json", pipe), "layer 0 (VM config): DIR/config.json is no file"},
		"config has other keys": {swap("config.json", func(p string) error { return os.WriteFile(p, []byte(`{"version":1}`), 0o600) }), "layer 0 (VM config): content "},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			hold, _, _ := w.push(t, "base", "a0bcd")
			_, dir := w.foreignCache(t, hold)
			trick.play(t, dir)
			home := t.TempDir()
			store := alone(t, home)
			_, err := store.Import(t.Context(), dir, hold.Ref, nil)
			if err == nil || !strings.Contains(strings.ReplaceAll(err.Error(), dir, "DIR"), trick.want) {
				t.Errorf("imported with %v; want %s", err, trick.want)
			}
			if n := published(t, home); n != 0 {
				t.Errorf("%d images are published", n)
			}
			err = filepath.WalkDir(home, func(path string, e os.DirEntry, err error) error {
				if err != nil || e.IsDir() {
					return err
				}
				data, err := os.ReadFile(path)
				if bytes.Contains(data, []byte("secret secret")) {
					t.Errorf("%s has what a link led to", path)
				}
				return err
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
}

// A tool wrote the manifest of its image anew, with the same meaning and other bytes: the
// image is what its directory is called, if a source has that manifest.
func TestImportRewrittenManifest(t *testing.T) {
	w := newWorld(t)
	hold, disk, m := w.push(t, "base", "ab")
	_, dir := w.foreignCache(t, hold)
	if err := os.WriteFile(filepath.Join(dir, "manifest.json"), append(bytes.Clone(m.Raw), '\n'), 0o600); err != nil {
		t.Fatal(err)
	}
	store := openStore(t, t.TempDir(), 0)
	if d, err := store.Import(t.Context(), dir, hold.Ref, nil); err != nil || d != hold.Digest {
		t.Fatalf("imported %s: %v", d, err)
	}
	checkDisk(t, store, hold.Digest, disk)
	if asked := w.reg.Counts().Requests; len(asked) != 1 || asked[hold.Digest] != 1 {
		t.Errorf("asked for %v; want the manifest alone", asked)
	}
}

// What a legacy image's disk should be, its manifest does not say: it is not taken over
// unseen, and one that was pulled cannot be verified later.
func TestLegacyIsUnverifiable(t *testing.T) {
	dir := t.TempDir()
	layer := func(mediaType string) image.Descriptor {
		return image.Descriptor{MediaType: mediaType, Digest: image.DigestOf([]byte(mediaType)), Size: int64(len(mediaType))}
	}
	raw, err := json.Marshal(image.Document{
		SchemaVersion: 2, MediaType: image.MediaTypeManifest, Config: layer("application/vnd.oci.image.config.v1+json"),
		Layers: []image.Descriptor{
			layer(tart.MediaTypeConfig), layer("application/vnd.cirruslabs.tart.disk.v1"), layer("application/vnd.cirruslabs.tart.disk.v1"), layer(tart.MediaTypeNVRAM),
		},
		Annotations: map[string]string{"org.cirruslabs.tart.uncompressed-disk-size": "4096"},
	})
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{"manifest.json": raw, "disk.img": make([]byte, 4096), "nvram.bin": nil, "config.json": nil} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	home := t.TempDir()
	store := alone(t, home)
	d, err := store.Import(t.Context(), dir, "ghcr.io/acme/old:1", nil)
	if !errors.Is(err, cache.ErrUnverifiable) || cache.ClassOf(err) != cache.ClassFormat || len(store.List()) != 0 {
		t.Fatalf("imported with %v: %+v", err, store.List())
	}
	at := filepath.Join(home, "images", strings.TrimPrefix(string(d), "sha256:"))
	if err := os.CopyFS(at, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	for name, mediaType := range map[string]string{"nvram.bin": tart.MediaTypeNVRAM, "config.json": tart.MediaTypeConfig} {
		if err := os.WriteFile(filepath.Join(at, name), []byte(mediaType), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if flaws, err := look(t, home).Verify(t.Context(), d, nil); !errors.Is(err, cache.ErrUnverifiable) || len(flaws) != 0 {
		t.Errorf("verified with %v, %v", flaws, err)
	}
}

// Links in a cache name tags and lead nowhere; what is too deep or no digest is passed
// over, and a port may be escaped.
func TestForeigners(t *testing.T) {
	root, outside := t.TempDir(), t.TempDir()
	a, b := "sha256:"+strings.Repeat("a", 64), "sha256:"+strings.Repeat("b", 64)
	for _, dir := range []string{
		"ghcr.io/acme/base/" + a, "ghcr.io/acme/base/sha256:short", "127.0.0.1%3A5000/x/" + b,
		"1/2/3/4/5/6/7/8/9/" + b,
	} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(outside, b), 0o700); err != nil {
		t.Fatal(err)
	}
	for link, target := range map[string]string{
		"ghcr.io/acme/base/v1":      filepath.Join(outside, a), // a tag of what is beside it, wherever it says that is
		"ghcr.io/acme/base/" + b:    filepath.Join(outside, b),
		"ghcr.io/acme/other":        outside,
		"127.0.0.1%3A5000/x/no tag": b,
	} {
		if err := os.Symlink(target, filepath.Join(root, link)); err != nil {
			t.Fatal(err)
		}
	}
	found, err := cache.Foreigners(root)
	want := []cache.Foreign{
		{Dir: filepath.Join(root, "127.0.0.1%3A5000/x", b), Ref: "127.0.0.1:5000/x@" + b, Digest: fleet.Digest(b)},
		{Dir: filepath.Join(root, "ghcr.io/acme/base", a), Ref: "ghcr.io/acme/base:v1@" + a, Digest: fleet.Digest(a)},
	}
	if err != nil || !slices.Equal(found, want) {
		t.Errorf("found %+v, %v\nwant %+v", found, err, want)
	}
	for _, f := range found {
		if _, err := image.ParseReference(f.Ref); err != nil {
			t.Error(err)
		}
	}
	if _, err := cache.Foreigners(filepath.Join(root, "nowhere")); err == nil {
		t.Error("a cache that is not there was read")
	}
}
