package cache

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// Repair takes a ready image that has flaws back to where a pull fetches what is bad, and
// nothing else. It fails with ErrLeased while the image is in use, and does nothing if
// there are no flaws.
func (s *Store) Repair(d fleet.Digest, flaws []Flaw) error {
	if len(flaws) == 0 {
		return nil
	}
	s.mu.Lock()
	e := s.images[d]
	if e == nil || e.State != fleet.ImageReady {
		s.mu.Unlock()
		return fmt.Errorf("repairing image %s: %w", d.Short(), ErrNotReady)
	}
	if len(e.leases) > 0 || e.work != nil {
		defer s.mu.Unlock()
		return fmt.Errorf("repairing image %s (%d leases): %w", d.Short(), len(e.leases), ErrLeased)
	}
	w := &work{done: make(chan struct{}), err: errAgain}
	e.work = w
	s.move(e, fleet.ImageEvicting)
	s.mu.Unlock()

	m, _, err := s.readManifest(s.dir.image(d), d)
	if err == nil {
		err = s.demote(m, flaws)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	e.work = nil
	close(w.done)
	if err != nil {
		s.move(e, fleet.ImageReady) // as it was: the rename comes last
		return fmt.Errorf("repairing image %s: %w", d.Short(), err)
	}
	e.DiskBytes, e.Total = 0, m.Bytes()
	e.done.Store(finishedIn(s.dir.partial(d)).bytes(m, true))
	s.move(e, fleet.ImagePaused)
	s.log.Warn("image is to be fetched again in part", "image", d, "flaws", len(flaws))
	return nil
}

// demote makes a partial image of a published one. A crash before its last step leaves
// the image published, as bad as it was.
func (s *Store) demote(m *image.Manifest, flaws []Flaw) error {
	bad := make(map[item]bool)
	for _, f := range flaws {
		bad[item{f.Kind, f.Want}] = true
	}
	dir := s.dir.image(m.Digest)
	if err := clearZeros(filepath.Join(dir, diskFile), flaws); err != nil {
		return err
	}
	if err := rewriteJournal(dir, m, bad); err != nil {
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

// rewriteJournal notes all parts of an image but the bad ones as finished.
func rewriteJournal(dir string, m *image.Manifest, bad map[item]bool) error {
	var lines strings.Builder
	add := func(i item) {
		if i.digest != "" && !bad[i] {
			lines.WriteString(note{item: i}.String())
		}
	}
	for _, small := range smallFiles(m) {
		add(item{small.kind, small.blob.Digest})
	}
	for _, c := range m.Distinct() {
		add(item{aChunk, c.Content})
	}
	path := filepath.Join(dir, journalFile)
	if err := writeFile(path+tempSuffix, []byte(lines.String())); err != nil {
		return err
	}
	return os.Rename(path+tempSuffix, path)
}
