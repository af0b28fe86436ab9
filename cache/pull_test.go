package cache_test

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/cache/registry"
	"github.com/paddock-ci/paddock/cache/registrytest"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
	"github.com/paddock-ci/paddock/image/tart"
)

// chunkSize is small, and a multiple of the 4 KiB in which holes are looked for.
const chunkSize = 128 << 10

// world is a registry on loopback and a store that pulls from it.
type world struct {
	reg   *registrytest.Registry
	host  string
	dir   string
	store *cache.Store
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{reg: registrytest.New(), dir: t.TempDir()}
	server := httptest.NewServer(w.reg)
	t.Cleanup(server.Close)
	t.Cleanup(w.reg.Heal) // before Close, which waits for hanging requests
	w.host = strings.TrimPrefix(server.URL, "http://")
	w.store = openStore(t, w.dir, 0)
	return w
}

// openStore opens a store on a client that tries thrice, quickly.
func openStore(t *testing.T, dir string, streams int) *cache.Store {
	t.Helper()
	client, err := registry.New(registry.Config{Tries: 3, Pause: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	store, err := cache.Open(cache.Config{Dir: dir, Sources: []cache.Source{client}, Streams: streams, Backoff: time.Nanosecond})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = store.Close() }) // some tests have closed it already
	return store
}

// push makes an image at the registry and returns the order to hold it, the bytes of its
// disk and its manifest.
func (w *world) push(t *testing.T, name, pattern string) (fleet.Hold, []byte, *image.Manifest) {
	t.Helper()
	return w.pushSized(t, name, pattern, chunkSize)
}

// pushSized is push with chunks of another size.
func (w *world) pushSized(t *testing.T, name, pattern string, chunk int) (fleet.Hold, []byte, *image.Manifest) {
	t.Helper()
	src := registrytest.Source(pattern, chunk)
	disk := make([]byte, src.Disk.Size())
	if n, err := src.Disk.ReadAt(disk, 0); n < len(disk) {
		t.Fatal(err)
	}
	d, err := w.reg.Push(t.Context(), "test/"+name, "v1", src)
	if err != nil {
		t.Fatal(err)
	}
	h := fleet.Hold{Digest: d, Ref: w.host + "/test/" + name + ":v1"}
	return h, disk, w.manifest(t, h)
}

// manifest asks the registry for an image's manifest, and forgets that it was asked.
func (w *world) manifest(t *testing.T, h fleet.Hold) *image.Manifest {
	t.Helper()
	client, err := registry.New(registry.Config{})
	if err != nil {
		t.Fatal(err)
	}
	raw, err := client.Manifest(t.Context(), h.Ref, h.Digest)
	if err != nil {
		t.Fatal(err)
	}
	m, _, err := image.Parse(raw, []image.Codec{tart.Codec{}})
	if err != nil {
		t.Fatal(err)
	}
	w.reg.Reset()
	return m
}

// checkDisk compares a ready image's disk with what was pushed.
func checkDisk(t *testing.T, s *cache.Store, d fleet.Digest, want []byte) {
	t.Helper()
	path, err := s.Path(d)
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(filepath.Join(path, "disk.img"))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("the disk differs from what was pushed (%d bytes, want %d)", len(got), len(want))
	}
}

// only returns the single image of a store.
func only(t *testing.T, s *cache.Store) fleet.NodeImage {
	t.Helper()
	list := s.List()
	if len(list) != 1 {
		t.Fatalf("%d images are listed; want 1: %+v", len(list), list)
	}
	return list[0]
}

// published counts the images under images/.
func published(t *testing.T, dir string) int {
	t.Helper()
	names, err := os.ReadDir(filepath.Join(dir, "images"))
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}

// allocated is the disk space of a file.
func allocated(t *testing.T, path string) int64 {
	t.Helper()
	var stat syscall.Stat_t
	if err := syscall.Stat(path, &stat); err != nil {
		t.Fatal(err)
	}
	return stat.Blocks * 512
}

// An image of seven chunks, of which two are zero and two the same: three are asked for,
// once each, and the disk is right and sparse.
func TestPull(t *testing.T) {
	w := newWorld(t)
	hold, disk, m := w.push(t, "base", "ab0a0cb")
	if err := w.store.Pull(t.Context(), hold); err != nil {
		t.Fatal(err)
	}
	checkDisk(t, w.store, hold.Digest, disk)

	counts := w.reg.Counts()
	want := map[fleet.Digest]int{hold.Digest: 1, m.Config.Digest: 1, m.NVRAM.Digest: 1}
	for _, c := range m.Distinct() {
		want[c.Blob] = 1
	}
	if len(m.Distinct()) != 3 || len(counts.Requests) != len(want) {
		t.Errorf("%d distinct chunks, asked for %d things; want 3, %d", len(m.Distinct()), len(counts.Requests), len(want))
	}
	for d, n := range counts.Requests {
		if n != want[d] {
			t.Errorf("%s was asked for %d times; want %d", d.Short(), n, want[d])
		}
	}
	i := only(t, w.store)
	if i.State != fleet.ImageReady || i.Digest != hold.Digest || i.Ref != hold.Ref || i.DiskBytes == 0 {
		t.Errorf("listed as %+v", i)
	}
	// Of five chunks with content three quarters are not zero; half a chunk is for slack.
	if most := int64(5*chunkSize*3/4 + chunkSize/2); i.DiskBytes > most {
		t.Errorf("%d bytes on disk; want at most %d: holes were written", i.DiskBytes, most)
	}
	if w.store.Rate() <= 0 {
		t.Error("the rate of the pull was not measured")
	}
	// Another pull of what is here asks for nothing.
	w.reg.Reset()
	if err := w.store.Pull(t.Context(), hold); err != nil {
		t.Fatal(err)
	}
	if n, _ := w.reg.Counts().Total(); n != 0 {
		t.Errorf("a pull of a ready image made %d requests", n)
	}
}

// Eight calls at once are one pull.
func TestPullShared(t *testing.T) {
	w := newWorld(t)
	hold, disk, m := w.push(t, "base", "abcdef")
	var calls sync.WaitGroup
	for range 8 {
		calls.Go(func() {
			if err := w.store.Pull(t.Context(), hold); err != nil {
				t.Error(err)
			}
		})
	}
	calls.Wait()
	checkDisk(t, w.store, hold.Digest, disk)
	if n, _ := w.reg.Counts().Total(); n != 3+len(m.Distinct()) {
		t.Errorf("%d requests; want %d", n, 3+len(m.Distinct()))
	}
}

// A store opened again has the image, its reference and its last use.
func TestReopen(t *testing.T) {
	w := newWorld(t)
	hold, disk, _ := w.push(t, "base", "ab0")
	if err := w.store.Pull(t.Context(), hold); err != nil {
		t.Fatal(err)
	}
	before := only(t, w.store)
	if err := w.store.Close(); err != nil {
		t.Fatal(err)
	}
	again := openStore(t, w.dir, 0)
	after := only(t, again)
	if after.State != fleet.ImageReady || after.Ref != before.Ref || after.DiskBytes != before.DiskBytes {
		t.Errorf("listed as %+v; was %+v", after, before)
	}
	checkDisk(t, again, hold.Digest, disk)
}

// Trouble that passes is ridden out: nothing is asked for again that has come.
func TestPullRidesOut(t *testing.T) {
	w := newWorld(t)
	hold, disk, m := w.push(t, "base", "abcdef")
	at := func(i int) fleet.Digest { return m.Chunks[i].Blob }
	w.reg.Break(at(0), registrytest.Fault{Kind: registrytest.Drop, At: 30_000, Times: 1})
	w.reg.Break(at(1), registrytest.Fault{Kind: registrytest.Refuse, Status: 503, Times: 2})
	w.reg.Break(at(2), registrytest.Fault{Kind: registrytest.Refuse, Status: 429, RetryAfter: "0", Times: 1})
	if err := w.store.Pull(t.Context(), hold); err != nil {
		t.Fatal(err)
	}
	checkDisk(t, w.store, hold.Digest, disk)
	counts := w.reg.Counts()
	if got := counts.Bytes[at(0)]; got != m.Chunks[0].BlobSize {
		t.Errorf("%d bytes were sent of the blob that was cut; want %d: it was not resumed", got, m.Chunks[0].BlobSize)
	}
	if n := counts.Requests[at(1)]; n != 3 {
		t.Errorf("%d requests for what was refused twice; want 3", n)
	}
}

// A connection is cut, and then the whole blob comes where a part was asked for: what has
// come already is passed over.
func TestPullPassesOver(t *testing.T) {
	w := newWorld(t)
	hold, disk, m := w.push(t, "base", "abcdef")
	w.reg.Break(m.Chunks[3].Blob, registrytest.Fault{Kind: registrytest.Drop, At: 30_000, Times: 1})
	w.reg.Break(m.Chunks[3].Blob, registrytest.Fault{Kind: registrytest.IgnoreRange, Times: 1})
	if err := w.store.Pull(t.Context(), hold); err != nil {
		t.Fatal(err)
	}
	checkDisk(t, w.store, hold.Digest, disk)
	if n := w.reg.Counts().Requests[m.Chunks[3].Blob]; n != 2 {
		t.Errorf("%d requests for what was cut once; want 2", n)
	}
}

// A pull that was cancelled keeps what it finished, and goes on from there.
func TestPullCancelled(t *testing.T) {
	w := newWorld(t)
	hold, disk, m := w.push(t, "base", "abcdef")
	stuck := m.Chunks[5].Blob
	w.reg.Break(stuck, registrytest.Fault{Kind: registrytest.Hang, At: 100})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- w.store.Pull(ctx, hold) }()
	await(t, w.dir, hold.Digest, 5)
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v; want %v", err, context.Canceled)
	}
	i := only(t, w.store)
	if i.State != fleet.ImagePaused || i.Done != m.Bytes()-m.Chunks[5].BlobSize || i.Total != m.Bytes() {
		t.Errorf("listed as %+v; want paused with %d of %d", i, m.Bytes()-m.Chunks[5].BlobSize, m.Bytes())
	}
	w.reg.Heal()
	w.reg.Reset()
	if err := w.store.Pull(t.Context(), hold); err != nil {
		t.Fatal(err)
	}
	checkDisk(t, w.store, hold.Digest, disk)
	if counts := w.reg.Counts(); counts.Requests[stuck] != 1 || len(counts.Requests) != 1 {
		t.Errorf("asked for %v; want the missing chunk only", counts.Requests)
	}
}

// When the caller that does the work goes, one that waited takes over.
func TestPullTakenOver(t *testing.T) {
	w := newWorld(t)
	hold, disk, m := w.push(t, "base", "abcdef")
	w.reg.Break(m.Chunks[5].Blob, registrytest.Fault{Kind: registrytest.Hang, At: 100, Times: 1})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	first, second := make(chan error, 1), make(chan error, 1)
	go func() { first <- w.store.Pull(ctx, hold) }()
	await(t, w.dir, hold.Digest, 5)
	go func() { second <- w.store.Pull(t.Context(), hold) }()
	cancel()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Errorf("the first: %v; want %v", err, context.Canceled)
	}
	if err := <-second; err != nil {
		t.Errorf("the second: %v", err)
	}
	checkDisk(t, w.store, hold.Digest, disk)
	for d, n := range w.reg.Counts().Requests {
		if n > 1 && d != m.Chunks[5].Blob {
			t.Errorf("%s was asked for %d times", d.Short(), n)
		}
	}
}

// await returns when a journal has that many chunks (beside config and NVRAM), asking
// the file every millisecond.
func await(t *testing.T, dir string, d fleet.Digest, chunks int) {
	t.Helper()
	path := filepath.Join(dir, "partial", strings.TrimPrefix(string(d), "sha256:"), "journal")
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		data, err := os.ReadFile(path)
		if err == nil && bytes.Count(data, []byte("\n")) >= chunks+2 {
			return
		}
		select {
		case <-tick.C:
		case <-t.Context().Done():
			t.Fatalf("the journal has %d lines; want %d", bytes.Count(data, []byte("\n")), chunks+2)
		}
	}
}

// Nothing but the store's own files is in a published image.
func TestPublishedFiles(t *testing.T) {
	w := newWorld(t)
	hold, _, m := w.push(t, "base", "a0")
	if err := w.store.Pull(t.Context(), hold); err != nil {
		t.Fatal(err)
	}
	path, err := w.store.Path(hold.Digest)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(filepath.Join(path, "manifest.json"))
	if err != nil || !bytes.Equal(raw, m.Raw) {
		t.Errorf("the manifest on disk differs from the registry's (%v)", err)
	}
	for _, dir := range []string{"partial", "trash"} {
		names, err := os.ReadDir(filepath.Join(w.dir, dir))
		if err != nil || len(names) != 0 {
			t.Errorf("%s: %v, %v; want it empty", dir, names, err)
		}
	}
}

// The registry's HTTP interface is the real one: what it does not count it hands on.
func TestRegistryAnswersPing(t *testing.T) {
	w := newWorld(t)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+w.host+"/v2/", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		t.Errorf("status %d", resp.StatusCode)
	}
}
