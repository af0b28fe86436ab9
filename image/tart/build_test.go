package tart

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

var update = flag.Bool("update", false, "write the golden files anew")

// shelf keeps what is put, and refuses what is not as described or comes twice.
type shelf struct {
	mu    sync.Mutex
	blobs map[fleet.Digest][]byte
}

func (s *shelf) put(_ context.Context, l Layer) error {
	var data []byte
	for range 2 { // a push that is tried again opens it again
		var err error
		data, err = l.Bytes()
		if err != nil || image.DigestOf(data) != l.Digest || int64(len(data)) != l.Size {
			return fmt.Errorf("%s is not what its descriptor says: %w", l.Digest, err)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, twice := s.blobs[l.Digest]; twice {
		return fmt.Errorf("%s put twice", l.Digest)
	}
	s.blobs[l.Digest] = data
	return nil
}

// make builds an image on an empty shelf.
func (s *shelf) make(t *testing.T, src Source) ([]byte, *image.Manifest) {
	t.Helper()
	s.blobs = map[fleet.Digest][]byte{}
	raw, err := Build(t.Context(), src, s.put)
	if err != nil {
		t.Fatal(err)
	}
	m, _, err := image.Parse(raw, codecs)
	if err != nil {
		t.Fatal(err)
	}
	return raw, m
}

// disk is what an image's blobs on the shelves decode to.
func disk(t *testing.T, m *image.Manifest, blobs ...map[fleet.Digest][]byte) []byte {
	t.Helper()
	var back bytes.Buffer
	for _, c := range m.Chunks {
		for _, on := range blobs {
			if blob, ok := on[c.Blob]; ok {
				if err := image.Decode(Codec{}, &back, bytes.NewReader(blob), c); err != nil {
					t.Fatal(err)
				}
				break
			}
		}
	}
	return back.Bytes()
}

// linux is a VM config that needs no hardware identity.
func linux() *Config { return &Config{Version: 1, OS: "linux", CPUCount: 2, MemorySize: 1 << 30} }

// chunkSize is of no round number: blocks and holes are not aligned to it.
const chunkSize = 200_000

// someDisk has distinct, doubled and zero chunks; the last is short.
func someDisk() []byte {
	return slices.Concat(noise(1, chunkSize), make([]byte, chunkSize), noise(2, chunkSize), noise(1, chunkSize), bytes.Repeat([]byte("paddock "), 777))
}

func someSource(content []byte) Source {
	return Source{Config: linux(), NVRAM: []byte("nvram"), Disk: bytes.NewReader(content), ChunkSize: chunkSize, UploadTime: time.Unix(1, 0)}
}

// An image made here reads back to the same disk, and is the same however many make it.
func TestBuildRoundTrip(t *testing.T) {
	content, s := someDisk(), &shelf{}
	source := someSource(content)
	raw, m := s.make(t, source)
	if len(m.Chunks) != 5 || len(m.Distinct()) != 3 || !m.Chunks[1].Zero || m.DiskSize != int64(len(content)) {
		t.Fatalf("%d chunks, %d distinct, second zero %v, %d bytes", len(m.Chunks), len(m.Distinct()), m.Chunks[1].Zero, m.DiskSize)
	}
	if !bytes.Equal(disk(t, m, s.blobs), content) {
		t.Error("the disk that was read back differs")
	}
	blobs := s.blobs
	source.Workers = 8
	if again, _ := s.make(t, source); !bytes.Equal(again, raw) {
		t.Error("eight workers made another manifest")
	}
	if diff := cmp.Diff(blobs, s.blobs); diff != "" {
		t.Error("eight workers made other blobs")
	}
}

// The next version of an image takes its parent's blobs over as they stand, though they
// were encoded otherwise; where it may not, it makes its own.
func TestBuildOnParent(t *testing.T) {
	parent, s := &shelf{}, &shelf{}
	content := someDisk()
	_, m := parent.make(t, someSource(content))
	// The parent's first chunk as another tool encoded it: as stored blocks.
	var other []byte
	for block := range slices.Chunk(content[:chunkSize], 1000) {
		other = append(other, stored(block)...)
	}
	other = append(other, magicEnd...)
	for _, i := range []int{0, 3} {
		m.Chunks[i].Blob, m.Chunks[i].BlobSize = image.DigestOf(other), int64(len(other))
	}
	parent.blobs[image.DigestOf(other)] = other
	copy(content[2*chunkSize:], "changed")
	for _, workers := range []int{0, 4} {
		for _, mounts := range []bool{true, false} {
			source := someSource(content)
			source.Parent, source.Workers = m, workers
			var mu sync.Mutex
			asked := map[fleet.Digest]int{}
			source.Reuse = func(_ context.Context, c image.Chunk) (bool, error) {
				mu.Lock()
				defer mu.Unlock()
				asked[c.Blob]++
				return mounts, nil
			}
			_, next := s.make(t, source)
			fresh := 0
			for _, c := range next.Distinct() {
				if _, put := s.blobs[c.Blob]; put {
					fresh++
				}
			}
			want := map[fleet.Digest]int{image.DigestOf(other): 1, m.Chunks[1].Blob: 1, m.Chunks[4].Blob: 1}
			if diff := cmp.Diff(want, asked); diff != "" {
				t.Errorf("workers %d: asked to mount: %s", workers, diff)
			}
			if taken := next.Chunks[0].Blob == image.DigestOf(other); taken != mounts || mounts && fresh != 1 || !mounts && fresh != 3 {
				t.Errorf("workers %d, mounts %v: %d disk layers were pushed anew, the first taken over: %v", workers, mounts, fresh, taken)
			}
			if !bytes.Equal(disk(t, next, s.blobs, parent.blobs), content) {
				t.Errorf("workers %d, mounts %v: the disk that was read back differs", workers, mounts)
			}
		}
	}
}

// A parent that lies about a chunk's size is not taken at its word.
func TestBuildOnLyingParent(t *testing.T) {
	parent, s := &shelf{}, &shelf{}
	_, m := parent.make(t, someSource(someDisk()))
	m.Chunks[0].Size /= 2
	source := someSource(someDisk())
	source.Parent = m
	source.Reuse = func(context.Context, image.Chunk) (bool, error) { return true, nil }
	_, next := s.make(t, source)
	if got := next.Chunks[0].Size; got != chunkSize {
		t.Errorf("the first chunk has %d bytes, want %d", got, chunkSize)
	}
	if !bytes.Equal(disk(t, next, s.blobs, parent.blobs), someDisk()) {
		t.Error("the disk that was read back differs")
	}
}

// sparseDisk says where it is empty, and does not like to be read there.
type sparseDisk struct {
	*bytes.Reader
	from, to int64 // the hole
	read     func(offset, size int64)
}

func (d sparseDisk) Zero(offset, size int64) bool { return offset >= d.from && offset+size <= d.to }

func (d sparseDisk) ReadAt(b []byte, at int64) (int, error) {
	d.read(at, int64(len(b)))
	return d.Reader.ReadAt(b, at)
}

// What the disk knows to be empty is not read: neither chunks nor parts of them. The image
// is the same.
func TestBuildDoesNotReadHoles(t *testing.T) {
	content := someDisk()
	clear(content[chunkSize : 3*chunkSize-500])
	s := &shelf{}
	want, _ := s.make(t, someSource(content))
	source := someSource(content)
	var inside int64
	source.Disk = sparseDisk{bytes.NewReader(content), chunkSize, 3*chunkSize - 500, func(at, n int64) {
		inside += max(0, min(at+n, 3*chunkSize-500)-max(at, chunkSize))
	}}
	got, _ := s.make(t, source)
	if !bytes.Equal(got, want) {
		t.Error("another image came of the same disk")
	}
	// The last block of the third chunk is empty but its end, and read as a whole.
	if limit := int64(window); inside > limit {
		t.Errorf("%d bytes of the hole were read, at most %d have to be", inside, limit)
	}
}

// bigDisk is larger than what is kept in memory, and generated as it is read. After spoil
// bytes were read of it, it changes.
type bigDisk struct {
	size  int64
	spoil int64
	seen  int64
}

func (d *bigDisk) Size() int64 { return d.size }

func (d *bigDisk) ReadAt(b []byte, at int64) (int, error) {
	block := noise(uint64(at>>16), len(b))
	n := copy(b, block[:min(int64(len(b)), d.size-at)])
	d.seen += int64(n)
	if d.spoil > 0 && d.seen > d.spoil {
		b[0]++
	}
	return n, nil
}

// A chunk that does not fit in what may be held is encoded again for its upload, and fails
// it if the disk is not what it was. Neither takes memory.
func TestBuildOfLargeChunks(t *testing.T) {
	const size = 6 * holdBytes
	var before, after runtime.MemStats
	source := Source{Config: linux(), NVRAM: []byte("n"), Disk: &bigDisk{size: size}, ChunkSize: size}
	count := func(_ context.Context, l Layer) error {
		r, err := l.Open()
		if err != nil {
			return err
		}
		n, err := io.Copy(io.Discard, r)
		if err == nil && n != l.Size {
			err = fmt.Errorf("%d bytes, its descriptor says %d", n, l.Size)
		}
		return errors.Join(err, r.Close())
	}
	runtime.GC()
	runtime.ReadMemStats(&before)
	if _, err := Build(t.Context(), source, count); err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	// The noise of two readings, what was kept in growing buffers, and little more.
	if got := int64(after.TotalAlloc - before.TotalAlloc); got > 2*size+6*holdBytes {
		t.Errorf("allocated %d bytes for a chunk of %d", got, size)
	}
	source.Disk = &bigDisk{size: size, spoil: size + size/2}
	if _, err := Build(t.Context(), source, count); !errors.Is(err, errChanged) {
		t.Errorf("the disk changed between hashing and upload: %v", err)
	}
	// With a parent, its content is looked at before.
	source.Disk, source.Parent = &bigDisk{size: size, spoil: size + size/2}, &image.Manifest{}
	if _, err := Build(t.Context(), source, count); !errors.Is(err, errChanged) {
		t.Errorf("the disk changed between the looks at its content: %v", err)
	}
}

// short ends before its size.
type short struct{ *bytes.Reader }

func (s short) Size() int64 { return s.Reader.Size() + 1 }

func TestBuildRefusals(t *testing.T) {
	mine := errors.New("registry is full")
	put := func(context.Context, Layer) error { return nil }
	for name, test := range map[string]struct {
		spoil func(*Source)
		put   func(context.Context, Layer) error
		want  error
		text  string
	}{
		"no disk":        {func(s *Source) { s.Disk = bytes.NewReader(nil) }, put, image.ErrTooLarge, "a disk of 0 bytes"},
		"no NVRAM":       {func(s *Source) { s.NVRAM = nil }, put, image.ErrTooLarge, "NVRAM of 0 bytes"},
		"negative chunk": {func(s *Source) { s.ChunkSize = -1 }, put, image.ErrTooLarge, "chunks of -1 bytes"},
		"many chunks":    {func(s *Source) { s.ChunkSize = 10 }, put, image.ErrTooLarge, "make them larger"},
		"bad config":     {func(s *Source) { s.Config = &Config{Version: 1, OS: "beos"} }, put, image.ErrMalformed, "beos"},
		"asif":           {func(s *Source) { s.Config = &Config{Version: 1, OS: "linux", DiskFormat: "asif"} }, put, image.ErrASIF, "raw disk"},
		"shrunk":         {func(s *Source) { s.Disk = short{bytes.NewReader(someDisk())} }, put, errShort, "disk chunk 4 (offset 800000)"},
		"put fails":      {func(*Source) {}, func(context.Context, Layer) error { return mine }, mine, "putting " + MediaTypeConfig},
		"put of a chunk fails": {func(s *Source) { s.Workers = 3 }, func(_ context.Context, l Layer) error {
			if l.MediaType == MediaTypeDisk {
				return mine
			}
			return nil
		}, mine, "disk chunk"},
		"mounting fails": {func(s *Source) {
			_, s.Parent = (&shelf{}).make(t, someSource(someDisk()))
			s.Reuse = func(context.Context, image.Chunk) (bool, error) { return false, mine }
		}, put, mine, "disk chunk 0"},
	} {
		source := someSource(someDisk())
		test.spoil(&source)
		if _, err := Build(t.Context(), source, test.put); !errors.Is(err, test.want) || !strings.Contains(err.Error(), test.text) {
			t.Errorf("%s: %v; want %v with %q", name, err, test.want, test.text)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Build(ctx, someSource(someDisk()), put); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// The golden files are an image as it was made when they were written: its blobs must
// decode for ever, and what is made today shares them with what is at registries. If the
// encoder is meant to change, write them anew with -update.
func TestGolden(t *testing.T) {
	content := slices.Concat(noise(1, 70_000), bytes.Repeat([]byte("warm runners "), 9_000), make([]byte, 100_000))[:256<<10]
	s := &shelf{}
	raw, m := s.make(t, Source{Config: linux(), NVRAM: []byte("nvram"), Disk: bytes.NewReader(content), ChunkSize: 128 << 10, UploadTime: time.Unix(1, 0)})
	files := map[string][]byte{"manifest.json": raw}
	for i, c := range m.Chunks {
		files[fmt.Sprintf("chunk%d.lz4", i)] = s.blobs[c.Blob]
	}
	stored := map[fleet.Digest][]byte{}
	for name, made := range files {
		path := filepath.Join("testdata", "golden", name)
		if *update {
			if err := os.WriteFile(path, made, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		stored[image.DigestOf(want)] = want
		if !bytes.Equal(made, want) {
			t.Errorf("%s: what is made today differs from it", name)
		}
	}
	golden, err := os.ReadFile(filepath.Join("testdata", "golden", "manifest.json"))
	if err != nil {
		t.Fatal(err)
	}
	if m, _, err = image.Parse(golden, codecs); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(disk(t, m, stored), content) {
		t.Error("the golden blobs decode to another disk")
	}
}
