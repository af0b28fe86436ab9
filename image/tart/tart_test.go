package tart

import (
	"encoding/json"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

var codecs = []image.Codec{Codec{}}

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
		{"old and new disk layers", func(d *image.Document) { d.Layers[2].MediaType = mediaTypeDiskV1 }, image.ErrMalformed, "layer 2: malformed image: disk layers of the old and of the new kind"},
		{"legacy of unknown size", func(d *image.Document) {
			d.Layers[1].MediaType, d.Layers[2].MediaType, d.Annotations = mediaTypeDiskV1, mediaTypeDiskV1, nil
		}, image.ErrLegacyDisk, "layer 1: this image in the legacy disk.v1 format does not say how large its disk is: pull and push it again"},
		{"legacy with a path for a digest", func(d *image.Document) {
			d.Layers[1].MediaType, d.Layers[2].MediaType, d.Layers[2].Digest = mediaTypeDiskV1, mediaTypeDiskV1, "sha256:../../x"
		}, image.ErrMalformed, "layer 2"},
		{"legacy of overflowing size", func(d *image.Document) {
			d.Layers[1].MediaType, d.Layers[2].MediaType, d.Layers[1].Size, d.Layers[2].Size = mediaTypeDiskV1, mediaTypeDiskV1, 1<<62, 1<<62
		}, image.ErrTooLarge, "layer 2: size out of bounds: blob size"},
		{"legacy that cannot hold its disk", func(d *image.Document) {
			d.Layers[1].MediaType, d.Layers[2].MediaType, d.Annotations[annotationDiskSize] = mediaTypeDiskV1, mediaTypeDiskV1, "1000000"
		}, image.ErrTooLarge, "100 bytes on the wire cannot hold 1000000 bytes of disk"},
		{"decompression bomb", func(d *image.Document) { d.Layers[1].Annotations[annotationSize] = "1073741824" }, image.ErrTooLarge, "layer 1: size out of bounds: 50 bytes on the wire cannot hold 1073741824"},
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
		{"huge chunk", func(d *image.Document) {
			d.Layers[1].Annotations[annotationSize], d.Layers[1].Size = "9223372036854775807", 1<<56
		}, image.ErrTooLarge, "layer 1: size out of bounds: uncompressed size 9223372036854775807"},
		{"overflowing sum", func(d *image.Document) {
			big := d.Layers[1]
			big.Size = 1 << 30
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
		{"foreign algorithm of a content digest", func(d *image.Document) {
			d.Layers[1].Annotations[annotationContent] = "sha512:" + strings.Repeat("a", 128)
		}, image.ErrMalformed, "sha256 is the only algorithm"},
		{"5000 layers", func(d *image.Document) { d.Layers = slices.Repeat(d.Layers[1:2], 5000) }, image.ErrTooLarge, "more than 4096 layers"},
		{"a manifest of 20 MB", func(d *image.Document) { d.Annotations["x"] = strings.Repeat("x", 20<<20) }, image.ErrTooLarge, "manifest of 209"},
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

// noise is n reproducible bytes that do not compress.
func noise(seed uint64, n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	_, _ = r.Read(b) // never fails
	return b
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
		`{"version":1,"os":"linux","macAddress":"../../etc/passwd"}`:          image.ErrMalformed,
		`{"version":1,"os":"linux","display":{"width":"../x"}}`:               image.ErrMalformed,
		`{"version":1,"os":"../../linux"}`:                                    image.ErrMalformed,
		`{"version":1,"os":"linux","diskFormat":"asif"}`:                      image.ErrASIF,
		`{"version":1,"os":"linux","diskFormat":"qcow2"}`:                     image.ErrMalformed,
		`{"version":1,"os":"linux","x":"` + strings.Repeat("x", 1<<20) + `"}`: image.ErrTooLarge,
	} {
		if err := (Codec{}).CheckConfig([]byte(raw)); !errors.Is(err, want) {
			t.Errorf("%.80s: got %v; want %v", raw, err, want)
		}
	}
}
