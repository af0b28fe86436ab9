package cache

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
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
		n := weight(e.holding.common(f.image))
		if n > most || n == most && best != nil && e.Digest < best.Digest {
			best, most = e, n
		}
	}
	if best == nil {
		return "", "", nil, nil, false
	}
	same = best.holding.common(f.image)
	s.log.Info("an image begins as a clone", "image", f.entry.Digest, "base", best.Digest, "same_bytes", most)
	return best.Digest, s.dir.image(best.Digest), same, s.pin(best), true
}

// common are the chunks of m that the image has at the same offset, and in which no rot was
// found; Store.mu is held.
func (h *holding) common(m *image.Manifest) []image.Chunk {
	same := common(h.chunks, m.Chunks)
	return slices.DeleteFunc(same, func(c image.Chunk) bool { return h.doubted[c.Content] })
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
	if c.Zero || c.Legacy() || !f.isCached(c) {
		return false, nil
	}
	turn := &slot{fetch: f}
	defer turn.free()
	if err := turn.take(ctx); err != nil {
		return false, err
	}
	src, err := f.cached(c)
	if src == nil || err != nil {
		return false, err
	}
	defer src.close()
	keep := func() error { return turn.keep(ctx) }
	shared, tried, err := 0, f.store.canShare(), error(nil)
	if tried {
		// Blocks that are shared are the very ones that were verified, unless they are rotten.
		// A disk that was here before may have been taken out of use for its rot, which the
		// other images share that were cloned from it, or it from them.
		if f.partial.found || src.doubted {
			err = copyVerified(io.Discard, src.reader(), c.Content, keep)
		}
		if err == nil {
			if shared, err = share(file, src.file, src.offset, offsets, c.Size); err != nil {
				return false, diskError(err)
			}
		}
	}
	if err == nil && shared < len(offsets) {
		out := &sparseWriter{file: file, offsets: offsets}
		if c.Index >= 0 { // the others are small, and written as they are
			// A share that fails may have changed what is there.
			out.clean = !tried && f.partial.clean(file, offsets, c.Size) || punch(file, offsets, c.Size)
		}
		err = copyVerified(out, src.reader(), c.Content, keep)
	}
	if err != nil {
		return false, f.suspect(src, c, file, offsets, err)
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

// cachedPiece is a piece's content in the file of a ready image, which is pinned.
type cachedPiece struct {
	place
	entry   *entry
	file    *os.File
	holding *holding
	doubted bool // it may be rotten
	release func()
}

func (p *cachedPiece) reader() io.Reader { return io.NewSectionReader(p.file, p.offset, p.size) }

func (p *cachedPiece) close() {
	_ = p.file.Close() // only read
	p.release()
}

// isCached reports whether some ready image has a piece.
func (f *fetch) isCached(c image.Chunk) bool {
	f.store.mu.Lock()
	defer f.store.mu.Unlock()
	return f.store.whoHas(c) != nil
}

// whoHas finds a ready image that has a piece's content, of that very size: a manifest
// that lies about it names what it has not got. One in which it may be rotten is the last
// choice. s.mu is held.
func (s *Store) whoHas(c image.Chunk) (found *cachedPiece) {
	for _, e := range s.images {
		if e.State != fleet.ImageReady || e.holding == nil {
			continue
		}
		h := e.holding
		if where, ok := h.places[c.Content]; ok && where.size == c.Size && (found == nil || found.doubted) {
			found = &cachedPiece{place: where, entry: e, holding: h, doubted: h.doubted[c.Content]}
		}
	}
	return found
}

// cached opens what whoHas finds; nil: there is none (any more), or it cannot be read. A
// shortage of files is an error: it is no reason to fetch what is here.
func (f *fetch) cached(c image.Chunk) (*cachedPiece, error) {
	s := f.store
	s.mu.Lock()
	p := s.whoHas(c)
	if p == nil {
		s.mu.Unlock()
		return nil, nil
	}
	p.release = s.pin(p.entry)
	s.mu.Unlock()
	var err error
	p.file, err = os.Open(filepath.Join(s.dir.image(p.entry.Digest), p.place.file))
	if err == nil {
		return p, nil
	}
	p.release()
	if errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) {
		return nil, diskError(fmt.Errorf("%w; let this process open more files", err))
	}
	s.log.Warn("a cached image cannot be read", "image", p.entry.Digest, "error", err)
	return nil, nil
}

// errSuspect marks content that is not what its image's manifest says.
var errSuspect = errors.New("the bytes on disk are not what was pulled")

// copyVerified copies and hashes in one pass; it goes on as long as keep lets it.
func copyVerified(out io.Writer, in io.Reader, want fleet.Digest, keep func() error) error {
	content := sha256.New()
	b := make([]byte, copyBuffer)
	for {
		if err := keep(); err != nil {
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
// fails no pull: the chunk is fetched, and not taken from there again.
func (f *fetch) suspect(from *cachedPiece, c image.Chunk, file *os.File, offsets []int64, err error) error {
	if !errors.Is(err, errSuspect) {
		return err
	}
	for _, offset := range offsets {
		if err := blank(file, offset, c.Size); err != nil {
			return diskError(err)
		}
	}
	s := f.store
	s.mu.Lock()
	from.holding.doubted[c.Content] = true
	s.mu.Unlock()
	s.log.Warn("a cached image is suspect: verify it, or remove it", "path", from.file.Name(), "offset", from.offset, "error", err)
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
