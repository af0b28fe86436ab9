package cache

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/paddock-ci/paddock/image/tart"
)

// A disk's holes are known, wherever they are, and an image of it is the same as of a disk
// that is read in full.
func TestRawDisk(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.img")
	const size = 8 << 20
	content := make([]byte, size)
	copy(content[1<<20:], bytes.Repeat([]byte("data"), 1<<18))
	copy(content[5<<20:], "and a little")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, at := range []int64{1 << 20, 5 << 20} {
		if _, err := f.WriteAt(bytes.TrimRight(content[at:at+1<<20], "\x00"), at); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	disk, err := OpenRawDisk(path)
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	for _, part := range []struct {
		from, size int64
		zero       bool
	}{
		{0, 1 << 20, true}, {0, 1<<20 + 1, false}, {1 << 20, 1, false}, {2 << 20, 3 << 20, true}, {2<<20 - 1, 2, false},
		{3 << 20, 1 << 20, true}, {5 << 20, 4, false}, {6 << 20, 2 << 20, true}, {0, size, false},
	} {
		if got := disk.Zero(part.from, part.size); got != part.zero {
			t.Errorf("%d bytes at %d are known to be zero: %v, want %v (of %v)", part.size, part.from, got, part.zero, disk.data)
		}
	}
	build := func(d tart.Disk) []byte {
		put := func(context.Context, tart.Layer) error { return nil }
		raw, err := tart.Build(t.Context(), tart.Source{Config: &tart.Config{Version: 1, OS: "linux"}, NVRAM: []byte("n"), Disk: d, ChunkSize: 1 << 20}, put)
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	if !bytes.Equal(build(disk), build(bytes.NewReader(content))) {
		t.Error("another image came of the same disk")
	}
	if _, err := OpenRawDisk(filepath.Dir(path) + "/none"); err == nil {
		t.Error("a disk that is not there was opened")
	}
}
