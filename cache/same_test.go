package cache

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
	"github.com/paddock-ci/paddock/image/tart"
)

// assemble makes an image of parts as they are, which tart.Build would not: any NVRAM
// and config, any chunks.
func (s *shelf) assemble(t *testing.T, config, nvram []byte, chunks ...[]byte) fleet.Hold {
	t.Helper()
	layer := func(mediaType string, data []byte, notes map[string]string) image.Descriptor {
		d := image.DigestOf(data)
		s.blobs[d] = data
		return image.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(data)), Annotations: notes}
	}
	layers := []image.Descriptor{layer(tart.MediaTypeConfig, config, nil)}
	for _, c := range chunks {
		var encoded bytes.Buffer
		if _, err := tart.Encode(&encoded, bytes.NewReader(c)); err != nil {
			t.Fatal(err)
		}
		layers = append(layers, layer(tart.MediaTypeDisk, encoded.Bytes(), map[string]string{
			"org.cirruslabs.tart.uncompressed-size":           strconv.Itoa(len(c)),
			"org.cirruslabs.tart.uncompressed-content-digest": string(image.DigestOf(c)),
		}))
	}
	layers = append(layers, layer(tart.MediaTypeNVRAM, nvram, nil))
	raw, err := json.Marshal(image.Document{
		SchemaVersion: 2, MediaType: image.MediaTypeManifest, Layers: layers,
		Config: image.Descriptor{MediaType: "application/vnd.oci.image.config.v1+json", Digest: image.DigestOf([]byte("x")), Size: 1},
	})
	if err != nil {
		t.Fatal(err)
	}
	d := image.DigestOf(raw)
	s.blobs[d] = raw
	return fleet.Hold{Digest: d, Ref: "registry.example/base:same"}
}

// The same bytes are two parts of an image: NVRAM and a chunk, or config and NVRAM. Each
// part is written to its place.
func TestEqualPartsWereTakenForOne(t *testing.T) {
	config := []byte(`{"version":1,"os":"linux"}`)
	a, b := bytes.Repeat([]byte("A123"), 16<<10), bytes.Repeat([]byte("B123"), 16<<10)
	for name, nvram := range map[string][]byte{"NVRAM is a chunk": a, "NVRAM is the config": config} {
		t.Run(name, func(t *testing.T) {
			shelf := newShelf()
			store := openShelf(t, shelf)
			h := shelf.assemble(t, config, nvram, a, b)
			if err := store.Pull(t.Context(), h); err != nil {
				t.Fatal(err)
			}
			for file, want := range map[string][]byte{configFile: config, nvramFile: nvram, diskFile: append(bytes.Clone(a), b...)} {
				got, err := os.ReadFile(filepath.Join(store.dir.image(h.Digest), file))
				if err != nil || !bytes.Equal(got, want) {
					t.Errorf("%s is not as it was pushed (%d bytes, %v)", file, len(got), err)
				}
			}
		})
	}
}

// A file that the journal promises is gone or cut: the image is not published without
// it, and the part is fetched again.
func TestSealChecksEveryFile(t *testing.T) {
	shelf := newShelf()
	store := openShelf(t, shelf)
	h, m := shelf.put(t, "AB")
	if err := store.Pull(t.Context(), h); err != nil {
		t.Fatal(err)
	}
	dir := store.dir.image(h.Digest)
	p := &partial{dir: dir, journal: &journal{done: map[item]bool{{aChunk, m.Chunks[0].Content}: true, {aChunk, m.Chunks[1].Content}: true}}}
	for _, file := range []string{configFile, nvramFile} {
		whole, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(filepath.Join(dir, file), 1); err != nil {
			t.Fatal(err)
		}
		if err := p.seal(m, h.Ref); ClassOf(err) != ClassDisk || err == nil {
			t.Errorf("sealed with a cut %s: %v; want class disk", file, err)
		}
		if err := writeFile(filepath.Join(dir, file), whole); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Truncate(filepath.Join(dir, nvramFile), 1); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(dir, store.dir.partial(h.Digest)); err != nil {
		t.Fatal(err)
	}
	store.mu.Lock()
	delete(store.images, h.Digest)
	store.mu.Unlock()
	shelf.asked = nil
	if err := store.Pull(t.Context(), h); err != nil {
		t.Fatal(err)
	}
	if want := []fleet.Digest{m.NVRAM.Digest}; !slices.Equal(shelf.asked, want) {
		t.Errorf("asked for %v; want the NVRAM alone, %v", shelf.asked, want)
	}
}
