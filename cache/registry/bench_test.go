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
