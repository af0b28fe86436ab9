package cache

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// partial is the directory of an image being pulled.
type partial struct {
	dir     string
	disk    *os.File
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
	// The reference, for the list after a restart.
	if err := writeMeta(dir, h.Ref); err != nil {
		return nil, err
	}
	j, err := openJournal(filepath.Join(dir, journalFile))
	if err != nil {
		return nil, err
	}
	return &partial{dir: dir, journal: j}, nil
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
	return disk.Truncate(size)
}

// finished notes that a blob or chunk is here in full. It waits until file is on disk
// before it writes the note, so that the journal never promises what a crash took.
func (p *partial) finished(file *os.File, i item) error {
	if file != nil {
		if err := file.Sync(); err != nil {
			return err
		}
	}
	return p.journal.add(i)
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
	if err := p.disk.Sync(); err != nil {
		return diskError(err)
	}
	return diskError(writeMeta(p.dir, ref))
}

func (p *partial) close() {
	_ = p.journal.file.Close() // every line was synced when it was written
	if p.disk != nil {
		_ = p.disk.Close() // synced in finished
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

// item is a part of an image. The kind belongs to it: the same bytes may be the config,
// the NVRAM and a chunk, and each has to be written to a place of its own.
type item struct {
	kind   string
	digest fleet.Digest // of content for chunks, of the blob for the others
}

// Kinds of items, as the journal has them.
const (
	aChunk  = "chunk"
	aConfig = "config"
	anNVRAM = "nvram"
)

// names are what people call them.
var names = map[string]string{aChunk: "chunk", aConfig: "VM config", anNVRAM: "NVRAM"}

// journal is the list of what is finished, in memory and on disk: a line for each, of
// its kind, a space and its digest.
type journal struct {
	mu   sync.Mutex
	file *os.File
	done map[item]bool
}

// openJournal reads a journal or begins one. A line that a crash cut short is dropped,
// and what it would have said is fetched again.
func openJournal(path string) (*journal, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	data, err := os.ReadFile(path)
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	done, whole := parseJournal(data)
	// Cut the torn line off, so that the next one begins at a line's start.
	if err := f.Truncate(whole); err != nil {
		_ = f.Close()
		return nil, err
	}
	if _, err := f.Seek(whole, 0); err != nil {
		_ = f.Close()
		return nil, err
	}
	return &journal{file: f, done: done}, nil
}

// parseJournal reads lines up to the first that is not an item and a newline; whole is
// how many bytes those are.
func parseJournal(data []byte) (done map[item]bool, whole int64) {
	done = make(map[item]bool)
	for {
		line, rest, ok := bytes.Cut(data, []byte("\n"))
		kind, digest, _ := strings.Cut(string(line), " ")
		i := item{kind, fleet.Digest(digest)}
		known := i.kind == aChunk || i.kind == aConfig || i.kind == anNVRAM
		if !ok || !known || fleet.CheckDigest(i.digest) != nil {
			return done, whole
		}
		done[i] = true
		whole += int64(len(line)) + 1
		data = rest
	}
}

func (j *journal) has(i item) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.done[i]
}

// add writes a line and waits until it is on disk.
func (j *journal) add(i item) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if _, err := j.file.WriteString(i.kind + " " + string(i.digest) + "\n"); err != nil {
		return err
	}
	if err := j.file.Sync(); err != nil {
		return err
	}
	j.done[i] = true
	return nil
}

// bytes is what the finished chunks of m had on the wire.
func (j *journal) bytes(m *image.Manifest) int64 {
	j.mu.Lock()
	defer j.mu.Unlock()
	var sum int64
	for _, c := range m.Distinct() {
		if j.done[item{aChunk, c.Content}] {
			sum += c.BlobSize
		}
	}
	return sum
}
