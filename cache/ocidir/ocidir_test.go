package ocidir_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/cache/ocidir"
	"github.com/paddock-ci/paddock/cache/registry"
	"github.com/paddock-ci/paddock/cache/registrytest"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// made is an image of some blobs, which no codec knows.
type made struct {
	manifest []byte
	blobs    []ocidir.Blob
	data     [][]byte
}

// mint makes an image of n blobs of 300,000 bytes (more than one read), of which those of
// equal seeds are equal.
func mint(t testing.TB, seed byte, n int) made {
	t.Helper()
	var m made
	doc := image.Document{SchemaVersion: 2, MediaType: image.MediaTypeManifest}
	for i := range n {
		data := make([]byte, 300_000)
		noise := rand.NewChaCha8([32]byte{seed, byte(i)})
		_, _ = noise.Read(data) // never fails
		b := image.Blob{Digest: image.DigestOf(data), Size: int64(len(data)), MediaType: "application/x-test"}
		m.blobs = append(m.blobs, ocidir.Blob{Blob: b, Open: func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }})
		m.data = append(m.data, data)
		doc.Layers = append(doc.Layers, image.Descriptor{MediaType: b.MediaType, Digest: b.Digest, Size: b.Size})
	}
	doc.Config = doc.Layers[0]
	raw, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	m.manifest = raw
	return m
}

func open(t testing.TB, dir string) *ocidir.Layout {
	t.Helper()
	l, err := ocidir.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	l.Stall = 5 * time.Second
	return l
}

func want(b image.Blob) cache.Want {
	return cache.Want{Chunk: image.Chunk{Content: b.Digest, Size: b.Size, Blob: b.Digest, BlobSize: b.Size}}
}

func read(l *ocidir.Layout, ctx context.Context, w cache.Want, from int64) ([]byte, error) {
	body, err := l.Open(ctx, w, from)
	if err != nil {
		return nil, err
	}
	defer func() { _ = body.Close() }()
	return io.ReadAll(body)
}

func TestAddAndRead(t *testing.T) {
	l := open(t, filepath.Join(t.TempDir(), "not", "there", "yet"))
	m := mint(t, 1, 2)
	const ref = "ghcr.io/acme/base:v1"
	d, err := l.Add(t.Context(), ref, m.manifest, m.blobs)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := l.Resolve(t.Context(), ref); err != nil || got != d || d != image.DigestOf(m.manifest) {
		t.Errorf("resolved to %s, %v; want %s", got, err, d)
	}
	if got, err := l.Resolve(t.Context(), "ghcr.io/acme/base@"+string(d)); err != nil || got != d {
		t.Errorf("by digest: %s, %v", got, err)
	}
	if raw, err := l.Manifest(t.Context(), ref, d); err != nil || !bytes.Equal(raw, m.manifest) {
		t.Errorf("the manifest came as %q, %v", raw, err)
	}
	size := int64(len(m.data[0]))
	for _, from := range []int64{0, 1, 262_143, 262_144, 262_145, size - 1, size} {
		got, err := read(l, t.Context(), want(m.blobs[0].Blob), from)
		if err != nil || !bytes.Equal(got, m.data[0][from:]) {
			t.Errorf("from %d: %d bytes, %v", from, len(got), err)
		}
	}
	parts := cache.Want{Chunk: image.Chunk{Parts: []image.Blob{m.blobs[0].Blob, m.blobs[1].Blob}, BlobSize: 2 * size}}
	if got, err := read(l, t.Context(), parts, size-5); err != nil || !bytes.Equal(got, append(bytes.Clone(m.data[0][size-5:]), m.data[1]...)) {
		t.Errorf("of two parts: %d bytes, %v", len(got), err)
	}

	// The tag moves; the other entry stays. Blobs may be written before.
	other := mint(t, 2, 1)
	if err := l.Put(t.Context(), other.blobs[0]); err != nil {
		t.Fatal(err)
	}
	other.blobs = nil
	if _, err := l.Add(t.Context(), "ghcr.io/acme/other:v1", m.manifest, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Add(t.Context(), ref, other.manifest, other.blobs); err != nil {
		t.Fatal(err)
	}
	list, err := l.List(t.Context())
	if err != nil || len(list) != 2 || list[0].Digest != d || list[1].Ref != ref || list[1].Digest != image.DigestOf(other.manifest) || list[1].Size != int64(len(other.manifest)) {
		t.Errorf("listed %+v, %v", list, err)
	}
}

// A store pulls an image that was copied from a registry into a layout, from the layout
// alone.
func TestStorePullsFromLayout(t *testing.T) {
	reg := registrytest.New()
	server := httptest.NewServer(reg)
	defer server.Close()
	d, err := reg.Push(t.Context(), "fleet/base", "v1", registrytest.Source("a0ba", 64<<10))
	if err != nil {
		t.Fatal(err)
	}
	ref := strings.TrimPrefix(server.URL, "http://") + "/fleet/base:v1"
	client, err := registry.New(registry.Config{})
	if err != nil {
		t.Fatal(err)
	}
	raw, err := client.Manifest(t.Context(), ref, d)
	if err != nil {
		t.Fatal(err)
	}
	doc, err := image.ParseDocument(raw)
	if err != nil {
		t.Fatal(err)
	}
	var blobs []ocidir.Blob
	for _, desc := range append(doc.Layers, doc.Config) {
		w := want(desc.Blob())
		w.Ref = ref
		blobs = append(blobs, ocidir.Blob{Blob: desc.Blob(), Open: func() (io.ReadCloser, error) { return client.Open(t.Context(), w, 0) }})
	}
	l := open(t, t.TempDir())
	if _, err := l.Add(t.Context(), ref, raw, blobs); err != nil {
		t.Fatal(err)
	}
	server.Close()
	store, err := cache.Open(cache.Config{Dir: t.TempDir(), Sources: []cache.Source{l}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = store.Close() }()
	if err := store.Pull(t.Context(), fleet.Hold{Digest: d, Ref: ref, Demand: true}); err != nil {
		t.Error(err)
	}
	if l.Kind() != cache.KindStore || !strings.HasPrefix(l.Name(), "store /") {
		t.Errorf("the layout is of kind %s, named %q", l.Kind(), l.Name())
	}
}

// Everything that is not there, or not what it should be, is an error of its own class.
func TestBadLayouts(t *testing.T) {
	m := mint(t, 1, 1)
	b := m.blobs[0].Blob
	path := filepath.Join("blobs", "sha256", strings.TrimPrefix(string(b.Digest), "sha256:"))
	tests := []struct {
		name  string
		spoil func(t *testing.T, dir string)
		class cache.Class
		text  string
	}{
		{"no such blob", func(t *testing.T, dir string) { must(t, os.Remove(filepath.Join(dir, path))) }, cache.ClassNotFound, "has no"},
		{"the mount is gone", func(t *testing.T, dir string) { must(t, os.RemoveAll(dir)) }, cache.ClassNetwork, "is it mounted"},
		{"truncated", func(t *testing.T, dir string) { must(t, os.Truncate(filepath.Join(dir, path), 100)) }, cache.ClassDigest, "has 100 bytes"},
		{"grown", func(t *testing.T, dir string) { must(t, os.Truncate(filepath.Join(dir, path), 1<<20)) }, cache.ClassDigest, "1048576 bytes"},
		{"a directory", func(t *testing.T, dir string) {
			must(t, os.Remove(filepath.Join(dir, path)))
			must(t, os.Mkdir(filepath.Join(dir, path), 0o755))
		}, cache.ClassDigest, "remove it"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "layout")
			l := open(t, dir)
			if _, err := l.Add(t.Context(), "a.b/c:d", m.manifest, m.blobs); err != nil {
				t.Fatal(err)
			}
			test.spoil(t, dir)
			_, err := read(l, t.Context(), want(b), 0)
			if err == nil || cache.ClassOf(err) != test.class || !strings.Contains(err.Error(), test.text) {
				t.Errorf("got %v; want class %s with %q", err, test.class, test.text)
			}
			_, has := l.Has(want(b))
			if known := test.class == cache.ClassDigest; has != known {
				t.Errorf("afterwards the layout says %t about having it", has)
			}
		})
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// A pipe where a blob or a manifest should be is an error of its own, at once, as often as
// it is asked for; neither it nor a blob that cannot be opened keeps the
// others from being read.
func TestBadFileAmongGood(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	m := mint(t, 1, 2)
	if _, err := l.Add(t.Context(), "a.b/c:d", m.manifest, m.blobs); err != nil {
		t.Fatal(err)
	}
	bad, good := m.blobs[0].Blob, m.blobs[1].Blob
	path := filepath.Join(dir, "blobs", "sha256", strings.TrimPrefix(string(bad.Digest), "sha256:"))
	check := func(class cache.Class, err error) {
		t.Helper()
		if err == nil || cache.ClassOf(err) != class {
			t.Errorf("%v; want class %s", err, class)
		}
		if _, ok := l.Has(want(good)); !ok {
			t.Error("the other blob is not there any more")
		}
		if got, err := read(l, t.Context(), want(good), 0); err != nil || !bytes.Equal(got, m.data[1]) {
			t.Errorf("the other blob: %d bytes, %v", len(got), err)
		}
	}
	must(t, os.Remove(path))
	must(t, os.Symlink(filepath.Base(path), path)) // to itself
	_, err := read(l, t.Context(), want(bad), 0)
	check(cache.ClassNetwork, err)
	must(t, os.Remove(path))
	must(t, unix.Mkfifo(path, 0o644))
	for range 20 {
		_, err := read(l, t.Context(), want(bad), 0)
		check(cache.ClassDigest, err)
		_, err = l.Manifest(t.Context(), "", bad.Digest)
		check(cache.ClassDigest, err)
	}
}

// A digest never leads out of the directory.
func TestTraversal(t *testing.T) {
	dir := t.TempDir()
	secret := filepath.Join(dir, "secret")
	must(t, os.WriteFile(secret, []byte("top"), 0o600))
	l := open(t, filepath.Join(dir, "layout"))
	for _, d := range []fleet.Digest{"sha256:../../../secret", "../secret", "", "sha256:", "sha512:" + fleet.Digest(strings.Repeat("a", 128))} {
		if _, err := l.Manifest(t.Context(), "", d); cache.ClassOf(err) != cache.ClassFormat {
			t.Errorf("manifest %q: %v; want class format", d, err)
		}
		if _, err := read(l, t.Context(), want(image.Blob{Digest: d, Size: 3}), 0); cache.ClassOf(err) != cache.ClassFormat {
			t.Errorf("blob %q: %v; want class format", d, err)
		}
		m := mint(t, 1, 1)
		m.blobs[0].Digest = d
		if _, err := l.Add(t.Context(), "a.b/c:d", m.manifest, m.blobs); cache.ClassOf(err) != cache.ClassFormat {
			t.Errorf("adding blob %q: %v; want class format", d, err)
		}
	}
}

// What cannot be added leaves no entry, and nothing that could be taken for a blob.
func TestAddRefusals(t *testing.T) {
	m := mint(t, 1, 2)
	wrong := func(data []byte) func() (io.ReadCloser, error) {
		return func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }
	}
	broken := errors.New("the disk broke")
	tests := []struct {
		name  string
		ref   string
		raw   []byte
		open  func() (io.ReadCloser, error) // of the second blob; nil: it is left out
		class cache.Class
		text  string
	}{
		{"a blob is missing", "a.b/c:d", m.manifest, nil, cache.ClassNotFound, "neither in the image layout"},
		{"a byte is wrong", "a.b/c:d", m.manifest, wrong(append(bytes.Clone(m.data[1][1:]), 'x')), cache.ClassDigest, "came with digest"},
		{"too short", "a.b/c:d", m.manifest, wrong(m.data[1][1:]), cache.ClassDigest, "299999 bytes"},
		{"endless", "a.b/c:d", m.manifest, func() (io.ReadCloser, error) { return io.NopCloser(zeros{}), nil }, cache.ClassDigest, "300001 bytes"},
		{"cannot be read", "a.b/c:d", m.manifest, func() (io.ReadCloser, error) { return nil, broken }, cache.ClassDisk, "the disk broke"},
		{"no host in the name", "c:d", m.manifest, wrong(m.data[1]), cache.ClassFormat, "names no registry host"},
		{"no manifest", "a.b/c:d", []byte("{}"), wrong(m.data[1]), cache.ClassFormat, ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			l := open(t, dir)
			blobs := m.blobs[:1]
			if test.open != nil {
				blobs = append(blobs[:1:1], ocidir.Blob{Blob: m.blobs[1].Blob, Open: test.open})
			}
			_, err := l.Add(t.Context(), test.ref, test.raw, blobs)
			if err == nil || cache.ClassOf(err) != test.class || !strings.Contains(err.Error(), test.text) {
				t.Errorf("got %v; want class %s with %q", err, test.class, test.text)
			}
			if _, err := os.Stat(filepath.Join(dir, "index.json")); err == nil {
				t.Error("there is an index")
			}
			files, err := filepath.Glob(filepath.Join(dir, ".incoming", "*"))
			if err != nil || len(files) != 0 {
				t.Errorf("left over: %v, %v", files, err)
			}
		})
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// An index that another tool wrote keeps what we do not know; one that is none is refused.
func TestForeignIndex(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir)
	m := mint(t, 1, 1)
	d := strings.Repeat("ab", 32)
	foreign := fmt.Sprintf(`{"schemaVersion":2,"annotations":{"x":"y"},"manifests":[{"mediaType":"m","digest":"sha256:%s","size":7,"platform":{"os":"linux"}}]}`, d)
	must(t, os.WriteFile(filepath.Join(dir, "index.json"), []byte(foreign), 0o644))
	if _, err := l.Add(t.Context(), "a.b/c:d", m.manifest, m.blobs); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(filepath.Join(dir, "index.json"))
	must(t, err)
	for _, part := range []string{`"annotations":{"x":"y"}`, `"platform":{"os":"linux"}`, `"org.opencontainers.image.ref.name":"a.b/c:d"`} {
		if !strings.Contains(string(raw), part) {
			t.Errorf("the index lacks %s: %s", part, raw)
		}
	}
	if list, err := l.List(t.Context()); err != nil || len(list) != 2 || list[0].Ref != "" {
		t.Errorf("listed %+v, %v", list, err)
	}
	for _, bad := range []string{"null", "[]", "x", `{"manifests":7}`, `{"manifests":[{"digest":"sha256:../../x"}]}`} {
		must(t, os.WriteFile(filepath.Join(dir, "index.json"), []byte(bad), 0o644))
		if _, err := l.List(t.Context()); !errors.Is(err, image.ErrMalformed) || cache.ClassOf(err) != cache.ClassFormat {
			t.Errorf("%s: %v; want malformed", bad, err)
		}
		if _, err := l.Add(t.Context(), "a.b/c:d", m.manifest, m.blobs); !errors.Is(err, image.ErrMalformed) {
			t.Errorf("adding to %s: %v; want malformed", bad, err)
		}
	}
	if _, err := ocidir.Open("relative/path"); err == nil {
		t.Error("a relative path was accepted")
	}
}
