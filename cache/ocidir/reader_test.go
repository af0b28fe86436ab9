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

// In a directory that hangs as a dead mount does, each caller is told within the stall
// time, and after some of them nobody is made to wait.
func TestHangingDirectory(t *testing.T) {
	l, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	raw := []byte("a manifest")
	d := image.DigestOf(raw)
	path, err := l.blob(d)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, raw, 0o600)); err != nil {
		t.Fatal(err)
	}
	answers := make(chan struct{})
	l.plain = func(path string) (*os.File, error) { <-answers; return openPlain(path) }
	l.Stall = 30 * time.Millisecond
	w := cache.Want{Chunk: image.Chunk{Content: d, Size: 10, Blob: d, BlobSize: 10}}
	began := time.Now()
	for i := range 20 {
		_, err := l.Open(t.Context(), w, 0)
		if cache.ClassOf(err) != cache.ClassNetwork || err == nil || !strings.Contains(err.Error(), "check the mount") {
			t.Fatalf("call %d: %v; want class network", i, err)
		}
		l.mu.Lock()
		down := l.down
		l.mu.Unlock()
		if down.Before(began) {
			t.Error("a layout that hangs is asked on")
		}
	}
	if _, err := l.Manifest(t.Context(), "", d); err == nil || !strings.Contains(err.Error(), "16 operations hang") {
		t.Errorf("after 20 calls: %v; want one that is refused at once", err)
	}
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("20 calls took %s", took)
	}
	close(answers)
	for deadline := time.Now().Add(time.Minute); l.hung.Load() != 0; runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatal("the directory answers again, and operations still count as hanging")
		}
	}
	l.Stall = 5 * time.Second
	if got, err := l.Manifest(t.Context(), "", d); err != nil || string(got) != string(raw) {
		t.Errorf("the directory answers again, and still: %q, %v", got, err)
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
		if time.Now().Before(l.down) {
			t.Errorf("of %q: one file keeps the whole layout from being asked", content)
		}
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
