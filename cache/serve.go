package cache

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// holding is what an image is made of, and where it has it.
type holding struct {
	chunks []image.Chunk
	places map[fleet.Digest]place // by content
	// doubted are the contents that were found rotten here, or in an image that may share
	// their blocks. They are hashed before they are reused, and not served. Guarded by
	// Store.mu.
	doubted map[fleet.Digest]bool
}

// place is where an image has some content.
type place struct {
	item         item
	number       int    // of the piece, as nodes tell each other
	file         string // in the image's directory
	offset, size int64
}

// newHolding reads a manifest. Of equal contents the first counts, as in Manifest.Piece.
// The content of a legacy disk has no digest by which anyone could ask for it.
func newHolding(m *image.Manifest) *holding {
	h := &holding{chunks: m.Chunks, places: make(map[fleet.Digest]place, len(m.Chunks)+2), doubted: make(map[fleet.Digest]bool)}
	put := func(c image.Chunk, number int, file string) {
		if _, known := h.places[c.Content]; !known && c.Content != "" {
			h.places[c.Content] = place{itemOf(c), number, file, c.Offset, c.Size}
		}
	}
	for _, c := range m.Chunks {
		if !c.Legacy() {
			put(c, c.Index, diskFile)
		}
	}
	put(m.NVRAMChunk(), len(m.Chunks), nvramFile)
	put(m.ConfigChunk(), len(m.Chunks)+1, configFile)
	return h
}

// hold notes what a pull brings, and what of it is here.
func (s *Store) hold(f *fetch) {
	h := newHolding(f.image)
	have := h.here(f.partial.journal)
	s.mu.Lock()
	defer s.mu.Unlock()
	f.entry.holding, f.entry.have = h, have
}

// here are the contents that a journal promises.
func (h *holding) here(j *journal) map[fleet.Digest]bool {
	have := make(map[fleet.Digest]bool)
	for content, p := range h.places {
		if j.has(p.item) {
			have[content] = true
		}
	}
	return have
}

// held are the numbers of the pieces of a partial image that are here.
func (s *Store) held(e *entry) []int {
	s.mu.Lock()
	defer s.mu.Unlock()
	var numbers []int
	for content := range e.have {
		numbers = append(numbers, e.holding.places[content].number)
	}
	return numbers
}

// has notes that a piece is here, verified and in the journal, wherever it came from.
func (f *fetch) has(content fleet.Digest) {
	s, e := f.store, f.entry
	s.mu.Lock()
	h := e.holding
	s.mu.Unlock()
	if h == nil {
		return // nobody can ask for it
	}
	// The same content may be two pieces, of which the other one is here.
	p, known := h.places[content]
	if !known || !f.partial.journal.has(p.item) {
		return
	}
	s.mu.Lock()
	e.have[content] = true
	s.mu.Unlock()
	f.turn.supplies.Load().arrived(p.number)
}

// Piece is some content of an image, to be read. It pins the image until it is closed.
type Piece struct {
	*io.SectionReader
	file    *os.File
	release func()
}

// Close ends the use of the image.
func (p *Piece) Close() error {
	defer p.release()
	return p.file.Close()
}

// Serve opens a verified piece of an image, ready or partial, by its content: a chunk,
// the VM config or the NVRAM. The image is not evicted before the piece is closed. It
// fails with ErrNotReady when the piece is not here.
func (s *Store) Serve(d, content fleet.Digest) (*Piece, error) {
	where, release, err := s.reserve(d, content)
	if err != nil {
		return nil, err
	}
	file, err := s.openEither(d, where.file)
	if err != nil {
		release()
		return nil, err
	}
	return &Piece{io.NewSectionReader(file, where.offset, where.size), file, release}, nil
}

// openEither opens a file of an image that may be published at this very moment, by the
// rename of its directory.
func (s *Store) openEither(d fleet.Digest, name string) (file *os.File, err error) {
	for _, dir := range []string{s.dir.image(d), s.dir.partial(d), s.dir.image(d)} {
		file, err = os.Open(filepath.Join(dir, name))
		if !errors.Is(err, os.ErrNotExist) {
			return file, err
		}
	}
	return nil, fmt.Errorf("serving image %s: %w: %w", d.Short(), ErrNotReady, err)
}

// reserve finds a verified piece and pins its image.
func (s *Store) reserve(d, content fleet.Digest) (place, func(), error) {
	refused := fmt.Errorf("serving %s of image %s: %w", content.Short(), d.Short(), ErrNotReady)
	if err := s.study(d); err != nil {
		return place{}, nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.images[d]
	if e == nil || e.State == fleet.ImageEvicting || e.holding == nil {
		return place{}, nil, refused
	}
	where, known := e.holding.places[content]
	if !known || e.holding.doubted[content] || e.State != fleet.ImageReady && !e.have[content] {
		return place{}, nil, refused
	}
	return where, s.pin(e), nil
}

// pin keeps an image from being evicted until release; s.mu is held. It is a lease of
// this process alone.
func (s *Store) pin(e *entry) (release func()) {
	e.pins++
	return sync.OnceFunc(func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		e.pins--
	})
}

// study reads what a ready image is made of, if it is not known: after a restart.
func (s *Store) study(d fleet.Digest) error {
	s.mu.Lock()
	e := s.images[d]
	if e == nil || e.State != fleet.ImageReady || e.holding != nil {
		s.mu.Unlock()
		return nil
	}
	release := s.pin(e)
	s.mu.Unlock()
	defer release()
	m, _, err := s.readManifest(s.dir.image(d), d)
	if err != nil {
		return fmt.Errorf("reading the manifest of image %s: %w", d.Short(), err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	e.holding = newHolding(m)
	return nil
}

// ServeManifest returns the manifest of an image that is here, ready or partial.
func (s *Store) ServeManifest(d fleet.Digest) ([]byte, error) {
	if err := fleet.CheckDigest(d); err != nil {
		return nil, err
	}
	s.mu.Lock()
	e := s.images[d]
	s.mu.Unlock()
	if e == nil {
		return nil, fmt.Errorf("serving image %s: %w", d.Short(), ErrNotReady)
	}
	file, err := s.openEither(d, manifestFile)
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	raw, err := io.ReadAll(io.LimitReader(file, image.MaxManifestBytes))
	if err != nil {
		return nil, fmt.Errorf("reading the manifest of image %s: %w", d.Short(), err)
	}
	if image.DigestOf(raw) != d {
		return nil, fmt.Errorf("serving image %s: %w: its manifest is half written", d.Short(), ErrNotReady)
	}
	return raw, nil
}
