package tart

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// DefaultChunkSize is what the format's own tool cuts disks into.
const DefaultChunkSize = 512 << 20

// Source is what an image is made of.
type Source struct {
	Config *Config
	NVRAM  []byte
	Disk   io.Reader // read to its end
	// ChunkSize is how many bytes of disk go into one layer; 0: DefaultChunkSize. One
	// encoded chunk is held in memory.
	ChunkSize int64
	// UploadTime goes into the manifest; zero: none is written.
	UploadTime time.Time
	// Parent is an image whose descriptors are taken over for chunks of equal content,
	// so that both share them at the registry; nil: none. The caller mounts those.
	Parent *image.Manifest
}

// Layer is a blob of an image that was made, to be pushed.
type Layer struct {
	image.Blob
	Data []byte
}

// Build makes an image and hands each distinct blob that is new (not the Parent's) to
// put, once and before the manifest exists; Data is not used again after put returns.
// It returns the manifest's bytes, whose digest is the image's.
func Build(src Source, put func(Layer) error) ([]byte, error) {
	b := &builder{put: put, known: make(map[fleet.Digest]image.Descriptor)}
	if src.Parent != nil {
		for _, c := range src.Parent.Chunks {
			b.known[c.Content] = descriptor(c)
		}
	}
	config, err := json.Marshal(src.Config)
	if err != nil {
		return nil, fmt.Errorf("writing the VM config: %w", err)
	}
	if _, err := ParseConfig(config); err != nil {
		return nil, err
	}
	if err := b.layer(MediaTypeConfig, config); err != nil {
		return nil, err
	}
	chunkSize := src.ChunkSize
	if chunkSize == 0 {
		chunkSize = DefaultChunkSize
	}
	if err := b.disk(src.Disk, chunkSize); err != nil {
		return nil, err
	}
	if err := b.layer(MediaTypeNVRAM, src.NVRAM); err != nil {
		return nil, err
	}
	return b.manifest(src.UploadTime)
}

// builder collects the layers of one image.
type builder struct {
	put      func(Layer) error
	known    map[fleet.Digest]image.Descriptor // by content
	layers   []image.Descriptor
	diskSize int64
}

// layer puts a whole blob and lists it.
func (b *builder) layer(mediaType string, data []byte) error {
	blob := image.Blob{Digest: image.DigestOf(data), Size: int64(len(data)), MediaType: mediaType}
	if err := b.put(Layer{Blob: blob, Data: data}); err != nil {
		return fmt.Errorf("putting %s: %w", mediaType, err)
	}
	b.layers = append(b.layers, image.Descriptor{MediaType: mediaType, Digest: blob.Digest, Size: blob.Size})
	return nil
}

// disk cuts the disk into chunks.
func (b *builder) disk(disk io.Reader, chunkSize int64) error {
	for n := 0; ; n++ {
		var encoded bytes.Buffer
		content := sha256.New()
		size, err := Encode(&encoded, io.TeeReader(io.LimitReader(disk, chunkSize), content))
		if err != nil {
			return fmt.Errorf("reading disk chunk %d: %w", n, err)
		}
		if size == 0 {
			return nil
		}
		b.diskSize += size
		if err := b.chunk(size, content.Sum(nil), encoded.Bytes()); err != nil {
			return fmt.Errorf("putting disk chunk %d: %w", n, err)
		}
		if size < chunkSize {
			return nil
		}
	}
}

// chunk lists one chunk, and puts it unless its content is known already.
func (b *builder) chunk(size int64, sum, encoded []byte) error {
	content := fleet.Digest("sha256:" + hex.EncodeToString(sum))
	d, known := b.known[content]
	if !known {
		d = descriptor(image.Chunk{
			Size: size, Content: content,
			Blob: image.DigestOf(encoded), BlobSize: int64(len(encoded)), MediaType: MediaTypeDisk,
		})
		if err := b.put(Layer{Blob: d.Blob(), Data: encoded}); err != nil {
			return err
		}
		b.known[content] = d
	}
	b.layers = append(b.layers, d)
	return nil
}

// descriptor is a disk layer's entry in a manifest.
func descriptor(c image.Chunk) image.Descriptor {
	return image.Descriptor{
		MediaType: c.MediaType, Digest: c.Blob, Size: c.BlobSize,
		Annotations: map[string]string{
			annotationSize:    strconv.FormatInt(c.Size, 10),
			annotationContent: string(c.Content),
		},
	}
}

// manifest writes the OCI config and the manifest over everything.
func (b *builder) manifest(uploadTime time.Time) ([]byte, error) {
	config := []byte(`{"architecture":"arm64","config":{"Labels":{"` + labelDiskFormat + `":"raw"}},"os":"darwin"}`)
	blob := image.Blob{Digest: image.DigestOf(config), Size: int64(len(config)), MediaType: mediaTypeOCI}
	if err := b.put(Layer{Blob: blob, Data: config}); err != nil {
		return nil, fmt.Errorf("putting the OCI config: %w", err)
	}
	annotations := map[string]string{annotationDiskSize: strconv.FormatInt(b.diskSize, 10)}
	if !uploadTime.IsZero() {
		annotations[annotationUploadTime] = uploadTime.UTC().Format(time.RFC3339)
	}
	return json.Marshal(image.Document{
		SchemaVersion: 2,
		MediaType:     image.MediaTypeManifest,
		Config:        image.Descriptor{MediaType: mediaTypeOCI, Digest: blob.Digest, Size: blob.Size},
		Layers:        b.layers,
		Annotations:   annotations,
	})
}
