package cache

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// copiesAtOnce is how many chunks are copied from cached images at a time: one disk is
// read and written, which more would only make seek. copyBuffer is what each has in memory.
const (
	copiesAtOnce = 2
	copyBuffer   = 256 << 10
)

// reuseBase finds the ready image whose disk is the best to begin with: dir has its
// disk.img, same are the chunks that are at the same offsets in both, zero ones too. What
// is journalled of them is told to has and counted by reused. release, if ok, is called
// when the disk is cloned, or not.
func (f *fetch) reuseBase(ctx context.Context) (base fleet.Digest, dir string, same []image.Chunk, release func(), ok bool) {
	s := f.store
	if ctx.Err() != nil || !s.canShare() {
		return "", "", nil, nil, false
	}
	s.studyAll() // begin comes later
	s.mu.Lock()
	defer s.mu.Unlock()
	var best *entry
	var most int64
	for _, e := range s.images {
		if e.State != fleet.ImageReady || e.holding == nil || e == f.entry {
			continue
		}
		// Of equals the first by name, so that the same cache gives the same base.
		n := weight(common(e.holding.chunks, f.image.Chunks))
		if n > most || n == most && best != nil && e.Digest < best.Digest {
			best, most = e, n
		}
	}
	if best == nil {
		return "", "", nil, nil, false
	}
	same = common(best.holding.chunks, f.image.Chunks)
	s.log.Info("an image begins as a clone", "image", f.entry.Digest, "base", best.Digest, "same_bytes", most)
	return best.Digest, s.dir.image(best.Digest), same, s.pin(best), true
}

// common are the chunks of want that have holds at the same offset. Both have to say the
// same size: of two that do not, one lies, and the content it names goes on where its own
// chunk ends.
func common(have, want []image.Chunk) []image.Chunk {
	type spot struct {
		offset, size int64
		content      fleet.Digest
	}
	at := make(map[spot]bool, len(have))
	for _, c := range have {
		at[spot{c.Offset, c.Size, c.Content}] = !c.Legacy()
	}
	var same []image.Chunk
	for _, c := range want {
		if !c.Legacy() && at[spot{c.Offset, c.Size, c.Content}] {
			same = append(same, c)
		}
	}
	return same
}

// weight is how many bytes of chunks are not holes.
func weight(chunks []image.Chunk) int64 {
	var sum int64
	for _, c := range chunks {
		if !c.Zero {
			sum += c.Size
		}
	}
	return sum
}

// studyAll reads what the ready images are made of, where it is not known.
func (s *Store) studyAll() {
	for _, i := range s.List() {
		if err := s.study(i.Digest); err != nil {
			s.log.Warn("an image cannot be reused", "image", i.Digest, "error", err)
		}
	}
}

// local copies a piece from a ready image to its offsets in a file, and verifies it; what
// it leaves if it is not done reads as zeros. It counts the progress; the caller journals
// and tells has.
func (f *fetch) local(ctx context.Context, c image.Chunk, file *os.File, offsets []int64) (done bool, err error) {
	if c.Zero || c.Legacy() {
		return false, nil
	}
	src, from, release, ok := f.cached(c)
	if !ok {
		return false, nil
	}
	defer release()
	defer func() { _ = src.Close() }()
	select {
	case f.store.copies <- struct{}{}:
		defer func() { <-f.store.copies }()
	case <-ctx.Done():
		return false, ctx.Err()
	}
	shared, err := share(file, src, from.offset, offsets, c.Size)
	if err != nil {
		return false, diskError(err)
	}
	if shared < len(offsets) {
		out := &sparseWriter{file: file, offsets: offsets}
		if c.Index >= 0 { // the others are small, and written as they are
			out.clean = shared == 0 && f.partial.clean(file, offsets, c.Size) || punch(file, offsets, c.Size)
		}
		if err := copyVerified(ctx, out, io.NewSectionReader(src, from.offset, from.size), c.Content); err != nil {
			return false, f.suspect(src.Name(), c, file, offsets, err)
		}
	}
	f.reused(c)
	return true, nil
}

// share makes a file share another one's blocks at its offsets, and returns at how many it
// could. Those are not hashed: they are the very blocks that were verified.
func share(file, src *os.File, from int64, offsets []int64, size int64) (int, error) {
	for i, offset := range offsets {
		if ok, err := reflinkRange(file, src, from, offset, size); err != nil || !ok {
			return i, err
		}
	}
	return len(offsets), nil
}

// cached opens the file of a ready image that has a piece's content, of that very size: a
// manifest that lies about it names what it has not got.
func (f *fetch) cached(c image.Chunk) (src *os.File, where place, release func(), ok bool) {
	s := f.store
	s.mu.Lock()
	var dir string
	for _, e := range s.images {
		if e.State != fleet.ImageReady || e.holding == nil {
			continue
		}
		if where, ok = e.holding.places[c.Content]; ok && where.size == c.Size {
			dir, release = s.dir.image(e.Digest), s.pin(e)
			break
		}
	}
	s.mu.Unlock()
	if release == nil {
		return nil, place{}, nil, false
	}
	src, err := os.Open(filepath.Join(dir, where.file))
	if err != nil {
		s.log.Warn("a cached image cannot be read", "path", dir, "error", err)
		release()
		return nil, place{}, nil, false
	}
	return src, where, release, true
}

// errSuspect marks content that is not what its image's manifest says.
var errSuspect = errors.New("the bytes on disk are not what was pulled")

// copyVerified copies and hashes in one pass.
func copyVerified(ctx context.Context, out io.Writer, in io.Reader, want fleet.Digest) error {
	content := sha256.New()
	b := make([]byte, copyBuffer)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := in.Read(b)
		content.Write(b[:n])
		if _, err := out.Write(b[:n]); err != nil {
			return err
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("%w: %w", errSuspect, err)
		}
	}
	if got := sum(content); got != want {
		return fmt.Errorf("%w: digest %s, want %s", errSuspect, got, want)
	}
	return nil
}

// suspect makes zeros of what was copied in vain. An image that turned out to be spoilt
// fails no pull: the chunk is fetched.
func (f *fetch) suspect(path string, c image.Chunk, file *os.File, offsets []int64, err error) error {
	if !errors.Is(err, errSuspect) {
		return err
	}
	for _, offset := range offsets {
		if err := blank(file, offset, c.Size); err != nil {
			return diskError(err)
		}
	}
	f.store.log.Warn("a cached image is suspect: verify it, or remove it", "path", path, "offset", c.Offset, "error", err)
	return nil
}

// tryShare reports whether the store's files can share blocks.
func (s *Store) tryShare() bool {
	// In the trash, which the next start empties if this is killed.
	shared, err := CanShare(filepath.Join(string(s.dir), "trash"))
	if err != nil {
		s.log.Warn("cannot find out whether files can share their blocks, so images are copied", "error", err)
	}
	return shared
}
