package cache_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// next is a second tag of an image: seven of its eleven chunks are those of "abcdefghij", two
// at other offsets.
const (
	first = "abcdefghij"
	next  = "xabcde0yzfg"
)

// asked are the things that were asked for, but the manifest.
func (w *world) asked(h fleet.Hold) []fleet.Digest {
	var list []fleet.Digest
	for d := range w.reg.Counts().Requests {
		if d != h.Digest {
			list = append(list, d)
		}
	}
	slices.Sort(list)
	return list
}

// missing are the blobs of m whose content base has not got.
func missing(m, base *image.Manifest) []fleet.Digest {
	have := map[fleet.Digest]bool{}
	for _, c := range base.Pieces() {
		have[c.Content] = true
	}
	var list []fleet.Digest
	for _, c := range m.Pieces() {
		if !have[c.Content] {
			list = append(list, c.Blob)
		}
	}
	slices.Sort(list)
	return list
}

// A next tag asks for exactly the chunks that no cached image holds, after a restart too,
// when what is held is known from manifests only.
func TestNextTagAsksForMissingChunks(t *testing.T) {
	w := newWorld(t)
	base, baseDisk, bm := w.push(t, "base", first)
	again, disk, m := w.push(t, "next", next)
	if err := w.store.Pull(t.Context(), base); err != nil {
		t.Fatal(err)
	}
	if err := w.store.Close(); err != nil {
		t.Fatal(err)
	}
	store := openStore(t, w.dir, 0)
	w.reg.Reset()
	if err := store.Pull(t.Context(), again); err != nil {
		t.Fatal(err)
	}
	checkDisk(t, store, again.Digest, disk)
	checkDisk(t, store, base.Digest, baseDisk)
	want := missing(m, bm)
	if got := w.asked(again); len(want) != 4 || !slices.Equal(got, want) { // x, y, z and the NVRAM
		t.Errorf("asked for %d things, %v; want %d, %v", len(got), got, len(want), want)
	}
	var saved int64
	for _, c := range m.Pieces() {
		if !slices.Contains(want, c.Blob) {
			saved += c.BlobSize
		}
	}
	if got := store.Moved()["reused"]; got != saved {
		t.Errorf("%d bytes are said to be reused; want %d", got, saved)
	}
}

// recompress pushes an image with the same content in other blobs: blocks that are stored
// as they are, as another encoder might do.
func (w *world) recompress(t *testing.T, name string, m *image.Manifest, disk []byte) (fleet.Hold, *image.Manifest) {
	t.Helper()
	var doc image.Document
	if err := json.Unmarshal(m.Raw, &doc); err != nil {
		t.Fatal(err)
	}
	for _, c := range m.Chunks {
		var blob []byte
		for block := range slices.Chunk(disk[c.Offset:c.Offset+c.Size], 64<<10) {
			blob = append(blob, "bv4-"...)
			blob = binary.LittleEndian.AppendUint32(blob, uint32(len(block)))
			blob = append(blob, block...)
		}
		blob = append(blob, "bv4$"...)
		d, err := w.reg.PutBlob(t.Context(), blob)
		if err != nil {
			t.Fatal(err)
		}
		doc.Layers[c.Layer].Digest, doc.Layers[c.Layer].Size = d, int64(len(blob))
	}
	raw, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	d, err := w.reg.PutManifest(t.Context(), "test/"+name, "v1", image.MediaTypeManifest, raw)
	if err != nil {
		t.Fatal(err)
	}
	h := fleet.Hold{Digest: d, Ref: w.host + "/test/" + name + ":v1"}
	return h, w.manifest(t, h)
}

// Content is what counts: the chunks of a cached image are reused when a tag has them in
// other blobs.
func TestRecompressedChunksAreReused(t *testing.T) {
	w := newWorld(t)
	base, _, bm := w.push(t, "base", first)
	_, disk, m := w.push(t, "next", next)
	again, m := w.recompress(t, "again", m, disk)
	if err := w.store.Pull(t.Context(), base); err != nil {
		t.Fatal(err)
	}
	w.reg.Reset()
	if err := w.store.Pull(t.Context(), again); err != nil {
		t.Fatal(err)
	}
	checkDisk(t, w.store, again.Digest, disk)
	if got, want := w.asked(again), missing(m, bm); len(want) != 4 || !slices.Equal(got, want) {
		t.Errorf("asked for %v; want %v", got, want)
	}
}

// The disk of a cached image was written to: its spoilt chunk is found out while it is
// copied, and fetched instead. Its chunks are no whole blocks, so that no file system can
// share them.
func TestSpoiltImageIsNotReused(t *testing.T) {
	w := newWorld(t)
	base, _, bm := w.pushSized(t, "base", first, 100_000)
	again, disk, m := w.pushSized(t, "next", next, 100_000)
	if err := w.store.Pull(t.Context(), base); err != nil {
		t.Fatal(err)
	}
	path, err := w.store.Path(base.Digest)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(filepath.Join(path, "disk.img"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("spoilt"), bm.Chunks[2].Offset+100); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	w.reg.Reset()
	if err := w.store.Pull(t.Context(), again); err != nil {
		t.Fatal(err)
	}
	checkDisk(t, w.store, again.Digest, disk)
	want := append(missing(m, bm), m.Chunks[3].Blob) // "c"
	slices.Sort(want)
	if got := w.asked(again); !slices.Equal(got, want) {
		t.Errorf("asked for %v; want %v", got, want)
	}
}

// A chunk that occurs several times is copied to all its places, and what a former try
// left there is gone, also where nothing is ever written.
func TestReuseOverLeftovers(t *testing.T) {
	w := newWorld(t)
	base, _, _ := w.push(t, "base", "ab")
	again, disk, m := w.push(t, "next", "aab0ca")
	if err := w.store.Pull(t.Context(), base); err != nil {
		t.Fatal(err)
	}
	partial := filepath.Join(w.dir, "partial", string(again.Digest)[len("sha256:"):])
	if err := w.store.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(partial, 0o700); err != nil {
		t.Fatal(err)
	}
	dirt := bytes.Repeat([]byte{0xff}, len(disk))
	for name, data := range map[string][]byte{"manifest.json": m.Raw, "disk.img": dirt, "journal": nil} {
		if err := os.WriteFile(filepath.Join(partial, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	store := openStore(t, w.dir, 0)
	if err := store.Pull(t.Context(), again); err != nil {
		t.Fatal(err)
	}
	checkDisk(t, store, again.Digest, disk)
}
