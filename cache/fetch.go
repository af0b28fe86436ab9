package cache

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sync/errgroup"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// readSize is how much is read of a body at a time: enough that taking the store's lock
// for each is nothing, and 8 streams of it are 1 MiB.
const readSize = 128 << 10

// fetch brings the parts of one image into its partial directory.
type fetch struct {
	store   *Store
	entry   *entry
	partial *partial
	turn    *turn
	ref     string

	image *image.Manifest
	codec image.Codec
}

// await returns when it is this pull's turn to move bytes.
func (f *fetch) await(ctx context.Context) error { return f.store.await(ctx, f.turn) }

// manifest reads the manifest from the partial directory, or fetches it there, and opens
// the disk. Nothing of a manifest that is no good is kept.
func (f *fetch) manifest(ctx context.Context) error {
	d := f.entry.Digest
	m, codec, err := f.store.readManifest(f.partial.dir, d)
	if err != nil {
		raw, err := f.fetchManifest(ctx)
		if err != nil {
			return fmt.Errorf("fetching the manifest: %w", err)
		}
		if got := image.DigestOf(raw); got != d {
			return &Error{Class: ClassDigest, Err: fmt.Errorf("the registry answered with another manifest: its digest is %s", got)}
		}
		if m, codec, err = image.Parse(raw, f.store.codecs); err != nil {
			return err
		}
		if err := writeFile(filepath.Join(f.partial.dir, manifestFile), raw); err != nil {
			return diskError(err)
		}
	}
	f.image, f.codec = m, codec
	return diskError(f.partial.openDisk(m.DiskSize))
}

// small brings the VM config, which may show that the rest is not worth fetching, and
// then the NVRAM.
func (f *fetch) small(ctx context.Context) error {
	if err := f.whole(ctx, aConfig, f.image.Config, configFile, f.codec.CheckConfig); err != nil {
		return err
	}
	return f.whole(ctx, anNVRAM, f.image.NVRAM, nvramFile, func([]byte) error { return nil })
}

// whole brings a blob that is a file as it is. Its size is within the limits of package
// image, so it fits in memory.
func (f *fetch) whole(ctx context.Context, kind string, b image.Blob, file string, check func([]byte) error) error {
	part, what := item{kind, b.Digest}, names[kind]
	info, err := os.Stat(filepath.Join(f.partial.dir, file))
	if err == nil && info.Size() == b.Size && f.partial.journal.has(part) {
		return nil
	}
	if err := f.await(ctx); err != nil {
		return err
	}
	if b.Digest == "" { // an image without it: an empty file stands for it in clones
		return diskError(writeFile(filepath.Join(f.partial.dir, file), nil))
	}
	w := Want{Ref: f.ref, Image: f.entry.Digest, Chunk: image.Chunk{
		Index: -1, Size: b.Size, Content: b.Digest, Blob: b.Digest, BlobSize: b.Size, MediaType: b.MediaType,
	}}
	body, err := f.open(ctx, w)
	if err != nil {
		return fmt.Errorf("fetching the %s (%s): %w", what, b.Digest.Short(), err)
	}
	defer func() { _ = body.Close() }()
	data, err := io.ReadAll(io.LimitReader(body, b.Size+1))
	if err != nil {
		return fmt.Errorf("fetching the %s (%s): %w", what, b.Digest.Short(), err)
	}
	if got := image.DigestOf(data); got != b.Digest {
		return &Error{Class: ClassDigest, Err: fmt.Errorf("%s: %d bytes came with digest %s, want %d bytes with %s", what, len(data), got, b.Size, b.Digest)}
	}
	if err := check(data); err != nil {
		return err
	}
	if err := writeFile(filepath.Join(f.partial.dir, file), data); err != nil {
		return diskError(err)
	}
	return diskError(f.partial.finished(nil, part))
}

// chunks brings every distinct chunk that is missing, several at a time, and writes it
// at every offset where it occurs. Chunks of zeros are holes already.
func (f *fetch) chunks(ctx context.Context) error {
	places := make(map[fleet.Digest][]int64)
	for _, c := range f.image.Chunks {
		places[c.Content] = append(places[c.Content], c.Offset)
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(f.store.streams)
	for _, c := range f.image.Distinct() {
		if f.partial.journal.has(item{aChunk, c.Content}) {
			continue
		}
		group.Go(func() error {
			if err := ctx.Err(); err != nil {
				return err // another chunk failed before this one began
			}
			if err := f.chunk(ctx, c, places[c.Content]); err != nil {
				return fmt.Errorf("layer %d (disk offset %d, blob %s): %w", c.Layer, c.Offset, c.Blob.Short(), err)
			}
			return nil
		})
	}
	return group.Wait()
}

// chunk brings one chunk: fetched, decoded, written and hashed twice in one pass.
func (f *fetch) chunk(ctx context.Context, c image.Chunk, offsets []int64) error {
	if err := f.await(ctx); err != nil {
		return err
	}
	out := &sparseWriter{file: f.partial.disk, offsets: offsets, clean: f.partial.fresh}
	if !out.clean {
		// A former try may have left anything here.
		out.clean = punch(f.partial.disk, offsets, c.Size)
	}
	body, err := f.open(ctx, Want{Ref: f.ref, Image: f.entry.Digest, Chunk: c})
	if err != nil {
		return err
	}
	defer func() { _ = body.Close() }()
	wire := &metered{
		await: func() error { return f.await(ctx) }, store: f.store, entry: f.entry,
		body: io.LimitReader(body, c.BlobSize+1), // one more shows that there is more
	}
	if err := f.transfer(c, wire, out); err != nil {
		wire.takeBack()
		return err
	}
	return diskError(f.partial.finished(f.partial.disk, item{aChunk, c.Content}))
}

// open opens a piece at the source that is chosen for it.
func (f *fetch) open(ctx context.Context, w Want) (io.ReadCloser, error) {
	s, err := f.choose(ctx, w, nil)
	if err != nil {
		return nil, err
	}
	defer s.ended(nil)
	return s.open(ctx, w, 0)
}

// transfer decodes a chunk from the wire to the disk and verifies both its digests.
func (f *fetch) transfer(c image.Chunk, wire io.Reader, out io.Writer) error {
	blob, content := sha256.New(), sha256.New()
	in := bufio.NewReaderSize(io.TeeReader(wire, blob), readSize)
	err := image.Decode(f.codec, io.MultiWriter(content, out), in, c)
	if err != nil && ClassOf(err) != ClassFormat {
		return err
	}
	// Read to the end also what does not decode: if the digest of the blob is wrong, the
	// bytes were spoilt on the way; if it is right, the image is bad as it was pushed.
	if _, rerr := io.Copy(io.Discard, in); rerr != nil {
		return errors.Join(err, rerr)
	}
	if got := sum(blob); got != c.Blob {
		wrong := fmt.Errorf("the blob's digest is %s, want %s: wrong or missing bytes came from the registry", got, c.Blob)
		if err != nil {
			wrong = fmt.Errorf("%w; %w", wrong, err)
		}
		return &Error{Class: ClassDigest, Err: wrong}
	}
	if err != nil {
		return err
	}
	if got := sum(content); got != c.Content {
		return &Error{Class: ClassDigest, Err: fmt.Errorf("the content's digest is %s, the manifest says %s: the image was pushed wrongly", got, c.Content)}
	}
	return nil
}

func sum(h hash.Hash) fleet.Digest {
	return fleet.Digest("sha256:" + hex.EncodeToString(h.Sum(nil)))
}

// sparseWriter writes a chunk at all its offsets at once and leaves zeros out, where
// there are none but zeros before.
type sparseWriter struct {
	file    *os.File
	offsets []int64
	clean   bool  // the regions read as zeros
	at      int64 // in the chunk
}

// hole is the piece in which zeros are looked for: the block size of APFS, ext4 and xfs.
const hole = 4096

var zeros [hole]byte

// Write implements io.Writer; its errors are of class disk.
func (w *sparseWriter) Write(b []byte) (int, error) {
	total := len(b)
	for len(b) > 0 {
		skip := 0
		if w.clean {
			skip = run(b, true)
		}
		w.at += int64(skip)
		b = b[skip:]
		n := len(b)
		if w.clean {
			n = run(b, false)
		}
		for _, offset := range w.offsets {
			if _, err := w.file.WriteAt(b[:n], offset+w.at); err != nil {
				return total - len(b), diskError(err)
			}
		}
		w.at += int64(n)
		b = b[n:]
	}
	return total, nil
}

// run is how many bytes at the start of b are pieces of zeros, or are none.
func run(b []byte, zero bool) int {
	n := 0
	for n < len(b) {
		piece := b[n:min(n+hole, len(b))]
		if bytes.Equal(piece, zeros[:len(piece)]) != zero {
			break
		}
		n += len(piece)
	}
	return n
}
