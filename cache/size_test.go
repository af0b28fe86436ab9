package cache

import (
	"encoding/json"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// lie makes an image whose second chunk is said to be another image's content, of another
// size; what its blob has is neither.
func (s *shelf) lie(t *testing.T, letters string, content fleet.Digest, size int64) (fleet.Hold, *image.Manifest) {
	t.Helper()
	h, m := s.put(t, letters)
	var doc image.Document
	if err := json.Unmarshal(m.Raw, &doc); err != nil {
		t.Fatal(err)
	}
	l := doc.Layers[m.Chunks[1].Layer]
	l.Annotations["org.cirruslabs.tart.uncompressed-content-digest"] = string(content)
	l.Annotations["org.cirruslabs.tart.uncompressed-size"] = strconv.FormatInt(size, 10)
	doc.Annotations["org.cirruslabs.tart.uncompressed-disk-size"] = strconv.FormatInt(m.DiskSize-m.Chunks[1].Size+size, 10)
	raw, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	h.Digest = image.DigestOf(raw)
	s.blobs[h.Digest] = raw
	liar, _, err := image.Parse(raw, Formats())
	if err != nil {
		t.Fatal(err)
	}
	return h, liar
}

// A manifest names the content of a cached chunk and says half its size, or twice: all of
// that chunk was copied over its neighbour, or its neighbour taken with it, and the image
// was published. It is no reason to reuse anything, and the pull fails as it does alone.
func TestContentOfAnotherSizeWasReused(t *testing.T) {
	for _, size := range []int64{32 << 10, 128 << 10} {
		shelf := newShelf()
		store := openShelf(t, shelf)
		base, bm := shelf.put(t, "AB")
		liar, lm := shelf.lie(t, "pCq", bm.Chunks[0].Content, size)
		if err := store.Pull(t.Context(), base); err != nil {
			t.Fatal(err)
		}
		err := store.Pull(t.Context(), liar)
		if err == nil || ClassOf(err) != ClassFormat && ClassOf(err) != ClassDigest || !strings.Contains(err.Error(), "layer 2 ") {
			t.Errorf("size %d: pulled with %v", size, err)
		}
		if n := store.Moved()[reusedName]; n != lm.Config.Size { // it is that of base, too
			t.Errorf("size %d: %d bytes were reused; want the VM config's %d", size, n, lm.Config.Size)
		}
		if state := store.state(liar.Digest); state == fleet.ImageReady {
			t.Errorf("size %d: it is %s", size, state)
		}
		view := &View{dir: store.dir, codecs: Formats()}
		plan, err := view.Plan(lm)
		if want := lm.Chunks; err != nil || !slices.ContainsFunc(plan.Chunks, func(c image.Chunk) bool { return c.Content == want[1].Content }) || plan.Reused != 0 {
			t.Errorf("size %d: planned %+v, %v", size, plan, err)
		}
		other := Seen{Digest: liar.Digest, Manifest: lm}
		if shared, err := view.Sharing(other); err != nil || len(shared) != 0 {
			t.Errorf("size %d: shares %+v, %v", size, shared, err)
		}
	}
}

// Two disks have a content at the same offset, if their manifests are believed. It is the
// same if they agree in the size, too, and have a digest of it at all.
func TestCommonChunks(t *testing.T) {
	chunk := func(offset, size int64, content fleet.Digest) image.Chunk {
		return image.Chunk{Offset: offset, Size: size, Content: content}
	}
	legacy := chunk(5, 5, "e")
	legacy.Parts = []image.Blob{{}}
	have := []image.Chunk{chunk(0, 2, "a"), chunk(2, 2, "b"), chunk(4, 1, "c"), chunk(5, 5, "e")}
	want := []image.Chunk{chunk(0, 1, "a"), chunk(2, 2, "b"), chunk(4, 2, "c"), legacy, chunk(5, 5, "f")}
	same := common(have, want)
	if len(same) != 1 || same[0].Offset != 2 {
		t.Errorf("common are %+v; want the one at 2", same)
	}
	if same := common([]image.Chunk{legacy}, have); len(same) != 0 {
		t.Errorf("common with a legacy disk are %+v", same)
	}
}
