package ocidir

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/image"
)

// A file that stops giving bytes in the middle is given up after the stall time, and
// counted among what hangs until it ends.
func TestReadThatHangs(t *testing.T) {
	l, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	l.Stall = 30 * time.Millisecond
	out, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r := &reader{layout: l, digest: "sha256:ab", left: 10, pieces: make(chan piece), quit: make(chan struct{}), ended: make(chan struct{})}
	go r.pump(out)
	if _, err := in.WriteString("abc"); err != nil {
		t.Fatal(err)
	}
	buffer := make([]byte, 10)
	if n, err := r.read(t.Context(), buffer); err != nil || string(buffer[:n]) != "abc" {
		t.Fatalf("%q, %v; want what is there", buffer[:n], err)
	}
	if _, err := r.read(t.Context(), buffer); !errors.Is(err, errHangs) || cache.ClassOf(err) != cache.ClassNetwork {
		t.Errorf("%v; want %v", err, errHangs)
	}
	if n := l.hung.Load(); n != 1 {
		t.Errorf("%d operations hang; want 1", n)
	}
	r.close()
	if err := in.Close(); err != nil {
		t.Fatal(err)
	}
	<-r.ended
	for deadline := time.Now().Add(20 * time.Second); l.hung.Load() != 0; runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatal("an operation that ended still counts as hanging")
		}
	}
	if _, err := r.read(t.Context(), buffer); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after Close: %v; want %v", err, os.ErrClosed)
	}
}

// A file that becomes shorter or longer while it is read gives an error, or no more than
// it should.
func TestFileThatChanges(t *testing.T) {
	dir := t.TempDir()
	l, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "f")
	for content, want := range map[string]string{"abc": "2 bytes are missing", "abcdefgh": ""} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		r := &reader{layout: l, digest: "sha256:ab", left: 5, pieces: make(chan piece), quit: make(chan struct{}), ended: make(chan struct{})}
		go r.pump(f)
		var got []byte
		buffer := make([]byte, 2)
		for err = error(nil); err == nil; {
			var n int
			n, err = r.read(t.Context(), buffer)
			got = append(got, buffer[:n]...)
		}
		r.close()
		<-r.ended
		if want != "" && !strings.Contains(err.Error(), want) || want == "" && string(got) != content[:5] {
			t.Errorf("of %q: %q, %v", content, got, err)
		}
	}
}

func FuzzParseIndex(f *testing.F) {
	f.Add([]byte(`{"schemaVersion":2,"manifests":[{"mediaType":"a","digest":"sha256:00","size":1}]}`))
	f.Add([]byte(`{"manifests":null}`))
	f.Add([]byte(``))
	f.Fuzz(func(t *testing.T, raw []byte) {
		x, err := parseIndex(raw)
		if err != nil {
			return
		}
		d := image.Descriptor{MediaType: image.MediaTypeManifest, Digest: image.DigestOf(raw), Size: 1}
		if err := x.put("a.b/c:d", d); err != nil {
			t.Fatal(err)
		}
		again, err := x.marshal()
		if err != nil {
			t.Fatal(err)
		}
		y, err := parseIndex(again)
		if err != nil || len(y.parsed) != len(x.parsed) {
			t.Fatalf("%q became %q: %v", raw, again, err)
		}
		last := y.parsed[len(y.parsed)-1]
		if last.Digest != d.Digest || last.Annotations[annotationRef] != "a.b/c:d" {
			t.Fatalf("the new entry is %+v", last)
		}
	})
}
