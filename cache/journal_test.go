package cache

import (
	"crypto/sha256"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/paddock-ci/paddock/fleet"
)

// someNotes are a finished chunk, and two that are under way: a blob and content.
func someNotes(t testing.TB) []note {
	t.Helper()
	blob, content := sha256.New(), sha256.New()
	blob.Write(make([]byte, 300))
	content.Write(make([]byte, 1000))
	at := mark{in: 300, out: 1000, blob: saveState(nil, blob), content: saveState(nil, content)}
	raw := mark{raw: true, in: 1000, out: 1000, content: at.content}
	return []note{
		{item: item{aChunk, digestOf('a')}},
		{item: item{aChunk, digestOf('b')}, mark: &at},
		{item: item{anNVRAM, digestOf('c')}, mark: &raw},
	}
}

func digestOf(c byte) fleet.Digest {
	return fleet.Digest("sha256:" + strings.Repeat(string(c), 64))
}

func lines(notes []note) string {
	var s strings.Builder
	for _, n := range notes {
		s.WriteString(n.String())
	}
	return s.String()
}

// A journal says after it was opened again what was added to it: the latest of each.
func TestJournal(t *testing.T) {
	path := filepath.Join(t.TempDir(), journalFile)
	open := func() *journal {
		t.Helper()
		j, err := openJournal(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(j.close)
		return j
	}
	j := open()
	notes := someNotes(t)
	if err := j.add(notes); err != nil {
		t.Fatal(err)
	}
	check := func(done, marks int) {
		t.Helper()
		for name, j := range map[string]*journal{"in memory": j, "read again": open()} {
			if len(j.done) != done || len(j.marks) != marks {
				t.Errorf("%s: %d finished, %d marks; want %d, %d", name, len(j.done), len(j.marks), done, marks)
			}
		}
	}
	check(1, 2)
	got, ok := open().mark(notes[1].item)
	if !ok || !reflect.DeepEqual(got, *notes[1].mark) {
		t.Errorf("read back as %+v; want %+v", got, notes[1].mark)
	}
	for n, state := range map[int64][]byte{300: got.blob, 1000: got.content} {
		h, ok := loadState(state, n)
		if want := sha256.Sum256(make([]byte, n)); !ok || !strings.HasSuffix(string(h.Sum(nil)), string(want[:])) {
			t.Errorf("the state after %d bytes is not what it was (%t)", n, ok)
		}
		if _, ok := loadState(state, n+1); ok {
			t.Errorf("the state after %d bytes was taken for one after %d", n, n+1)
		}
	}
	// One is finished, the other begins anew; a mark of what is finished says nothing.
	if err := j.add([]note{{item: notes[1].item}, {item: notes[2].item, mark: &mark{}}, {item: notes[0].item, mark: notes[1].mark}}); err != nil {
		t.Fatal(err)
	}
	check(2, 0)
	if err := j.forget(); err != nil {
		t.Fatal(err)
	}
	check(0, 0)
}

// Whatever line is torn or spoilt, and wherever: the others say what they said.
func TestJournalSpoilt(t *testing.T) {
	notes := someNotes(t)
	good := lines(notes)
	for at := range len(good) {
		for name, bad := range map[string]string{
			"torn":    good[:at],
			"flipped": good[:at] + string(good[at]^0x10) + good[at+1:],
			"zeroed":  good[:at] + strings.Repeat("\x00", len(good)-at),
		} {
			hit := len(notes) - strings.Count(good[at:], "\n")
			done, marks, size := parseJournal([]byte(bad))
			if size > int64(len(bad)) {
				t.Fatalf("%s at %d: %d of %d bytes are lines", name, at, size, len(bad))
			}
			for i, n := range notes {
				_, marked := marks[n.item]
				here := done[n.item] || marked
				if lost := i == hit || i > hit && name != "flipped"; here == lost && (i != hit+1 || good[at] != '\n') {
					t.Errorf("%s at %d (line %d): line %d is there: %t", name, at, hit, i, here)
				}
			}
		}
	}
}

// A journal to which marks are added for ever stays small, and loses nothing.
func TestJournalCompacts(t *testing.T) {
	path := filepath.Join(t.TempDir(), journalFile)
	j, err := openJournal(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { j.close() }()
	notes := someNotes(t)
	batch := notes[:1:1]
	for range 1000 {
		batch = append(batch, notes[1:]...)
	}
	for range 10 { // 7 MB in all
		if err := j.add(batch); err != nil {
			t.Fatal(err)
		}
	}
	info, err := os.Stat(path)
	if err != nil || info.Size() > 2*compactAt {
		t.Errorf("the journal is %+v (%v); want at most %d bytes", info, err, 2*compactAt)
	}
	done, marks, _, err := readJournal(path)
	if err != nil || !maps.Equal(done, j.done) || !reflect.DeepEqual(marks, j.marks) || len(done) != 1 || len(marks) != 2 {
		t.Errorf("read again: %d finished, %d marks (%v)", len(done), len(marks), err)
	}
	if left, err := filepath.Glob(path + "?*"); err != nil || len(left) > 0 {
		t.Errorf("compacting left %v (%v)", left, err)
	}
}

// A write that fails gives the reserve back: the next note makes another one, so that what
// comes before the disk is full again can be noted.
func TestJournalReserveAfterFailure(t *testing.T) {
	path := filepath.Join(t.TempDir(), journalFile)
	j, err := openJournal(path)
	if err != nil {
		t.Fatal(err)
	}
	defer j.close()
	notes := someNotes(t)
	if err := j.add(notes[:1]); err != nil {
		t.Fatal(err)
	}
	whole := j.file
	spoilt, err := os.Open(path) // for reading only: every write to it fails
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = spoilt.Close() }()
	j.file = spoilt
	if err := j.add(notes[1:2]); err == nil {
		t.Fatal("a note was written to a file that is open for reading")
	}
	j.file = whole
	if j.room > j.size {
		t.Errorf("the journal believes in room for %d bytes at %d, which the failure gave back", j.room, j.size)
	}
	if err := j.add(notes[2:]); err != nil {
		t.Fatal(err)
	}
	if j.room-j.size < reserve/2 || j.has(notes[1].item) {
		t.Errorf("room for %d bytes behind %d; the note that failed counts: %t", j.room-j.size, j.size, j.has(notes[1].item))
	}
}

func FuzzJournal(f *testing.F) {
	f.Add([]byte(lines(someNotes(f))))
	f.Add([]byte(note{item: item{aConfig, digestOf('d')}, mark: &mark{}}.String() + "torn"))
	f.Add([]byte("chunk sha256:" + strings.Repeat("a", 64) + "\n\n\n"))
	f.Add([]byte(sealed("mark chunk " + string(digestOf('e')) + " blob 99999999999999999999 1 AAAA -")))
	f.Add([]byte(sealed("mark chunk " + string(digestOf('e')) + " blob 1 1 " + strings.Repeat("A", 144) + " -")))
	f.Fuzz(func(t *testing.T, data []byte) {
		done, marks, size := parseJournal(data)
		if size > int64(len(data)) {
			t.Fatalf("%d of %d bytes are whole lines", size, len(data))
		}
		var all []note
		for i := range done {
			all = append(all, note{item: i})
		}
		for i, m := range marks {
			if m.in <= 0 || m.out <= 0 {
				t.Fatalf("a mark at %d, %d", m.in, m.out)
			}
			// None of these may panic, whatever the state is.
			for _, state := range [][]byte{m.blob, m.content} {
				if h, ok := loadState(state, m.out); ok {
					h.Write([]byte("more"))
					h.Sum(nil)
				}
			}
			all = append(all, note{item: i, mark: &m})
		}
		for _, n := range all {
			if err := fleet.CheckDigest(n.item.digest); err != nil {
				t.Fatal(err)
			}
		}
		again, marked, _ := parseJournal([]byte(lines(all)))
		if !maps.Equal(again, done) || !reflect.DeepEqual(marked, marks) {
			t.Fatalf("written and read again: %v, %v; were %v, %v", again, marked, done, marks)
		}
	})
}

// sealed is a line with its checksum.
func sealed(body string) string { return checksum(body) + " " + body + "\n" }

// FuzzJournalLine is FuzzJournal behind the checksum, which fuzzing does not get past.
func FuzzJournalLine(f *testing.F) {
	for _, n := range someNotes(f) {
		_, body, _ := strings.Cut(strings.TrimSuffix(n.String(), "\n"), " ")
		f.Add(body)
	}
	f.Fuzz(func(t *testing.T, body string) {
		if strings.Contains(body, "\n") {
			return
		}
		n, ok := parseNote(strings.TrimSuffix(sealed(body), "\n"))
		if !ok {
			return
		}
		if m := n.mark; m != nil && (len(m.blob)+len(m.content))%stateSize != 0 {
			t.Fatalf("%q has states of %d and %d bytes", body, len(m.blob), len(m.content))
		}
		if again, ok := parseNote(strings.TrimSuffix(n.String(), "\n")); !ok || !reflect.DeepEqual(again, n) {
			t.Fatalf("%q gives %q, which gives %+v", body, n, again)
		}
	})
}
