package cache_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/cache/registry"
	"github.com/paddock-ci/paddock/fleet"
)

// counted is a source that counts the bytes that are read of it.
type counted struct {
	cache.Source
	bytes atomic.Int64
}

func (c *counted) Open(ctx context.Context, w cache.Want, from int64) (io.ReadCloser, error) {
	body, err := c.Source.Open(ctx, w, from)
	return &countedBody{body, &c.bytes}, err
}

type countedBody struct {
	io.ReadCloser
	bytes *atomic.Int64
}

func (b *countedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.bytes.Add(int64(n))
	return n, err
}

// A disk that is full at any moment of a pull: a tmpfs in a process with a mount namespace
// of its own, for an image of twelve chunks of 1 MiB, with room for nothing at first and
// then for 192 KiB more at a time. Each time the error says so, nothing is published, and
// what fitted is kept; at the end the image is right, and no byte came twice but what the
// two streams had not written when the disk was full.
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
		t.Logf("%s", out)
		return
	}
	const step, streams = 192 << 10, 2
	room := func(flags uintptr, bytes int64) {
		t.Helper()
		if err := syscall.Mount("tmpfs", dir, "tmpfs", flags, fmt.Sprintf("size=%d", bytes)); err != nil {
			t.Fatalf("giving the disk %d bytes: %v", bytes, err)
		}
	}
	size := int64(64 << 10) // for the directories
	room(0, size)
	w := newWorld(t)
	hold, disk, m := w.pushSized(t, "base", "abc0defghijkl", 1<<20)
	client, err := registry.New(registry.Config{Tries: 3, Pause: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	source := &counted{Source: client}
	var store *cache.Store
	full, done := 0, int64(0)
	for {
		store, err = cache.Open(cache.Config{Dir: dir, Sources: []cache.Source{source}, Streams: streams, Backoff: time.Nanosecond})
		if err == nil {
			if err = store.Pull(t.Context(), hold); err == nil {
				break
			}
			done = checkFull(t, store, dir, err, done)
			if err := store.Close(); err != nil {
				t.Fatal(err)
			}
		} else if !errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("opening the store on a full disk: %v", err)
		}
		full++
		size += step
		room(syscall.MS_REMOUNT, size)
	}
	defer func() { _ = store.Close() }()
	checkDisk(t, store, hold.Digest, disk)
	// Of each chunk three quarters are not zero.
	if least := int(12 << 20 * 3 / 4 / step / 2); full < least {
		t.Errorf("the disk was full %d times; want at least %d, or nothing was tried", full, least)
	}
	// Each time, a stream loses what it read ahead and the block that did not fit.
	image := m.Bytes() + m.Config.Size + m.NVRAM.Size
	if got, most := source.bytes.Load(), image+int64(full)*streams*(128<<10+1<<16+1<<12); got < image || got > most {
		t.Errorf("%d bytes came in all; want %d to %d", got, image, most)
	}
	t.Logf("full %d times; %d bytes came for %d", full, source.bytes.Load(), image)
}

// checkFull checks what a pull leaves that found the disk full, and that it is not less than
// before.
func checkFull(t *testing.T, store *cache.Store, dir string, err error, before int64) (done int64) {
	t.Helper()
	if cache.ClassOf(err) != cache.ClassDisk || !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), "evict images") {
		t.Fatalf("got %v (class %s); want class disk with a hint", err, cache.ClassOf(err))
	}
	i := only(t, store)
	if i.State != fleet.ImageFailed || i.Class != "disk" || i.Done < before || published(t, dir) != 0 {
		t.Errorf("listed as %+v after %d bytes were done, %d published", i, before, published(t, dir))
	}
	if left, err := filepath.Glob(filepath.Join(dir, "*", "*", "*.new")); err != nil || len(left) > 0 {
		t.Errorf("left %v (%v)", left, err)
	}
	return i.Done
}
