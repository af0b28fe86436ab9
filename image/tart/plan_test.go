package tart

import (
	"bytes"
	"encoding/json"
	"os"
	"strconv"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// publicManifest is a real one, and what it says to a reader that knows nothing but JSON.
func publicManifest(t *testing.T) (m *image.Manifest, layers []map[string]any) {
	t.Helper()
	raw, err := os.ReadFile("testdata/sonoma-manifest.json")
	if err != nil {
		t.Fatal(err)
	}
	var plain struct {
		Layers []map[string]any `json:"layers"`
	}
	if err := json.Unmarshal(raw, &plain); err != nil {
		t.Fatal(err)
	}
	m, codec, err := image.Parse(raw, codecs)
	if err != nil {
		t.Fatal(err)
	}
	if codec.Name() != "tart" || !bytes.Equal(m.Raw, raw) || m.Digest != image.DigestOf(raw) {
		t.Fatalf("read by %s as %s", codec.Name(), m.Digest)
	}
	return m, plain.Layers
}

// The figures of the public image were counted from its manifest by other means.
func TestPublicImage(t *testing.T) {
	m, _ := publicManifest(t)
	zeros, contents := 0, map[fleet.Digest]bool{}
	for _, c := range m.Chunks {
		if c.Zero {
			zeros++
		}
		contents[c.Content] = true
	}
	type figures struct {
		Chunks, Unique, Zeros     int
		Requests                  int // beside the manifest
		Disk, Wire, NVRAM, Config int64
	}
	var wire int64
	for _, p := range m.Pieces() {
		wire += p.BlobSize
	}
	got := figures{len(m.Chunks), len(contents), zeros, len(m.Pieces()), m.DiskSize, m.Bytes(), m.NVRAM.Size, m.Config.Size}
	want := figures{94, 66, 29, 65 + 2, 50_000_000_000, 20_638_268_094, 33_570_816, 513}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if wire != 20_638_268_094+33_570_816+513 {
		t.Errorf("a full pull moves %d bytes", wire)
	}
}

// A full pull asks for each blob once, for none that is zero, and writes every chunk to
// where the layers before it end. The plan is compared with one made from plain JSON.
func TestPlanOfPublicImage(t *testing.T) {
	m, layers := publicManifest(t)
	const zero = "sha256:9acca8e8c22201155389f65abbf6bc9723edc7384ead80503839f49dcc56d767"
	type request struct {
		Blob    string
		Bytes   int64
		Offsets []int64
	}
	want, at, offset := []request{}, map[string]int{}, int64(0)
	var last []request // NVRAM, VM config
	for _, l := range layers {
		r := request{Blob: l["digest"].(string), Bytes: int64(l["size"].(float64))}
		if l["mediaType"] != "application/vnd.cirruslabs.tart.disk.v2" {
			last = append([]request{r}, last...)
			continue
		}
		notes := l["annotations"].(map[string]any)
		content := notes["org.cirruslabs.tart.uncompressed-content-digest"].(string)
		size, err := strconv.ParseInt(notes["org.cirruslabs.tart.uncompressed-size"].(string), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		i, seen := at[content]
		if !seen && content != zero {
			i = len(want)
			at[content], want = i, append(want, r)
		}
		if content != zero {
			want[i].Offsets = append(want[i].Offsets, offset)
		}
		offset += size
	}
	want = append(want, last...)

	places := map[fleet.Digest][]int64{}
	for _, c := range m.Chunks {
		places[c.Content] = append(places[c.Content], c.Offset)
	}
	got := []request{}
	for _, p := range m.Pieces() {
		got = append(got, request{string(p.Blob), p.BlobSize, places[p.Content]})
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if offset != m.DiskSize {
		t.Errorf("the disk has %d bytes, its layers %d", m.DiskSize, offset)
	}
}
