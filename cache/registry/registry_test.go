package registry_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/cache/registry"
	"github.com/paddock-ci/paddock/cache/registrytest"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// keychain has one set of credentials, for every registry.
type keychain struct{ user, password string }

func (k keychain) Resolve(authn.Resource) (authn.Authenticator, error) {
	return authn.FromConfig(authn.AuthConfig{Username: k.user, Password: k.password}), nil
}

func serve(t *testing.T) (*registrytest.Registry, string) {
	t.Helper()
	reg := registrytest.New()
	server := httptest.NewServer(reg)
	t.Cleanup(server.Close)
	t.Cleanup(reg.Heal)
	return reg, strings.TrimPrefix(server.URL, "http://")
}

func newClient(t *testing.T, keys authn.Keychain) *registry.Client {
	t.Helper()
	c, err := registry.New(registry.Config{Keychain: keys, Tries: 3, Pause: time.Millisecond, Stall: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func push(t *testing.T, reg *registrytest.Registry, repository string) fleet.Digest {
	t.Helper()
	d, err := reg.Push(t.Context(), repository, "v1", registrytest.Source("a0ba", 64<<10))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestResolve(t *testing.T) {
	reg, host := serve(t)
	d := push(t, reg, "fleet/base")
	client := newClient(t, nil)
	ref := host + "/fleet/base:v1"
	got, err := client.Resolve(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	if got.Digest != d || got.Ref != ref || got.DiskBytes != 4*64<<10 || got.Bytes <= 64<<10 || got.Bytes >= 2*64<<10 || got.ResolvedAt.IsZero() {
		t.Errorf("resolved to %+v", got)
	}
	byDigest, err := client.Resolve(t.Context(), host+"/fleet/base@"+string(d))
	if err != nil || byDigest.Digest != d {
		t.Errorf("by digest: %+v, %v", byDigest, err)
	}
}

// An index of one image is that image; one of two is not, and neither is an index of an
// index.
func TestResolveIndex(t *testing.T) {
	reg, host := serve(t)
	d := push(t, reg, "fleet/base")
	index := func(tag string, entries ...fleet.Digest) fleet.Digest {
		list := []image.Descriptor{}
		for _, e := range entries {
			list = append(list, image.Descriptor{MediaType: image.MediaTypeManifest, Digest: e, Size: 1})
		}
		raw, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": image.MediaTypeIndex, "manifests": list})
		if err != nil {
			t.Fatal(err)
		}
		at, err := reg.PutManifest(t.Context(), "fleet/base", tag, image.MediaTypeIndex, raw)
		if err != nil {
			t.Fatal(err)
		}
		return at
	}
	one := index("one", d)
	index("two", d, d)
	index("nested", one)
	client := newClient(t, nil)
	if got, err := client.Resolve(t.Context(), host+"/fleet/base:one"); err != nil || got.Digest != d {
		t.Errorf("one entry: %+v, %v", got, err)
	}
	for tag, text := range map[string]string{"two": "2 entries", "nested": "index of images"} {
		_, err := client.Resolve(t.Context(), host+"/fleet/base:"+tag)
		if !errors.Is(err, image.ErrIndex) || cache.ClassOf(err) != cache.ClassFormat || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: got %v", tag, err)
		}
	}
}

func TestErrorClasses(t *testing.T) {
	reg, host := serve(t)
	push(t, reg, "fleet/base")
	big := `{"schemaVersion":2,"x":"` + strings.Repeat("x", 5<<20) + `"}`
	if _, err := reg.PutManifest(t.Context(), "fleet/big", "v1", image.MediaTypeManifest, []byte(big)); err != nil {
		t.Fatal(err)
	}
	closed := httptest.NewServer(http.NotFoundHandler())
	closed.Close()
	locked, lockedHost := serve(t)
	locked.RequireBasic("user", "right")
	tests := []struct {
		name, ref string
		class     cache.Class
		text      string
	}{
		{"no tag", host + "/fleet/base:v2", cache.ClassNotFound, "manifests/v2 is not at"},
		{"no repository", host + "/fleet/other:v1", cache.ClassNotFound, "check the name"},
		{"nobody listens", strings.TrimPrefix(closed.URL, "http://") + "/a:b", cache.ClassNetwork, "refused"},
		{"a manifest of 5 MB", host + "/fleet/big:v1", cache.ClassFormat, "more than 4194304 bytes"},
		{"wrong password", lockedHost + "/fleet/base:v1", cache.ClassAuth, "docker login " + lockedHost},
		{"no reference", "base:v1", cache.ClassFormat, "names no registry host"},
	}
	client := newClient(t, keychain{"user", "wrong"})
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			_, err := client.Resolve(t.Context(), test.ref)
			var typed *cache.Error
			if !errors.As(err, &typed) || typed.Class != test.class || !strings.Contains(err.Error(), test.text) {
				t.Errorf("got %v; want class %s with %q", err, test.class, test.text)
			}
			if err != nil && strings.Contains(err.Error(), "wrong") && test.class == cache.ClassAuth {
				t.Errorf("the password is in the error: %v", err)
			}
		})
	}
}

// Plain HTTP is for this machine alone, whatever a registry or go-containerregistry's
// fallback for private networks would like.
func TestPlainHTTPRefused(t *testing.T) {
	transport := roundTrip(func(req *http.Request) (*http.Response, error) {
		if req.URL.Scheme == "http" {
			t.Errorf("%s was asked for in plain HTTP", req.URL)
		}
		return nil, errors.New("no TLS there")
	})
	client, err := registry.New(registry.Config{Transport: transport, Tries: 1})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.Resolve(t.Context(), "10.1.2.3:5000/fleet/base:v1"); cache.ClassOf(err) != cache.ClassNetwork {
		t.Errorf("got %v; want class network", err)
	}
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(req *http.Request) (*http.Response, error) { return f(req) }

// Basic credentials and tokens; a token that expires in the middle of a pull is renewed.
func TestAuth(t *testing.T) {
	reg, host := serve(t)
	d := push(t, reg, "fleet/base")
	reg.RequireBasic("user", "right")
	if _, err := newClient(t, keychain{"user", "right"}).Manifest(t.Context(), host+"/fleet/base:v1", d); err != nil {
		t.Errorf("basic: %v", err)
	}
	reg.RequireToken("user", "right", 2)
	client := newClient(t, keychain{"user", "right"})
	for i := range 7 {
		if _, err := client.Manifest(t.Context(), host+"/fleet/base:v1", d); err != nil {
			t.Errorf("request %d: %v", i, err)
		}
	}
	if n := reg.Tokens(); n != 4 {
		t.Errorf("%d tokens were bought for 7 requests at 2 each; want 4", n)
	}
	if _, err := newClient(t, keychain{"user", "wrong"}).Manifest(t.Context(), host+"/fleet/base:v1", d); cache.ClassOf(err) != cache.ClassAuth {
		t.Errorf("wrong password: got %v; want class auth", err)
	}
}

// wantOf is a want of a whole blob.
// eventually waits for what must come to be so, for a minute at most.
func eventually(t *testing.T, what string, so func() bool) {
	t.Helper()
	late := time.After(time.Minute)
	look := time.NewTicker(time.Millisecond)
	defer look.Stop()
	for !so() {
		select {
		case <-look.C:
		case <-late:
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

func wantOf(ref string, b image.Blob) cache.Want {
	return cache.Want{Ref: ref, Chunk: image.Chunk{Content: b.Digest, Size: b.Size, Blob: b.Digest, BlobSize: b.Size}}
}

// blobOf is the first disk chunk's blob of an image.
func blobOf(t *testing.T, client *registry.Client, ref string, d fleet.Digest) image.Blob {
	t.Helper()
	raw, err := client.Manifest(t.Context(), ref, d)
	if err != nil {
		t.Fatal(err)
	}
	doc, err := image.ParseDocument(raw)
	if err != nil {
		t.Fatal(err)
	}
	return doc.Layers[1].Blob()
}

// A redirect to another host gets the blob, and no credentials.
func TestRedirectWithoutCredentials(t *testing.T) {
	reg, host := serve(t)
	d := push(t, reg, "fleet/base")
	for _, kind := range []string{"basic", "token"} {
		t.Run(kind, func(t *testing.T) {
			reg.RequireBasic("user", "right")
			if kind == "token" {
				reg.RequireToken("user", "right", 0)
			}
			var mu sync.Mutex
			var headers []string
			storage := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
				mu.Lock()
				headers = append(headers, req.Header.Get("Authorization"))
				mu.Unlock()
				_, _ = io.WriteString(w, strings.Repeat("x", 100))
			}))
			defer storage.Close()
			client := newClient(t, keychain{"user", "right"})
			ref := host + "/fleet/base:v1"
			b := blobOf(t, client, ref, d)
			b.Size = 100
			reg.Break(b.Digest, registrytest.Fault{Kind: registrytest.Redirect, Location: storage.URL})
			defer reg.Heal()
			body, err := client.Open(t.Context(), wantOf(ref, b), 0)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = body.Close() }()
			if data, err := io.ReadAll(body); err != nil || len(data) != 100 {
				t.Errorf("%d bytes, %v", len(data), err)
			}
			if len(headers) != 1 || headers[0] != "" {
				t.Errorf("the other host saw Authorization %q; want one request without", headers)
			}
		})
	}
}

// That a registry answers no ranges is remembered: it is asked for none any more, and
// each body that begins in the middle is skipped into once.
func TestNoRangesRemembered(t *testing.T) {
	reg, host := serve(t)
	d := push(t, reg, "fleet/base")
	var ranges []string
	client, err := registry.New(registry.Config{Transport: roundTrip(func(req *http.Request) (*http.Response, error) {
		if strings.Contains(req.URL.Path, "/blobs/") {
			ranges = append(ranges, req.Header.Get("Range"))
		}
		return http.DefaultTransport.RoundTrip(req)
	})})
	if err != nil {
		t.Fatal(err)
	}
	ref := host + "/fleet/base:v1"
	b := blobOf(t, client, ref, d)
	reg.Break("", registrytest.Fault{Kind: registrytest.IgnoreRange})
	for i := range 3 {
		body, err := client.Open(t.Context(), wantOf(ref, b), 1000)
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(body)
		if err := errors.Join(err, body.Close()); err != nil || int64(len(data)) != b.Size-1000 {
			t.Errorf("body %d: %d bytes, %v; want %d", i, len(data), err, b.Size-1000)
		}
	}
	if got, want := strings.Join(ranges, ";"), fmt.Sprintf("bytes=1000-%d;;", b.Size-1); got != want {
		t.Errorf("the requests had ranges %q; want %q", got, want)
	}
}

// A manifest that is cut off is asked for again.
func TestManifestCutOff(t *testing.T) {
	reg, host := serve(t)
	d := push(t, reg, "fleet/base")
	cuts := 2
	client, err := registry.New(registry.Config{Tries: 3, Pause: time.Millisecond, Transport: roundTrip(func(req *http.Request) (*http.Response, error) {
		resp, err := http.DefaultTransport.RoundTrip(req)
		if err == nil && strings.Contains(req.URL.Path, "/manifests/") && cuts > 0 {
			cuts--
			resp.Body = struct {
				io.Reader
				io.Closer
			}{io.MultiReader(io.LimitReader(resp.Body, 100), iotest.ErrReader(io.ErrUnexpectedEOF)), resp.Body}
		}
		return resp, err
	})})
	if err != nil {
		t.Fatal(err)
	}
	if raw, err := client.Manifest(t.Context(), host+"/fleet/base:v1", d); err != nil || image.DigestOf(raw) != d {
		t.Errorf("%d bytes, %v", len(raw), err)
	}
	cuts = 3
	if _, err := client.Manifest(t.Context(), host+"/fleet/base:v1", d); cache.ClassOf(err) != cache.ClassNetwork || err == nil {
		t.Errorf("cut off at every request: %v; want class network", err)
	}
}

// A body that has more bytes than the manifest says, and does not say so, ends in an
// error behind the last byte that is wanted.
func TestTooManyBytes(t *testing.T) {
	reg, host := serve(t)
	d := push(t, reg, "fleet/base")
	client := newClient(t, nil)
	ref := host + "/fleet/base:v1"
	b := blobOf(t, client, ref, d)
	reg.Break(b.Digest, registrytest.Fault{Kind: registrytest.Overlong, At: 10, Whole: true, Unsized: true})
	body, err := client.Open(t.Context(), wantOf(ref, b), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = body.Close() }()
	data, err := io.ReadAll(body)
	if cache.ClassOf(err) != cache.ClassDigest || err == nil || !strings.Contains(err.Error(), "sends more than") || int64(len(data)) > b.Size {
		t.Errorf("%d bytes, %v; want class digest", len(data), err)
	}
}

// From each byte on, a blob comes as it is, and so do blobs that are cut in parts.
func TestOpenFrom(t *testing.T) {
	reg, host := serve(t)
	d := push(t, reg, "fleet/base")
	client := newClient(t, nil)
	ref := host + "/fleet/base:v1"
	b := blobOf(t, client, ref, d)
	read := func(w cache.Want, from int64) []byte {
		body, err := client.Open(t.Context(), w, from)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = body.Close() }()
		data, err := io.ReadAll(body)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	all := read(wantOf(ref, b), 0)
	reg.Reset()
	for _, from := range []int64{1, b.Size / 2, b.Size - 1, b.Size} {
		if got := read(wantOf(ref, b), from); string(got) != string(all[from:]) {
			t.Errorf("from %d: %d bytes; want %d", from, len(got), b.Size-from)
		}
	}
	if got, want := reg.Counts().Bytes[b.Digest], b.Size-1+b.Size-b.Size/2+1; got != want {
		t.Errorf("%d bytes were sent; want %d", got, want)
	}
	parts := cache.Want{Ref: ref, Chunk: image.Chunk{Parts: []image.Blob{b, b}, BlobSize: 2 * b.Size}}
	if got := read(parts, b.Size-3); string(got) != string(all[b.Size-3:])+string(all) {
		t.Errorf("of two parts: %d bytes; want %d", len(got), b.Size+3)
	}
}

// A connection on which no byte moves is given up, and the blob goes on on the next; one
// that is slow is not.
func TestStall(t *testing.T) {
	reg, host := serve(t)
	d := push(t, reg, "fleet/base")
	client := newClient(t, nil)
	ref := host + "/fleet/base:v1"
	b := blobOf(t, client, ref, d)
	reg.Reset()
	reg.Break(b.Digest, registrytest.Fault{Kind: registrytest.Hang, At: 5000, Times: 1})
	reg.Break(b.Digest, registrytest.Fault{Kind: registrytest.Slow, Rate: 100_000, Times: 1})
	body, err := client.Open(t.Context(), wantOf(ref, b), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = body.Close() }()
	data, err := io.ReadAll(body)
	if err != nil || image.DigestOf(data) != b.Digest {
		t.Errorf("%d bytes, %v; want the blob", len(data), err)
	}
	if counts := reg.Counts(); counts.Requests[b.Digest] != 2 || counts.Bytes[b.Digest] != b.Size {
		t.Errorf("%d requests, %d bytes; want 2 requests and each of %d bytes once", counts.Requests[b.Digest], counts.Bytes[b.Digest], b.Size)
	}
}

// A reader that pauses for an hour is no stall, and a cancelled one ends at once. In
// virtual time, on a registry without a network.
func TestSlowReaderAndCancel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		requests := 0
		transport := roundTrip(func(req *http.Request) (*http.Response, error) {
			answer := ""
			if strings.Contains(req.URL.Path, "/blobs/") {
				requests++
				answer = strings.Repeat("x", 1000)
			}
			return &http.Response{
				StatusCode: http.StatusOK, Request: req, Header: http.Header{},
				Body: io.NopCloser(strings.NewReader(answer)), ContentLength: int64(len(answer)),
			}, nil
		})
		client, err := registry.New(registry.Config{Transport: transport})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		body, err := client.Open(ctx, wantOf("localhost:5000/fleet/base:v1", image.Blob{Digest: image.DigestOf(nil), Size: 1000}), 0)
		if err != nil {
			t.Fatal(err)
		}
		buffer := make([]byte, 100)
		for range 3 {
			if _, err := io.ReadFull(body, buffer); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Hour)
		}
		if requests != 1 {
			t.Errorf("%d requests; want 1: the pause was taken for a stall", requests)
		}
		cancel()
		if _, err := io.ReadAll(body); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v; want %v", err, context.Canceled)
		}
		if err := body.Close(); err != nil {
			t.Error(err)
		}
	})
}

func TestNewRefusals(t *testing.T) {
	for _, cfg := range []registry.Config{{Tries: -1}, {Pause: -1}, {Stall: -1}} {
		if _, err := registry.New(cfg); err == nil {
			t.Errorf("%+v was accepted", cfg)
		}
	}
}
