package peer

import (
	"context"
	"io"
	"log/slog"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/cache/registrytest"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
	"github.com/paddock-ci/paddock/image/tart"
)

// The cast of these tests. The fleet has a key and a real registry with one image. A
// station is a node of it: a real image store, and a port on loopback.

// chunkSize is that of the test image's disk chunks, in bytes; hugeChunk is more than the
// sockets of a connection hold.
const (
	chunkSize = 1 << 20
	hugeChunk = 16 << 20
)

// home is the fleet.
type home struct {
	key      access.Key
	registry *registrytest.Registry
	ref      string
	manifest *image.Manifest
	disk     []byte
	nvram    []byte
}

func newHome(t testing.TB, pattern string) *home {
	t.Helper()
	return newHomeOf(t, pattern, chunkSize)
}

func newHomeOf(t testing.TB, pattern string, size int) *home {
	t.Helper()
	h := &home{key: access.NewKey(), registry: registrytest.New()}
	server := httptest.NewServer(h.registry)
	t.Cleanup(server.Close)
	source := registrytest.Source(pattern, size)
	var err error
	if h.disk, err = io.ReadAll(io.NewSectionReader(source.Disk, 0, source.Disk.Size())); err != nil {
		t.Fatal(err)
	}
	h.nvram = source.NVRAM
	d, err := h.registry.Push(t.Context(), "base", "1", source)
	if err != nil {
		t.Fatal(err)
	}
	h.ref = server.Listener.Addr().String() + "/base:1"
	raw, err := h.client(t).Manifest(t.Context(), h.ref, d)
	if err != nil {
		t.Fatal(err)
	}
	if h.manifest, _, err = image.Parse(raw, []image.Codec{tart.Codec{}}); err != nil {
		t.Fatal(err)
	}
	h.registry.Reset()
	return h
}

func (h *home) hold() fleet.Hold {
	return fleet.Hold{Digest: h.manifest.Digest, Ref: h.ref, Demand: true}
}

// want is a piece of the image by its number among the manifest's pieces.
func (h *home) want(c image.Chunk) cache.Want {
	return cache.Want{Ref: h.ref, Image: h.manifest.Digest, Chunk: c}
}

// content is what a piece holds, from the source and not from any store.
func (h *home) content(c image.Chunk) []byte {
	switch c.Index {
	case image.NVRAMIndex:
		return h.nvram
	case image.ConfigIndex:
		return nil // by its digest only
	}
	return h.disk[c.Offset : c.Offset+c.Size]
}

// token is a grant for one node at another.
func (h *home) token(t testing.TB, from, at *station) access.Token {
	t.Helper()
	token, err := h.key.SignPeer(access.PeerGrant{
		Receiver: from.id, Server: at.id, Image: h.manifest.Digest, ExpiresAt: time.Now().Add(access.PeerLife),
		ReceiverCertificate: from.identity.Hash(),
	})
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// station is one node.
type station struct {
	id       fleet.NodeID
	identity *Identity
	store    *cache.Store
	looked   atomic.Int32 // calls of the store for others
	client   *Client
	head     time.Duration // that a request's head may take; 0: as in earnest
	strange  time.Duration // that a connection may be without a token; 0: long, for busy machines
	server   *Server
	stop     func() // ends the server, and returns when no transfer is left
}

// newStation makes a node with a store, and its port if change is not nil.
func (h *home) newStation(t testing.TB, id fleet.NodeID, stored cache.Config, change func(*Config)) *station {
	t.Helper()
	dir := t.TempDir()
	s := &station{id: id}
	var err error
	if s.identity, err = OpenIdentity(dir, id, nil); err != nil {
		t.Fatal(err)
	}
	if s.client, err = NewClient(ClientConfig{Identity: s.identity, Stall: 10 * time.Second}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.client.Close)
	stored.Dir, stored.Log = dir+"/images", slog.New(slog.NewTextHandler(t.Output(), nil)).With("node", id)
	if s.store, err = cache.Open(stored); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.store.Close(); err != nil {
			t.Error(err)
		}
	})
	if change != nil {
		s.listen(t, h, change)
	}
	return s
}

// listen runs the port until stop.
func (s *station) listen(t testing.TB, h *home, change func(*Config)) {
	t.Helper()
	config := Config{
		Node: s.id, Identity: s.identity, Pieces: s, Listen: "127.0.0.1:0",
		Log: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})).With("node", s.id),
	}
	change(&config)
	var err error
	if s.server, err = NewServer(config); err != nil {
		t.Fatal(err)
	}
	if s.head > 0 {
		s.server.head = s.head
	}
	if s.server.door.strange = s.strange; s.strange == 0 {
		s.server.door.strange = 30 * time.Second
	}
	key, err := h.key.PeerKey()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.server.Trust(key); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); s.server.Run(ctx) }()
	s.stop = sync.OnceFunc(func() { cancel(); <-ended })
	t.Cleanup(s.stop)
	eventually(t, "the port listens", func() bool { return s.server.Where().Address != "" })
}

// Serve and ServeManifest are the store's, counted.
func (s *station) Serve(d, content fleet.Digest) (*cache.Piece, error) {
	s.looked.Add(1)
	return s.store.Serve(d, content)
}

func (s *station) ServeManifest(d fleet.Digest) ([]byte, error) {
	s.looked.Add(1)
	return s.store.ServeManifest(d)
}

// full is a node that has the image, and serves it.
func (h *home) full(t testing.TB, id fleet.NodeID, change func(*Config)) *station {
	t.Helper()
	s := h.newStation(t, id, cache.Config{Sources: []cache.Source{h.client(t)}}, change)
	if err := s.store.Pull(t.Context(), h.hold()); err != nil {
		t.Fatal(err)
	}
	h.registry.Reset()
	return s
}

func plain(*Config) {}

// source is one station as another fetches from it.
func (h *home) source(t testing.TB, from, at *station) cache.Source {
	return from.client.Source(at.id, at.server.Where(), h.token(t, from, at), func(cache.Want) bool { return true })
}

// read opens a piece and reads it to its end.
func read(ctx context.Context, src cache.Source, w cache.Want, from int64) ([]byte, error) {
	r, err := src.Open(ctx, w, from)
	if err != nil {
		return nil, err
	}
	got, err := io.ReadAll(r)
	if cerr := r.Close(); err == nil {
		err = cerr
	}
	return got, err
}

// eventually waits for what must come to be so, for a minute at most.
func eventually(t testing.TB, what string, so func() bool) {
	t.Helper()
	late := time.After(time.Minute)
	look := time.NewTicker(5 * time.Millisecond)
	defer look.Stop()
	for !so() {
		select {
		case <-look.C:
		case <-late:
			t.Fatalf("not within a minute: %s", what)
		}
	}
}
