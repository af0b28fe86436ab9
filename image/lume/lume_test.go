package lume

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

func TestRefusedByName(t *testing.T) {
	for mediaType, ours := range map[string]bool{
		"application/vnd.trycua.lume.disk.v1":                               true,
		"application/vnd.trycua.lume.nvram.v1":                              true,
		"application/vnd.oci.image.layer.v1.tar;part.number=1;part.total=9": true,
		"application/vnd.oci.image.layer.v1.tar":                            false, // any container's
		"application/vnd.cirruslabs.tart.disk.v2":                           false,
	} {
		d := fleet.Digest("sha256:" + strings.Repeat("a", 64))
		raw, err := json.Marshal(image.Document{SchemaVersion: 2, Layers: []image.Descriptor{
			{MediaType: "application/octet-stream", Digest: d, Size: 1},
			{MediaType: mediaType, Digest: d, Size: 1},
		}})
		if err != nil {
			t.Fatal(err)
		}
		_, _, err = image.Parse(raw, []image.Codec{Codec{}})
		if !errors.Is(err, image.ErrUnknownMediaType) {
			t.Errorf("%s: %v; want %v", mediaType, err, image.ErrUnknownMediaType)
		}
		if got := strings.Contains(err.Error(), "layer 1: ") && strings.Contains(err.Error(), "Lume image, not supported yet; push"); got != ours {
			t.Errorf("%s: recognized as Lume's: %v, want %v: %v", mediaType, got, ours, err)
		}
	}
}

func TestNothingIsRead(t *testing.T) {
	if err := (Codec{}).CheckConfig(nil); !errors.Is(err, image.ErrUnknownMediaType) {
		t.Errorf("VM config: %v", err)
	}
	if d, err := (Codec{}).NewDecoder(strings.NewReader(""), image.Chunk{MediaType: current + "disk.v1"}, image.Mark{}); d != nil || !errors.Is(err, image.ErrUnknownMediaType) {
		t.Errorf("decoder: %v, %v", d, err)
	}
}
