// Package lume knows Lume's VM images by the media types of their layers, and says that
// they cannot be pulled yet and what to do instead.
//
// It is the seam for reading them: their disk is cut like Tart's, into chunks of gzip
// (the current form) or as it is (the older one). It reads nothing of them today. Called
// through image.Codec; cache.Formats lists it.
package lume

import (
	"fmt"
	"io"
	"strings"

	"github.com/paddock-ci/paddock/image"
)

// The beginnings of media types that only Lume's layers have: the current form, and the
// older one of numbered raw parts.
const (
	current = "application/vnd.trycua.lume."
	older   = "application/vnd.oci.image.layer.v1.tar;part.number="
)

// Codec is the format as an image.Codec. Its zero value is ready.
type Codec struct{}

var _ image.Codec = Codec{}

// Name is "lume".
func (Codec) Name() string { return "lume" }

// Recognizes knows the layers of both forms.
func (Codec) Recognizes(mediaType string) bool {
	return strings.HasPrefix(mediaType, current) || strings.HasPrefix(mediaType, older)
}

// Parse refuses every image.
func (c Codec) Parse(doc *image.Document) (*image.Manifest, error) {
	for i, l := range doc.Layers {
		if c.Recognizes(l.MediaType) {
			return nil, fmt.Errorf("layer %d: %w", i, refused(l.MediaType))
		}
	}
	return nil, refused(doc.MediaType)
}

// CheckConfig refuses every VM config.
func (Codec) CheckConfig([]byte) error { return refused("VM config") }

// NewDecoder refuses every blob.
func (Codec) NewDecoder(_ io.Reader, c image.Chunk, _ image.Mark) (image.Decoder, error) {
	return nil, refused(c.MediaType)
}

// refused is an image.ErrUnknownMediaType in words that help.
func refused(what string) error {
	return fmt.Errorf("%w %.120q: this is a Lume image, not supported yet; push the VM as a Tart image (paddock image push) and use that", image.ErrUnknownMediaType, what)
}
