package cache

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// Flaw is a part of an image on disk that is not what the manifest says.
type Flaw struct {
	Kind   string       // chunk, config or nvram
	Layer  int          // among the manifest's layers, from 0
	Offset int64        // in the disk, in bytes; 0 for what is no chunk
	Size   int64        // in bytes
	Want   fleet.Digest // of the content
	Got    fleet.Digest // empty: it could not be read
	Err    error        // why it could not
	zero   bool         // what should be nothing but zeros
}

// String names the part and says what is wrong with it.
func (f Flaw) String() string {
	where := fmt.Sprintf("layer %d (%s", f.Layer, names[f.Kind])
	if f.Kind == aChunk {
		where = fmt.Sprintf("layer %d (disk offset %d, %d bytes", f.Layer, f.Offset, f.Size)
	}
	switch {
	case f.Err != nil:
		return fmt.Sprintf("%s): %v", where, f.Err)
	case f.zero:
		return where + "): not all zero, as it should be"
	default:
		return fmt.Sprintf("%s): content %s, want %s", where, f.Got.Short(), f.Want.Short())
	}
}

// ErrUnverifiable: the image's format says nothing of the disk's content.
var ErrUnverifiable = errors.New("images of the legacy format disk.v1 name no digest of the disk's content, so that only a new pull can verify them")

// Verify hashes again what is here of an image, on all cores, and returns what is not as
// the manifest says, in the order of the disk. Of an image that is here in part those
// parts are looked at that its journal promises. progress, unless it is nil, is called by
// one goroutine at a time, with bytes.
func (v *View) Verify(ctx context.Context, d fleet.Digest, progress func(done, total int64)) ([]Flaw, error) {
	i, err := v.Image(d)
	if err == nil {
		err = i.Err
	}
	if err == nil && i.Manifest == nil {
		err = ErrNotReady
	}
	if err != nil {
		return nil, fmt.Errorf("verifying image %s: %w", d.Short(), err)
	}
	flaws, err := verify(ctx, i, progress)
	if err != nil {
		return nil, fmt.Errorf("verifying image %s: %w", d.Short(), err)
	}
	return flaws, nil
}

func verify(ctx context.Context, i Seen, progress func(done, total int64)) ([]Flaw, error) {
	here := func(kind string, d fleet.Digest) bool { return i.Ready || i.journal.has(item{kind, d}) }
	disk, err := openPlain(filepath.Join(i.Dir, diskFile))
	if err == nil {
		defer func() { _ = disk.Close() }()
	}
	var small []Flaw
	for _, s := range smallFiles(i.Manifest) {
		if s.blob.Digest == "" || !here(s.kind, s.blob.Digest) {
			continue
		}
		if f := s.check(i.Dir); f != nil {
			small = append(small, *f)
		}
	}
	// From here on the disk can be read, wherever it goes. What was not found before that
	// may have been taken away, with all of the image.
	if info, serr := os.Lstat(i.Dir); serr != nil || !os.SameFile(info, i.info) {
		return nil, fmt.Errorf("it went away meanwhile: %w", ErrNotReady)
	}
	if err != nil {
		return nil, err
	}
	info, err := disk.Stat()
	if err != nil {
		return nil, err
	}
	var chunks []image.Chunk
	for _, c := range i.Manifest.Chunks {
		// Regions of zeros are never journalled: they are there as soon as the disk has its size.
		if i.Ready || c.Zero && info.Size() == i.Manifest.DiskSize || here(aChunk, c.Content) {
			chunks = append(chunks, c)
		}
	}
	flaws, err := hashChunks(ctx, disk, chunks, progress, func(image.Chunk) error { return nil })
	return append(flaws, small...), err
}

// hashChunks hashes chunks of a disk on all cores, and returns those that are wrong in
// the order in which they were given. right is told of the others, by several goroutines.
func hashChunks(ctx context.Context, disk *os.File, chunks []image.Chunk, progress func(done, total int64), right func(image.Chunk) error) ([]Flaw, error) {
	count := counting(chunks, progress)
	bad := make([]*Flaw, len(chunks))
	group, ctx := errgroup.WithContext(ctx)
	next := make(chan int)
	for range runtime.GOMAXPROCS(0) {
		group.Go(func() error {
			h := hasher{disk: disk, buffer: make([]byte, 1<<20), count: count}
			for n := range next {
				flaw, err := h.check(ctx, chunks[n])
				if err == nil && flaw == nil {
					err = right(chunks[n])
				}
				if err != nil {
					return err
				}
				bad[n] = flaw
			}
			return nil
		})
	}
	group.Go(func() error {
		defer close(next)
		for n := range chunks {
			select {
			case next <- n:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	})
	if err := group.Wait(); err != nil {
		return nil, err
	}
	var flaws []Flaw
	for _, f := range bad {
		if f != nil {
			flaws = append(flaws, *f)
		}
	}
	return flaws, nil
}

// counting returns what adds to the bytes that are done and tells of them.
func counting(chunks []image.Chunk, progress func(done, total int64)) func(n int64) {
	if progress == nil {
		return func(int64) {}
	}
	var mu sync.Mutex
	var done, total int64
	for _, c := range chunks {
		total += c.Size
	}
	return func(n int64) {
		mu.Lock()
		defer mu.Unlock()
		done += n
		progress(done, total)
	}
}

// hasher reads and hashes chunks, one after the other.
type hasher struct {
	disk   *os.File
	buffer []byte
	count  func(n int64)
}

// check compares a chunk on disk with its digest. A legacy chunk has none.
func (h *hasher) check(ctx context.Context, c image.Chunk) (*Flaw, error) {
	flaw := &Flaw{Kind: aChunk, Layer: c.Layer, Offset: c.Offset, Size: c.Size, Want: c.Content, zero: c.Zero}
	if c.Legacy() {
		return nil, ErrUnverifiable
	}
	if c.Zero && h.hole(c) {
		h.count(c.Size)
		return nil, ctx.Err()
	}
	content, clean := sha256.New(), true
	for at := int64(0); at < c.Size; {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		b := h.buffer[:min(c.Size-at, int64(len(h.buffer)))]
		n, err := h.disk.ReadAt(b, c.Offset+at)
		if n < len(b) {
			if errors.Is(err, io.EOF) {
				err = fmt.Errorf("the disk ends at %d: %w", c.Offset+at+int64(n), io.ErrUnexpectedEOF)
			}
			flaw.Err = err
			h.count(c.Size - at)
			return flaw, nil
		}
		if c.Zero {
			clean = clean && allZero(b)
		} else {
			_, _ = content.Write(b) // never fails
		}
		at += int64(n)
		h.count(int64(n))
	}
	if c.Zero {
		if !clean {
			return flaw, nil
		}
		return nil, nil
	}
	if flaw.Got = sum(content); flaw.Got != c.Content {
		return flaw, nil
	}
	return nil, nil
}

// allZero reports whether b is nothing but zeros.
func allZero(b []byte) bool {
	for len(b) > 0 {
		n := min(len(b), len(zeros))
		if !bytes.Equal(b[:n], zeros[:n]) {
			return false
		}
		b = b[n:]
	}
	return true
}

// hole reports whether a chunk has no data on disk, as far as the file system tells.
func (h *hasher) hole(c image.Chunk) bool {
	// Other goroutines move the file's position, too, but each learns of its own move.
	at, err := h.disk.Seek(c.Offset, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) { // no data up to the end: then the file must go that far
		info, err := h.disk.Stat()
		return err == nil && info.Size() >= c.Offset+c.Size
	}
	return err == nil && at >= c.Offset+c.Size
}

// small is a part of an image that is a file of its own.
type small struct {
	kind, file string
	layer      int
	blob       image.Blob
}

func smallFiles(m *image.Manifest) []small {
	return []small{{anNVRAM, nvramFile, m.NVRAMLayer, m.NVRAM}, {aConfig, configFile, m.ConfigLayer, m.Config}}
}

// read reads the file in a directory and holds it to its digest.
func (s small) read(dir string) ([]byte, *Flaw) {
	flaw := &Flaw{Kind: s.kind, Layer: s.layer, Size: s.blob.Size, Want: s.blob.Digest}
	f, err := openPlain(filepath.Join(dir, s.file))
	if err != nil {
		flaw.Err = err
		return nil, flaw
	}
	defer func() { _ = f.Close() }()
	data, err := io.ReadAll(io.LimitReader(f, s.blob.Size+1))
	if err != nil {
		flaw.Err = err
		return nil, flaw
	}
	if flaw.Got = image.DigestOf(data); flaw.Got != s.blob.Digest {
		return nil, flaw
	}
	return data, nil
}

func (s small) check(dir string) *Flaw {
	_, flaw := s.read(dir)
	return flaw
}

// openPlain opens a regular file for reading: no symlink, no pipe that would never end.
func openPlain(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, syscall.ELOOP) {
		return nil, fmt.Errorf("%s is a symbolic link, and files are wanted: %w", path, errNoImage)
	}
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is no file: %w", path, errNoImage)
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}
