package registry_test

import (
	"io"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/paddock-ci/paddock/cache/registry"
	"github.com/paddock-ci/paddock/cache/registrytest"
	"github.com/paddock-ci/paddock/image"
)

// BenchmarkOpen reads a blob of 64 MiB over loopback, both ends in this process: what a
// pull can get at most from one connection.
func BenchmarkOpen(b *testing.B) {
	reg := registrytest.New()
	server := httptest.NewServer(reg)
	defer server.Close()
	data := make([]byte, 64<<20)
	d, err := reg.PutBlob(b.Context(), data)
	if err != nil {
		b.Fatal(err)
	}
	client, err := registry.New(registry.Config{Keychain: noKeys{}})
	if err != nil {
		b.Fatal(err)
	}
	w := wantOf(strings.TrimPrefix(server.URL, "http://")+"/a/b:c", image.Blob{Digest: d, Size: int64(len(data))})
	buffer := make([]byte, 128<<10)
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		body, err := client.Open(b.Context(), w, 0)
		if err != nil {
			b.Fatal(err)
		}
		n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{body}, buffer)
		if err != nil || n != int64(len(data)) {
			b.Fatal(n, err)
		}
		_ = body.Close()
	}
}

// BenchmarkHas is what a pull asks of each source for each of its pieces.
func BenchmarkHas(b *testing.B) {
	for name, mirror := range map[string]string{"registry": "", "mirror": "mirror.example/all"} {
		b.Run(name, func(b *testing.B) {
			client, err := registry.New(registry.Config{Keychain: noKeys{}, Mirror: mirror})
			if err != nil {
				b.Fatal(err)
			}
			w := wantOf("registry.example/group/name:tag", image.Blob{Size: 1})
			b.ReportAllocs()
			for b.Loop() {
				if _, ok := client.Has(w); !ok {
					b.Fatal("it has not got it")
				}
			}
		})
	}
}

// A reference is read once for all the pieces of an image.
func TestHasReadEachReferenceAnew(t *testing.T) {
	client, err := registry.New(registry.Config{Keychain: noKeys{}, Mirror: "mirror.example/all", For: "registry.example"})
	if err != nil {
		t.Fatal(err)
	}
	for ref, want := range map[string]bool{"registry.example/a:b": true, "other.example/a:b": false, "no reference": false} {
		if _, ok := client.Has(wantOf(ref, image.Blob{Size: 1})); ok != want {
			t.Errorf("%s: %v", ref, ok)
		}
	}
	w := wantOf("registry.example/a:b", image.Blob{Size: 1})
	if n := testing.AllocsPerRun(100, func() { client.Has(w) }); n > 0 {
		t.Errorf("%g allocations for each piece", n)
	}
}
