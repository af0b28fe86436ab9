package peer

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/cache/registry"
	"github.com/paddock-ci/paddock/image"
)

func (h *home) client(t testing.TB) *registry.Client {
	t.Helper()
	c, err := registry.New(registry.Config{Pause: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// mac-1 fetches every piece from mac-2, from its beginning and from bytes on, raw and
// encoded, and the manifest; encoded it moves less.
func TestFetch(t *testing.T) {
	h := newHome(t, "ab0c")
	two := h.full(t, "mac-2", plain)
	one := h.newStation(t, "mac-1", cache.Config{}, nil)
	src := h.source(t, one, two)
	if src.Name() != "peer mac-2" || src.Kind() != cache.KindPeer {
		t.Errorf("%s, %s", src.Name(), src.Kind())
	}
	raw, err := src.Manifest(t.Context(), h.ref, h.manifest.Digest)
	if err != nil || !bytes.Equal(raw, h.manifest.Raw) {
		t.Errorf("manifest: %d bytes, %v", len(raw), err)
	}
	for _, encoded := range []bool{false, true} {
		if encoded {
			one.client.c.Slow, one.client.meter.rate = 1<<50, 1 // every link is slow
		}
		for _, c := range h.manifest.Pieces() {
			for _, from := range []int64{0, 1, 65536, c.Size / 2, c.Size - 1, c.Size} {
				if from > c.Size {
					continue
				}
				got, err := read(t.Context(), src, h.want(c), from)
				want := h.content(c)
				if want == nil { // the config
					if from == 0 && image.DigestOf(got) != c.Content {
						t.Errorf("config: %q", got)
					}
					continue
				}
				if err != nil || !bytes.Equal(got, want[from:]) {
					t.Errorf("piece %d from %d, encoded %v: %d bytes, %v", c.Index, from, encoded, len(got), err)
				}
			}
		}
		c := h.manifest.Chunks[0]
		before := two.server.Sent()
		if _, err := read(t.Context(), src, h.want(c), 0); err != nil {
			t.Error(err)
		}
		two.idle(t)
		wire, ok := src.Has(h.want(c))
		if sent := two.server.Sent() - before; (sent < c.Size) != encoded || wire != c.Size || !ok {
			t.Errorf("encoded %v: sent %d, foretold %d of %d bytes", encoded, sent, wire, c.Size)
		}
	}
	if n, _ := h.registry.Counts().Total(); n != 0 {
		t.Errorf("the registry was asked %d times", n)
	}
	legacy := h.manifest.Chunks[0]
	legacy.Parts = []image.Blob{{}}
	if _, ok := src.Has(h.want(legacy)); ok {
		t.Error("a disk without a digest of its content is fetched from a peer")
	}
}

// Whoever has no token for this node, this image and themselves gets nothing, and nothing
// is looked up for them.
func TestUnauthorized(t *testing.T) {
	h := newHome(t, "a")
	two := h.full(t, "mac-2", plain)
	one := h.newStation(t, "mac-1", cache.Config{}, nil)
	guest := h.newStation(t, "mac-3", cache.Config{}, nil) // with a certificate of its own
	good := access.PeerGrant{
		Receiver: "mac-1", Server: "mac-2", Image: h.manifest.Digest, ExpiresAt: time.Now().Add(time.Minute), ReceiverCertificate: one.identity.Hash(),
	}
	sign := func(key access.Key, change func(*access.PeerGrant)) access.Token {
		t.Helper()
		g := good
		change(&g)
		token, err := key.SignPeer(g)
		if err != nil {
			t.Fatal(err)
		}
		return token
	}
	as := func(who *station, token access.Token) cache.Source {
		return who.client.Source("mac-2", two.server.Where(), token, nil)
	}
	bare, err := NewClient(ClientConfig{})
	if err != nil {
		t.Fatal(err)
	}
	defer bare.Close()
	same := func(*access.PeerGrant) {}
	credential, err := h.key.Sign(access.Identity{ID: "1", Role: access.Node, Subject: "mac-1", ExpiresAt: time.Now().Add(time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	w := h.want(h.manifest.Chunks[0])
	for name, src := range map[string]cache.Source{
		"no token":               as(one, ""),
		"nonsense":               as(one, "pdkpeer_x.y.z"),
		"expired":                as(one, sign(h.key, func(g *access.PeerGrant) { g.ExpiresAt = time.Now().Add(-time.Minute) })),
		"for another server":     as(one, sign(h.key, func(g *access.PeerGrant) { g.Server = "mac-4" })),
		"for another image":      as(one, sign(h.key, func(g *access.PeerGrant) { g.Image = another })),
		"of another fleet":       as(one, sign(access.NewKey(), same)),
		"a credential":           as(one, credential),
		"stolen by another node": as(guest, sign(h.key, same)),
		"stolen by a guest":      bare.Source("mac-2", two.server.Where(), sign(h.key, same), nil),
	} {
		got, err := read(t.Context(), src, w, 0)
		if err == nil || !strings.Contains(err.Error(), "401") || cache.ClassOf(err) != cache.ClassNetwork || len(got) > 0 {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
		if raw, err := src.Manifest(t.Context(), h.ref, h.manifest.Digest); err == nil || !strings.Contains(err.Error(), "401") || cache.ClassOf(err) != cache.ClassNetwork || len(raw) > 0 {
			t.Errorf("%s: manifest of %d bytes, %v", name, len(raw), err)
		}
	}
	if n := two.looked.Load(); n != 0 {
		t.Errorf("the store was asked %d times", n)
	}
	if got, err := read(t.Context(), as(one, sign(h.key, same)), w, 0); err != nil || len(got) != chunkSize {
		t.Errorf("with a good token: %d bytes, %v", len(got), err)
	}
	unbound := sign(h.key, func(g *access.PeerGrant) { g.ReceiverCertificate = "" })
	if _, err := read(t.Context(), bare.Source("mac-2", two.server.Where(), unbound, nil), w, 0); err != nil {
		t.Errorf("with a token for whoever has it: %v", err)
	}
}

// mac-2's clock is eleven minutes ahead of the controller's. Uncorrected, it refuses a good
// token and says so, once; so it does for the token of another fleet. By the controller's
// time it serves.
func TestWrongClock(t *testing.T) {
	h := newHome(t, "a")
	var log bytes.Buffer
	off := access.PeerLife + time.Minute
	var mu sync.Mutex
	two := h.full(t, "mac-2", func(c *Config) {
		c.Log = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelWarn}))
		c.Now = func() time.Time {
			mu.Lock()
			defer mu.Unlock()
			return time.Now().Add(off)
		}
	})
	one := h.newStation(t, "mac-1", cache.Config{}, nil)
	other := &home{key: access.NewKey(), manifest: h.manifest}
	w := h.want(h.manifest.Chunks[0])
	for range 3 {
		for name, src := range map[string]cache.Source{"expired": h.source(t, one, two), "another fleet's": other.source(t, one, two)} {
			if _, err := read(t.Context(), src, w, 0); err == nil || !strings.Contains(err.Error(), "401") {
				t.Errorf("%s: %v, want 401", name, err)
			}
		}
	}
	mu.Lock()
	off = 0
	mu.Unlock()
	if _, err := read(t.Context(), h.source(t, one, two), w, 0); err != nil {
		t.Errorf("with the time corrected: %v", err)
	}
	two.stop()
	for _, text := range []string{"expired", "another key"} {
		if n := strings.Count(log.String(), text); n != 1 {
			t.Errorf("%q is said %d times:\n%s", text, n, &log)
		}
	}
	if strings.Contains(log.String(), "pdkpeer_") {
		t.Error("the log has a token")
	}
}

// What is said by hand: odd methods, paths, bodies and ranges, with a good token.
func TestOddRequests(t *testing.T) {
	h := newHome(t, "a")
	two := h.full(t, "mac-2", plain)
	one := h.newStation(t, "mac-1", cache.Config{}, nil)
	transport, err := one.client.line(two.server.Where())
	if err != nil {
		t.Fatal(err)
	}
	token := string(h.token(t, one, two))
	c := h.manifest.Chunks[0]
	good := target{h.manifest.Digest, c.Content}.path()
	for name, r := range map[string]struct {
		method, path, ranges, body string
		want                       int
	}{
		"a piece":             {"GET", good, "", "", 200},
		"its end":             {"GET", good, "bytes=1048575-", "", 206},
		"behind its end":      {"GET", good, "bytes=1048576-", "", 416},
		"a range of two":      {"GET", good, "bytes=0-1,5-6", "", 400},
		"POST":                {"POST", good, "", "x", 405},
		"GET with a body":     {"GET", good, "", strings.Repeat("x", 100000), 405},
		"DELETE":              {"DELETE", good, "", "", 405},
		"no such piece":       {"GET", target{h.manifest.Digest, another}.path(), "", "", 404},
		"no such route":       {"GET", good + "/more", "", "", 401}, // no token names it
		"a path to elsewhere": {"GET", "/v1/images/../../etc/passwd", "", "", 401},
	} {
		req, err := http.NewRequestWithContext(t.Context(), r.method, "https://"+two.server.Where().Address+r.path, strings.NewReader(r.body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", bearer+token)
		if r.ranges != "" {
			req.Header.Set("Range", r.ranges)
		}
		resp, err := transport.RoundTrip(req)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != r.want || r.want >= 400 && len(body) > 100 {
			t.Errorf("%s: %s with %d bytes, want %d", name, resp.Status, len(body), r.want)
		}
	}
}

// A peer that shows another certificate than the controller named is not spoken to: it
// does not even see the token.
func TestWrongCertificate(t *testing.T) {
	h := newHome(t, "a")
	two := h.full(t, "mac-2", plain)
	one := h.newStation(t, "mac-1", cache.Config{}, nil)
	at := two.server.Where()
	at.Certificate = one.identity.Hash()
	src := one.client.Source("mac-2", at, h.token(t, one, two), nil)
	if _, err := read(t.Context(), src, h.want(h.manifest.Chunks[0]), 0); !errors.Is(err, errPin) || cache.ClassOf(err) != cache.ClassNetwork {
		t.Errorf("%v", err)
	}
	at.Certificate = "nonsense"
	src = one.client.Source("mac-2", at, h.token(t, one, two), nil)
	if _, err := read(t.Context(), src, h.want(h.manifest.Chunks[0]), 0); err == nil {
		t.Error("a peer without a certificate's hash is spoken to")
	}
	if n := two.looked.Load(); n != 0 {
		t.Errorf("the store was asked %d times", n)
	}
	// Nor anything older than TLS 1.3.
	dialer := tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12}}
	if c, err := dialer.DialContext(t.Context(), "tcp", two.server.Where().Address); err == nil {
		c.Close()
		t.Error("TLS 1.2 is spoken")
	}
}

// An image that is being served stays until the transfer ends.
func TestServedImageStays(t *testing.T) {
	h := newHomeOf(t, "a", hugeChunk)
	two := h.full(t, "mac-2", plain)
	one := h.newStation(t, "mac-1", cache.Config{}, nil)
	r, err := h.source(t, one, two).Open(t.Context(), h.want(h.manifest.Chunks[0]), 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(r, make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	if err := two.store.Evict(h.manifest.Digest); !errors.Is(err, cache.ErrLeased) {
		t.Errorf("evicted in mid-transfer: %v", err)
	}
	_ = r.Close()
	eventually(t, "the image goes", func() bool { return two.store.Evict(h.manifest.Digest) == nil })
	if _, err := read(t.Context(), h.source(t, one, two), h.want(h.manifest.Chunks[0]), 0); cache.ClassOf(err) != cache.ClassNotFound {
		t.Errorf("after it went: %v", err)
	}
}

// pinned is a raw connection to a station, as a hostile or broken client has one.
func (h *home) pinned(t *testing.T, from, at *station) net.Conn {
	t.Helper()
	dialer := tls.Dialer{Config: &tls.Config{
		InsecureSkipVerify:   true,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return from.identity.show() },
	}}
	c, err := dialer.DialContext(t.Context(), "tcp", at.server.Where().Address)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.(*tls.Conn).NetConn().(*net.TCPConn).SetReadBuffer(4 << 10); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// Who does not read is cut, and the image goes free; so is a transfer when the node stops.
func TestSlowReader(t *testing.T) {
	h := newHomeOf(t, "a", hugeChunk)
	for cut, stall := range map[string]time.Duration{"stalled": 300 * time.Millisecond, "stopped": time.Minute} {
		t.Run(cut, func(t *testing.T) {
			two := h.full(t, "mac-2", func(c *Config) { c.Stall = stall })
			one := h.newStation(t, "mac-1", cache.Config{}, nil)
			c := h.pinned(t, one, two)
			piece := target{h.manifest.Digest, h.manifest.Chunks[0].Content}
			request := "GET " + piece.path() + " HTTP/1.1\r\nHost: x\r\nAuthorization: " + bearer + string(h.token(t, one, two)) + "\r\n\r\n"
			if _, err := io.WriteString(c, request); err != nil {
				t.Fatal(err)
			}
			leased := func() bool { return two.store.List()[0].Leases > 0 }
			eventually(t, "bytes move", func() bool { return two.server.Sent() > 0 })
			if cut == "stopped" {
				two.stop()
				if leased() {
					t.Error("the port has stopped, and a transfer runs on")
				}
			}
			eventually(t, "the lease ends", func() bool { return !leased() })
			if sent := two.server.Sent(); sent >= hugeChunk {
				t.Errorf("all %d bytes were sent to who reads none", sent)
			}
		})
	}
}

// idle waits until no transfer runs.
func (s *station) idle(t testing.TB) {
	t.Helper()
	eventually(t, "no place is taken", func() bool {
		s.server.places.mu.Lock()
		defer s.server.places.mu.Unlock()
		return s.server.places.taken == 0 && len(s.server.places.by) == 0
	})
}

// A receiver has half of the places, and the next one is told to come again.
func TestPlaces(t *testing.T) {
	h := newHome(t, "a")
	two := h.full(t, "mac-2", func(c *Config) { c.Transfers, c.Bandwidth = 2, 128<<10 })
	one := h.newStation(t, "mac-1", cache.Config{}, nil)
	three := h.newStation(t, "mac-3", cache.Config{}, nil)
	w := h.want(h.manifest.Chunks[0])
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	first, err := h.source(t, one, two).Open(ctx, w, 0)
	if err != nil {
		t.Fatal(err)
	}
	before := time.Now()
	var busy *cache.Error
	if _, err := h.source(t, one, two).Open(ctx, w, 0); !errors.As(err, &busy) || busy.Class != cache.ClassNetwork || busy.RetryAt.Before(before.Add(time.Second)) {
		t.Errorf("beyond its places: %v, again at %v", err, busy)
	}
	other, err := h.source(t, three, two).Open(ctx, w, 0)
	if err != nil {
		t.Fatalf("the others' places are taken too: %v", err)
	}
	_ = other.Close()
	_ = first.Close()
	eventually(t, "the place is free again", func() bool {
		r, err := h.source(t, one, two).Open(ctx, w, 0)
		if err == nil {
			_ = r.Close()
		}
		return err == nil
	})
	two.idle(t)
}

// What is sent keeps to the bandwidth, over all transfers.
func TestBandwidth(t *testing.T) {
	h := newHome(t, "ab")
	const perSecond = 1 << 20
	two := h.full(t, "mac-2", func(c *Config) { c.Bandwidth = perSecond })
	one := h.newStation(t, "mac-1", cache.Config{}, nil)
	begun := time.Now()
	done := make(chan error, 2)
	for i := range 2 {
		go func() {
			_, err := read(t.Context(), h.source(t, one, two), h.want(h.manifest.Chunks[i]), 0)
			done <- err
		}()
	}
	for range 2 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if took := time.Since(begun); took < 1700*time.Millisecond { // 2 s, less the burst
		t.Errorf("2 MiB at 1 MiB/s in %s", took)
	}
}
