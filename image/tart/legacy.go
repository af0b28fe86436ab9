package tart

import (
	"fmt"
	"math"
	"strings"

	"github.com/paddock-ci/paddock/image"
)

// legacy collects the disk layers of an image from before 2024 ("disk.v1"): one
// Apple-LZ4 stream over the whole disk, cut into layers of any size. Where a layer begins
// in the disk is not known, nor what digest its content has, so that all of them together
// are one chunk.
type legacy struct {
	parts []image.Blob
	first int   // layer
	size  int64 // of all parts, in bytes
}

// add takes the next layer of the stream.
func (g *legacy) add(i int, l image.Descriptor) error {
	b := l.Blob()
	if err := b.Check(math.MaxInt64 - g.size); err != nil {
		return err
	}
	if len(g.parts) == 0 {
		g.first = i
	}
	g.parts = append(g.parts, b)
	g.size += b.Size
	return nil
}

// join makes the layers the one chunk of m, if there are any. diskSize is negative if the
// manifest does not say it.
func (g *legacy) join(m *image.Manifest, diskSize int64) error {
	switch {
	case len(g.parts) == 0:
		return nil
	case len(m.Chunks) > 0:
		return fmt.Errorf("layer %d: %w: disk layers of the old and of the new kind (disk.v1 and disk.v2) in one image", g.first, image.ErrMalformed)
	case diskSize < 0:
		return fmt.Errorf("layer %d: %w (no annotation %s)", g.first, image.ErrLegacyDisk, annotationDiskSize)
	}
	// A name for what is only known by its parts, the same wherever they occur together.
	var name strings.Builder
	name.WriteString("disk.v1")
	for _, p := range g.parts {
		name.WriteString("\n" + string(p.Digest))
	}
	stand := image.DigestOf([]byte(name.String()))
	c := image.Chunk{
		Layer: g.first, Size: diskSize, Content: stand,
		Blob: stand, BlobSize: g.size, MediaType: mediaTypeDiskV1, Parts: g.parts,
	}
	if err := checkRatio(c); err != nil {
		return fmt.Errorf("layer %d: %w", g.first, err)
	}
	m.Chunks = []image.Chunk{c}
	return nil
}
