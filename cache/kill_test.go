package cache_test

import (
	"errors"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/cache/registrytest"
	"github.com/paddock-ci/paddock/fleet"
)

// Variables by which a test runs itself in another process.
const (
	childDir    = "PADDOCK_TEST_CACHE_DIR"
	childRef    = "PADDOCK_TEST_CACHE_REF"
	childDigest = "PADDOCK_TEST_CACHE_DIGEST"
)

// child is this test binary, running one test only.
func child(t *testing.T, test string, env ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self, "-test.run=^"+test+"$", "-test.v")
	cmd.Env = append(os.Environ(), env...)
	return cmd
}

// A process is killed (-9) in the middle of a pull: three of five chunks are in its
// journal, two hang in the middle of their bodies. The next
// process finds the store unlocked, asks for what is missing and nothing else, and
// hashes nothing again.
func TestKilled(t *testing.T) {
	if dir := os.Getenv(childDir); dir != "" {
		hold := fleet.Hold{Ref: os.Getenv(childRef), Digest: fleet.Digest(os.Getenv(childDigest))}
		err := openStore(t, dir, 4).Pull(t.Context(), hold)
		t.Fatalf("the pull that was to be killed ended: %v", err)
	}
	w := newWorld(t)
	if err := w.store.Close(); err != nil {
		t.Fatal(err)
	}
	hold, disk, m := w.push(t, "base", "ab0cade")
	missing := m.Distinct()[3:]
	for _, c := range missing {
		w.reg.Break(c.Blob, registrytest.Fault{Kind: registrytest.Hang, At: 40_000})
	}
	victim := child(t, "TestKilled", childDir+"="+w.dir, childRef+"="+hold.Ref, childDigest+"="+string(hold.Digest))
	if err := victim.Start(); err != nil {
		t.Fatal(err)
	}
	await(t, w.dir, hold.Digest, len(m.Distinct())-len(missing))
	if err := victim.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	var exit *exec.ExitError
	if err := victim.Wait(); !errors.As(err, &exit) || exit.Exited() {
		t.Fatalf("the victim ended by itself: %v", err)
	}
	// Another registry with the same image, so that no late request of the victim is
	// counted. Partial work goes by the manifest's digest, wherever its bytes come from.
	other := newWorld(t)
	again, _, _ := other.push(t, "mirror", "ab0cade")
	if again.Digest != hold.Digest {
		t.Fatalf("the same image has digests %s and %s", hold.Digest, again.Digest)
	}
	store := openStore(t, w.dir, 0)
	i := only(t, store)
	if i.State != fleet.ImagePaused || i.Ref != hold.Ref || i.Done == 0 || i.Done >= i.Total {
		t.Errorf("found as %+v; want paused, in part", i)
	}
	if err := store.Pull(t.Context(), again); err != nil {
		t.Fatal(err)
	}
	checkDisk(t, store, hold.Digest, disk)
	counts := other.reg.Counts()
	var left int64
	for _, c := range missing {
		left += c.BlobSize
		if counts.Requests[c.Blob] != 1 {
			t.Errorf("layer %d was asked for %d times; want once", c.Layer, counts.Requests[c.Blob])
		}
	}
	if n, bytes := counts.Total(); n != len(missing) || bytes != left {
		t.Errorf("%d requests for %d bytes; want %d for %d", n, bytes, len(missing), left)
	}
	path, err := store.Path(hold.Digest)
	if err != nil {
		t.Fatal(err)
	}
	// Four chunks with content, one of them twice, each three quarters full; half a chunk
	// is for slack. What the killed process wrote in part left no zeros behind.
	if have, most := allocated(t, filepath.Join(path, "disk.img")), int64(6*chunkSize*3/4+chunkSize/2); have > most {
		t.Errorf("%d bytes on disk; want at most %d", have, most)
	}
}

// asked is a registry's server that notes from which byte on blobs are asked for.
type asked struct {
	http.Handler
	mu   sync.Mutex
	from map[fleet.Digest][]int64 // in the order of the requests
}

func (a *asked) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if _, hex, ok := strings.Cut(r.URL.Path, "/blobs/sha256:"); ok {
		from, _, _ := strings.Cut(strings.TrimPrefix(r.Header.Get("Range"), "bytes="), "-")
		n, _ := strconv.ParseInt(from, 10, 64) // without a range: 0
		a.mu.Lock()
		a.from[fleet.Digest("sha256:"+hex)] = append(a.from[fleet.Digest("sha256:"+hex)], n)
		a.mu.Unlock()
	}
	a.Handler.ServeHTTP(w, r)
}

// marks reads from a journal how far the chunks are: at which byte of their blobs, or -1 if
// they are finished.
func marks(t *testing.T, dir string, d fleet.Digest) map[fleet.Digest]int64 {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(dir, "partial", strings.TrimPrefix(string(d), "sha256:"), "journal"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	at := make(map[fleet.Digest]int64)
	for line := range strings.Lines(string(data)) {
		words := strings.Fields(line)
		switch {
		case !strings.HasSuffix(line, "\n"):
		case len(words) == 3 && words[1] == "chunk":
			at[fleet.Digest(words[2])] = -1
		case len(words) == 9 && words[1] == "mark" && words[2] == "chunk":
			if at[fleet.Digest(words[3])], err = strconv.ParseInt(words[5], 10, 64); err != nil {
				t.Fatal(err)
			}
		}
	}
	return at
}

// A pull of six chunks of 24 MiB by two streams is killed (-9) five times, at random
// moments. Each next process asks for each blob from the byte on that the journal has, so
// that nothing is hashed again, and for nothing that is finished. In all, a kill costs at
// most 16 MiB for each connection: what was read and not in the journal, and what was in
// the sockets.
func TestKilledAgainAndAgain(t *testing.T) {
	const streams, kills, lost = 2, 5, 16 << 20
	if dir := os.Getenv(childDir); dir != "" {
		hold := fleet.Hold{Ref: os.Getenv(childRef), Digest: fleet.Digest(os.Getenv(childDigest))}
		err := openStore(t, dir, streams).Pull(t.Context(), hold)
		t.Fatalf("the pull that was to be killed ended: %v", err)
	}
	w := newWorld(t)
	if err := w.store.Close(); err != nil {
		t.Fatal(err)
	}
	hold, disk, m := w.pushSized(t, "base", "abcdef", 24<<20)
	w.reg.Limit(100 << 20) // so that there are moments
	var store *cache.Store
	for round := range kills + 1 {
		// A server for each process, so that no late request of the former one is counted.
		log := &asked{Handler: w.reg, from: make(map[fleet.Digest][]int64)}
		server := httptest.NewServer(log)
		defer server.Close()
		hold.Ref = strings.TrimPrefix(server.URL, "http://") + "/test/base:v1"
		before := marks(t, w.dir, hold.Digest)
		if round < kills {
			w.killAfter(t, hold, 5<<20+rand.Int64N(15<<20))
		} else {
			store = openStore(t, w.dir, streams)
			if err := store.Pull(t.Context(), hold); err != nil {
				t.Fatal(err)
			}
		}
		log.mu.Lock()
		for _, c := range m.Chunks {
			at, from := before[c.Content], log.from[c.Blob]
			if at < 0 && len(from) > 0 || at >= 0 && len(from) > 0 && from[0] != at {
				t.Errorf("round %d: layer %d was asked for from %v on; the journal was at %d", round, c.Layer, from, at)
			}
		}
		log.mu.Unlock()
	}
	checkDisk(t, store, hold.Digest, disk)
	_, sent := w.reg.Counts().Total()
	image := m.Bytes() + m.Config.Size + m.NVRAM.Size + int64(len(m.Raw))
	if sent > image+kills*streams*lost {
		t.Errorf("%d bytes were sent for an image of %d; want at most %d more", sent, image, kills*streams*lost)
	}
	t.Logf("%d bytes were sent for an image of %d: %.1f MiB for each connection killed", sent, image, float64(sent-image)/kills/streams/(1<<20))
}

// killAfter pulls in another process, and kills it when so many bytes have been sent.
func (w *world) killAfter(t *testing.T, hold fleet.Hold, bytes int64) {
	t.Helper()
	_, before := w.reg.Counts().Total()
	victim := child(t, t.Name(), childDir+"="+w.dir, childRef+"="+hold.Ref, childDigest+"="+string(hold.Digest))
	var said strings.Builder
	victim.Stdout = &said
	if err := victim.Start(); err != nil {
		t.Fatal(err)
	}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(time.Minute); ; <-tick.C {
		if _, now := w.reg.Counts().Total(); now-before >= bytes || time.Now().After(deadline) {
			break
		}
	}
	if err := victim.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	var exit *exec.ExitError
	if err := victim.Wait(); !errors.As(err, &exit) || exit.Exited() {
		t.Fatalf("the victim ended by itself: %v\n%s", err, said.String())
	}
}

// Over a slow line, chunks of 1 MiB that come by two streams are noted before the first of
// them is whole: what a killed process (-9) leaves is listed, and a plan counts on it.
func TestSlowPullWasListedAsNothing(t *testing.T) {
	if dir := os.Getenv(childDir); dir != "" {
		hold := fleet.Hold{Ref: os.Getenv(childRef), Digest: fleet.Digest(os.Getenv(childDigest))}
		err := openStore(t, dir, 2).Pull(t.Context(), hold)
		t.Fatalf("the pull that was to be killed ended: %v", err)
	}
	w := newWorld(t)
	if err := w.store.Close(); err != nil {
		t.Fatal(err)
	}
	hold, _, m := w.pushSized(t, "base", "ab", 1<<20)
	w.reg.Limit(100 << 10) // about a quarter of a minute
	victim := child(t, t.Name(), childDir+"="+w.dir, childRef+"="+hold.Ref, childDigest+"="+string(hold.Digest))
	if err := victim.Start(); err != nil {
		t.Fatal(err)
	}
	seen := func() (cache.Seen, bool) {
		i, err := look(t, w.dir).Image(hold.Digest)
		return i, err == nil && i.Done > 0
	}
	eventually(t, func() bool { _, any := seen(); return any })
	if err := victim.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = victim.Wait() // killed
	for content, at := range marks(t, w.dir, hold.Digest) {
		if at < 0 {
			t.Errorf("chunk %s was whole before anything was noted", content.Short())
		}
	}
	i, any := seen()
	plan, err := look(t, w.dir).Plan(m)
	if err != nil {
		t.Fatal(err)
	}
	if !any || plan.Kept != i.Done || plan.Requests >= m.Bytes() || plan.Requests < m.Bytes()-plan.Kept {
		t.Errorf("listed with %d bytes; the plan keeps %d and requests %d of %d", i.Done, plan.Kept, plan.Requests, m.Bytes())
	}
}
