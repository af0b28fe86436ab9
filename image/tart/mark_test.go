package tart

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/paddock-ci/paddock/image"
)

// before is the window that a mark needs.
func before(plain []byte, at image.Mark) image.Mark {
	at.Window = plain[max(0, at.Out-window):at.Out]
	return at
}

// through decodes from a mark to the end, and returns what came and every mark on the way.
// After each block, the bytes that were taken from the reader are those before the mark.
func through(t *testing.T, stream, plain []byte, from image.Mark) (out []byte, marks []image.Mark) {
	t.Helper()
	hash := sha256.New()
	hash.Write(stream[:from.In])
	c := image.Chunk{Size: int64(len(plain)), BlobSize: int64(len(stream)), MediaType: MediaTypeDisk}
	// As a puller does it: buffered, and hashed behind the buffer.
	r := io.TeeReader(bufio.NewReaderSize(bytes.NewReader(stream[from.In:]), 100_000), hash)
	d, err := (Codec{}).NewDecoder(r, c, from)
	if err != nil {
		t.Fatalf("at %d: %v", from.In, err)
	}
	clear(from.Window) // not used again
	for {
		block, err := d.Next()
		if err != nil && !errors.Is(err, io.EOF) {
			t.Fatalf("from %d: %v", from.In, err)
		}
		at := d.Mark()
		if want := sha256.Sum256(stream[:at.In]); !bytes.Equal(hash.Sum(nil), want[:]) {
			t.Fatalf("from %d: what was read is not the %d bytes before the mark", from.In, at.In)
		}
		if errors.Is(err, io.EOF) {
			if _, err := d.Next(); !errors.Is(err, io.EOF) {
				t.Fatalf("after the end: %v", err)
			}
			if at.In != int64(len(stream)) || at.Out != int64(len(plain)) {
				t.Fatalf("ended at %d and %d, want %d and %d", at.In, at.Out, len(stream), len(plain))
			}
			return out, marks
		}
		out = append(out, block...)
		marks = append(marks, at)
	}
}

// Decoding can begin anew at every border of blocks, with the window taken from what was
// decoded before.
func TestResumeAtEveryBorder(t *testing.T) {
	streams := map[string][2][]byte{}
	stream, plain := windowed()
	streams["referring back across stored and short blocks"] = [2][]byte{stream, plain}
	plain = bytes.Repeat(noise(8, 1500), 400)
	streams["every block refers back"] = [2][]byte{dependent(t, plain), plain}
	plain = slices.Concat(noise(5, 70_000), make([]byte, 200_000), []byte(strings.Repeat("x", 1000)))
	streams["as encoded here"] = [2][]byte{encode(t, plain), plain}
	tiny := append(stored([]byte("0123456789")), block(105, 10, copyBack(10, 100))...)
	plain = []byte(strings.Repeat("0123456789", 11) + "12345")
	streams["smaller than a window"] = [2][]byte{append(tiny, magicEnd...), plain}
	for name, s := range streams {
		t.Run(name, func(t *testing.T) {
			stream, plain := s[0], s[1]
			whole, marks := through(t, stream, plain, image.Mark{})
			if !bytes.Equal(whole, plain) || len(marks) < 2 {
				t.Fatalf("decoded in one go: %d bytes in %d blocks, not the %d that were encoded", len(whole), len(marks), len(plain))
			}
			for _, at := range marks {
				at = before(bytes.Clone(plain), at)
				if rest, _ := through(t, stream, plain, at); !bytes.Equal(rest, plain[at.Out:]) {
					t.Errorf("from %d (decoded offset %d): other bytes than in one go", at.In, at.Out)
				}
			}
		})
	}
}

// What is wrong is found at the same place, wherever decoding began.
func TestErrorsAfterResume(t *testing.T) {
	stream, plain := windowed()
	_, marks := through(t, stream, plain, image.Mark{})
	spoilt := append(bytes.Clone(stream[:marks[4].In]), "bv42"...)
	c := image.Chunk{Size: int64(len(plain)), BlobSize: int64(len(spoilt)), MediaType: MediaTypeDisk}
	for _, at := range append([]image.Mark{{}}, marks[:5]...) {
		d, err := (Codec{}).NewDecoder(bytes.NewReader(spoilt[at.In:]), c, before(plain, at))
		if err != nil {
			t.Fatal(err)
		}
		for err == nil {
			_, err = d.Next()
		}
		var de *DecodeError
		if !errors.Is(err, ErrMagic) || !errors.As(err, &de) || de.Offset != marks[4].In || de.Out != marks[4].Out {
			t.Errorf("from %d: %v; want %v at %d and %d", at.In, err, ErrMagic, marks[4].In, marks[4].Out)
		}
		if _, again := d.Next(); !errors.Is(again, err) {
			t.Errorf("asked again: %v; want the same error", again)
		}
	}
}

// A mark that lies, or that came without its window, is refused before a byte is read.
func TestMarkRefusals(t *testing.T) {
	c := image.Chunk{Size: 100_000, BlobSize: 50_000, MediaType: MediaTypeDisk}
	full := make([]byte, window)
	for name, at := range map[string]image.Mark{
		"negative in":       {In: -1, Out: 70_000, Window: full},
		"negative out":      {In: 1, Out: -1},
		"beyond the blob":   {In: 50_001, Out: 70_000, Window: full},
		"beyond the disk":   {In: 100, Out: 100_001, Window: full},
		"nothing decoded":   {In: 100, Out: 0},
		"nothing consumed":  {In: 0, Out: 100, Window: full[:100]},
		"no window":         {In: 100, Out: 70_000},
		"too short":         {In: 100, Out: 70_000, Window: full[:window-1]},
		"too long":          {In: 100, Out: 1000, Window: full},
		"window of nothing": {Window: full[:1]},
	} {
		if d, err := (Codec{}).NewDecoder(strings.NewReader(""), c, at); d != nil || !errors.Is(err, ErrMark) {
			t.Errorf("%s: %v, %v; want %v", name, d, err, ErrMark)
		}
	}
}
