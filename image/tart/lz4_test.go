package tart

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/paddock-ci/paddock/image"
)

func encode(t testing.TB, plain []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	if n, err := Encode(&b, bytes.NewReader(plain)); err != nil || n != int64(len(plain)) {
		t.Fatalf("Encode: %d bytes, %v", n, err)
	}
	return b.Bytes()
}

func TestEncodeDecode(t *testing.T) {
	for name, plain := range map[string][]byte{
		"empty":        nil,
		"one byte":     {7},
		"zeros":        make([]byte, 300_000),
		"text":         []byte(strings.Repeat("warm runners ", 20_000)),
		"noise":        noise(3, 200_001),
		"block border": noise(4, 2*window),
		"mixed":        slices.Concat(noise(5, 70_000), make([]byte, 70_000), []byte(strings.Repeat("x", 100))),
	} {
		t.Run(name, func(t *testing.T) {
			stream := encode(t, plain)
			var back bytes.Buffer
			// One byte at a time: reads need not end at block borders.
			if err := decodeAll(&back, iotest.OneByteReader(bytes.NewReader(stream)), int64(len(plain))); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(back.Bytes(), plain) {
				t.Error("decoded bytes differ")
			}
		})
	}
}

// decodeAll decodes a whole stream of size decoded bytes.
func decodeAll(w io.Writer, r io.Reader, size int64) error {
	return image.Decode(Codec{}, w, r, image.Chunk{Size: size, MediaType: MediaTypeDisk})
}

// block is a framed block.
func block(decoded, encoded uint32, body []byte) []byte {
	b := []byte(magicLZ4)
	b = binary.LittleEndian.AppendUint32(b, decoded)
	b = binary.LittleEndian.AppendUint32(b, encoded)
	return append(b, body...)
}

func stored(body []byte) []byte {
	b := []byte(magicStored)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(body)))
	return append(b, body...)
}

// copyBack is a raw LZ4 block that copies n (19 to 273) bytes from distance back, and
// then, since a block must end in literals, adds five.
func copyBack(distance uint16, n int) []byte {
	b := []byte{0x0f, byte(distance), byte(distance >> 8), byte(n - 19)}
	return append(b, 0x50, '1', '2', '3', '4', '5')
}

// dependent is a stream as Apple's encoder makes it, every block compressed against the
// one before, of plain bytes that repeat every 1500.
func dependent(t testing.TB, plain []byte) []byte {
	t.Helper()
	first := encode(t, plain[:window])
	stream := first[:len(first)-4] // without the end
	for i := window; i < len(plain); i += window {
		piece := plain[i:min(i+window, len(plain))]
		// One match back by 64500 bytes (43 times 1500) covers it but the last five.
		n := len(piece) - 5
		body := []byte{0x0f, 64500 & 0xff, 64500 >> 8}
		rest := n - 19
		body = append(body, bytes.Repeat([]byte{255}, rest/255)...)
		body = append(body, byte(rest%255), 0x50)
		body = append(body, piece[n:]...)
		stream = append(stream, block(uint32(len(piece)), uint32(len(body)), body)...)
	}
	return append(stream, magicEnd...)
}

// windowed is a stream whose blocks refer back across stored and short blocks, to the very
// start of the window, and what it decodes to.
func windowed() (stream, plain []byte) {
	long, short := noise(6, window), noise(7, 1000)
	plain = slices.Concat(long)
	stream = stored(long)
	for _, step := range []struct {
		distance, n int
	}{{window - 1, 100}, {65535, 200}, {300, 100}} {
		stream = append(stream, block(uint32(step.n+5), uint32(len(copyBack(0, step.n))), copyBack(uint16(step.distance), step.n))...)
		start := len(plain) - step.distance
		plain = append(append(plain, plain[start:start+step.n]...), "12345"...)
		stream = append(stream, stored(short)...)
		plain = append(plain, short...)
	}
	return append(stream, magicEnd...), plain
}

func TestDecodeReferencesBack(t *testing.T) {
	streams := map[string][2][]byte{}
	stream, plain := windowed()
	streams["across stored and short blocks"] = [2][]byte{stream, plain}
	plain = bytes.Repeat(noise(8, 1500), 200)
	streams["in every block"] = [2][]byte{dependent(t, plain), plain}
	for name, s := range streams {
		var back bytes.Buffer
		if err := decodeAll(&back, bytes.NewReader(s[0]), int64(len(s[1]))); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if !bytes.Equal(back.Bytes(), s[1]) {
			t.Errorf("%s: decoded bytes differ", name)
		}
	}
}

func TestDecodeErrors(t *testing.T) {
	plain := noise(9, 100_000)
	stream := encode(t, plain) // two stored blocks
	second := int64(8 + window)
	tests := []struct {
		name   string
		stream []byte
		size   int64
		want   error
		offset int64
	}{
		{"empty", nil, 1, ErrTruncated, 0},
		{"unknown magic", append(bytes.Clone(stream[:second]), "bv42...."...), 100_000, ErrMagic, second},
		{"truncated magic", stream[:second+2], 100_000, ErrTruncated, second},
		{"truncated header", stream[:second+6], 100_000, ErrTruncated, second},
		{"truncated body", stream[:second+600], 100_000, ErrTruncated, second},
		{"no end", stream[:len(stream)-4], 100_000, ErrTruncated, int64(len(stream) - 4)},
		{"trailing", append(bytes.Clone(stream), 0), 100_000, ErrTrailing, int64(len(stream))},
		{"too long", stream, 99_999, ErrTooLong, second},
		{"too short", stream, 100_001, ErrTooShort, int64(len(stream))},
		{"decoded near 2^32", block(0xfffffff0, 20, make([]byte, 20)), 1 << 40, ErrBlockSize, 0},
		{"encoded near 2^32", block(65536, 0xfffffff8, make([]byte, 20)), 1 << 40, ErrBlockSize, 0},
		{"stored near 2^32", append([]byte(magicStored), 0xf8, 0xff, 0xff, 0xff), 1 << 40, ErrBlockSize, 0},
		{"empty blocks", block(0, 0, nil), 10, ErrBlockSize, 0},
		{"nothing encoded", block(10, 0, nil), 10, ErrBlockSize, 0},
		{"match before the start", block(105, 10, copyBack(50, 100)), 105, ErrCorrupt, 0},
		{"match beyond the window", append(stored(plain[:10]), block(105, 10, copyBack(11, 100))...), 115, ErrCorrupt, 18},
		{"header promises more", block(106, 10, copyBack(50, 100)), 200, ErrCorrupt, 0},
		{"garbage", block(1000, 100, plain[:100]), 1000, ErrCorrupt, 0},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			err := decodeAll(io.Discard, bytes.NewReader(test.stream), test.size)
			var de *DecodeError
			if !errors.Is(err, test.want) || !errors.As(err, &de) || de.Offset != test.offset {
				t.Errorf("got %v; want %v at %d", err, test.want, test.offset)
			}
		})
	}
}

// Errors of the connection and of the disk are not the stream's fault.
func TestDecodePassesErrors(t *testing.T) {
	stream := encode(t, noise(10, 100_000))
	broken := errors.New("connection reset")
	err := decodeAll(io.Discard, io.MultiReader(bytes.NewReader(stream[:70_000]), iotest.ErrReader(broken)), 100_000)
	if de := (*DecodeError)(nil); !errors.Is(err, broken) || errors.As(err, &de) {
		t.Errorf("got %v; want the reader's error as it is", err)
	}
	// What a body that was cut short says is no word about the stream.
	err = decodeAll(io.Discard, io.MultiReader(bytes.NewReader(stream[:70_000]), iotest.ErrReader(io.ErrUnexpectedEOF)), 100_000)
	if de := (*DecodeError)(nil); !errors.Is(err, io.ErrUnexpectedEOF) || errors.As(err, &de) {
		t.Errorf("got %v; want the reader's unexpected end as it is", err)
	}
	full := errors.New("disk full")
	pr, pw := io.Pipe()
	_ = pr.CloseWithError(full)
	if err := decodeAll(pw, bytes.NewReader(stream), 100_000); !errors.Is(err, full) {
		t.Errorf("got %v; want the writer's error", err)
	}
}

// mixedDisk is n bytes as disks are: half text-like, a quarter noise, a quarter zero.
func mixedDisk(n int) []byte {
	var b []byte
	for i := uint64(0); len(b) < n; i++ {
		words := noise(i, 8192)
		b = append(b, bytes.Repeat(words[:1024], 32)...)
		b = append(b, noise(i+1, 16384)...)
		b = append(b, make([]byte, 16384)...)
	}
	return b[:n]
}

// BenchmarkDecode is the work that a pull cannot avoid: decode and hash the content,
// hash the blob; MB/s of decoded bytes on one core.
func BenchmarkDecode(b *testing.B) {
	plain := mixedDisk(64 << 20)
	stream := encode(b, plain)
	for _, with := range []string{"decode", "decode+sha256"} {
		b.Run(with, func(b *testing.B) {
			b.SetBytes(int64(len(plain)))
			b.ReportAllocs()
			for b.Loop() {
				r, w := io.Reader(bytes.NewReader(stream)), io.Discard
				if with != "decode" {
					r, w = io.TeeReader(r, sha256.New()), io.Writer(sha256.New())
				}
				if err := decodeAll(w, r, int64(len(plain))); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(len(stream))/float64(len(plain)), "ratio")
		})
	}
}

// BenchmarkEncode is what making an image costs, beside its hashes.
func BenchmarkEncode(b *testing.B) {
	plain := mixedDisk(64 << 20)
	b.SetBytes(int64(len(plain)))
	for b.Loop() {
		if _, err := Encode(io.Discard, bytes.NewReader(plain)); err != nil {
			b.Fatal(err)
		}
	}
}
