// Package tart reads and writes VM images in the format that the public macOS images
// have: an OCI manifest whose layers are a VM config, disk chunks as independent
// Apple-LZ4 streams ("disk.v2"), and an NVRAM blob. It also reads the older form whose
// disk is one such stream, cut into layers ("disk.v1").
//
// It is pure: it works on bytes, readers and writers that it is given, and talks to no
// registry (cache/registry does) and no disk (cache does). Called by cache and
// cache/registry through image.Codec, and by whoever makes an image (Build): the demo,
// the test registry, the CLI's push.
package tart

import (
	"fmt"
	"io"
	"strconv"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// The media types of layers.
const (
	MediaTypeConfig = "application/vnd.cirruslabs.tart.config.v1"
	MediaTypeDisk   = "application/vnd.cirruslabs.tart.disk.v2"
	MediaTypeNVRAM  = "application/vnd.cirruslabs.tart.nvram.v1"

	mediaTypeDiskV1  = "application/vnd.cirruslabs.tart.disk.v1"
	mediaTypeOverlay = "application/vnd.cirruslabs.tart.disk.asif.overlay.v1"
	mediaTypeOCI     = "application/vnd.oci.image.config.v1+json"
)

// The annotations; sizes are decimal bytes.
const (
	annotationDiskSize   = "org.cirruslabs.tart.uncompressed-disk-size"
	annotationUploadTime = "org.cirruslabs.tart.upload-time"
	annotationSize       = "org.cirruslabs.tart.uncompressed-size"
	annotationContent    = "org.cirruslabs.tart.uncompressed-content-digest"
	labelDiskFormat      = "org.cirruslabs.tart.disk.format"
)

// Codec is the format as an image.Codec. Its zero value is ready.
type Codec struct{}

var _ image.Codec = Codec{}

// Name is "tart".
func (Codec) Name() string { return "tart" }

// Recognizes knows every layer type of the format, also those that Parse refuses.
func (Codec) Recognizes(mediaType string) bool {
	switch mediaType {
	case MediaTypeConfig, MediaTypeDisk, MediaTypeNVRAM, mediaTypeDiskV1, mediaTypeOverlay:
		return true
	}
	return false
}

// Parse reads a manifest: exactly one config and one NVRAM layer, at whatever place, and
// the disk layers in disk order. Errors are those of package image and name the layer.
func (Codec) Parse(doc *image.Document) (*image.Manifest, error) {
	m := &image.Manifest{Digest: doc.Digest, Raw: doc.Raw}
	var old legacy
	for i, l := range doc.Layers {
		if err := addLayer(m, &old, i, l); err != nil {
			return nil, fmt.Errorf("layer %d: %w", i, err)
		}
	}
	if m.Config.Digest == "" {
		return nil, fmt.Errorf("%w: no VM config (%s)", image.ErrMissingLayer, MediaTypeConfig)
	}
	if m.NVRAM.Digest == "" {
		return nil, fmt.Errorf("%w: no NVRAM (%s)", image.ErrMissingLayer, MediaTypeNVRAM)
	}
	want := int64(-1) // images made before the annotation existed do not say
	if text, ok := doc.Annotations[annotationDiskSize]; ok {
		n, err := parseSize(annotationDiskSize, text)
		if err != nil {
			return nil, err
		}
		want = n
	}
	if err := old.join(m, want); err != nil {
		return nil, err
	}
	if err := m.Lay(want); err != nil {
		return nil, err
	}
	return m, nil
}

// addLayer takes one layer into the manifest.
func addLayer(m *image.Manifest, old *legacy, i int, l image.Descriptor) error {
	switch l.MediaType {
	case MediaTypeConfig:
		m.ConfigLayer = i
		return single(&m.Config, l, "VM config", image.MaxConfigBytes)
	case MediaTypeNVRAM:
		m.NVRAMLayer = i
		return single(&m.NVRAM, l, "NVRAM", image.MaxNVRAMBytes)
	case MediaTypeDisk:
		chunk, err := diskChunk(i, l)
		if err != nil {
			return err
		}
		m.Chunks = append(m.Chunks, chunk)
		return nil
	case mediaTypeDiskV1:
		return old.add(i, l)
	case mediaTypeOverlay:
		return image.ErrStacked
	default:
		return fmt.Errorf("%w %.120q", image.ErrUnknownMediaType, l.MediaType)
	}
}

// single fills in a layer that occurs once.
func single(into *image.Blob, l image.Descriptor, what string, limit int64) error {
	if into.Digest != "" {
		return fmt.Errorf("%s: %w", what, image.ErrDoubled)
	}
	if err := l.Blob().Check(limit); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	*into = l.Blob()
	return nil
}

// diskChunk reads a disk layer; offset and zeros are filled in by Manifest.Lay.
func diskChunk(i int, l image.Descriptor) (image.Chunk, error) {
	text, ok := l.Annotations[annotationSize]
	if !ok {
		return image.Chunk{}, fmt.Errorf("%w %s", image.ErrMissingAnnotation, annotationSize)
	}
	content, ok := l.Annotations[annotationContent]
	if !ok {
		return image.Chunk{}, fmt.Errorf("%w %s", image.ErrMissingAnnotation, annotationContent)
	}
	size, err := parseSize(annotationSize, text)
	if err != nil {
		return image.Chunk{}, err
	}
	c := image.Chunk{
		Layer: i, Size: size, Content: fleet.Digest(content),
		Blob: l.Digest, BlobSize: l.Size, MediaType: l.MediaType,
	}
	return c, checkRatio(c)
}

// checkRatio refuses a chunk that its blob cannot expand to: a byte of LZ4 stands for 255
// at most. So a small manifest cannot claim much more of a disk than it has blobs for.
func checkRatio(c image.Chunk) error {
	if c.BlobSize > 0 && c.Size/255 > c.BlobSize {
		return fmt.Errorf("%w: %d bytes on the wire cannot hold %d bytes of disk", image.ErrTooLarge, c.BlobSize, c.Size)
	}
	return nil
}

// parseSize reads decimal bytes; what overflows 63 bits or is negative is refused here.
func parseSize(annotation, text string) (int64, error) {
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n < 0 {
		return 0, fmt.Errorf("%w: annotation %s is %.40q, want decimal bytes", image.ErrTooLarge, annotation, text)
	}
	return n, nil
}

// CheckConfig refuses a VM config that cannot be read, and disks that are not raw.
func (Codec) CheckConfig(raw []byte) error {
	_, err := ParseConfig(raw)
	return err
}

// NewDecoder decodes the Apple-LZ4 stream of a disk layer, or of all legacy ones together,
// from any border of blocks. Errors of the stream are *DecodeError; a mark that cannot be
// is ErrMark, at once.
func (Codec) NewDecoder(r io.Reader, c image.Chunk, at image.Mark) (image.Decoder, error) {
	if c.MediaType != MediaTypeDisk && c.MediaType != mediaTypeDiskV1 {
		return nil, fmt.Errorf("%w %.120q", image.ErrUnknownMediaType, c.MediaType)
	}
	if at.In > c.BlobSize {
		return nil, fmt.Errorf("%w: compressed offset %d of %d", ErrMark, at.In, c.BlobSize)
	}
	d, err := newDecoder(r, c.Size, at)
	if err != nil {
		return nil, err // not d, which would be a Decoder that is no nil
	}
	return d, nil
}
