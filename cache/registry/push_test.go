package registry_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/cache/registry"
	"github.com/paddock-ci/paddock/cache/registrytest"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
	"github.com/paddock-ci/paddock/image/tart"
)

// upload makes an image of a pattern and pushes it, the blobs of its parent taken from
// where that is.
func upload(t *testing.T, client *registry.Client, ref, pattern, parentRef string, parent *image.Manifest) (*image.Manifest, error) {
	t.Helper()
	u, err := client.Upload(t.Context(), ref, nil)
	if err != nil {
		return nil, err
	}
	src := registrytest.Source(pattern, 64<<10)
	src.Workers = 3
	if parent != nil {
		src.Parent = parent
		src.Reuse = func(ctx context.Context, c image.Chunk) (bool, error) {
			return u.Take(ctx, image.Blob{Digest: c.Blob, Size: c.BlobSize, MediaType: c.MediaType}, parentRef)
		}
	}
	raw, err := tart.Build(t.Context(), src, func(ctx context.Context, l tart.Layer) error { return u.Put(ctx, registry.Blob(l)) })
	if err != nil {
		return nil, err
	}
	d, err := u.Finish(t.Context(), raw)
	if err != nil {
		return nil, err
	}
	m, _, err := image.Parse(raw, []image.Codec{tart.Codec{}})
	if err != nil {
		t.Fatal(err)
	}
	if m.Digest != d {
		t.Errorf("the push says digest %s, the manifest has %s", d, m.Digest)
	}
	return m, nil
}

// pulls checks that a store can pull an image, which verifies all of it.
func pulls(t *testing.T, client *registry.Client, ref string, d fleet.Digest) {
	t.Helper()
	store, err := cache.Open(cache.Config{Dir: t.TempDir(), Sources: []cache.Source{client}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = store.Close() }()
	if err := store.Pull(t.Context(), fleet.Hold{Digest: d, Ref: ref, Demand: true}); err != nil {
		t.Errorf("pulling what was pushed: %v", err)
	}
}

// An image is pushed, pushed again (nothing is sent), and its next tag is pushed to
// another repository: what it shares is mounted, or copied where that is not to be had.
func TestPush(t *testing.T) {
	for _, mounts := range []bool{true, false} {
		reg, host := serve(t)
		reg.RequireToken("user", "right", 0)
		if !mounts {
			reg.RefuseMounts()
		}
		client := newClient(t, keychain{"user", "right"})
		base := host + "/fleet/base:v1"
		m, err := upload(t, client, base, "a0bc", "", nil)
		if err != nil {
			t.Fatal(err)
		}
		// a, b, c, zeros, the VM config, the NVRAM and the OCI config.
		if got := reg.Pushed(); got.Blobs != 7 || got.Manifests != 1 || got.Mounts != 0 {
			t.Errorf("the first push: %+v; want 7 blobs and a manifest", got)
		}
		pulls(t, client, base, m.Digest)

		reg.Reset()
		if again, err := upload(t, client, base, "a0bc", "", nil); err != nil || again.Digest != m.Digest {
			t.Errorf("the second push: %v, %v", again, err)
		}
		if got := reg.Pushed(); got.Blobs != 0 || got.Bytes != 0 || got.Manifests != 1 {
			t.Errorf("the second push: %+v; want no blob", got)
		}

		reg.Reset()
		next := host + "/fleet/next:v2"
		m2, err := upload(t, client, next, "a0dc", base, m)
		if err != nil {
			t.Fatal(err)
		}
		got := reg.Pushed()
		if want := 3; mounts && got.Mounts != want || !mounts && got.Mounts != 0 {
			t.Errorf("mounts allowed: %t, the next tag: %+v; want %d mounted", mounts, got, want)
		}
		if _, pulled := reg.Counts().Total(); mounts && pulled != 0 || !mounts && pulled == 0 {
			t.Errorf("mounts allowed: %t, %d bytes were pulled to push the next tag", mounts, pulled)
		}
		shared := 0
		for i := range m2.Chunks {
			if m2.Chunks[i].Blob == m.Chunks[i].Blob {
				shared++
			}
		}
		if shared != 3 {
			t.Errorf("%d chunks are the parent's; want 3", shared)
		}
		pulls(t, client, next, m2.Digest)
	}
}

// whole reads an image at a registry as a request to push it elsewhere.
func whole(t *testing.T, client *registry.Client, ref string, d fleet.Digest) registry.PushRequest {
	t.Helper()
	raw, err := client.Manifest(t.Context(), ref, d)
	if err != nil {
		t.Fatal(err)
	}
	doc, err := image.ParseDocument(raw)
	if err != nil {
		t.Fatal(err)
	}
	p := registry.PushRequest{Manifest: raw}
	seen := make(map[fleet.Digest]bool)
	for _, desc := range append([]image.Descriptor{doc.Config}, doc.Layers...) {
		if seen[desc.Digest] {
			continue
		}
		seen[desc.Digest] = true
		body, err := client.Open(t.Context(), wantOf(ref, desc.Blob()), 0)
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(body)
		if err := errors.Join(err, body.Close()); err != nil {
			t.Fatal(err)
		}
		p.Blobs = append(p.Blobs, registry.Blob{Blob: desc.Blob(), Open: opener(data)})
	}
	return p
}

// opener opens bytes.
func opener(data []byte) func() (io.ReadCloser, error) {
	return func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }
}

// A push goes on through what registries do, tells how far it is, and does not send again
// what has arrived.
func TestPushThroughTrouble(t *testing.T) {
	from, fromHost := serve(t)
	d := push(t, from, "fleet/base")
	for name, faults := range map[string][]registrytest.Fault{
		"none":                nil,
		"cut in the middle":   {{Kind: registrytest.Drop, At: 10_000, Times: 2}},
		"500":                 {{Kind: registrytest.Refuse, Status: 500, Times: 2}},
		"429 and Retry-After": {{Kind: registrytest.Refuse, Status: 429, RetryAfter: "1", Times: 1}},
		"the token expires":   {{Kind: registrytest.Expire, Times: 2}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client := newClient(t, keychain{"user", "right"})
			p := whole(t, client, fromHost+"/fleet/base:v1", d)
			to, host := serve(t)
			to.RequireToken("user", "right", 0)
			for _, f := range faults {
				to.BreakUploads(f)
			}
			var last, total atomic.Int64
			p.Ref = host + "/other/name:v7"
			p.Progress = func(done, all int64) { last.Store(done); total.Store(all) }
			began := time.Now()
			got, err := client.Push(t.Context(), p)
			if err != nil || got != d {
				t.Fatalf("%s, %v; want %s", got, err, d)
			}
			if took := time.Since(began); strings.Contains(name, "429") && took < time.Second {
				t.Errorf("it took %s, although the registry said a second", took)
			}
			if last.Load() != total.Load() || total.Load() == 0 {
				t.Errorf("in the end %d of %d bytes had been sent", last.Load(), total.Load())
			}
			pulls(t, client, p.Ref, d)
		})
	}
}

// What cannot be pushed is an error that says why, and no image.
func TestPushRefusals(t *testing.T) {
	reg, host := serve(t)
	d := push(t, reg, "fleet/base")
	client := newClient(t, nil)
	good := whole(t, client, host+"/fleet/base:v1", d)
	broken := errors.New("the disk broke")
	replaced := func(open func() (io.ReadCloser, error)) registry.PushRequest {
		p := good
		p.Blobs = append([]registry.Blob(nil), good.Blobs...)
		p.Blobs[2].Open = open
		return p
	}
	without := good
	without.Blobs = good.Blobs[1:]
	tests := []struct {
		name  string
		p     registry.PushRequest
		ref   string
		class cache.Class
		text  string
	}{
		{"a blob is missing", without, "/a/b:c", cache.ClassNotFound, "name the image's parent"},
		{"not at the parent either", func() registry.PushRequest { p := without; p.Parent = "PARENT"; return p }(), "/a/b:c", cache.ClassNotFound, "name the image's parent"},
		{"cannot be opened", replaced(func() (io.ReadCloser, error) { return nil, broken }), "/a/b:c", cache.ClassNetwork, "the disk broke"},
		{"is too long", replaced(opener(make([]byte, 1<<20))), "/a/b:c", cache.ClassDigest, "more than its"},
		{"is not what it says", replaced(opener(make([]byte, good.Blobs[2].Size))), "/a/b:c", cache.ClassFormat, "DIGEST_INVALID"},
		{"no manifest", registry.PushRequest{Manifest: []byte("{}")}, "/a/b:c", cache.ClassFormat, ""},
		{"no host", good, "", cache.ClassFormat, "names no registry host"},
		{"another digest", good, "/a/b@sha256:" + strings.Repeat("ab", 32), cache.ClassFormat, string(d)},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			to, toHost := serve(t)
			p := test.p
			p.Ref = "a:b"
			if test.ref != "" {
				p.Ref = toHost + test.ref
			}
			if p.Parent != "" {
				p.Parent = toHost + "/some/parent"
			}
			_, err := client.Push(t.Context(), p)
			if err == nil || cache.ClassOf(err) != test.class || !strings.Contains(err.Error(), test.text) {
				t.Errorf("got %v; want class %s with %q", err, test.class, test.text)
			}
			if n := to.Pushed().Manifests; n != 0 {
				t.Errorf("%d manifests were pushed", n)
			}
		})
	}
}

// A registry that takes nothing of what is sent to it is given up after the stall time.
func TestPushStalls(t *testing.T) {
	over := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		switch req.Method {
		case http.MethodHead:
			w.WriteHeader(http.StatusNotFound)
		case http.MethodPost:
			w.Header().Set("Location", "/upload")
			w.WriteHeader(http.StatusAccepted)
		case http.MethodPatch:
			<-over
		}
	}))
	defer server.Close()
	defer close(over)
	client, err := registry.New(registry.Config{Tries: 1, Pause: time.Millisecond, Stall: 200 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	u, err := client.Upload(t.Context(), strings.TrimPrefix(server.URL, "http://")+"/a/b:c", nil)
	if err != nil {
		t.Fatal(err)
	}
	data := make([]byte, 32<<20) // more than the buffers on the way
	b := registry.Blob{
		Blob: image.Blob{Digest: image.DigestOf(data), Size: int64(len(data)), MediaType: "x/y"},
		Open: opener(data),
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := u.Put(ctx, b); ctx.Err() != nil || err == nil || cache.ClassOf(err) != cache.ClassNetwork || !strings.Contains(err.Error(), "nothing moves") {
		t.Errorf("got %v; want class network soon", err)
	}
}
