package cache

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
	"github.com/paddock-ci/paddock/image/tart"
)

// crate holds an image with one chunk of 3 MiB that does not compress, in the usual format
// or in the old one, cut every 1,000,000 bytes.
type crate struct {
	disk  []byte
	blobs map[fleet.Digest][]byte
	hold  fleet.Hold
	image *image.Manifest
}

func newCrate(t *testing.T, legacy bool) *crate {
	t.Helper()
	c := &crate{disk: make([]byte, 3<<20), blobs: make(map[fleet.Digest][]byte)}
	_, _ = rand.NewChaCha8([32]byte{3}).Read(c.disk) // never fails
	var stream bytes.Buffer
	if _, err := tart.Encode(&stream, bytes.NewReader(c.disk)); err != nil {
		t.Fatal(err)
	}
	const kind = "application/vnd.cirruslabs.tart."
	put := func(mediaType string, data []byte, annotations map[string]string) image.Descriptor {
		d := image.DigestOf(data)
		c.blobs[d] = data
		return image.Descriptor{MediaType: kind + mediaType, Digest: d, Size: int64(len(data)), Annotations: annotations}
	}
	layers := []image.Descriptor{put("config.v1", []byte(`{"version":1,"os":"linux"}`), nil)}
	size := strconv.Itoa(len(c.disk))
	if legacy {
		for part := range slices.Chunk(stream.Bytes(), 1_000_000) {
			layers = append(layers, put("disk.v1", part, nil))
		}
	} else {
		layers = append(layers, put("disk.v2", stream.Bytes(), map[string]string{
			"org.cirruslabs.tart.uncompressed-size":           size,
			"org.cirruslabs.tart.uncompressed-content-digest": string(image.DigestOf(c.disk)),
		}))
	}
	layers = append(layers, put("nvram.v1", []byte("nvram"), nil))
	raw, err := json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": image.MediaTypeManifest, "layers": layers,
		"annotations": map[string]string{"org.cirruslabs.tart.uncompressed-disk-size": size},
	})
	if err != nil {
		t.Fatal(err)
	}
	if c.image, _, err = image.Parse(raw, Formats()); err != nil {
		t.Fatal(err)
	}
	c.hold = fleet.Hold{Digest: c.image.Digest, Ref: "registry.example/base:v1"}
	c.blobs[c.image.Digest] = raw
	return c
}

// check compares the disk of the store's image.
func (c *crate) check(t *testing.T, s *Store) {
	t.Helper()
	dir, err := s.Path(c.hold.Digest)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(dir, diskFile)); err != nil || !bytes.Equal(got, c.disk) {
		t.Errorf("another disk came out (%v)", err)
	}
}

// hand is a source of a crate that fails at some byte of the chunk, or gives a wrong one.
type hand struct {
	*crate
	kind   Kind
	name   string
	breaks []int64 // where each Open's body fails, counted from the chunk's beginning; 0: not
	ends   bool    // instead of an error there, it ends
	wrong  int64   // where a byte is wrong; 0: none is
	lacks  bool    // it has all but the chunk

	mu    sync.Mutex
	asked []int64 // for the chunk, from which bytes on
}

func (h *hand) Name() string {
	if h.name != "" {
		return h.name
	}
	return string(h.kind)
}
func (h *hand) Kind() Kind { return h.kind }

// Has makes all but the registry so cheap that they are taken first.
func (h *hand) Has(w Want) (int64, bool) {
	if h.kind == KindRegistry {
		return w.Chunk.BlobSize, !h.lacks || w.Chunk.Index < 0
	}
	return 1, w.Chunk.Index == 0
}

func (h *hand) Manifest(context.Context, string, fleet.Digest) ([]byte, error) {
	if h.kind != KindRegistry {
		return nil, &Error{Class: ClassNotFound, Err: errors.New("no manifest here")}
	}
	return h.blobs[h.hold.Digest], nil
}

func (h *hand) Open(_ context.Context, w Want, from int64) (io.ReadCloser, error) {
	data := h.blobs[w.Chunk.Blob]
	if w.Chunk.Legacy() {
		data = nil
		for _, p := range w.Chunk.Parts {
			data = append(data, h.blobs[p.Digest]...)
		}
	}
	if w.Chunk.Index < 0 {
		return io.NopCloser(bytes.NewReader(data[from:])), nil
	}
	if h.kind == KindPeer {
		data = h.disk
	}
	if h.wrong > 0 {
		data = bytes.Clone(data)
		data[h.wrong] ^= 1
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.asked = append(h.asked, from)
	body := io.Reader(bytes.NewReader(data[from:]))
	if n := len(h.asked) - 1; n < len(h.breaks) && h.breaks[n] > from {
		body = io.LimitReader(body, h.breaks[n]-from)
		if !h.ends {
			body = io.MultiReader(body, readerFunc(func([]byte) (int, error) { return 0, &Error{Class: ClassNetwork, Err: errors.New("the cable is out")} }))
		}
	}
	return io.NopCloser(body), nil
}

// Sources fail in the middle of a piece, or give wrong bytes: the next one goes on at that
// byte if it gives the same bytes, else at the first. Wrong bytes are asked for again of
// others than those who may have sent them.
func TestSuppliesChange(t *testing.T) {
	const mid = 1_234_567
	tests := []struct {
		name   string
		legacy bool
		hands  []*hand
		asked  [][]int64 // of each hand
		class  Class     // of the error; "": none
		text   string
	}{
		{"a mirror fails", false, []*hand{{kind: KindMirror, breaks: []int64{mid}}, {kind: KindRegistry}}, [][]int64{{0}, {mid}}, "", ""},
		{"a mirror ends early", false, []*hand{{kind: KindMirror, breaks: []int64{mid}, ends: true}, {kind: KindRegistry}}, [][]int64{{0}, {mid}}, "", ""},
		{"a peer fails, another has it", false, []*hand{{kind: KindPeer, breaks: []int64{mid}}, {kind: KindPeer, name: "second"}, {kind: KindRegistry}}, [][]int64{{0}, {mid}, nil}, "", ""},
		{"a peer fails", false, []*hand{{kind: KindPeer, breaks: []int64{mid}}, {kind: KindRegistry}}, [][]int64{{0}, {0}}, "", ""},
		{"a peer fails, then a mirror", false, []*hand{{kind: KindPeer, breaks: []int64{mid}}, {kind: KindMirror, breaks: []int64{mid}}, {kind: KindRegistry}}, [][]int64{{0}, {0}, {mid}}, "", ""},
		{"a wrong mirror", false, []*hand{{kind: KindMirror, wrong: mid}, {kind: KindRegistry}}, [][]int64{{0}, {0}}, "", ""},
		{"a wrong peer", false, []*hand{{kind: KindPeer, wrong: mid}, {kind: KindRegistry}}, [][]int64{{0}, {0}}, "", ""},
		{"a wrong mirror fails later", false, []*hand{{kind: KindMirror, wrong: mid, breaks: []int64{2 * mid}}, {kind: KindRegistry}}, [][]int64{{0}, {2 * mid, 0}}, "", ""},
		{"all are wrong", false, []*hand{{kind: KindMirror, wrong: mid}, {kind: KindPeer, wrong: mid}, {kind: KindRegistry, wrong: mid}}, [][]int64{{0}, {0}, {0}}, ClassDigest, "layer 1 (disk offset 0"},
		{"a wrong mirror, and no registry", false, []*hand{{kind: KindMirror, wrong: mid}, {kind: KindRegistry, breaks: []int64{mid}}}, [][]int64{{0}, {0}}, ClassNetwork, "the cable is out"},
		{"legacy: a mirror fails", true, []*hand{{kind: KindMirror, breaks: []int64{mid}}, {kind: KindRegistry}}, [][]int64{{0}, {mid}}, "", ""},
		{"legacy: a mirror's second part is wrong", true, []*hand{{kind: KindMirror, wrong: mid}, {kind: KindRegistry}}, [][]int64{{0}, {0}}, "", ""},
		{"legacy: a wrong part", true, []*hand{{kind: KindRegistry, wrong: mid}}, [][]int64{{0}}, ClassDigest, "the blob's digest is"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			c := newCrate(t, test.legacy)
			var sources []Source
			for _, h := range test.hands {
				h.crate = c
				sources = append(sources, h)
			}
			store, err := Open(Config{Dir: t.TempDir(), Sources: sources, Backoff: time.Nanosecond})
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = store.Close() }()
			err = store.Pull(t.Context(), c.hold)
			switch {
			case test.class == "" && err == nil:
				c.check(t, store)
			case test.class == "" || ClassOf(err) != test.class || !strings.Contains(fmt.Sprint(err), test.text):
				t.Errorf("got %v (class %s); want class %q with %q", err, ClassOf(err), test.class, test.text)
			}
			for i, h := range test.hands {
				if !slices.Equal(h.asked, test.asked[i]) {
					t.Errorf("%s was asked from %v on; want %v", h.Name(), h.asked, test.asked[i])
				}
			}
		})
	}
}

// A pull whose only source fails in the middle goes on from the last border before that:
// of blobs, of content, and of the old format, whose parts' borders do not matter.
func TestGoesOnAtTheBorder(t *testing.T) {
	const mid = 2_345_678
	for name, test := range map[string]struct {
		legacy bool
		kind   Kind
	}{"blob": {false, KindRegistry}, "legacy": {true, KindRegistry}, "content": {false, KindPeer}} {
		t.Run(name, func(t *testing.T) {
			c := newCrate(t, test.legacy)
			h := &hand{crate: c, kind: test.kind, breaks: []int64{mid}}
			sources := []Source{h}
			if test.kind != KindRegistry { // somebody has to have the manifest
				sources = append(sources, &hand{crate: c, kind: KindRegistry, lacks: true})
			}
			dir := t.TempDir()
			store, err := Open(Config{Dir: dir, Sources: sources, Backoff: time.Nanosecond})
			if err != nil {
				t.Fatal(err)
			}
			if err := store.Pull(t.Context(), c.hold); ClassOf(err) != ClassNetwork || err == nil {
				t.Fatalf("got %v; want class network", err)
			}
			if err := store.Close(); err != nil {
				t.Fatal(err)
			}
			if store, err = Open(Config{Dir: dir, Sources: sources, Backoff: time.Nanosecond}); err != nil {
				t.Fatal(err)
			}
			defer func() { _ = store.Close() }()
			if err := store.Pull(t.Context(), c.hold); err != nil {
				t.Fatal(err)
			}
			c.check(t, store)
			if len(h.asked) != 2 || h.asked[1] > mid || h.asked[1] < mid-readSize-1<<16 {
				t.Errorf("asked from %v on; want the second to be the last border before %d", h.asked, mid)
			}
		})
	}
}

// The disk changes under a mark: its window, or a state in the journal, is not what it was.
// The piece begins anew, and is right.
func TestMarkIsNotTrue(t *testing.T) {
	const mid = 2_345_678
	for name, spoil := range map[string]func(t *testing.T, dir string){
		"disk cut off": func(t *testing.T, dir string) {
			if err := os.Truncate(filepath.Join(dir, diskFile), 4096); err != nil {
				t.Fatal(err)
			}
		},
		"disk gone": func(t *testing.T, dir string) {
			if err := os.Remove(filepath.Join(dir, diskFile)); err != nil {
				t.Fatal(err)
			}
		},
		"another state": func(t *testing.T, dir string) {
			path := filepath.Join(dir, journalFile)
			done, marks, _, err := readJournal(path)
			if err != nil || len(marks) != 1 {
				t.Fatalf("%d marks in the journal (%v); want 1", len(marks), err)
			}
			var text strings.Builder
			for i := range done {
				text.WriteString(note{item: i}.String())
			}
			for i, m := range marks {
				m.content[10] ^= 1
				text.WriteString(note{item: i, mark: &m}.String())
			}
			if err := os.WriteFile(path, []byte(text.String()), 0o600); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCrate(t, false)
			h := &hand{crate: c, kind: KindRegistry, breaks: []int64{mid}}
			store, err := Open(Config{Dir: t.TempDir(), Sources: []Source{h}, Backoff: time.Nanosecond})
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = store.Close() }()
			if err := store.Pull(t.Context(), c.hold); err == nil {
				t.Fatal("the pull went through a broken cable")
			}
			spoil(t, store.dir.partial(c.hold.Digest))
			if err := store.Pull(t.Context(), c.hold); err != nil {
				t.Fatal(err)
			}
			c.check(t, store)
			if last := h.asked[len(h.asked)-1]; last != 0 {
				t.Errorf("asked from %v on; want the last from 0", h.asked)
			}
		})
	}
}
