package cache

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// partial is the directory of an image being pulled.
type partial struct {
	dir     string
	disk    *os.File
	found   bool // there was a disk before this pull
	fresh   bool // disk was made by this very pull: what is not written is zero
	journal *journal
}

// begun reports whether there is a partial image that can be resumed.
func (l layout) begun(d fleet.Digest) bool {
	_, err := os.Stat(filepath.Join(l.partial(d), manifestFile))
	return err == nil
}

// openPartial makes or reopens the partial image; its disk is opened when its size is
// known.
func (s *Store) openPartial(h fleet.Hold) (*partial, error) {
	dir := s.dir.partial(h.Digest)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	// The reference, for the list after a restart. It is not written again for nothing: a
	// full disk would leave it empty.
	if ref, _ := readMeta(dir); ref != h.Ref {
		if err := writeMeta(dir, h.Ref); err != nil {
			return nil, err
		}
	}
	j, err := openJournal(filepath.Join(dir, journalFile))
	if err != nil {
		return nil, err
	}
	_, err = os.Lstat(filepath.Join(dir, diskFile))
	found := !errors.Is(err, os.ErrNotExist)
	if !found && j.size > 0 {
		if err := j.forget(); err != nil { // it speaks of a disk that is gone
			j.close()
			return nil, err
		}
	}
	return &partial{dir: dir, journal: j, found: found}, nil
}

// openDisk opens the disk at its full size; all of a new one is a hole.
func (p *partial) openDisk(size int64) error {
	path := filepath.Join(p.dir, diskFile)
	disk, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	p.fresh = err == nil
	if errors.Is(err, os.ErrExist) {
		disk, err = os.OpenFile(path, os.O_RDWR, 0o600)
	}
	if err != nil {
		return err
	}
	p.disk = disk
	info, err := disk.Stat()
	if err != nil {
		return err
	}
	if info.Size() == size {
		return nil
	}
	// The size of an old one is set before anything is journalled: this one was cut by
	// somebody, and what the journal says of it is not true.
	if err := p.journal.forget(); err != nil {
		return err
	}
	if err := disk.Truncate(size); err != nil {
		return err
	}
	return syncDir(p.dir)
}

// clean makes size bytes at each offset read as zeros, if it can; false: they hold
// whatever a former try, or the disk that this one was cloned from, left there.
func (p *partial) clean(file *os.File, offsets []int64, size int64) bool {
	return p.fresh && file == p.disk || punch(file, offsets, size)
}

// finished notes that a part is here in full. It waits until file is on disk before it
// writes the note, so that the journal never promises what a crash took.
func (p *partial) finished(file *os.File, i item) error {
	if file != nil {
		if err := datasync(file); err != nil {
			return err
		}
	}
	return p.journal.add([]note{{item: i}})
}

// seal checks that all is here, and waits until it is on disk.
func (p *partial) seal(m *image.Manifest, ref string) error {
	for _, c := range m.Distinct() {
		if !p.journal.has(item{aChunk, c.Content}) {
			return fmt.Errorf("layer %d is not in the journal after all were fetched", c.Layer)
		}
	}
	if err := checkFiles(p.dir, m); err != nil {
		return diskError(err)
	}
	if err := p.blankZeros(m); err != nil {
		return diskError(err)
	}
	if err := p.disk.Sync(); err != nil {
		return diskError(err)
	}
	p.journal.trim()
	return diskError(writeMeta(p.dir, ref))
}

// blankZeros makes zeros of what should be: nobody fetches or looks at those regions, and a
// disk that was here before may be another one's clone.
func (p *partial) blankZeros(m *image.Manifest) error {
	h := hasher{disk: p.disk}
	for _, c := range m.Chunks {
		if !c.Zero || p.fresh || h.hole(c) {
			continue
		}
		if err := blank(p.disk, c.Offset, c.Size); err != nil {
			return err
		}
	}
	return nil
}

func (p *partial) close() {
	p.journal.close()
	if p.disk != nil {
		_ = p.disk.Close() // synced before each note
	}
}

// meta is image.json.
type meta struct {
	Ref string `json:"ref"`
}

func writeMeta(dir, ref string) error {
	data, err := json.Marshal(meta{Ref: ref})
	if err != nil {
		return err
	}
	return writeFile(filepath.Join(dir, metaFile), data)
}

// readMeta reads the reference and the time of the last use; it matters to people and
// to eviction by age only, so what cannot be read is empty.
func readMeta(dir string) (ref string, used time.Time) {
	path := filepath.Join(dir, metaFile)
	var m meta
	if data, err := os.ReadFile(path); err == nil {
		_ = json.Unmarshal(data, &m)
	}
	if info, err := os.Stat(path); err == nil {
		used = info.ModTime()
	}
	return m.Ref, used
}
