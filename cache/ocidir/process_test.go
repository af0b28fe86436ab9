package ocidir_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/cache/ocidir"
	"github.com/paddock-ci/paddock/image"
)

// TestMain lets the test program be a writer process: "writer DIR NAME" adds a dozen
// images, each of blobs of its own and one that all share; "stuck DIR" stops in the
// middle of a blob, says so, and waits to be killed.
func TestMain(m *testing.M) {
	args := os.Args[1:]
	switch {
	case len(args) == 3 && args[0] == "writer":
		if err := write(args[1], args[2]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	case len(args) == 2 && args[0] == "stuck":
		_ = stick(args[1])
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// images of one writer.
const perWriter = 12

// imageOf is image i of a writer.
func imageOf(t testing.TB, name string, i int) (ref string, m made) {
	m = mint(t, name[0], i+1)
	shared := mint(t, 0, 1)
	m.blobs = append(m.blobs, shared.blobs...)
	return fmt.Sprintf("registry.test/%s:%d", name, i), m
}

func write(dir, name string) error {
	l, err := ocidir.Open(dir)
	if err != nil {
		return err
	}
	b := &testing.B{}
	for i := range perWriter {
		ref, m := imageOf(b, name, i)
		if _, err := l.Add(context.Background(), ref, m.manifest, m.blobs); err != nil {
			return fmt.Errorf("%s: %w", ref, err)
		}
	}
	return nil
}

func stick(dir string) error {
	l, err := ocidir.Open(dir)
	if err != nil {
		return err
	}
	m := mint(&testing.B{}, 7, 1)
	m.blobs[0].Open = func() (io.ReadCloser, error) { return &half{data: m.data[0][:200_000]}, nil }
	_, err = l.Add(context.Background(), "a.b/c:d", m.manifest, m.blobs)
	return err
}

// half gives what it has, says so, and then nothing more.
type half struct{ data []byte }

func (h *half) Read(p []byte) (int, error) {
	if len(h.data) == 0 {
		fmt.Println("stuck")
		select {}
	}
	n := copy(p, h.data[:min(len(h.data), 1000)])
	h.data = h.data[n:]
	return n, nil
}
func (h *half) Close() error { return nil }

// Two processes write two dozen images to one directory, while this one reads whatever
// the index names: every image is there in the end, and nothing was ever read in half.
func TestTwoWriters(t *testing.T) {
	self, err := os.Executable()
	must(t, err)
	dir := t.TempDir()
	l := open(t, dir)
	var writers []*exec.Cmd
	ended := make(chan error, 2)
	for _, name := range []string{"p", "q"} {
		cmd := exec.CommandContext(t.Context(), self, "writer", dir, name)
		cmd.Stderr = os.Stderr
		must(t, cmd.Start())
		writers = append(writers, cmd)
		go func() { ended <- cmd.Wait() }()
	}
	running, rounds := len(writers), 0
	for running > 0 {
		select {
		case err := <-ended:
			if running--; err != nil {
				t.Errorf("a writer: %v", err)
			}
		default:
			rounds++
			readAll(t, l)
		}
	}
	if n := readAll(t, l); n != 2*perWriter || rounds == 0 {
		t.Errorf("%d images are there after %d rounds of reading; want %d", n, rounds, 2*perWriter)
	}
	for _, name := range []string{"p", "q"} {
		for i := range perWriter {
			ref, m := imageOf(t, name, i)
			if d, err := l.Resolve(t.Context(), ref); err != nil || d != image.DigestOf(m.manifest) {
				t.Errorf("%s: %s, %v", ref, d, err)
			}
		}
	}
	files, err := filepath.Glob(filepath.Join(dir, ".incoming", "*"))
	if err != nil || len(files) != 0 {
		t.Errorf("left over: %v, %v", files, err)
	}
}

// readAll reads every image that the index names, in full, and returns how many.
func readAll(t *testing.T, l *ocidir.Layout) int {
	t.Helper()
	list, err := l.List(t.Context())
	if errors.Is(err, os.ErrNotExist) {
		return 0 // the writers have not come that far
	}
	must(t, err)
	for _, e := range list {
		raw, err := l.Manifest(t.Context(), e.Ref, e.Digest)
		must(t, err)
		doc, err := image.ParseDocument(raw)
		must(t, err)
		for _, d := range doc.Layers {
			data, err := read(l, t.Context(), want(d.Blob()), 0)
			if err != nil || image.DigestOf(data) != d.Digest {
				t.Fatalf("%s: blob %s: %d bytes, %v", e.Ref, d.Digest, len(data), err)
			}
		}
	}
	return len(list)
}

// A writer that is killed in the middle of a blob leaves no blob, and stands in nobody's
// way.
func TestKilledWriter(t *testing.T) {
	self, err := os.Executable()
	must(t, err)
	dir := t.TempDir()
	cmd := exec.CommandContext(t.Context(), self, "stuck", dir)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "stuck\n" {
		t.Fatalf("the writer said %q, %v", line, err)
	}
	must(t, cmd.Process.Signal(syscall.SIGKILL))
	_ = cmd.Wait() // "killed" is what it says

	l := open(t, dir)
	m := mint(t, 7, 1)
	if _, err := read(l, t.Context(), want(m.blobs[0].Blob), 0); cache.ClassOf(err) != cache.ClassNotFound {
		t.Errorf("the half blob: %v; want class not-found", err)
	}
	files, err := filepath.Glob(filepath.Join(dir, ".incoming", "*"))
	if err != nil || len(files) != 1 {
		t.Fatalf("the killed writer left %v, %v; want one file", files, err)
	}
	if _, err := l.Add(t.Context(), "a.b/c:d", m.manifest, m.blobs); err != nil {
		t.Fatal(err)
	}
	if data, err := read(l, t.Context(), want(m.blobs[0].Blob), 0); err != nil || !strings.HasPrefix(string(data), string(m.data[0])) {
		t.Errorf("after the second try: %d bytes, %v", len(data), err)
	}
	// It is removed when it counts as abandoned.
	old := fileTime(t, files[0])
	must(t, os.Chtimes(files[0], old, old))
	if _, err := l.Add(t.Context(), "a.b/c:d", m.manifest, m.blobs); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(files[0]); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what was abandoned: %v; want it gone", err)
	}
}

// fileTime is two days before a file's own.
func fileTime(t *testing.T, path string) time.Time {
	t.Helper()
	info, err := os.Stat(path)
	must(t, err)
	return info.ModTime().Add(-48 * time.Hour)
}
