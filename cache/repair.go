package cache

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// Repair takes an image that has flaws, ready or partial, back to where a pull fetches what
// is bad, and nothing else. It fails with ErrLeased while the image is in use. Even then
// none of what is bad is served any more, nor reused before it is hashed again, neither
// from there nor from other images, which may share its blocks. Without flaws it does
// nothing.
func (s *Store) Repair(d fleet.Digest, flaws []Flaw) error {
	if len(flaws) == 0 {
		return nil
	}
	s.studyAll()
	s.doubt(d, flaws) // even if it cannot be repaired now
	e, w, before, err := s.beginRepair(d)
	if err != nil {
		return fmt.Errorf("repairing image %s: %w", d.Short(), err)
	}
	from, rework := s.dir.image(d), s.demote
	if before != fleet.ImageReady {
		from, rework = s.dir.partial(d), s.unfinish
	}
	m, _, err := s.readManifest(from, d)
	if err == nil {
		err = rework(m, flaws)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	e.work = nil
	close(w.done)
	if err != nil {
		s.move(e, before) // as it was: the rename comes last
		return fmt.Errorf("repairing image %s: %w", d.Short(), err)
	}
	left := finishedIn(s.dir.partial(d))
	e.DiskBytes, e.Total = 0, m.Bytes()
	e.done.Store(left.bytes(m, true))
	e.holding = newHolding(m)
	e.have = e.holding.here(left)
	s.move(e, fleet.ImagePaused)
	s.log.Warn("image is to be fetched again in part", "image", d, "flaws", len(flaws))
	return nil
}

// beginRepair takes an image out of use.
func (s *Store) beginRepair(d fleet.Digest) (e *entry, w *work, before fleet.ImageState, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e = s.images[d]
	if e == nil || e.State == gone {
		return nil, nil, "", ErrNotReady
	}
	if len(e.leases) > 0 || e.pins > 0 || e.work != nil {
		return nil, nil, "", fmt.Errorf("%w (%s, %d leases, %d other uses)", ErrLeased, e.State, len(e.leases), e.pins)
	}
	before = e.State
	w = &work{done: make(chan struct{}), err: errAgain}
	e.work = w
	s.move(e, fleet.ImageEvicting)
	return e, w, before, nil
}

// doubt notes what is bad in an image, there and in the others.
func (s *Store) doubt(bad fleet.Digest, flaws []Flaw) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range s.images {
		if e.holding == nil {
			continue
		}
		shared := 0
		for _, f := range flaws {
			if _, known := e.holding.places[f.Want]; known && !e.holding.doubted[f.Want] {
				e.holding.doubted[f.Want] = true
				shared++
			}
		}
		if shared > 0 && e.Digest != bad {
			s.log.Warn("an image may share blocks that are bad: verify it", "image", e.Digest, "ref", e.Ref, "parts", shared, "bad_in", bad)
		}
	}
}

// demote makes a partial image of a published one. A crash before its last step leaves
// the image published, as bad as it was.
func (s *Store) demote(m *image.Manifest, flaws []Flaw) error {
	dir := s.dir.image(m.Digest)
	if err := clearZeros(filepath.Join(dir, diskFile), flaws); err != nil {
		return err
	}
	var here []note
	add := func(i item) {
		if i.digest != "" {
			here = append(here, note{item: i})
		}
	}
	for _, small := range smallFiles(m) {
		add(item{small.kind, small.blob.Digest})
	}
	for _, c := range m.Distinct() {
		add(item{aChunk, c.Content})
	}
	if err := rewriteJournal(dir, here, flaws); err != nil {
		return err
	}
	if err := s.dir.discard(s.dir.partial(m.Digest)); err != nil {
		return err
	}
	if err := os.Rename(dir, s.dir.partial(m.Digest)); err != nil {
		return err
	}
	return errors.Join(syncDir(filepath.Join(string(s.dir), "images")), syncDir(filepath.Join(string(s.dir), "partial")))
}

// unfinish takes what is bad out of what a partial image has.
func (s *Store) unfinish(m *image.Manifest, flaws []Flaw) error {
	dir := s.dir.partial(m.Digest)
	if err := clearZeros(filepath.Join(dir, diskFile), flaws); err != nil {
		return err
	}
	done, marks, _, err := readJournal(filepath.Join(dir, journalFile))
	if err != nil {
		return err
	}
	var here []note
	for i := range done {
		here = append(here, note{item: i})
	}
	for i, m := range marks {
		here = append(here, note{item: i, mark: &m})
	}
	return rewriteJournal(dir, here, flaws)
}

// clearZeros writes the zeros that no pull would, since it never asks for them.
func clearZeros(path string, flaws []Flaw) error {
	disk, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer func() { _ = disk.Close() }() // synced below
	for _, f := range flaws {
		if f.Kind != aChunk || !f.zero || punch(disk, []int64{f.Offset}, f.Size) {
			continue
		}
		w := &sparseWriter{file: disk, offsets: []int64{f.Offset}}
		for at := int64(0); at < f.Size; at += hole {
			if _, err := w.Write(zeros[:min(hole, f.Size-at)]); err != nil {
				return err
			}
		}
	}
	return disk.Sync()
}

// rewriteJournal makes a journal of notes, but for those of what is bad.
func rewriteJournal(dir string, notes []note, bad []Flaw) error {
	var lines strings.Builder
	for _, n := range notes {
		if !slices.ContainsFunc(bad, func(f Flaw) bool { return n.item == item{f.Kind, f.Want} }) {
			lines.WriteString(n.String())
		}
	}
	path := filepath.Join(dir, journalFile)
	if err := writeFile(path+tempSuffix, []byte(lines.String())); err != nil {
		return err
	}
	if err := os.Rename(path+tempSuffix, path); err != nil {
		return err
	}
	return syncDir(dir)
}
