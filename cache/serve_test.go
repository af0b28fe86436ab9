package cache

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// fetchServed reads a served piece.
func fetchServed(t *testing.T, s *Store, d, content fleet.Digest) []byte {
	t.Helper()
	p, err := s.Serve(d, content)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(p)
	if err := errors.Join(err, p.Close()); err != nil {
		t.Fatal(err)
	}
	return b
}

// An image is served while it is pulled, but only what is verified; a piece that is open
// when the image is published stays readable, and keeps the image from its eviction.
func TestServe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		shelf := newShelf()
		s := openShelf(t, shelf)
		h, m := shelf.put(t, "A0BA")
		free := shelf.hold(m.Chunks[2].Blob)
		refused := func(what string, content fleet.Digest) {
			t.Helper()
			if p, err := s.Serve(h.Digest, content); !errors.Is(err, ErrNotReady) {
				t.Errorf("%s was served: %v, %v", what, p, err)
			}
		}
		refused("an image that is not here", m.Chunks[0].Content)
		ended := make(chan error, 1)
		go func() { ended <- s.Pull(t.Context(), h) }()
		synctest.Wait()
		refused("a chunk on its way", m.Chunks[2].Content)
		refused("a hole of a partial image", m.Chunks[1].Content)
		refused("what no image has", image.DigestOf([]byte("x")))
		for content, want := range map[fleet.Digest][]byte{m.Chunks[0].Content: letter('A'), m.NVRAM.Digest: []byte("A0BA")} {
			if got := fetchServed(t, s, h.Digest, content); !bytes.Equal(got, want) {
				t.Errorf("%d bytes of the partial image are wrong", len(got))
			}
		}
		if raw, err := s.ServeManifest(h.Digest); err != nil || !bytes.Equal(raw, m.Raw) {
			t.Errorf("the manifest of the partial image: %d bytes, %v", len(raw), err)
		}
		open, err := s.Serve(h.Digest, m.Chunks[3].Content)
		if err != nil {
			t.Fatal(err)
		}
		free()
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
		if err := s.Evict(h.Digest); !errors.Is(err, ErrLeased) {
			t.Errorf("evicted while it was served: %v", err)
		}
		if got, err := io.ReadAll(open); err != nil || !bytes.Equal(got, letter('A')) {
			t.Errorf("%d bytes after the rename, %v", len(got), err)
		}
		if got := fetchServed(t, s, h.Digest, m.Chunks[2].Content); !bytes.Equal(got, letter('B')) {
			t.Error("a chunk of the ready image is wrong")
		}
		for range 2 { // a second Close must not let go of what another holds
			_ = open.Close()
		}
		if err := s.Evict(h.Digest); err != nil {
			t.Errorf("after the last piece was closed: %v", err)
		}
		refused("an evicted image", m.Chunks[0].Content)
		if _, err := s.ServeManifest(h.Digest); !errors.Is(err, ErrNotReady) {
			t.Errorf("the manifest of an evicted image: %v", err)
		}
	})
}

// After a restart a ready image is served from what its manifest says.
func TestServeAfterRestart(t *testing.T) {
	shelf := newShelf()
	s := openShelf(t, shelf)
	h, m := shelf.put(t, "AB")
	if err := errors.Join(s.Pull(t.Context(), h), s.Close()); err != nil {
		t.Fatal(err)
	}
	s, err := Open(Config{Dir: string(s.dir)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	config, err := os.ReadFile(filepath.Join(s.dir.image(h.Digest), configFile))
	if err != nil {
		t.Fatal(err)
	}
	for content, want := range map[fleet.Digest][]byte{m.Chunks[1].Content: letter('B'), m.NVRAM.Digest: []byte("AB"), m.Config.Digest: config} {
		if got := fetchServed(t, s, h.Digest, content); !bytes.Equal(got, want) {
			t.Errorf("%d bytes are wrong; want %d", len(got), len(want))
		}
	}
}

// The same bytes are NVRAM and a chunk: while only one of them is here, the other's place
// is not served for it.
func TestServeOfEqualParts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		shelf := newShelf()
		s := openShelf(t, shelf)
		h := shelf.assemble(t, []byte(`{"version":1,"os":"linux"}`), letter('A'), letter('B'), letter('A'))
		raw := shelf.blobs[h.Digest]
		m, _, err := image.Parse(raw, s.codecs)
		if err != nil {
			t.Fatal(err)
		}
		free := shelf.hold(m.Chunks[1].Blob)
		ended := make(chan error, 1)
		go func() { ended <- s.Pull(t.Context(), h) }()
		synctest.Wait()
		if _, err := s.Serve(h.Digest, m.NVRAM.Digest); !errors.Is(err, ErrNotReady) {
			t.Errorf("the chunk was served while only the NVRAM was here: %v", err)
		}
		free()
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
		if got := fetchServed(t, s, h.Digest, m.NVRAM.Digest); !bytes.Equal(got, letter('A')) {
			t.Error("wrong bytes")
		}
	})
}
