package image

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/paddock-ci/paddock/fleet"
)

const aDigest = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"

func TestParseReference(t *testing.T) {
	for text, want := range map[string]struct{ host, tag, digest, full string }{
		"ghcr.io/cirruslabs/macos-sonoma-base:latest": {"ghcr.io", "latest", "", "ghcr.io/cirruslabs/macos-sonoma-base:latest"},
		"ghcr.io/cirruslabs/macos":                    {"ghcr.io", "latest", "", "ghcr.io/cirruslabs/macos:latest"},
		"localhost:5000/base:v1":                      {"localhost:5000", "v1", "", "localhost:5000/base:v1"},
		"localhost/base:v1":                           {"localhost", "v1", "", "localhost/base:v1"},
		"127.0.0.1:5000/a/b/c@" + aDigest:             {"127.0.0.1:5000", "", aDigest, "127.0.0.1:5000/a/b/c@" + aDigest},
		"registry.example:5000/a/b:tag.1@" + aDigest:  {"registry.example:5000", "tag.1", aDigest, "registry.example:5000/a/b:tag.1@" + aDigest},
	} {
		r, err := ParseReference(text)
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		if r.Host() != want.host || r.Tag() != want.tag || r.Digest() != fleet.Digest(want.digest) || r.String() != want.full {
			t.Errorf("%s: host %s, tag %s, digest %s, full %s; want %+v", text, r.Host(), r.Tag(), r.Digest(), r, want)
		}
		again, err := ParseReference(r.String())
		if err != nil || again != r {
			t.Errorf("%s does not parse back: %v, %v", r, again, err)
		}
	}
	for _, text := range []string{
		"", "macos", "macos:latest", "cirruslabs/macos:latest", "ghcr.io/", "../x", "-a.b/c", "a.b:port/c", "ghcr.io/../../etc:x", "ghcr.io/UPPER:x",
		"ghcr.io/a:b:c", "ghcr.io/a@sha256:short", "ghcr.io/a@sha512:" + strings.Repeat("a", 128), "https://ghcr.io/a:b",
		"user:secret@ghcr.io/a:b", "ghcr.io/a:" + strings.Repeat("x", 300), "ghcr.io/a b:c",
		"ghcr.io/" + strings.Repeat("a/", 600) + "b", "ghcr.io/a:../../x", "ghcr.io/a:..", "ghcr.io/a:.x", "ghcr.io/a@sha256:../../x", "ghcr.io/a%2f..:x",
	} {
		if r, err := ParseReference(text); !errors.Is(err, ErrReference) || !strings.Contains(err.Error(), "write host/repository:tag") {
			t.Errorf("%q: got %v, %v; want an error with a hint", text, r, err)
		}
	}
}

func TestReferenceAt(t *testing.T) {
	r, err := ParseReference("ghcr.io/a/b:tag")
	if err != nil {
		t.Fatal(err)
	}
	if r.Identifier() != "tag" || r.At(aDigest).Identifier() != aDigest || r.At(aDigest).String() != "ghcr.io/a/b@"+aDigest {
		t.Errorf("identifiers %s, %s; at digest %s", r.Identifier(), r.At(aDigest).Identifier(), r.At(aDigest))
	}
}

func TestLoopback(t *testing.T) {
	for host, want := range map[string]bool{
		"localhost": true, "localhost:5000": true, "127.0.0.1:1": true, "127.8.8.8": true, "[::1]:5000": true, "[::1]": true,
		"localhost.example": false, "10.0.0.1:5000": false, "127.0.0.1.example:80": false, "example": false, "": false,
	} {
		if got := Loopback(host); got != want {
			t.Errorf("Loopback(%q) = %v; want %v", host, got, want)
		}
	}
}

func TestZeroDigest(t *testing.T) {
	for _, size := range []int64{0, 1, 4095, 65536, 65537, 1 << 20} {
		sum := sha256.Sum256(make([]byte, size))
		if got, err := ZeroDigest(size); err != nil || got != digest(sum[:]) {
			t.Errorf("%d zeros: %s, %v; want %s", size, got, err, digest(sum[:]))
		}
	}
	for _, size := range []int64{-1, 1<<30 + 1} {
		if _, err := ZeroDigest(size); !errors.Is(err, ErrTooLarge) {
			t.Errorf("%d zeros: %v; want %v", size, err, ErrTooLarge)
		}
	}
}

// The digest of the usual chunk is written down; here it is computed.
func TestKnownZeroDigest(t *testing.T) {
	hash, zeros := sha256.New(), make([]byte, 1<<20)
	for range 512 {
		hash.Write(zeros)
	}
	if got, err := ZeroDigest(512 << 20); err != nil || got != digest(hash.Sum(nil)) {
		t.Errorf("%s, %v; want %s", got, err, digest(hash.Sum(nil)))
	}
}

func TestIndexEntry(t *testing.T) {
	index := func(entries ...string) []byte {
		type entry struct {
			Digest string `json:"digest"`
		}
		list := []entry{}
		for _, e := range entries {
			list = append(list, entry{e})
		}
		raw, err := json.Marshal(map[string]any{"schemaVersion": 2, "manifests": list})
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	if d, ok, err := IndexEntry(index(aDigest)); d != aDigest || !ok || err != nil {
		t.Errorf("single entry: %s, %v, %v", d, ok, err)
	}
	if _, ok, err := IndexEntry(index(aDigest, aDigest)); !ok || !errors.Is(err, ErrIndex) || !strings.Contains(err.Error(), "2 entries") {
		t.Errorf("two entries: %v, %v", ok, err)
	}
	if _, ok, err := IndexEntry(index()); !ok || !errors.Is(err, ErrIndex) || !strings.Contains(err.Error(), "nothing to pull") {
		t.Errorf("no entries: %v, %v", ok, err)
	}
	for _, mediaType := range []string{MediaTypeIndex, mediaTypeDockerList} {
		nested := fmt.Sprintf(`{"schemaVersion":2,"manifests":[{"mediaType":%q,"digest":%q,"size":5}]}`, mediaType, aDigest)
		if _, ok, err := IndexEntry([]byte(nested)); !ok || !errors.Is(err, ErrIndex) || !strings.Contains(err.Error(), "an index again") {
			t.Errorf("nested: %v, %v", ok, err)
		}
		// One that hides it is an index where the image should be.
		if _, err := ParseDocument([]byte(nested)); !errors.Is(err, ErrIndex) {
			t.Errorf("an index for an image: %v", err)
		}
	}
	if _, ok, err := IndexEntry(index("sha512:" + strings.Repeat("a", 128))); !ok || !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), "sha256 is the only algorithm") {
		t.Errorf("another algorithm: %v, %v", ok, err)
	}
	if _, ok, err := IndexEntry(index(slices.Repeat([]string{aDigest}, 5000)...)); !ok || !errors.Is(err, ErrTooLarge) || !strings.Contains(err.Error(), "more than 4096") {
		t.Errorf("5000 entries: %v, %v", ok, err)
	}
	if _, ok, err := IndexEntry([]byte(`{"schemaVersion":2,"manifests":{"digest":5}}`)); !ok || !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), "where a list") {
		t.Errorf("no list: %v, %v", ok, err)
	}
	if _, ok, err := IndexEntry(index("sha256:../x")); !ok || !errors.Is(err, ErrMalformed) {
		t.Errorf("path for a digest: %v, %v", ok, err)
	}
	if _, ok, err := IndexEntry([]byte(`{"schemaVersion":2,"layers":[]}`)); ok || err != nil {
		t.Errorf("a manifest: %v, %v", ok, err)
	}
	if _, _, err := IndexEntry(make([]byte, MaxManifestBytes+1)); !errors.Is(err, ErrTooLarge) {
		t.Errorf("too big: %v", err)
	}
}

func FuzzParseReference(f *testing.F) {
	f.Add("ghcr.io/a/b:tag")
	f.Add("localhost:5000/a@" + aDigest)
	f.Add("[::1]:5000/a:b")
	f.Fuzz(func(t *testing.T, text string) {
		r, err := ParseReference(text)
		if err != nil {
			if !errors.Is(err, ErrReference) || len(err.Error()) > 10*maxReference {
				t.Fatalf("%d bytes: %v", len(text), err)
			}
			return
		}
		if strings.Contains(r.String(), "..") && !strings.Contains(r.Host()+r.Tag(), "..") {
			t.Fatalf("%q gives %q, which is a way upwards", text, r)
		}
		if again, err := ParseReference(r.String()); err != nil || again != r {
			t.Fatalf("%q gives %q, which gives %v, %v", text, r, again, err)
		}
	})
}

// A content digest with two sizes cannot be true of both chunks; the same content twice
// is common.
func TestLayTookOneContentInTwoSizes(t *testing.T) {
	blob := fleet.Digest("sha256:" + strings.Repeat("b", 64))
	chunk := func(layer int, size int64) Chunk {
		return Chunk{Layer: layer, Size: size, Content: aDigest, Blob: blob, BlobSize: 1}
	}
	m := &Manifest{Chunks: []Chunk{chunk(1, 128<<10), chunk(2, 128<<10)}}
	if err := m.Lay(256 << 10); err != nil {
		t.Errorf("one size: %v", err)
	}
	m.Chunks = append(m.Chunks, chunk(3, 64<<10))
	if err := m.Lay(-1); !errors.Is(err, ErrSizeMismatch) || !strings.Contains(err.Error(), "layer 3") {
		t.Errorf("two sizes: %v; want %v of layer 3", err, ErrSizeMismatch)
	}
}

// Pieces are numbered alike on every node: by the first chunk with the content, then the
// NVRAM, then the VM config.
func TestPieces(t *testing.T) {
	d := func(c string) fleet.Digest { return fleet.Digest("sha256:" + strings.Repeat(c, 64)) }
	zero, err := ZeroDigest(4096)
	if err != nil {
		t.Fatal(err)
	}
	chunk := func(layer int, content fleet.Digest) Chunk {
		return Chunk{Layer: layer, Size: 4096, Content: content, Blob: d("b"), BlobSize: 100}
	}
	m := &Manifest{
		Config: Blob{Digest: d("e"), Size: 500, MediaType: "config"}, ConfigLayer: 0,
		NVRAM: Blob{Digest: d("f"), Size: 700, MediaType: "nvram"}, NVRAMLayer: 5,
		Chunks: []Chunk{chunk(1, d("1")), chunk(2, zero), chunk(3, d("2")), chunk(4, d("1"))},
	}
	if err := m.Lay(-1); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, p := range m.Pieces() {
		n, ok := m.Piece(p.Content)
		got = append(got, fmt.Sprintf("%d %d %d %d %v", p.Index, p.Layer, p.Size, n, ok))
	}
	want := []string{"0 1 4096 0 true", "2 3 4096 2 true", "-1 5 700 4 true", "-2 0 500 5 true"}
	if !slices.Equal(got, want) || m.PieceCount() != 6 {
		t.Errorf("%d pieces: index, layer, size, number %q; want %q", m.PieceCount(), got, want)
	}
	if n, ok := m.Piece(d("9")); ok {
		t.Errorf("content of another image is piece %d", n)
	}
	m.NVRAM = Blob{}
	if n, ok := m.Piece(""); ok || len(m.Pieces()) != 3 {
		t.Errorf("without NVRAM: %d pieces, and no content at all is piece %d", len(m.Pieces()), n)
	}
}
