package cache_test

import (
	"errors"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/fleet"
)

// A disk that is full in the middle of a pull: a tmpfs of 448 KiB, in a process with a
// mount namespace of its own, for an image of eight chunks of 96 KiB. The error says so,
// nothing is published, the chunks that fitted are kept; with more room the pull goes on
// and asks for the others only.
func TestDiskFull(t *testing.T) {
	dir := os.Getenv(childDir)
	if dir == "" {
		cmd := child(t, "TestDiskFull", childDir+"="+t.TempDir())
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
			UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
		}
		out, err := cmd.CombinedOutput()
		if errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.ENOSPC) {
			t.Skipf("this kernel gives us no user namespace, and so no disk to fill: %v", err)
		}
		if err != nil || !strings.Contains(string(out), "--- PASS: TestDiskFull") {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=448k"); err != nil {
		t.Fatalf("mounting a small disk: %v", err)
	}
	w := newWorld(t)
	store := openStore(t, dir, 1) // one at a time, so that what fits is journalled
	hold, disk, m := w.push(t, "base", "abcdefgh")
	err := store.Pull(t.Context(), hold)
	if cache.ClassOf(err) != cache.ClassDisk || !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), "evict images") {
		t.Fatalf("got %v; want class disk with a hint", err)
	}
	i := only(t, store)
	if i.State != fleet.ImageFailed || i.Class != "disk" || i.Done == 0 || published(t, dir) != 0 {
		t.Errorf("listed as %+v, %d published", i, published(t, dir))
	}
	var kept int
	for sum := int64(0); sum < i.Done; kept++ {
		sum += m.Chunks[kept].BlobSize
	}
	w.reg.Reset()
	if err := syscall.Mount("", dir, "", syscall.MS_REMOUNT, "size=8m"); err != nil {
		t.Fatalf("making room: %v", err)
	}
	if err := store.Pull(t.Context(), hold); err != nil {
		t.Fatal(err)
	}
	checkDisk(t, store, hold.Digest, disk)
	if n, _ := w.reg.Counts().Total(); kept == 0 || n != len(m.Chunks)-kept {
		t.Errorf("%d requests after %d chunks were kept; want %d", n, kept, len(m.Chunks)-kept)
	}
}
