package peer

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
	"github.com/paddock-ci/paddock/image/tart"
)

// impostor is a server with a certificate that the controller named, and no manners.
type impostor struct {
	at  fleet.NodePeer
	url string
}

func newImpostor(t testing.TB, answer http.HandlerFunc) *impostor {
	t.Helper()
	server := httptest.NewUnstartedServer(answer)
	server.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)
	server.TLS = &tls.Config{MinVersion: tls.VersionTLS13}
	server.StartTLS()
	t.Cleanup(server.Close)
	sum := sha256.Sum256(server.Certificate().Raw)
	return &impostor{at: fleet.NodePeer{Address: server.Listener.Addr().String(), Certificate: hex.EncodeToString(sum[:])}, url: server.URL}
}

func newFetcher(t testing.TB, c ClientConfig) *Client {
	t.Helper()
	client, err := NewClient(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	return client
}

func everything(cache.Want) bool { return true }

// A peer answers with anything but what was asked for: it is an error that says so, of
// the class by which the store leaves it, and never a byte too many.
func TestBadAnswers(t *testing.T) {
	const size = 1000
	content := bytes.Repeat([]byte("content "), size/8)
	var stream bytes.Buffer
	if _, err := tart.Encode(&stream, bytes.NewReader(content[100:])); err != nil {
		t.Fatal(err)
	}
	encoded := func(b []byte) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set(EncodingHeader, appleLZ4)
			w.Header().Set("Content-Range", contentRange(100, size))
			w.WriteHeader(http.StatusPartialContent)
			_, _ = w.Write(b)
		}
	}
	partial := func(ranges string, b []byte) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Range", ranges)
			w.WriteHeader(http.StatusPartialContent)
			_, _ = w.Write(b)
		}
	}
	status := func(code int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) }
	}
	var elsewhere atomic.Int32
	other := newImpostor(t, func(http.ResponseWriter, *http.Request) { elsewhere.Add(1) })
	for name, c := range map[string]struct {
		answer http.HandlerFunc
		class  cache.Class
		words  string
	}{
		"the whole":          {func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(content) }, cache.ClassDigest, "range"},
		"another range":      {partial(contentRange(99, size), content[100:]), cache.ClassDigest, "range"},
		"another size":       {partial(contentRange(100, size+1), content[100:]), cache.ClassDigest, "range"},
		"too few":            {partial(contentRange(100, size), content[101:]), cache.ClassDigest, "899 bytes where 900"},
		"too many":           {partial(contentRange(100, size), content[99:]), cache.ClassDigest, "901 bytes where 900"},
		"encoded too short":  {encoded(stream.Bytes()[:20]), cache.ClassDigest, "encoding"},
		"encoded and more":   {encoded(append(bytes.Clone(stream.Bytes()), "x"...)), cache.ClassDigest, "encoding"},
		"a bomb":             {encoded([]byte("bv41\xff\xff\xff\x7f\x10\x00\x00\x00aaaaaaaaaaaaaaaa")), cache.ClassDigest, "encoding"},
		"not encoded at all": {encoded(content[100:]), cache.ClassDigest, "encoding"},
		"an unknown encoding": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set(EncodingHeader, "zip")
			partial(contentRange(100, size), content[100:])(w, r)
		}, cache.ClassDigest, "encoding"},
		"no such piece": {status(404), cache.ClassNotFound, "404"},
		"an error":      {status(500), cache.ClassNetwork, "500"},
		"nothing":       {status(204), cache.ClassNetwork, "204"},
		"a redirect": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Location", other.url)
			w.WriteHeader(307)
		}, cache.ClassNetwork, "307"},
		"a cut": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "900")
			partial(contentRange(100, size), content[100:200])(w, r)
			panic(http.ErrAbortHandler)
		}, cache.ClassNetwork, "mac-2"},
		"silence in the body": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "900")
			partial(contentRange(100, size), content[100:200])(w, r)
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
		}, cache.ClassNetwork, "no byte came"},
		"silence from the start": {func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, cache.ClassNetwork, "timeout"},
	} {
		t.Run(name, func(t *testing.T) {
			bad := newImpostor(t, c.answer)
			client := newFetcher(t, ClientConfig{Stall: 500 * time.Millisecond})
			src := client.Source("mac-2", bad.at, "pdkpeer_x", everything)
			w := cache.Want{Image: one, Chunk: image.Chunk{Content: another, Size: size, BlobSize: size}}
			got, err := read(t.Context(), src, w, 100)
			if cache.ClassOf(err) != c.class || err == nil || !strings.Contains(err.Error(), c.words) {
				t.Errorf("%v, want class %s and %q", err, c.class, c.words)
			}
			if !bytes.HasPrefix(content[100:], got) {
				t.Errorf("%d bytes came that are none of it", len(got))
			}
			if strings.Contains(fmt.Sprint(err), "pdkpeer_") {
				t.Errorf("the token is in the error: %v", err)
			}
		})
	}
	if n := elsewhere.Load(); n != 0 {
		t.Errorf("a redirect was followed %d times", n)
	}
}

// A manifest has a limit, whatever a peer sends.
func TestHugeManifest(t *testing.T) {
	bad := newImpostor(t, func(w http.ResponseWriter, _ *http.Request) {
		for range 2 * image.MaxManifestBytes / (1 << 20) {
			_, _ = w.Write(make([]byte, 1<<20))
		}
	})
	src := newFetcher(t, ClientConfig{}).Source("mac-2", bad.at, "", nil)
	if raw, err := src.Manifest(t.Context(), "r", one); cache.ClassOf(err) != cache.ClassDigest || len(raw) > 0 {
		t.Errorf("%d bytes, %v", len(raw), err)
	}
}

// Who asks goes away: the error is theirs, and the connection is not kept.
func TestCancelled(t *testing.T) {
	hang := newImpostor(t, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	src := newFetcher(t, ClientConfig{}).Source("mac-2", hang.at, "", nil)
	if _, err := src.Manifest(ctx, "r", one); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
}

// drip is a body of which so many bytes come at a time, after so long.
type drip struct {
	left, step int
	every      time.Duration
}

func (d *drip) Read(p []byte) (int, error) {
	if d.left == 0 {
		return 0, io.EOF
	}
	time.Sleep(d.every)
	n := min(d.step, d.left, len(p))
	d.left -= n
	return n, nil
}

func (*drip) Close() error { return nil }

// roundTrip is a way to a peer that is no network.
type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(req *http.Request) (*http.Response, error) { return f(req) }

// A peer that sends a byte now and then, each within the time of a stall, is given up after
// that time; one that is slow is not, and neither is one whose reader makes a pause. In
// virtual time.
func TestTrickle(t *testing.T) {
	const size = 4 << 20
	for name, c := range map[string]struct {
		step    int
		every   time.Duration
		pause   time.Duration // of the reader, between reads
		encoded bool
		gives   bool
	}{
		"a byte in 10 s":              {step: 1, every: 10 * time.Second},
		"a byte in 10 s, encoded":     {step: 1, every: 10 * time.Second, encoded: true},
		"600 KiB in 10 s":             {step: 600 << 10, every: 10 * time.Second},
		"100 KiB in a second":         {step: 100 << 10, every: time.Second, gives: true},
		"a reader that takes an hour": {step: 64 << 10, every: 100 * time.Millisecond, pause: time.Hour, gives: true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client := newFetcher(t, ClientConfig{})
				at := fleet.NodePeer{Address: "192.0.2.1:1", Certificate: strings.Repeat("00", 32)}
				way := &http.Transport{Protocols: new(http.Protocols)}
				way.Protocols.SetHTTP1(true)
				way.RegisterProtocol("https", roundTrip(func(req *http.Request) (*http.Response, error) {
					answer := &http.Response{StatusCode: http.StatusOK, Request: req, Header: http.Header{}, Body: &drip{size, c.step, c.every}, ContentLength: size}
					if c.encoded {
						answer.Header.Set(EncodingHeader, appleLZ4)
					}
					return answer, nil
				}))
				client.lines[at] = &line{transport: way, used: time.Now()}
				w := cache.Want{Image: one, Chunk: image.Chunk{Content: another, Size: size, BlobSize: size}}
				r, err := client.Source("mac-2", at, "", everything).Open(t.Context(), w, 0)
				if err != nil {
					t.Fatal(err)
				}
				defer func() { _ = r.Close() }()
				began, got := time.Now(), 0
				buffer := make([]byte, 1<<20)
				for err == nil {
					var n int
					n, err = r.Read(buffer)
					got += n
					time.Sleep(c.pause)
				}
				if c.gives {
					if !errors.Is(err, io.EOF) || got != size {
						t.Errorf("%d bytes, %v; want all of them", got, err)
					}
					return
				}
				if cache.ClassOf(err) != cache.ClassNetwork || !strings.Contains(err.Error(), "less than 65536 bytes per second came for 15s") {
					t.Errorf("%v; want class network, and the floor", err)
				}
				if took := time.Since(began); took > time.Minute {
					t.Errorf("it was given up after %s", took)
				}
			})
		})
	}
}

// The meter counts the time in which somebody waits for bytes, once for all who wait.
func TestMeter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := newFetcher(t, ClientConfig{})
		m := &client.meter
		for range 16 { // two at once: 32 MiB in 16 s, with pauses that do not count
			m.begin()
			m.begin()
			time.Sleep(time.Second)
			m.end(1 << 20)
			m.end(1 << 20)
			time.Sleep(time.Minute)
		}
		if rate := m.value(); rate != 2<<20 || !client.encoded() {
			t.Errorf("%d bytes per second, encoded %v", rate, client.encoded())
		}
		for range 100 { // 10 GbE
			m.begin()
			time.Sleep(16 * time.Millisecond)
			m.end(16 << 20)
		}
		if rate := m.value(); rate < 900<<20 || client.encoded() {
			t.Errorf("%d bytes per second, encoded %v", rate, client.encoded())
		}
		client.c.Slow = -1
		m.rate = 1
		if client.encoded() {
			t.Error("asked for encoded pieces although they are off")
		}
	})
}

// FuzzAnswer: whatever head and body an answer has, what is read is at most the piece, and
// an error or all of it.
func FuzzAnswer(f *testing.F) {
	f.Add(200, "", "", "0123456789", int64(0))
	f.Add(206, "bytes 4-9/10", "", "456789", int64(4))
	f.Add(206, "bytes 4-9/10", appleLZ4, "bv4-\x06\x00\x00\x00456789bv4$", int64(4))
	f.Add(206, "bytes 4-9/10", appleLZ4, "bv41\x06\x00\x00\x00\x02\x00\x00\x00aabv4$", int64(4))
	f.Fuzz(func(t *testing.T, status int, ranges, encoding, text string, from int64) {
		const size = 10
		if from < 0 || from >= size {
			return
		}
		client, err := NewClient(ClientConfig{})
		if err != nil {
			t.Fatal(err)
		}
		s := &source{client: client, id: "mac-2"}
		resp := &http.Response{
			StatusCode: status, ContentLength: int64(len(text)), Body: io.NopCloser(strings.NewReader(text)),
			Header: http.Header{"Content-Range": {ranges}, EncodingHeader: {encoding}},
		}
		if s.status(resp) != nil {
			return
		}
		r, err := s.content(&body{source: s, resp: resp, cancel: func() {}, timer: time.NewTimer(time.Hour), left: -1}, from, size)
		if err != nil {
			return
		}
		got, err := io.ReadAll(r)
		if len(got) > int(size-from) || err == nil && len(got) != int(size-from) {
			t.Errorf("%d bytes of %d, %v", len(got), size-from, err)
		}
	})
}
