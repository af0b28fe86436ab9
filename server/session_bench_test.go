package server

import (
	"io"
	"testing"
	"time"
)

// FuzzTame: a node's words become one short line that a terminal only shows.
func FuzzTame(f *testing.F) {
	f.Add("plain")
	f.Add("\x1b]0;title\x07\u009b2J\xc2")
	f.Fuzz(func(t *testing.T, text string) {
		got := tame(text)
		if len(got) > maxWhy*3 { // one bad byte becomes one "?", a control a space
			t.Errorf("%d bytes", len(got))
		}
		for _, r := range got {
			if r < ' ' || r >= 0x7f && r < 0xa0 {
				t.Fatalf("%q", got)
			}
		}
	})
}

// BenchmarkSession opens a session from call to stream, with the node's sync parked, and
// carries megabytes through it.
func BenchmarkSession(b *testing.B) {
	h := newHouse(b)
	m := h.warmUp()
	h.server.times.look = time.Hour
	b.Run("open", func(b *testing.B) {
		for b.Loop() {
			near, far := m.meets(port22)
			_, _ = near.Close(), far.Close()
		}
	})
	b.Run("bytes", func(b *testing.B) {
		near, far := m.meets(port22)
		piece := make([]byte, 1<<20)
		b.SetBytes(int64(len(piece)))
		go func() { _, _ = io.Copy(io.Discard, far) }()
		for b.Loop() {
			if _, err := near.Write(piece); err != nil {
				b.Fatal(err)
			}
		}
	})
}
