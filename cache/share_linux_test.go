package cache_test

import (
	"bytes"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/cache/registry"
	"github.com/paddock-ci/paddock/cache/registrytest"
	"github.com/paddock-ci/paddock/fleet"
)

// onXFS runs a test in a process whose mount namespace has an xfs, which can share blocks,
// at the directory it returns; "" in the process that only waits for that one. The mount
// and its loop device go with the process, however it ends.
func onXFS(t *testing.T) string {
	t.Helper()
	if dir := os.Getenv(childDir); dir != "" {
		disk := dir + ".img" // of the least size that xfs takes; nearly all of it is a hole
		for _, command := range [][]string{
			{"truncate", "-s", "400M", disk},
			{"/sbin/mkfs.xfs", "-q", "-m", "reflink=1", disk},
			{"mount", "-o", "loop", disk, dir},
		} {
			if out, err := exec.CommandContext(t.Context(), command[0], command[1:]...).CombinedOutput(); err != nil {
				t.Fatalf("%v: %v\n%s", command, err, out)
			}
		}
		return dir
	}
	if os.Getuid() != 0 {
		t.Skip("only root can mount a file system that shares blocks; run this test as root")
	}
	dir := filepath.Join(t.TempDir(), "xfs")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := child(t, t.Name(), childDir+"="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS} // with mounts made private
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Fatalf("%v\n%s", err, out)
	}
	return ""
}

// used is the space taken on a file system, in bytes, once all of it is written.
func used(t *testing.T, dir string) int64 {
	t.Helper()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		t.Fatal(err)
	}
	var s syscall.Statfs_t
	if err := syscall.Statfs(dir, &s); err != nil {
		t.Fatal(err)
	}
	return int64(s.Blocks-s.Bfree) * s.Bsize
}

// Where blocks can be shared, a next tag begins as a clone of the cached image that is
// closest to it, chunks at other offsets share their blocks too, and a clone for a VM
// costs next to nothing.
func TestSharedBlocks(t *testing.T) {
	dir := onXFS(t)
	if dir == "" {
		return
	}
	const chunk = 1 << 20
	if shared, err := cache.CanShare(dir); err != nil || !shared {
		t.Fatalf("xfs with reflink cannot share blocks: %v", err)
	}
	w := newWorld(t)
	client, err := registry.New(registry.Config{Tries: 3, Pause: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	store, err := cache.Open(cache.Config{
		Dir: filepath.Join(dir, "store"), Sources: []cache.Source{client}, Log: slog.New(slog.NewTextHandler(&log, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = store.Close() }()
	// far has fewer equal chunks at equal offsets than base.
	far, farDisk, _ := w.pushSized(t, "far", "abzzzzzz00qrst", chunk)
	base, baseDisk, bm := w.pushSized(t, "base", "abcdefgh00klmn", chunk)
	again, disk, m := w.pushSized(t, "next", "abcdefXh00nm0l", chunk)
	if err := store.Pull(t.Context(), far); err != nil {
		t.Fatal(err)
	}
	if err := store.Pull(t.Context(), base); err != nil {
		t.Fatal(err)
	}
	before := used(t, dir)
	w.reg.Reset()
	// The one new chunk is cut in its middle once: what is resumed lies in a cloned disk.
	w.reg.Break(m.Chunks[6].Blob, registrytest.Fault{Kind: registrytest.Drop, At: 300_000, Times: 1})
	if err := store.Pull(t.Context(), again); err != nil {
		t.Fatal(err)
	}
	checkDisk(t, store, again.Digest, disk)
	checkDisk(t, store, base.Digest, baseDisk)
	checkDisk(t, store, far.Digest, farDisk)
	want := []string{string(m.Chunks[6].Blob), string(m.NVRAM.Digest)}
	var got []string
	for _, d := range w.asked(again) {
		got = append(got, string(d))
	}
	slices.Sort(want)
	if !slices.Equal(got, want) || len(missing(m, bm)) != 2 {
		t.Errorf("asked for %v; want %v", got, want)
	}
	if !strings.Contains(log.String(), "begins as a clone\" image="+string(again.Digest)+" base="+string(base.Digest)) {
		t.Errorf("the next tag did not begin as a clone of the closest image:\n%s", &log)
	}
	// One chunk is new, and three quarters of it are not zero. xfs may keep some blocks
	// for files that grow; one chunk is for slack, where eleven are shared.
	if grew := used(t, dir) - before; grew > 2*chunk {
		t.Errorf("the next tag took %d bytes of disk; want one chunk of %d", grew, chunk)
	}
	release, err := store.Lease(again.Digest, "vm")
	if err != nil {
		t.Fatal(err)
	}
	before = used(t, dir)
	if err := store.Clone(t.Context(), again.Digest, filepath.Join(dir, "clone"), 64<<20); err != nil {
		t.Fatal(err)
	}
	if grew := used(t, dir) - before; grew > chunk {
		t.Errorf("a clone took %d bytes of disk", grew)
	}
	info, err := os.Stat(filepath.Join(dir, "clone", "disk.img"))
	if err != nil || info.Size() != 64<<20 {
		t.Errorf("the clone: %v, %v", info, err)
	}
	if err := release(); err != nil {
		t.Error(err)
	}
}

// Three images share the blocks of a chunk that has rotted in all of them, and Verify has
// named it in the first. Its repair took the chunk from the others, whose blocks nobody had
// hashed: now it is fetched, also when the process has ended meanwhile, and a new tag that
// begins as a clone of any of them gets the good one.
func TestRepairTookSharedRot(t *testing.T) {
	dir := onXFS(t)
	if dir == "" {
		return
	}
	for _, again := range []bool{false, true} {
		w := newWorld(t)
		home := filepath.Join(dir, map[bool]string{false: "kept", true: "again"}[again])
		store := openStore(t, home, 0)
		base, disk, m := w.pushSized(t, "base", "abcd", 1<<20)
		next, _, _ := w.pushSized(t, "next", "abcX", 1<<20)
		moved, _, _ := w.pushSized(t, "moved", "Ycab", 1<<20)
		if err := store.Pull(t.Context(), base); err != nil {
			t.Fatal(err)
		}
		path, err := store.Path(base.Digest)
		if err != nil {
			t.Fatal(err)
		}
		spoil(t, filepath.Join(path, "disk.img"), m.Chunks[2].Offset+5)
		for _, h := range []fleet.Hold{next, moved} {
			if err := store.Pull(t.Context(), h); err != nil {
				t.Fatal(err)
			}
			checkFlaws(t, home, h.Digest, 1) // it shares them
		}
		if err := store.Repair(base.Digest, checkFlaws(t, home, base.Digest, 1)); err != nil {
			t.Fatal(err)
		}
		if again {
			if err := store.Close(); err != nil {
				t.Fatal(err)
			}
			store = openStore(t, home, 0)
		} else {
			last, lastDisk, _ := w.pushSized(t, "last", "abcZ", 1<<20)
			if err := store.Pull(t.Context(), last); err != nil {
				t.Fatal(err)
			}
			checkDisk(t, store, last.Digest, lastDisk)
		}
		w.reg.Reset()
		if err := store.Pull(t.Context(), base); err != nil {
			t.Fatal(err)
		}
		checkDisk(t, store, base.Digest, disk)
		if asked := w.asked(base); again && (len(asked) != 1 || asked[0] != m.Chunks[2].Blob) {
			t.Errorf("asked for %v; want the bad chunk alone", asked)
		}
		if err := store.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
