package cache_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

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
