package tart

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

var codecs = []image.Codec{Codec{}}

// A real public image: the figures were counted from its manifest by other means.
func TestParsePublicManifest(t *testing.T) {
	raw, err := os.ReadFile("testdata/sonoma-manifest.json")
	if err != nil {
		t.Fatal(err)
	}
	m, codec, err := image.Parse(raw, codecs)
	if err != nil {
		t.Fatal(err)
	}
	zeros := 0
	var end int64
	for i, c := range m.Chunks {
		if c.Zero {
			zeros++
		}
		if c.Index != i || c.Layer != i+1 || c.Offset != end {
			t.Fatalf("chunk %d: index %d, layer %d, offset %d; want layer %d, offset %d", i, c.Index, c.Layer, c.Offset, i+1, end)
		}
		end += c.Size
	}
	contents := map[fleet.Digest]bool{}
	for _, c := range m.Chunks {
		contents[c.Content] = true
	}
	type figures struct {
		Codec                     string
		Chunks, Unique, Zeros     int
		Requests                  int
		Disk, Wire, NVRAM, Config int64
		Raw                       bool
	}
	got := figures{codec.Name(), len(m.Chunks), len(contents), zeros, len(m.Distinct()), m.DiskSize, m.Bytes(), m.NVRAM.Size, m.Config.Size, bytes.Equal(m.Raw, raw)}
	want := figures{"tart", 94, 66, 29, 65, 50_000_000_000, 20638268094, 33570816, 513, true}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if m.Digest != image.DigestOf(raw) {
		t.Errorf("digest %s", m.Digest)
	}
}

// good is a small manifest to be spoiled: two disk chunks between config and NVRAM.
func good() *image.Document {
	d := func(c string) fleet.Digest { return fleet.Digest("sha256:" + strings.Repeat(c, 64)) }
	disk := func(c string, size string) image.Descriptor {
		return image.Descriptor{MediaType: MediaTypeDisk, Digest: d(c), Size: 50, Annotations: map[string]string{
			annotationSize: size, annotationContent: string(d(c)),
		}}
	}
	return &image.Document{
		SchemaVersion: 2, MediaType: image.MediaTypeManifest,
		Layers: []image.Descriptor{
			{MediaType: MediaTypeConfig, Digest: d("a"), Size: 100},
			disk("b", "1000"), disk("c", "500"),
			{MediaType: MediaTypeNVRAM, Digest: d("d"), Size: 100},
		},
		Annotations: map[string]string{annotationDiskSize: "1500"},
	}
}

func TestParseRefusals(t *testing.T) {
	tests := []struct {
		name  string
		spoil func(*image.Document)
		want  error
		text  string // in the message
	}{
		{"no size annotation", func(d *image.Document) { delete(d.Layers[2].Annotations, annotationSize) }, image.ErrMissingAnnotation, "layer 2: missing annotation " + annotationSize},
		{"no content annotation", func(d *image.Document) { delete(d.Layers[1].Annotations, annotationContent) }, image.ErrMissingAnnotation, "layer 1: missing annotation " + annotationContent},
		{"unknown layer", func(d *image.Document) { d.Layers[1].MediaType = "application/x-mystery" }, image.ErrUnknownMediaType, `layer 1: unknown media type "application/x-mystery"`},
		{"nothing known", func(d *image.Document) {
			d.Layers = []image.Descriptor{{MediaType: "application/vnd.oci.image.layer.v1.tar"}}
		}, image.ErrUnknownMediaType, "layer.v1.tar"},
		{"stacked", func(d *image.Document) { d.Layers[2].MediaType = mediaTypeOverlay }, image.ErrStacked, "push a flat"},
		{"legacy", func(d *image.Document) { d.Layers[1].MediaType = mediaTypeDiskV1 }, image.ErrLegacyDisk, "layer 1"},
		{"two configs", func(d *image.Document) { d.Layers[3].MediaType = MediaTypeConfig }, image.ErrDoubled, "layer 3: VM config"},
		{"two NVRAMs", func(d *image.Document) { d.Layers[0].MediaType = MediaTypeNVRAM }, image.ErrDoubled, "layer 3: NVRAM"},
		{"no config", func(d *image.Document) { d.Layers = d.Layers[1:] }, image.ErrMissingLayer, "VM config"},
		{"no NVRAM", func(d *image.Document) { d.Layers = d.Layers[:3] }, image.ErrMissingLayer, "NVRAM"},
		{"no disk", func(d *image.Document) { d.Layers = slices.Delete(d.Layers, 1, 3) }, image.ErrMalformed, "no disk layer"},
		{"no layers", func(d *image.Document) { d.Layers = nil }, image.ErrMalformed, "no layers"},
		{"sums differ", func(d *image.Document) { d.Annotations[annotationDiskSize] = "1501" }, image.ErrSizeMismatch, "1501 bytes of disk, its layers add up to 1500"},
		{"negative size", func(d *image.Document) { d.Layers[1].Annotations[annotationSize] = "-1" }, image.ErrTooLarge, `"-1"`},
		{"zero size", func(d *image.Document) { d.Layers[1].Annotations[annotationSize] = "0" }, image.ErrTooLarge, "layer 1"},
		{"overflowing size", func(d *image.Document) { d.Layers[1].Annotations[annotationSize] = "18446744073709551617" }, image.ErrTooLarge, "18446744073709551617"},
		{"huge chunk", func(d *image.Document) { d.Layers[1].Annotations[annotationSize] = "9223372036854775807" }, image.ErrTooLarge, "layer 1"},
		{"overflowing sum", func(d *image.Document) {
			big := d.Layers[1]
			big.Annotations = map[string]string{annotationSize: "17179869184", annotationContent: big.Annotations[annotationContent]}
			d.Layers = append(slices.Repeat([]image.Descriptor{big}, 2049), d.Layers...)
		}, image.ErrTooLarge, "the disk would exceed"},
		{"negative disk size", func(d *image.Document) { d.Annotations[annotationDiskSize] = "-1500" }, image.ErrTooLarge, annotationDiskSize},
		{"negative blob size", func(d *image.Document) { d.Layers[2].Size = -5 }, image.ErrTooLarge, "blob size -5"},
		{"blob larger than its content", func(d *image.Document) { d.Layers[2].Size = 1 << 40 }, image.ErrTooLarge, "on the wire"},
		{"huge config", func(d *image.Document) { d.Layers[0].Size = 1 << 30 }, image.ErrTooLarge, "VM config"},
		{"foreign digest algorithm", func(d *image.Document) { d.Layers[1].Digest = "sha512:abcd" }, image.ErrMalformed, "sha256 is the only algorithm"},
		{"path in a digest", func(d *image.Document) { d.Layers[0].Digest = "sha256:../../../../etc/passwd" }, image.ErrMalformed, "layer 0"},
		{"path in a content digest", func(d *image.Document) { d.Layers[1].Annotations[annotationContent] = "../x" }, image.ErrMalformed, "content digest"},
		{"5000 layers", func(d *image.Document) { d.Layers = slices.Repeat(d.Layers[1:2], 5000) }, image.ErrTooLarge, "5000 layers"},
		{"schema 1", func(d *image.Document) { d.SchemaVersion = 1 }, image.ErrMalformed, "schema version 1"},
		{"an index", func(d *image.Document) { d.MediaType = image.MediaTypeIndex }, image.ErrIndex, "index"},
		{"a stranger", func(d *image.Document) { d.MediaType = "text/plain" }, image.ErrUnknownMediaType, `"text/plain"`},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			doc := good()
			test.spoil(doc)
			raw, err := json.Marshal(doc)
			if err != nil {
				t.Fatal(err)
			}
			_, _, err = image.Parse(raw, codecs)
			if !errors.Is(err, test.want) || !strings.Contains(err.Error(), test.text) {
				t.Errorf("got %v; want %v with %q", err, test.want, test.text)
			}
		})
	}
	if raw, err := json.Marshal(good()); err != nil {
		t.Fatal(err)
	} else if _, _, err := image.Parse(raw, codecs); err != nil {
		t.Errorf("the unspoiled manifest: %v", err)
	}
}

// Layers in another order are read laxly, as long as the disk's own order stands.
func TestParseLaxOrder(t *testing.T) {
	doc := good()
	doc.Layers[0], doc.Layers[3] = doc.Layers[3], doc.Layers[0]
	delete(doc.Annotations, annotationDiskSize)
	raw, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	m, _, err := image.Parse(raw, codecs)
	if err != nil {
		t.Fatal(err)
	}
	if m.DiskSize != 1500 || m.Chunks[1].Offset != 1000 {
		t.Errorf("disk size %d, second offset %d; want 1500, 1000", m.DiskSize, m.Chunks[1].Offset)
	}
}

// linux is a VM config that needs no hardware identity.
func linux() *Config { return &Config{Version: 1, OS: "linux", CPUCount: 2, MemorySize: 1 << 30} }

// noise is n reproducible bytes that do not compress.
func noise(seed uint64, n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	_, _ = r.Read(b) // never fails
	return b
}

// An image made here reads back to the same disk: chunks are distinct, doubled and zero,
// and the last is short.
func TestBuildRoundTrip(t *testing.T) {
	const chunk = 200_000
	disk := slices.Concat(noise(1, chunk), make([]byte, chunk), noise(2, chunk), noise(1, chunk), bytes.Repeat([]byte("paddock "), 777))
	blobs := map[fleet.Digest][]byte{}
	put := func(_ context.Context, l Layer) error {
		if _, twice := blobs[l.Digest]; twice {
			return fmt.Errorf("%s put twice", l.Digest)
		}
		data, err := l.Bytes()
		if err != nil || image.DigestOf(data) != l.Digest || int64(len(data)) != l.Size {
			return fmt.Errorf("%s is not what its descriptor says: %w", l.Digest, err)
		}
		blobs[l.Digest] = data
		return nil
	}
	source := Source{Config: linux(), NVRAM: []byte("nvram"), Disk: bytes.NewReader(disk), ChunkSize: chunk, UploadTime: time.Unix(1, 0)}
	raw, err := Build(t.Context(), source, put)
	if err != nil {
		t.Fatal(err)
	}
	m, _, err := image.Parse(raw, codecs)
	if err != nil {
		t.Fatal(err)
	}
	if len(m.Chunks) != 5 || len(m.Distinct()) != 3 || !m.Chunks[1].Zero || m.DiskSize != int64(len(disk)) {
		t.Fatalf("%d chunks, %d distinct, second zero %v, %d bytes", len(m.Chunks), len(m.Distinct()), m.Chunks[1].Zero, m.DiskSize)
	}
	var back bytes.Buffer
	for _, c := range m.Chunks {
		if err := image.Decode(Codec{}, &back, bytes.NewReader(blobs[c.Blob]), c); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(back.Bytes(), disk) {
		t.Error("the disk that was read back differs")
	}

	// The next version of the image differs in its third chunk, and takes the other
	// descriptors over as they stand.
	clear(blobs)
	copy(disk[2*chunk:], "changed")
	source.Disk, source.Parent = bytes.NewReader(disk), m
	raw, err = Build(t.Context(), source, put)
	if err != nil {
		t.Fatal(err)
	}
	next, _, err := image.Parse(raw, codecs)
	if err != nil {
		t.Fatal(err)
	}
	fresh := 0
	for _, c := range next.Chunks {
		if _, put := blobs[c.Blob]; put {
			fresh++
		}
	}
	if fresh != 1 || next.Chunks[0].Blob != m.Chunks[0].Blob {
		t.Errorf("%d disk layers were pushed anew; want only the changed one", fresh)
	}
}

func TestConfigKeepsUnknownKeys(t *testing.T) {
	raw := `{"version":1,"os":"darwin","arch":"arm64","ecid":"aWQ=","hardwareModel":"aHc=","macAddress":"aa:bb:cc:dd:ee:ff","newKey":{"a":[1,2]},"cpuCount":4}`
	c, err := ParseConfig([]byte(raw))
	if err != nil {
		t.Fatal(err)
	}
	if string(c.ECID) != "id" || string(c.HardwareModel) != "hw" || c.DiskFormat != "raw" {
		t.Errorf("read %+v", c)
	}
	c.CPUCount, c.MACAddress = 8, ""
	out, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	var got map[string]any
	if err := json.Unmarshal(out, &got); err != nil {
		t.Fatal(err)
	}
	want := map[string]any{
		"version": 1.0, "os": "darwin", "arch": "arm64", "ecid": "aWQ=", "hardwareModel": "aHc=",
		"newKey": map[string]any{"a": []any{1.0, 2.0}}, "cpuCount": 8.0, "diskFormat": "raw",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestConfigRefusals(t *testing.T) {
	for raw, want := range map[string]error{
		`{`:                                     image.ErrMalformed,
		`[]`:                                    image.ErrMalformed,
		`{"version":2}`:                         image.ErrMalformed,
		`{"version":1,"os":"beos"}`:             image.ErrMalformed,
		`{"version":1,"os":"darwin"}`:           image.ErrMalformed,
		`{"version":1,"os":"linux","arch":"x"}`: image.ErrMalformed,
		`{"version":1,"os":"linux","cpuCount":-1}`:                            image.ErrMalformed,
		`{"version":1,"os":"linux","memorySize":-1}`:                          image.ErrMalformed,
		`{"version":1,"os":"linux","memorySize":99999999999999999999}`:        image.ErrMalformed,
		`{"version":1,"os":"darwin","ecid":"***","hardwareModel":"aHc="}`:     image.ErrMalformed,
		`{"version":1,"os":"linux","diskFormat":"asif"}`:                      image.ErrASIF,
		`{"version":1,"os":"linux","diskFormat":"qcow2"}`:                     image.ErrMalformed,
		`{"version":1,"os":"linux","x":"` + strings.Repeat("x", 1<<20) + `"}`: image.ErrTooLarge,
	} {
		if err := (Codec{}).CheckConfig([]byte(raw)); !errors.Is(err, want) {
			t.Errorf("%.80s: got %v; want %v", raw, err, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	raw, err := os.ReadFile("testdata/sonoma-manifest.json")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	small, err := json.Marshal(good())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(small)
	f.Add([]byte(`{"schemaVersion":2,"manifests":[{"digest":"sha256:` + strings.Repeat("a", 64) + `"}]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if entry, ok, err := image.IndexEntry(raw); ok && err == nil {
			if err := fleet.CheckDigest(entry); err != nil {
				t.Fatalf("index entry: %v", err)
			}
		}
		m, _, err := image.Parse(raw, codecs)
		if err != nil {
			return
		}
		var sum int64
		for _, c := range m.Chunks {
			if c.Offset != sum || c.Size <= 0 || c.BlobSize <= 0 {
				t.Fatalf("chunk %+v at %d", c, sum)
			}
			sum += c.Size
		}
		if sum != m.DiskSize || m.Bytes() < 0 {
			t.Fatalf("chunks add up to %d, the disk is %d", sum, m.DiskSize)
		}
	})
}

func FuzzConfig(f *testing.F) {
	f.Add([]byte(`{"version":1,"os":"linux","display":{"width":1,"height":2},"other":[null]}`))
	f.Add([]byte(`{"version":1,"ecid":"aWQ=","hardwareModel":"aHc="}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		c, err := ParseConfig(raw)
		if err != nil {
			return
		}
		out, err := json.Marshal(c)
		if err != nil {
			t.Fatalf("%q was read but cannot be written: %v", raw, err)
		}
		if _, err := ParseConfig(out); err != nil {
			t.Fatalf("%q was written as %q, which is refused: %v", raw, out, err)
		}
	})
}
