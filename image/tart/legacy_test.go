package tart

import (
	"bytes"
	"encoding/json"
	"io"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// cutManifest is a legacy image of a stream that is cut at any places.
func cutManifest(t *testing.T, pieces [][]byte, disk int) *image.Manifest {
	t.Helper()
	doc := good()
	layers := doc.Layers[:1]
	for _, p := range pieces {
		layers = append(layers, image.Descriptor{MediaType: mediaTypeDiskV1, Digest: image.DigestOf(p), Size: int64(len(p))})
	}
	doc.Layers = append(layers, good().Layers[3])
	doc.Annotations[annotationDiskSize] = strconv.Itoa(disk)
	raw, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	m, _, err := image.Parse(raw, codecs)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// The disk of an old image is one stream: wherever it was cut, the layers one after the
// other decode to the disk, from any border of blocks.
func TestLegacyDisk(t *testing.T) {
	plain := bytes.Repeat(noise(8, 1500), 200)
	stream := dependent(t, plain)
	for name, sizes := range map[string]int{"one layer": len(stream), "tiny layers": 37, "large layers": 50_001} {
		pieces := slices.Collect(slices.Chunk(stream, sizes))
		m := cutManifest(t, pieces, len(plain))
		if len(m.Chunks) != 1 || !m.Chunks[0].Legacy() || m.DiskSize != int64(len(plain)) || m.Bytes() != int64(len(stream)) {
			t.Fatalf("%s: %d chunks, disk of %d bytes, %d on the wire: %+v", name, len(m.Chunks), m.DiskSize, m.Bytes(), m.Chunks)
		}
		c := m.Chunks[0]
		if c.Layer != 1 || len(c.Parts) != len(pieces) || c.Parts[0].Digest != image.DigestOf(pieces[0]) || c.Zero {
			t.Errorf("%s: layer %d, %d parts, zero %v", name, c.Layer, len(c.Parts), c.Zero)
		}
		readers := []io.Reader{}
		for _, p := range pieces {
			readers = append(readers, bytes.NewReader(p))
		}
		var back bytes.Buffer
		if err := image.Decode(Codec{}, &back, io.MultiReader(readers...), c); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if !bytes.Equal(back.Bytes(), plain) {
			t.Errorf("%s: another disk came out", name)
		}
	}
}

// Content and Blob of such a disk stand for it: the same for the same layers, and never
// what a chunk of known content has.
func TestLegacyIdentity(t *testing.T) {
	stream := encode(t, make([]byte, 1<<20)) // zeros, which is not to be known from outside
	half := len(stream) / 2
	one, two := cutManifest(t, [][]byte{stream[:half], stream[half:]}, 1<<20), cutManifest(t, [][]byte{stream[:half], stream[half:]}, 1<<20)
	other := cutManifest(t, [][]byte{stream}, 1<<20)
	a, b, c := one.Chunks[0], two.Chunks[0], other.Chunks[0]
	if a.Content != b.Content || a.Content == c.Content || a.Content != a.Blob || a.Zero || a.Content == image.DigestOf(make([]byte, 1<<20)) {
		t.Errorf("contents %s, %s, %s; blob %s, zero %v", a.Content, b.Content, c.Content, a.Blob, a.Zero)
	}
	names := []string{"disk.v1", string(a.Parts[0].Digest), string(a.Parts[1].Digest)}
	if want := image.DigestOf([]byte(strings.Join(names, "\n"))); a.Content != want {
		t.Errorf("content %s, want %s: stores on disk go by it", a.Content, want)
	}
	if err := fleet.CheckDigest(a.Content); err != nil {
		t.Error(err)
	}
}

// A legacy disk may be larger than any chunk, but not than any disk.
func TestLegacyLimits(t *testing.T) {
	doc := good()
	for i := range doc.Layers[1:3] {
		doc.Layers[1+i].MediaType, doc.Layers[1+i].Size = mediaTypeDiskV1, 500_000_000
	}
	for size, ok := range map[int64]bool{100_000_000_000: true, image.MaxChunkBytes + 1: true, image.MaxDiskBytes + 1: false, 0: false} {
		doc.Annotations[annotationDiskSize] = strconv.FormatInt(size, 10)
		raw, err := json.Marshal(doc)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := image.Parse(raw, codecs); (err == nil) != ok {
			t.Errorf("%d bytes of disk: %v", size, err)
		}
	}
}
