package image

import "errors"

// What can be wrong with an image, each in its own words; all are found with errors.Is.
// They say that the image is bad or beyond us, so that another try brings the same.
var (
	// ErrReference: text that names no image at a registry.
	ErrReference = errors.New("bad image reference")
	// ErrMalformed: not the JSON, digest or shape that the format prescribes.
	ErrMalformed = errors.New("malformed image")
	// ErrTooLarge: a size is negative, zero, or beyond the limits of this package.
	ErrTooLarge = errors.New("size out of bounds")
	// ErrSizeMismatch: sizes that must agree do not.
	ErrSizeMismatch = errors.New("sizes do not agree")
	// ErrMissingAnnotation: a layer lacks what its format requires.
	ErrMissingAnnotation = errors.New("missing annotation")
	// ErrDoubled: two layers of a kind that occurs once.
	ErrDoubled = errors.New("layer occurs more than once")
	// ErrMissingLayer: a layer that must be there is not.
	ErrMissingLayer = errors.New("missing layer")
	// ErrUnknownMediaType names a layer that no codec knows.
	ErrUnknownMediaType = errors.New("unknown media type")
	// ErrIndex: an OCI index where an image was meant.
	ErrIndex = errors.New("this is an index of images, not one image")
	// ErrStacked: the disk is an overlay over another image.
	ErrStacked = errors.New("stacked images are not supported: push a flat (full) image instead")
	// ErrASIF: the disk is in Apple's sparse image format.
	ErrASIF = errors.New("disks in asif format are not supported: make the image with a raw disk")
	// ErrLegacyDisk: the disk is one stream cut in pieces, as before 2024, and nothing says
	// how large it will be.
	ErrLegacyDisk = errors.New("this image in the legacy disk.v1 format does not say how large its disk is: pull and push it again with a current tool, or use a newer tag")
)
