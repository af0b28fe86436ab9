package cache

import (
	"bytes"
	"crypto/sha256"
	"encoding"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

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

// itemOf is a piece as the journal knows it.
func itemOf(c image.Chunk) item {
	switch c.Index {
	case image.ConfigIndex:
		return item{aConfig, c.Content}
	case image.NVRAMIndex:
		return item{anNVRAM, c.Content}
	}
	return item{aChunk, c.Content}
}

// mark is how far an item is: a border of blocks, before which everything is on disk. The
// window of its decoder is not kept, since it is what the disk has before out.
type mark struct {
	raw     bool   // in counts bytes of content, which came as they are
	in, out int64  // bytes of the blob (or content), and of content
	blob    []byte // SHA-256 state of the blob, or of its part at in; nil if raw
	content []byte // SHA-256 state of the content; nil if no digest of it is known
}

// clone is a mark of its own.
func (m mark) clone() mark {
	m.blob, m.content = slices.Clone(m.blob), slices.Clone(m.content)
	return m
}

// stateSize is what crypto/sha256 marshals: 4 bytes that say so, 8 words of 4 bytes, a block
// of 64 bytes, and how many bytes were hashed, in 8 bytes.
const stateSize = 4 + 8*4 + 64 + 8

// saveState appends the state of a SHA-256 to b[:0].
func saveState(b []byte, h hash.Hash) []byte {
	state, ok := h.(encoding.BinaryAppender)
	if !ok {
		return nil // another SHA-256 than the usual one: pieces begin anew after a crash
	}
	b, err := state.AppendBinary(b[:0])
	if err != nil {
		return nil
	}
	return b
}

// loadState makes a SHA-256 that has hashed n bytes. The state comes from a file that
// anyone may have written: what is no state, or one of another length, is refused.
func loadState(b []byte, n int64) (hash.Hash, bool) {
	h := sha256.New()
	state, ok := h.(encoding.BinaryUnmarshaler)
	if !ok || len(b) != stateSize || binary.BigEndian.Uint64(b[stateSize-8:]) != uint64(n) {
		return nil, false
	}
	return h, state.UnmarshalBinary(b) == nil
}

// note is a line of the journal: an item is finished, or (with a mark) that far. The zero
// mark says that it begins anew: what the disk has of it is about to be overwritten.
type note struct {
	item item
	mark *mark
}

func (n note) finished() bool { return n.mark == nil }

func (n note) anew() bool { return n.mark != nil && n.mark.out == 0 }

// journal is what is finished and how far the rest is, in memory and on disk. Each line
// begins with its own CRC-32C, so that a torn or spoilt line loses what it said, and no
// other:
//
//	<crc> chunk sha256:…
//	<crc> mark chunk sha256:… blob <in> <out> <state of blob> <state of content>
//	<crc> anew chunk sha256:…
//
// A later mark replaces a former one. The lines of the past are dropped when they are most
// of the file.
type journal struct {
	mu    sync.Mutex
	path  string
	file  *os.File
	size  int64 // where the next line goes
	room  int64 // up to where there is room for lines on disk
	limit int64 // the size at which the file is written anew
	done  map[item]bool
	marks map[item]mark
}

const (
	// maxJournal is beyond any journal of ours, which have 2 MB at most when compacted
	// (4,096 chunks, each with a mark).
	maxJournal = 16 << 20
	// compactAt is the least size at which a journal is compacted: 2,000 marks.
	compactAt = 1 << 20
	// reserve is the room that a journal has on disk beyond its size, so that a full disk
	// does not keep us from noting what came before it was full. One note for each of 16
	// streams has 8 KB.
	reserve = 128 << 10
)

// openJournal reads a journal or begins one.
func openJournal(path string) (*journal, error) {
	done, marks, size, err := readJournal(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	// Cut a torn line off, so that the next one begins at a line's start.
	if err := f.Truncate(size); err != nil {
		_ = f.Close()
		return nil, err
	}
	j := &journal{path: path, file: f, size: size, limit: max(compactAt, 2*size), done: done, marks: marks}
	j.makeRoom(0)
	return j, nil
}

// readJournal reads a journal's file; size is where its last line ends.
func readJournal(path string) (done map[item]bool, marks map[item]mark, size int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return map[item]bool{}, map[item]mark{}, 0, err
	}
	defer func() { _ = f.Close() }()
	data, err := io.ReadAll(io.LimitReader(f, maxJournal))
	if err != nil {
		return nil, nil, 0, err
	}
	done, marks, size = parseJournal(data)
	return done, marks, size, nil
}

// parseJournal reads lines and passes over those that are none of ours; size is where the
// last whole line ends.
func parseJournal(data []byte) (done map[item]bool, marks map[item]mark, size int64) {
	done, marks = make(map[item]bool), make(map[item]mark)
	for {
		line, rest, whole := bytes.Cut(data, []byte("\n"))
		if !whole {
			break
		}
		size += int64(len(line)) + 1
		data = rest
		if n, ok := parseNote(string(line)); ok {
			n.apply(done, marks)
		}
	}
	return done, marks, size
}

// apply does what a line says. What is finished stays so.
func (n note) apply(done map[item]bool, marks map[item]mark) {
	switch {
	case n.finished():
		done[n.item] = true
		delete(marks, n.item)
	case n.anew():
		delete(marks, n.item)
	case !done[n.item]:
		marks[n.item] = *n.mark
	}
}

// parseNote reads a line without its newline.
func parseNote(line string) (note, bool) {
	crc, body, _ := strings.Cut(line, " ")
	if crc != checksum(body) {
		return note{}, false
	}
	words := strings.Split(body, " ")
	verb := words[0]
	if verb == "mark" || verb == "anew" {
		words = words[1:]
	}
	if len(words) < 2 {
		return note{}, false
	}
	n := note{item: item{words[0], fleet.Digest(words[1])}}
	if names[n.item.kind] == "" || fleet.CheckDigest(n.item.digest) != nil {
		return note{}, false
	}
	switch words = words[2:]; verb {
	case "mark":
		m, ok := parseMark(words)
		n.mark = &m
		return n, ok
	case "anew":
		n.mark = &mark{}
	}
	return n, len(words) == 0
}

// parseMark reads the words of a mark behind its item.
func parseMark(words []string) (mark, bool) {
	if len(words) != 5 || words[0] != "raw" && words[0] != "blob" {
		return mark{}, false
	}
	m := mark{raw: words[0] == "raw"}
	in, err1 := strconv.ParseInt(words[1], 10, 64)
	out, err2 := strconv.ParseInt(words[2], 10, 64)
	blob, err3 := parseState(words[3])
	content, err4 := parseState(words[4])
	m.in, m.out, m.blob, m.content = in, out, blob, content
	sound := errors.Join(err1, err2, err3, err4) == nil && in > 0 && out > 0
	return m, sound && (!m.raw || in == out) && (m.raw == (blob == nil))
}

// parseState reads a state; "-" is none.
func parseState(word string) ([]byte, error) {
	if word == "-" {
		return nil, nil
	}
	state, err := base64.RawStdEncoding.Strict().DecodeString(word)
	if err == nil && len(state) != stateSize {
		err = fmt.Errorf("a SHA-256 state of %d bytes, want %d", len(state), stateSize)
	}
	return state, err
}

// String is the line, with its newline.
func (n note) String() string {
	body := n.item.kind + " " + string(n.item.digest)
	if n.anew() {
		body = "anew " + body
	} else if m := n.mark; m != nil {
		from := "blob"
		if m.raw {
			from = "raw"
		}
		body = fmt.Sprintf("mark %s %s %d %d %s %s", body, from, m.in, m.out, stateWord(m.blob), stateWord(m.content))
	}
	return checksum(body) + " " + body + "\n"
}

func stateWord(state []byte) string {
	if state == nil {
		return "-"
	}
	return base64.RawStdEncoding.EncodeToString(state)
}

func checksum(body string) string {
	return fmt.Sprintf("%08x", crc32.Checksum([]byte(body), crc32.MakeTable(crc32.Castagnoli)))
}

// has reports whether an item is here in full, on disk.
func (j *journal) has(i item) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.done[i]
}

// mark is how far an item is that is not finished.
func (j *journal) mark(i item) (mark, bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	m, ok := j.marks[i]
	return m, ok
}

// add writes lines and waits until they are on disk. If it fails, none of them counts, and
// the next ones are written over what is left of them.
func (j *journal) add(notes []note) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	var lines strings.Builder
	for _, n := range notes {
		lines.WriteString(n.String())
	}
	j.makeRoom(int64(lines.Len()))
	if _, err := j.file.WriteAt([]byte(lines.String()), j.size); err != nil {
		j.room = 0 // Truncate gives the reserve back, and the next note needs one
		return errors.Join(err, j.file.Truncate(j.size))
	}
	if err := datasync(j.file); err != nil {
		return err
	}
	j.size += int64(lines.Len())
	for _, n := range notes {
		n.apply(j.done, j.marks)
	}
	if j.size > j.limit {
		j.compact()
	}
	return nil
}

// compact writes the journal anew without the lines of the past; j.mu is held. When it
// fails, the journal stays as it is and grows on.
func (j *journal) compact() {
	var lines strings.Builder
	for i := range j.done {
		lines.WriteString(note{item: i}.String())
	}
	for i, m := range j.marks {
		lines.WriteString(note{item: i, mark: &m}.String())
	}
	size := int64(lines.Len())
	j.limit = max(compactAt, 2*size, j.size+compactAt)
	next := j.path + tempSuffix
	if err := writeFile(next, []byte(lines.String())); err != nil {
		_ = os.Remove(next) // else the next start does
		return
	}
	f, err := os.OpenFile(next, os.O_RDWR, 0o600)
	if err != nil {
		return
	}
	if err := os.Rename(next, j.path); err != nil {
		_ = f.Close()
		return
	}
	// Without this, a loss of power may bring the old file back, without what is added to
	// the new one: then that is fetched again.
	_ = syncDir(filepath.Dir(j.path))
	_ = j.file.Close()
	j.file, j.size, j.room, j.limit = f, size, 0, max(compactAt, 2*size)
	j.makeRoom(0)
}

// makeRoom sees to it that there is room for n bytes and a reserve of half of what it asks
// for at a time.
func (j *journal) makeRoom(n int64) {
	if j.size+n+reserve/2 > j.room {
		preallocate(j.file, j.size, n+reserve)
		j.room = j.size + n + reserve
	}
}

// forget begins anew: all that the journal promises of the disk is gone.
func (j *journal) forget() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if err := j.file.Truncate(0); err != nil {
		return err
	}
	clear(j.done)
	clear(j.marks)
	j.size, j.room = 0, 0
	return j.file.Sync()
}

// bytes is what the chunks of m that are here had on the wire; with parts, those that are
// here in part count for that.
func (j *journal) bytes(m *image.Manifest, parts bool) int64 {
	j.mu.Lock()
	defer j.mu.Unlock()
	var sum int64
	for _, c := range m.Distinct() {
		i := itemOf(c)
		if j.done[i] {
			sum += c.BlobSize
		} else if m, ok := j.marks[i]; ok && parts {
			sum += m.wire(c)
		}
	}
	return sum
}

// wire is what of a chunk's blob has come, or would have if content did not come instead;
// never more than all of it, whatever a journal says.
func (m mark) wire(c image.Chunk) int64 {
	if m.raw { // in floating point, for the product may exceed 64 bits
		return min(c.BlobSize, int64(float64(c.BlobSize)*(float64(m.out)/float64(c.Size))))
	}
	return min(c.BlobSize, m.in)
}

// trim gives the room back that was not needed.
func (j *journal) trim() {
	j.mu.Lock()
	defer j.mu.Unlock()
	_ = j.file.Truncate(j.size) // to the size that it has
	j.room = 0
}

func (j *journal) close() {
	j.trim()
	_ = j.file.Close() // every line was synced when it was written
}
