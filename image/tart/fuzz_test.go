package tart

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"testing"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// within fails if what it runs allocates more than limit bytes in all.
func within(t *testing.T, limit int64, run func()) {
	t.Helper()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	run()
	runtime.ReadMemStats(&after)
	if got := int64(after.TotalAlloc - before.TotalAlloc); got > limit {
		t.Fatalf("%d bytes allocated, at most %d may be", got, limit)
	}
}

// typed reports whether an error is one of package image's.
func typed(err error) bool {
	for _, known := range []error{
		image.ErrMalformed, image.ErrTooLarge, image.ErrSizeMismatch, image.ErrMissingAnnotation, image.ErrDoubled,
		image.ErrMissingLayer, image.ErrUnknownMediaType, image.ErrIndex, image.ErrStacked, image.ErrASIF, image.ErrLegacyDisk,
	} {
		if errors.Is(err, known) {
			return true
		}
	}
	return false
}

// hostileBytes is a quarter of what a manifest may have: enough to see how memory grows with
// it, and soon done with the race detector.
const hostileBytes = image.MaxManifestBytes / 4

// hostile are manifests that are small and wish to be large.
func hostile() map[string][]byte {
	fill := func(before, each, after string) []byte {
		n := (hostileBytes - len(before) - len(after)) / len(each)
		return []byte(before + strings.TrimSuffix(strings.Repeat(each, n), ",") + after)
	}
	var keys strings.Builder
	for i := 0; keys.Len() < hostileBytes-100; i++ {
		keys.WriteString(`"` + string(rune('a'+i%26)) + string(rune(0x4e00+i%20000)) + string(rune(0x4e00+i/20000)) + `":"",`)
	}
	return map[string][]byte{
		"empty layers":   fill(`{"schemaVersion":2,"layers":[`, `{},`, `]}`),
		"null layers":    fill(`{"schemaVersion":2,"layers":[`, `null,`, `]}`),
		"layers twice":   fill(`{"schemaVersion":2,"layers":[{}],"layers":[`, `{},`, `]}`),
		"empty entries":  fill(`{"schemaVersion":2,"manifests":[`, `{},`, `]}`),
		"deep":           fill(`{"schemaVersion":2,"layers":[{"annotations":`, `[`, `]}`),
		"annotations":    []byte(`{"schemaVersion":2,"layers":[{"annotations":{` + strings.TrimSuffix(keys.String(), ",") + `}}]}`),
		"a long number":  fill(`{"schemaVersion":2,"layers":[{"size":`, `1`, `}]}`),
		"a long digest":  fill(`{"schemaVersion":2,"layers":[{"mediaType":"`+MediaTypeConfig+`","digest":"`, `x`, `"}]}`),
		"a long entry":   fill(`{"schemaVersion":2,"manifests":[{"digest":"`, `x`, `"}]}`),
		"a long size":    fill(`{"schemaVersion":2,"layers":[{"mediaType":"`+MediaTypeDisk+`","annotations":{"`+annotationContent+`":"x","`+annotationSize+`":"`, `1`, `"}}]}`),
		"one long media": fill(`{"schemaVersion":2,"layers":[{"mediaType":"`, `x`, `"}]}`),
	}
}

// budget is what reading a manifest may take: a map of its annotations is the most that
// its bytes can become.
func budget(raw []byte) int64 { return 1<<20 + 40*int64(len(raw)) }

// A manifest cannot make us hold much more, whatever is in it.
func TestHostileManifests(t *testing.T) {
	for name, raw := range hostile() {
		t.Run(name, func(t *testing.T) {
			within(t, budget(raw), func() {
				_, _, entry := image.IndexEntry(raw)
				_, _, err := image.Parse(raw, codecs)
				if !typed(err) || entry != nil && !typed(entry) {
					t.Errorf("parse: %.200v; index: %.200v", err, entry)
				}
				if text := fmt.Sprint(err, entry); len(text) > 1000 {
					t.Errorf("a message of %d bytes: %.200s", len(text), text)
				}
			})
		})
	}
}

func FuzzParse(f *testing.F) {
	raw, err := os.ReadFile("testdata/sonoma-manifest.json")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	doc := good()
	for range 2 { // of new layers, then of old ones
		small, err := json.Marshal(doc)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(small)
		doc.Layers[1].MediaType, doc.Layers[2].MediaType = mediaTypeDiskV1, mediaTypeDiskV1
	}
	f.Add([]byte(`{"schemaVersion":2,"manifests":[{"digest":"sha256:` + strings.Repeat("a", 64) + `"}]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		within(t, budget(raw), func() { checkParse(t, raw) })
	})
}

// checkParse holds what is read of any bytes to what callers rely on.
func checkParse(t *testing.T, raw []byte) {
	switch entry, ok, err := image.IndexEntry(raw); {
	case err != nil:
		if !typed(err) {
			t.Fatalf("index: %v is no error of package image", err)
		}
	case ok:
		if err := fleet.CheckDigest(entry); err != nil {
			t.Fatalf("index entry: %v", err)
		}
	}
	m, _, err := image.Parse(raw, codecs)
	if err != nil {
		if !typed(err) {
			t.Fatalf("%v is no error of package image", err)
		}
		return
	}
	var at int64
	for _, c := range m.Chunks {
		if c.Offset != at || c.Size <= 0 || c.BlobSize <= 0 {
			t.Fatalf("chunk %+v at %d", c, at)
		}
		at += c.Size
		var parts int64
		for _, p := range c.Parts {
			parts += p.Size
			if err := fleet.CheckDigest(p.Digest); err != nil || p.Size <= 0 {
				t.Fatalf("part %+v: %v", p, err)
			}
		}
		if c.Legacy() && (parts != c.BlobSize || len(m.Chunks) != 1) {
			t.Fatalf("parts of %d bytes, a blob of %d, %d chunks", parts, c.BlobSize, len(m.Chunks))
		}
	}
	if at != m.DiskSize || m.Bytes() < 0 {
		t.Fatalf("chunks add up to %d, the disk is %d", at, m.DiskSize)
	}
	for _, p := range m.Pieces() {
		if n, ok := m.Piece(p.Content); !ok || n < 0 || n >= m.PieceCount() {
			t.Fatalf("piece %d of %d: %v", n, m.PieceCount(), ok)
		}
	}
}

func FuzzConfig(f *testing.F) {
	f.Add([]byte(`{"version":1,"os":"linux","display":{"width":1,"height":2},"other":[null]}`))
	f.Add([]byte(`{"version":1,"ecid":"aWQ=","hardwareModel":"aHc=","macAddress":"aa:bb:cc:dd:ee:ff"}`))
	f.Add([]byte(`{"version":1,"os":"linux","paddockBoot":{"kernel":{"offset":0,"size":5},"commandLine":"quiet"}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var c *Config
		var err error
		within(t, budget(raw), func() { c, err = ParseConfig(raw) })
		if err != nil {
			if !typed(err) {
				t.Fatalf("%v is no error of package image", err)
			}
			return
		}
		out, err := json.Marshal(c)
		if err != nil {
			t.Fatalf("%q was read but cannot be written: %v", raw, err)
		}
		if _, err := ParseConfig(out); err != nil {
			t.Fatalf("%q was written as %q, which is refused: %v", raw, out, err)
		}
	})
}

// decoderBudget is what decoding may take whatever the stream says: a block in, two out,
// and the window.
const decoderBudget = maxEncoded + 2*maxBlock + window + 64<<10

// counter counts and forgets.
type counter int64

func (c *counter) Write(b []byte) (int, error) {
	*c += counter(len(b))
	return len(b), nil
}

// What it decodes does not matter; that it stays within its bounds does.
func FuzzDecode(f *testing.F) {
	f.Add(encode(f, noise(11, 300)), int64(300))
	f.Add(encode(f, make([]byte, 200_000)), int64(200_000))
	f.Add(append(stored([]byte("0123456789")), block(105, 10, copyBack(11, 100))...), int64(115))
	f.Add(block(0xfffffff0, 0xfffffff0, nil), int64(1<<40))
	f.Add(block(maxBlock, maxEncoded, nil), int64(1<<40))
	f.Fuzz(func(t *testing.T, stream []byte, size int64) {
		var out counter
		var err error
		within(t, decoderBudget, func() { err = decodeAll(&out, bytes.NewReader(stream), size) })
		if err == nil && int64(out) != size {
			t.Fatalf("%d bytes decoded, want %d, and no error", out, size)
		}
		if de := (*DecodeError)(nil); err != nil && !errors.Is(err, ErrMark) && (!errors.As(err, &de) || de.Offset > int64(len(stream)) || de.Out != int64(out)) {
			t.Fatalf("error without its place in the stream: %v", err)
		}
		if int64(out) > max(size, 0) {
			t.Fatalf("%d bytes decoded, at most %d allowed", out, size)
		}
	})
}

// FuzzResume: a mark may be anything, like the file that it was read from. One that is
// taken keeps to the bounds; and one that the stream really has gives the stream's rest.
func FuzzResume(f *testing.F) {
	// Small ones: what refers back by 64 KiB has a test, and would be slow to change.
	tiny := append(stored([]byte("0123456789")), block(105, 10, copyBack(10, 100))...)
	f.Add(append(tiny, magicEnd...), int64(115), int64(18), int64(10), []byte("0123456789"), uint16(1))
	f.Add(encode(f, bytes.Repeat([]byte("warm"), 100)), int64(400), int64(1), int64(5), []byte("hello"), uint16(0))
	f.Add([]byte(magicEnd), int64(10), int64(50), int64(10), []byte("0123456789"), uint16(0))
	f.Fuzz(func(t *testing.T, stream []byte, size, in, out int64, window []byte, n uint16) {
		c := image.Chunk{Size: size, BlobSize: int64(len(stream)), MediaType: MediaTypeDisk}
		within(t, decoderBudget, func() {
			from := stream[min(max(in, 0), int64(len(stream))):]
			if rest, err := rest(from, c, image.Mark{In: in, Out: out, Window: window}); int64(rest) > max(size-out, 0) {
				t.Fatalf("%d bytes decoded from %d of %d: %v", rest, out, size, err)
			}
		})
		checkRealMark(t, stream, c, int(n))
	})
}

// rest decodes from a mark on.
func rest(stream []byte, c image.Chunk, at image.Mark) (n int, err error) {
	d, err := (Codec{}).NewDecoder(bytes.NewReader(stream), c, at)
	for err == nil {
		var block []byte
		block, err = d.Next()
		n += len(block)
	}
	return n, err
}

// checkRealMark decodes a stream twice: in one go, and in two from its n-th border.
func checkRealMark(t *testing.T, stream []byte, c image.Chunk, n int) {
	if c.Size > 1<<24 {
		return
	}
	var whole bytes.Buffer
	d, err := (Codec{}).NewDecoder(bytes.NewReader(stream), c, image.Mark{})
	if err != nil {
		return
	}
	var at image.Mark
	for i := 0; ; i++ {
		block, next := d.Next()
		if next != nil {
			err = next
			break
		}
		whole.Write(block)
		if i <= n {
			at = d.Mark()
		}
	}
	at = before(whole.Bytes(), at)
	d, fresh := (Codec{}).NewDecoder(bytes.NewReader(stream[at.In:]), c, at)
	if fresh != nil {
		t.Fatalf("its own mark %d, %d is refused: %v", at.In, at.Out, fresh)
	}
	again := whole.Bytes()[:at.Out:at.Out]
	var end error
	for end == nil {
		var block []byte
		block, end = d.Next()
		again = append(again, block...)
	}
	if !bytes.Equal(again, whole.Bytes()) || errors.Is(end, io.EOF) != errors.Is(err, io.EOF) || end.Error() != err.Error() {
		t.Fatalf("from %d: %d bytes and %v; in one go %d and %v", at.In, len(again), end, whole.Len(), err)
	}
}

// FuzzEncode: whatever is encoded decodes to itself.
func FuzzEncode(f *testing.F) {
	f.Add([]byte("warm"))
	f.Add(bytes.Repeat([]byte("ab"), 50_000))
	f.Fuzz(func(t *testing.T, plain []byte) {
		var back bytes.Buffer
		if err := decodeAll(&back, bytes.NewReader(encode(t, plain)), int64(len(plain))); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(back.Bytes(), plain) {
			t.Fatal("decoded bytes differ")
		}
	})
}
