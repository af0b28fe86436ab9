// Package image says what a VM image is: a reference, a manifest, and an ordered list of
// disk chunks, each known by the SHA-256 of its uncompressed content.
//
// It does no I/O, reads no clock and knows no format by itself: a format is a Codec
// (image/tart is one), and the callers say which ones they accept. Fetching is
// cache/registry, keeping is cache. Called by cache, cache/registry and the CLI.
package image

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"math"

	"github.com/paddock-ci/paddock/fleet"
)

// Limits on what a registry may make us hold in memory or hash. A public 50 GB image has
// 96 layers in 33 KB of manifest.
const (
	// MaxManifestBytes is what registries are asked to accept at least, and so all
	// that an image may rely on.
	MaxManifestBytes = 4 << 20
	// MaxLayers bounds the layers of one manifest: 2 TiB in chunks of 512 MiB.
	MaxLayers = 4096
	// MaxConfigBytes bounds a VM config; real ones have 500 bytes.
	MaxConfigBytes = 1 << 20
	// MaxNVRAMBytes bounds an NVRAM blob; macOS guests have 33 MB.
	MaxNVRAMBytes = 256 << 20
	// MaxChunkBytes bounds one uncompressed chunk; 512 MiB is usual.
	MaxChunkBytes = 16 << 30
	// MaxDiskBytes bounds a disk: beyond the largest Mac's.
	MaxDiskBytes = 32 << 40
)

// Blob is something a registry stores: Size bytes (on the wire) that hash to Digest.
type Blob struct {
	Digest    fleet.Digest
	Size      int64
	MediaType string
}

// Chunk is one piece of the disk.
type Chunk struct {
	Index   int          // among the disk chunks, from 0
	Layer   int          // among the manifest's layers, from 0; what errors name
	Offset  int64        // in the disk, in bytes
	Size    int64        // uncompressed bytes
	Content fleet.Digest // of the uncompressed bytes: what caching, sharing and placement go by

	Blob      fleet.Digest // of the bytes on the wire: what the registry is asked for
	BlobSize  int64        // bytes on the wire
	MediaType string       // how Blob encodes Content

	// Parts are the blobs whose bytes, one after the other, are the blob; nil: Blob is a
	// blob itself. With them, nothing is known of the content before it is here: Blob and
	// Content only stand for it, and it is the Parts' digests that are verified.
	Parts []Blob

	// Zero: the content is Size zero bytes, so no request is needed.
	Zero bool
}

// Legacy reports whether the chunk is cut over several blobs, none of which can be decoded
// without those before it.
func (c *Chunk) Legacy() bool { return len(c.Parts) > 0 }

// Manifest is an image as its registry describes it.
type Manifest struct {
	Digest fleet.Digest // of Raw
	Raw    []byte       // as it came: its bytes are its identity
	Config Blob         // the VM config, uncompressed
	NVRAM  Blob         // uncompressed; the zero Blob if there is none

	ConfigLayer, NVRAMLayer int // among the manifest's layers, from 0

	DiskSize int64 // bytes of the decoded disk
	Chunks   []Chunk
}

// Distinct returns the chunks that a full pull has to fetch: one for each content that
// is not zero, in disk order.
func (m *Manifest) Distinct() []Chunk {
	seen := make(map[fleet.Digest]bool, len(m.Chunks))
	var distinct []Chunk
	for _, c := range m.Chunks {
		if !c.Zero && !seen[c.Content] {
			seen[c.Content] = true
			distinct = append(distinct, c)
		}
	}
	return distinct
}

// Bytes is what a full pull of the disk moves: the wire bytes of the distinct chunks
// that are not zero. It is fleet.Image.Bytes.
func (m *Manifest) Bytes() int64 {
	var sum int64
	for _, c := range m.Distinct() {
		sum += c.BlobSize
	}
	return sum
}

// Lay gives every chunk its index and its offset (the sum of the sizes before it), marks
// the zero ones, and checks every size and digest; a codec calls it last. want is the
// disk's size as the manifest states it, or negative if it does not.
func (m *Manifest) Lay(want int64) error {
	if len(m.Chunks) == 0 {
		return fmt.Errorf("%w: no disk layer", ErrMalformed)
	}
	var offset int64
	sizes := make(map[fleet.Digest]int64, len(m.Chunks)) // by content
	for i := range m.Chunks {
		c := &m.Chunks[i]
		if err := c.check(); err != nil {
			return fmt.Errorf("layer %d: %w", c.Layer, err)
		}
		// Equal contents are fetched once and written to all their offsets: with two
		// sizes, the larger would be written over its neighbour.
		if size, seen := sizes[c.Content]; seen && size != c.Size {
			return fmt.Errorf("layer %d: %w: content %s has %d bytes here and %d in a layer before", c.Layer, ErrSizeMismatch, c.Content.Short(), c.Size, size)
		}
		sizes[c.Content] = c.Size
		if offset > MaxDiskBytes-c.Size {
			return fmt.Errorf("layer %d: %w: the disk would exceed %d bytes", c.Layer, ErrTooLarge, int64(MaxDiskBytes))
		}
		c.Index, c.Offset = i, offset
		offset += c.Size
	}
	if want >= 0 && want != offset {
		return fmt.Errorf("%w: the manifest says %d bytes of disk, its layers add up to %d", ErrSizeMismatch, want, offset)
	}
	m.DiskSize = offset
	if m.Chunks[0].Legacy() {
		return nil // nothing is known of its content
	}
	zero := zeroDigests(m.Chunks)
	for i := range m.Chunks {
		c := &m.Chunks[i]
		c.Zero = zero[c.Size] == c.Content
	}
	return nil
}

// check holds one chunk to what the limits and plain sense allow.
func (c *Chunk) check() error {
	if err := fleet.CheckDigest(c.Content); err != nil {
		return fmt.Errorf("%w: content digest: %w (sha256 is the only algorithm known here)", ErrMalformed, err)
	}
	if err := checkBlob(c.Blob, c.BlobSize, math.MaxInt64); err != nil {
		return err
	}
	limit := int64(MaxChunkBytes)
	if c.Legacy() {
		limit = MaxDiskBytes
	}
	if c.Size <= 0 || c.Size > limit {
		return fmt.Errorf("%w: uncompressed size %d, want 1 to %d", ErrTooLarge, c.Size, limit)
	}
	// No encoder lets data grow beyond a few bytes per block; twice the size and
	// room for headers is already absurd, and would only waste the transfer.
	if c.BlobSize > 2*c.Size+1<<20 {
		return fmt.Errorf("%w: %d bytes on the wire for %d bytes of disk", ErrTooLarge, c.BlobSize, c.Size)
	}
	return nil
}

// Check holds a whole blob (config or NVRAM) to a limit.
func (b Blob) Check(limit int64) error { return checkBlob(b.Digest, b.Size, limit) }

func checkBlob(d fleet.Digest, size, limit int64) error {
	if err := fleet.CheckDigest(d); err != nil {
		return fmt.Errorf("%w: %w (sha256 is the only algorithm known here)", ErrMalformed, err)
	}
	if size <= 0 || size > limit {
		return fmt.Errorf("%w: blob size %d, want 1 to %d", ErrTooLarge, size, limit)
	}
	return nil
}

// DigestOf is the digest of bytes in memory.
func DigestOf(b []byte) fleet.Digest {
	sum := sha256.Sum256(b)
	return digest(sum[:])
}

func digest(sum []byte) fleet.Digest { return fleet.Digest("sha256:" + hex.EncodeToString(sum)) }

// Codec is one image format. Codecs hold no state and are safe for concurrent use.
type Codec interface {
	// Name is the format's name, for people.
	Name() string
	// Recognizes reports whether layers of a media type are this format's, supported
	// or not: Parse says why one is not.
	Recognizes(mediaType string) bool
	// Parse reads a document that has a layer the codec recognizes.
	Parse(doc *Document) (*Manifest, error)
	// CheckConfig refuses a VM config that no machine could be made from.
	CheckConfig(raw []byte) error
	// NewDecoder begins to decode the blob of c at a mark; r goes on with the blob's byte
	// at.In. The zero Mark is the blob's beginning. It keeps no reference to at.Window.
	// The digests are the caller's to verify.
	NewDecoder(r io.Reader, c Chunk, at Mark) (Decoder, error)
}

// Parse reads the raw bytes of a manifest with the first codec that recognizes one of
// its layers. Errors are those of this package (errors.Is) and name the layer.
func Parse(raw []byte, codecs []Codec) (*Manifest, Codec, error) {
	doc, err := ParseDocument(raw)
	if err != nil {
		return nil, nil, err
	}
	for _, codec := range codecs {
		for _, l := range doc.Layers {
			if codec.Recognizes(l.MediaType) {
				m, err := codec.Parse(doc)
				if err != nil {
					return nil, nil, fmt.Errorf("%s image: %w", codec.Name(), err)
				}
				return m, codec, nil
			}
		}
	}
	return nil, nil, fmt.Errorf("layer 0: %w %.120q: this is no VM image that is supported here", ErrUnknownMediaType, doc.Layers[0].MediaType)
}
