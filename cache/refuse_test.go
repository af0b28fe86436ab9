package cache_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/cache/registrytest"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// Whatever is wrong with an image or on the way: the error says what and where, has the
// right class, nothing is published, and the store is no worse for it.
func TestPullRefusals(t *testing.T) {
	tests := []struct {
		name  string
		spoil func(w *world, m *image.Manifest)
		class cache.Class
		text  string
	}{
		{"wrong byte in a chunk", func(w *world, m *image.Manifest) {
			w.reg.Break(m.Chunks[1].Blob, registrytest.Fault{Kind: registrytest.WrongByte, At: 5000})
		}, cache.ClassDigest, "layer 2 (disk offset 131072"},
		{"wrong byte in the header of a chunk", func(w *world, m *image.Manifest) {
			w.reg.Break(m.Chunks[1].Blob, registrytest.Fault{Kind: registrytest.WrongByte, At: 0})
		}, cache.ClassDigest, "no Apple-LZ4 block begins here"},
		{"wrong byte in the config", func(w *world, m *image.Manifest) {
			w.reg.Break(m.Config.Digest, registrytest.Fault{Kind: registrytest.WrongByte})
		}, cache.ClassDigest, "VM config"},
		{"wrong byte in the NVRAM", func(w *world, m *image.Manifest) {
			w.reg.Break(m.NVRAM.Digest, registrytest.Fault{Kind: registrytest.WrongByte})
		}, cache.ClassDigest, "NVRAM"},
		{"truncated layer", func(w *world, m *image.Manifest) {
			w.reg.Break(m.Chunks[0].Blob, registrytest.Fault{Kind: registrytest.Truncate, At: 1000})
		}, cache.ClassDigest, "truncated or wrong layer: the registry has 1000 bytes"},
		{"missing layer", func(w *world, m *image.Manifest) {
			w.reg.Break(m.Chunks[0].Blob, registrytest.Fault{Kind: registrytest.Refuse, Status: 404})
		}, cache.ClassNotFound, "layer 1"},
		{"no access to a layer", func(w *world, m *image.Manifest) {
			w.reg.Break(m.Chunks[0].Blob, registrytest.Fault{Kind: registrytest.Refuse, Status: 403})
		}, cache.ClassAuth, "docker login"},
		{"overloaded for ever", func(w *world, m *image.Manifest) {
			w.reg.Break(m.Chunks[0].Blob, registrytest.Fault{Kind: registrytest.Refuse, Status: 503})
		}, cache.ClassNetwork, "503"},
		{"asked to wait for an hour", func(w *world, m *image.Manifest) {
			w.reg.Break(m.Chunks[0].Blob, registrytest.Fault{Kind: registrytest.Refuse, Status: 429, RetryAfter: "3600"})
		}, cache.ClassNetwork, "429"},
		{"always cut at the same byte", func(w *world, m *image.Manifest) {
			w.reg.Break(m.Chunks[0].Blob, registrytest.Fault{Kind: registrytest.Drop, At: 30_000})
		}, cache.ClassNetwork, "after 30000 of"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t)
			hold, disk, m := w.push(t, "base", "ab0c")
			test.spoil(w, m)
			err := w.store.Pull(t.Context(), hold)
			w.checkRefused(t, err, test.class, test.text)
			// Once the registry is well again, so is the pull.
			w.reg.Heal()
			if err := w.store.Pull(t.Context(), hold); err != nil {
				t.Fatal(err)
			}
			checkDisk(t, w.store, hold.Digest, disk)
		})
	}
}

// checkRefused checks the outcome of a pull that must fail.
func (w *world) checkRefused(t *testing.T, err error, class cache.Class, text string) {
	t.Helper()
	var failure *cache.Error
	if !errors.As(err, &failure) || failure.Class != class || !strings.Contains(err.Error(), text) {
		t.Errorf("got %v (class %s); want class %s with %q", err, cache.ClassOf(err), class, text)
	}
	if n := published(t, w.dir); n != 0 {
		t.Errorf("%d images were published", n)
	}
	i := only(t, w.store)
	if i.State != fleet.ImageFailed || i.Class != string(class) || i.Error == "" || i.RetryAt.IsZero() {
		t.Errorf("listed as %+v", i)
	}
	if _, err := w.store.Lease(i.Digest, "vm"); !errors.Is(err, cache.ErrNotReady) {
		t.Errorf("a lease of it gives %v; want %v", err, cache.ErrNotReady)
	}
}

// Images that are bad as they were pushed. Each is a good one with its manifest changed.
func TestPullBadImages(t *testing.T) {
	const content = "org.cirruslabs.tart.uncompressed-content-digest"
	const size = "org.cirruslabs.tart.uncompressed-size"
	put := func(w *world, t *testing.T, data string) (fleet.Digest, int64) {
		d, err := w.reg.PutBlob(t.Context(), []byte(data))
		if err != nil {
			t.Fatal(err)
		}
		return d, int64(len(data))
	}
	tests := []struct {
		name  string
		spoil func(w *world, t *testing.T, doc *image.Document)
		class cache.Class
		text  string
	}{
		{"missing annotation", func(_ *world, _ *testing.T, doc *image.Document) { delete(doc.Layers[2].Annotations, content) }, cache.ClassFormat, "layer 2: missing annotation"},
		{"unknown media type", func(_ *world, _ *testing.T, doc *image.Document) { doc.Layers[2].MediaType = "x/y" }, cache.ClassFormat, `layer 2: unknown media type "x/y"`},
		{"stacked", func(_ *world, _ *testing.T, doc *image.Document) {
			doc.Layers[2].MediaType = "application/vnd.cirruslabs.tart.disk.asif.overlay.v1"
		}, cache.ClassFormat, "stacked images"},
		{"content digest of something else", func(_ *world, _ *testing.T, doc *image.Document) {
			doc.Layers[1].Annotations[content] = string(doc.Layers[1].Digest)
		}, cache.ClassDigest, "the image was pushed wrongly"},
		{"layer larger than it says", func(_ *world, _ *testing.T, doc *image.Document) {
			doc.Layers[1].Annotations[size] = "131000"
			delete(doc.Annotations, "org.cirruslabs.tart.uncompressed-disk-size")
		}, cache.ClassFormat, "stream holds more than"},
		{"layer smaller than it says", func(_ *world, _ *testing.T, doc *image.Document) {
			doc.Layers[1].Annotations[size] = "140000"
			delete(doc.Annotations, "org.cirruslabs.tart.uncompressed-disk-size")
		}, cache.ClassFormat, "stream holds less than"},
		{"sums differ", func(_ *world, _ *testing.T, doc *image.Document) { doc.Layers[1].Annotations[size] = "140000" }, cache.ClassFormat, "add up to"},
		{"a layer that is no stream", func(w *world, t *testing.T, doc *image.Document) {
			doc.Layers[1].Digest, doc.Layers[1].Size = put(w, t, strings.Repeat("this is not an Apple-LZ4 stream", 100))
		}, cache.ClassFormat, `at compressed offset 0 (decoded offset 0): no Apple-LZ4 block begins here: found "this"`},
		{"an asif disk", func(w *world, t *testing.T, doc *image.Document) {
			doc.Layers[0].Digest, doc.Layers[0].Size = put(w, t, `{"version":1,"os":"linux","diskFormat":"asif"}`)
		}, cache.ClassFormat, "asif format are not supported"},
		{"a config that is none", func(w *world, t *testing.T, doc *image.Document) {
			doc.Layers[0].Digest, doc.Layers[0].Size = put(w, t, `../../etc/passwd`)
		}, cache.ClassFormat, "VM config"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t)
			_, _, m := w.push(t, "base", "ab0c")
			doc, err := image.ParseDocument(m.Raw)
			if err != nil {
				t.Fatal(err)
			}
			test.spoil(w, t, doc)
			raw, err := json.Marshal(doc)
			if err != nil {
				t.Fatal(err)
			}
			d, err := w.reg.PutManifest(t.Context(), "test/bad", "v1", image.MediaTypeManifest, raw)
			if err != nil {
				t.Fatal(err)
			}
			err = w.store.Pull(t.Context(), fleet.Hold{Digest: d, Ref: w.host + "/test/bad:v1"})
			w.checkRefused(t, err, test.class, test.text)
		})
	}
}

// Orders that make no sense are refused before any request or file.
func TestPullBadOrders(t *testing.T) {
	w := newWorld(t)
	hold, _, _ := w.push(t, "base", "a")
	for _, h := range []fleet.Hold{
		{Digest: "sha256:../../../../tmp/x", Ref: hold.Ref},
		{Digest: "", Ref: hold.Ref},
		{Digest: hold.Digest, Ref: "../x"},
		{Digest: hold.Digest, Ref: ""},
	} {
		if err := w.store.Pull(t.Context(), h); cache.ClassOf(err) != cache.ClassFormat {
			t.Errorf("%+v: got %v; want class %s", h, err, cache.ClassFormat)
		}
	}
	if n, _ := w.reg.Counts().Total(); n != 0 || len(w.store.List()) != 0 {
		t.Errorf("%d requests, %d images listed; want none", n, len(w.store.List()))
	}
}
