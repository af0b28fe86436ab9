package cache_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

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
			if failure := (&cache.Error{}); errors.As(err, &failure) && time.Until(failure.RetryAt) > time.Minute {
				w.checkRefused(t, w.store.Pull(t.Context(), hold), test.class, test.text) // not yet
				if err := w.store.Close(); err != nil {
					t.Fatal(err)
				}
				w.store = openStore(t, w.dir, 4)
			} else if strings.Contains(test.name, "hour") {
				t.Errorf("may be tried again at %s", failure.RetryAt)
			}
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

// badImage is a way to spoil a good image of four chunks, and how its pull is refused.
type badImage struct {
	name  string
	spoil func(t *testing.T, w *world, doc *image.Document)
	text  string
	class cache.Class // "": format
}

// Annotations of a disk layer, and of the manifest.
const (
	contentDigest = "org.cirruslabs.tart.uncompressed-content-digest"
	contentSize   = "org.cirruslabs.tart.uncompressed-size"
	diskSize      = "org.cirruslabs.tart.uncompressed-disk-size"
)

// putBlob makes a layer of other bytes.
func putBlob(t *testing.T, w *world, l *image.Descriptor, data string) {
	t.Helper()
	d, err := w.reg.PutBlob(t.Context(), []byte(data))
	if err != nil {
		t.Fatal(err)
	}
	l.Digest, l.Size = d, int64(len(data))
}

// badManifests say what cannot be.
func badManifests() []badImage {
	first := func(change func(l *image.Descriptor)) func(*testing.T, *world, *image.Document) {
		return func(_ *testing.T, _ *world, doc *image.Document) { change(&doc.Layers[1]) }
	}
	document := func(change func(doc *image.Document)) func(*testing.T, *world, *image.Document) {
		return func(_ *testing.T, _ *world, doc *image.Document) { change(doc) }
	}
	sized := func(size string) func(*testing.T, *world, *image.Document) {
		return document(func(doc *image.Document) {
			doc.Layers[1].Annotations[contentSize] = size
			delete(doc.Annotations, diskSize)
		})
	}
	return []badImage{
		{"missing annotation", first(func(l *image.Descriptor) { delete(l.Annotations, contentDigest) }), "layer 1: missing annotation", ""},
		{"unknown media type", first(func(l *image.Descriptor) { l.MediaType = "x/y" }), `layer 1: unknown media type "x/y"`, ""},
		{"stacked", first(func(l *image.Descriptor) { l.MediaType = "application/vnd.cirruslabs.tart.disk.asif.overlay.v1" }), "stacked images", ""},
		{"path for a digest", first(func(l *image.Descriptor) { l.Digest = "sha256:../../../../../../tmp/escaped" }), "layer 1: malformed image", ""},
		{"path for a content digest", first(func(l *image.Descriptor) { l.Annotations[contentDigest] = "sha256:/../../escaped" }), "content digest", ""},
		{"path for the config's digest", document(func(doc *image.Document) { doc.Layers[0].Digest = "../escaped" }), "layer 0", ""},
		{"unknown algorithm", first(func(l *image.Descriptor) { l.Digest = fleet.Digest("sha512:" + strings.Repeat("a", 128)) }), "sha256 is the only algorithm known here", ""},
		{"negative blob", first(func(l *image.Descriptor) { l.Size = -1 }), "blob size -1", ""},
		{"negative size", sized("-131072"), "-131072", ""},
		{"overflowing size", sized("99999999999999999999"), "99999999999999999999", ""},
		{"size of 2^63-1", sized("9223372036854775807"), "cannot hold 9223372036854775807 bytes of disk", ""},
		{"sums differ", first(func(l *image.Descriptor) { l.Annotations[contentSize] = "140000" }), "add up to", ""},
		{"two configs", document(func(doc *image.Document) { doc.Layers = append(doc.Layers, doc.Layers[0]) }), "VM config: layer occurs more than once", ""},
		{"no config", document(func(doc *image.Document) { doc.Layers = doc.Layers[1:] }), "missing layer", ""},
		{"5,000 layers", document(func(doc *image.Document) {
			for len(doc.Layers) < 5000 {
				doc.Layers = append(doc.Layers, doc.Layers[1])
			}
		}), "more than 4096 layers", ""},
		{"a manifest of 20 MB", document(func(doc *image.Document) { doc.Annotations["x"] = strings.Repeat("x", 20<<20) }), "manifest", ""},
		{"an index", document(func(doc *image.Document) { doc.MediaType = image.MediaTypeIndex }), "this is an index of images", ""},
	}
}

// badBlobs are right by their digests, and no image.
func badBlobs() []badImage {
	disk := func(blob string) func(*testing.T, *world, *image.Document) {
		return func(t *testing.T, w *world, doc *image.Document) { putBlob(t, w, &doc.Layers[1], blob) }
	}
	config := func(text string) func(*testing.T, *world, *image.Document) {
		return func(t *testing.T, w *world, doc *image.Document) { putBlob(t, w, &doc.Layers[0], text) }
	}
	sized := func(size string) func(*testing.T, *world, *image.Document) {
		return func(_ *testing.T, _ *world, doc *image.Document) {
			doc.Layers[1].Annotations[contentSize] = size
			delete(doc.Annotations, diskSize)
		}
	}
	filler := strings.Repeat("x", 4000) // for as many bytes as a chunk of 128 KiB has at least
	return []badImage{
		{"content digest of something else", func(_ *testing.T, _ *world, doc *image.Document) {
			doc.Layers[1].Annotations[contentDigest] = string(doc.Layers[1].Digest)
		}, "the image was pushed wrongly", cache.ClassDigest},
		{"a bomb", sized("131000"), "stream holds more than", ""},
		{"layer smaller than it says", sized("140000"), "stream holds less than", ""},
		{"a layer that is no stream", disk("this is no stream" + filler), `at compressed offset 0 (decoded offset 0): no Apple-LZ4 block begins here: found "this"`, ""},
		{"decoded size near 2^32", disk("bv41\xff\xff\xff\xff\x00\x01\x00\x00" + filler), "4294967295 decoded bytes", ""},
		{"encoded size near 2^32", disk("bv41\x00\x00\x01\x00\xf8\xff\xff\xff" + filler), "4294967288 encoded bytes", ""},
		{"stored size near 2^32", disk("bv4-\xfc\xff\xff\xff" + filler), "4294967292 decoded bytes", ""},
		// One literal, and then four bytes from 65,535 bytes before the stream.
		{"a match before the start", disk("bv41\x00\x00\x01\x00\x04\x00\x00\x00\x10a\xff\xff" + filler), "corrupt LZ4 block", ""},
		{"a block after the end", disk("bv4$" + filler), "stream holds less than", ""},
		{"an asif disk", config(`{"version":1,"os":"linux","diskFormat":"asif"}`), "asif format are not supported", ""},
		{"a config that is a path", config(`../../etc/passwd`), "VM config", ""},
	}
}

// Images that are bad as they were pushed: each is a good one with something changed. Each
// is refused in words of its own, nothing of it is published, and nothing is written but the
// store's own files.
func TestPullBadImages(t *testing.T) {
	said := make(map[string]string)
	for _, test := range slices.Concat(badManifests(), badBlobs()) {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t)
			_, _, m := w.push(t, "base", "ab0c")
			doc, err := image.ParseDocument(m.Raw)
			if err != nil {
				t.Fatal(err)
			}
			test.spoil(t, w, doc)
			raw, err := json.Marshal(doc)
			if err != nil {
				t.Fatal(err)
			}
			kind := image.MediaTypeManifest
			if doc.MediaType != "" {
				kind = doc.MediaType
			}
			d, err := w.reg.PutManifest(t.Context(), "test/bad", "v1", kind, raw)
			if err != nil {
				t.Fatal(err)
			}
			class := test.class
			if class == "" {
				class = cache.ClassFormat
			}
			err = w.store.Pull(t.Context(), fleet.Hold{Digest: d, Ref: w.host + "/test/bad:v1"})
			w.checkRefused(t, err, class, test.text)
			w.checkConfined(t)
			text := strings.TrimPrefix(fmt.Sprint(err), "pulling image "+d.Short())
			if other, taken := said[text]; taken || len(text) > 2000 {
				t.Errorf("%q is said of %q, too; or it is too long", text, other)
			}
			said[text] = test.name
		})
	}
}

// checkConfined checks that only the store was written to, and nothing in it that is not
// the store's.
func (w *world) checkConfined(t *testing.T) {
	t.Helper()
	known := regexp.MustCompile(`^(lock|images|leases|trash|partial(/[0-9a-f]{64}(/(manifest\.json|image\.json|journal|disk\.img|config\.json|nvram\.bin))?)?)$`)
	err := filepath.WalkDir(filepath.Dir(w.dir), func(path string, _ fs.DirEntry, err error) error {
		if err != nil || path == w.dir || path == filepath.Dir(w.dir) {
			return err
		}
		if name, err := filepath.Rel(w.dir, path); err != nil || !known.MatchString(name) {
			t.Errorf("there is %s (%v)", path, err)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
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
