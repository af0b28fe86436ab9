package tart

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// DefaultChunkSize is what the format's own tool cuts disks into.
const DefaultChunkSize = 512 << 20

// Disk is what an image's disk is read from, at several places at once: a bytes.Reader,
// an io.SectionReader of a file. It must not change until Build has returned.
type Disk interface {
	io.ReaderAt
	Size() int64 // bytes
}

// Sparse is a Disk that knows where it is empty. Those parts are not read.
type Sparse interface {
	Disk
	// Zero reports whether size bytes at offset are known to be zeros.
	Zero(offset, size int64) bool
}

// Source is what an image is made of.
type Source struct {
	Config *Config
	NVRAM  []byte
	Disk   Disk
	// ChunkSize is how many bytes of disk go into one layer; 0: DefaultChunkSize.
	ChunkSize int64
	// Workers is how many chunks are encoded and put at once; 0: one after the other, in
	// disk order. Each takes less than 10 MiB of memory, whatever ChunkSize is.
	Workers int
	// UploadTime goes into the manifest; zero: none is written.
	UploadTime time.Time
	// Parent is an image whose blobs are taken over, as they stand, for chunks of equal
	// content, so that both share them at the registry; nil: none.
	Parent *image.Manifest
	// Reuse is asked once for each blob of Parent that would be taken over, before the
	// manifest exists: it mounts the blob where the image goes. If it reports false, the
	// chunk is encoded and put like any other. nil: all are there already. With Workers
	// it is called by several goroutines, like put.
	Reuse func(ctx context.Context, c image.Chunk) (bool, error)
}

// Layer is a blob of an image that was made, to be pushed.
type Layer struct {
	image.Blob
	// Open gives the blob's bytes from their beginning, as often as needed until put has
	// returned. A large disk chunk is encoded anew each time rather than held in memory;
	// if the disk has changed since, reading it fails.
	Open func() (io.ReadCloser, error)
}

// Bytes is all of the blob, for those who have the room.
func (l Layer) Bytes() (data []byte, err error) {
	r, err := l.Open()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	return io.ReadAll(r)
}

// Build makes an image and hands each distinct blob that is new (not the Parent's) to
// put, once and before the manifest exists. It returns the manifest's bytes, whose digest
// is the image's. Equal sources give equal bytes, also with more workers.
func Build(ctx context.Context, src Source, put func(context.Context, Layer) error) ([]byte, error) {
	b := &builder{src: src, put: put, claimed: make(map[fleet.Digest]bool), known: make(map[fleet.Digest]image.Descriptor)}
	config, err := b.check()
	if err != nil {
		return nil, err
	}
	if err := b.small(ctx, MediaTypeConfig, config); err != nil {
		return nil, err
	}
	contents, err := b.disk(ctx)
	if err != nil {
		return nil, err
	}
	for _, content := range contents {
		b.layers = append(b.layers, b.known[content])
	}
	if err := b.small(ctx, MediaTypeNVRAM, src.NVRAM); err != nil {
		return nil, err
	}
	return b.manifest(ctx)
}

// builder collects the layers of one image.
type builder struct {
	src    Source
	put    func(context.Context, Layer) error
	parent map[fleet.Digest]image.Chunk // by content
	layers []image.Descriptor

	mu      sync.Mutex
	claimed map[fleet.Digest]bool             // contents that a worker sees to, or has seen to
	known   map[fleet.Digest]image.Descriptor // by content
}

// check refuses what no reader would take, before anything is put, and returns the VM
// config's bytes.
func (b *builder) check() ([]byte, error) {
	src := &b.src
	if src.ChunkSize == 0 {
		src.ChunkSize = DefaultChunkSize
	}
	if src.ChunkSize < 0 || src.ChunkSize > image.MaxChunkBytes {
		return nil, fmt.Errorf("%w: chunks of %d bytes, want 1 to %d", image.ErrTooLarge, src.ChunkSize, int64(image.MaxChunkBytes))
	}
	size := src.Disk.Size()
	if size <= 0 || size > image.MaxDiskBytes {
		return nil, fmt.Errorf("%w: a disk of %d bytes, want 1 to %d", image.ErrTooLarge, size, int64(image.MaxDiskBytes))
	}
	if n := (size-1)/src.ChunkSize + 1; n > image.MaxLayers-2 {
		return nil, fmt.Errorf("%w: %d chunks of %d bytes, at most %d can be read: make them larger", image.ErrTooLarge, n, src.ChunkSize, image.MaxLayers-2)
	}
	if n := len(src.NVRAM); n == 0 || n > image.MaxNVRAMBytes {
		return nil, fmt.Errorf("%w: NVRAM of %d bytes, want 1 to %d", image.ErrTooLarge, n, image.MaxNVRAMBytes)
	}
	if src.Parent != nil {
		b.parent = make(map[fleet.Digest]image.Chunk)
		for _, c := range src.Parent.Chunks {
			if _, before := b.parent[c.Content]; !before && c.MediaType == MediaTypeDisk {
				b.parent[c.Content] = c
			}
		}
	}
	config, err := json.Marshal(src.Config)
	if err != nil {
		return nil, fmt.Errorf("writing the VM config: %w", err)
	}
	_, err = ParseConfig(config)
	return config, err
}

// small puts a whole blob that is in memory, and lists it.
func (b *builder) small(ctx context.Context, mediaType string, data []byte) error {
	blob := image.Blob{Digest: image.DigestOf(data), Size: int64(len(data)), MediaType: mediaType}
	if err := b.put(ctx, Layer{Blob: blob, Open: held(data)}); err != nil {
		return fmt.Errorf("putting %s: %w", mediaType, err)
	}
	b.layers = append(b.layers, image.Descriptor{MediaType: mediaType, Digest: blob.Digest, Size: blob.Size})
	return nil
}

// disk cuts the disk into chunks and returns their contents in order; afterwards all of
// them are known.
func (b *builder) disk(ctx context.Context) ([]fleet.Digest, error) {
	size := b.src.Disk.Size()
	contents := make([]fleet.Digest, (size-1)/b.src.ChunkSize+1)
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(max(1, b.src.Workers))
	for i := range contents {
		at := int64(i) * b.src.ChunkSize
		p := part{disk: b.src.Disk, offset: at, size: min(b.src.ChunkSize, size-at)}
		group.Go(func() (err error) {
			if contents[i], err = b.chunk(ctx, p); err != nil {
				return fmt.Errorf("disk chunk %d (offset %d): %w", i, p.offset, err)
			}
			return nil
		})
	}
	return contents, group.Wait()
}

// chunk sees to one chunk, unless another worker has seen to the same content.
func (b *builder) chunk(ctx context.Context, p part) (content fleet.Digest, err error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	// Encoding is the dear part. So the content is looked at alone if it may be known
	// already: if there is a parent, or if no byte has to be read for it.
	var e encoded
	switch {
	case p.zero():
		content, err = image.ZeroDigest(p.size)
	case b.parent != nil:
		content, err = p.digest(ctx)
	default:
		e, err = p.encode(ctx)
		content = e.content
	}
	if err != nil || !b.claim(content) {
		return content, err
	}
	d, taken, err := b.take(ctx, content, p.size)
	if err == nil && !taken {
		d, err = b.add(ctx, p, content, e)
	}
	if err != nil {
		return "", err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.known[content] = d
	return content, nil
}

// claim reports whether the caller is the first with that content.
func (b *builder) claim(content fleet.Digest) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	first := !b.claimed[content]
	b.claimed[content] = true
	return first
}

// take takes the parent's descriptor over, if it has that content, in that size (a parent
// may lie about it), and its blob can be had.
func (b *builder) take(ctx context.Context, content fleet.Digest, size int64) (image.Descriptor, bool, error) {
	c, ok := b.parent[content]
	if !ok || c.Size != size {
		return image.Descriptor{}, false, nil
	}
	if b.src.Reuse != nil {
		if there, err := b.src.Reuse(ctx, c); err != nil || !there {
			return image.Descriptor{}, false, err
		}
	}
	return descriptor(c), true, nil
}

// add encodes a chunk, unless e is that already, and puts it.
func (b *builder) add(ctx context.Context, p part, content fleet.Digest, e encoded) (image.Descriptor, error) {
	if e.content == "" {
		var err error
		if e, err = p.encode(ctx); err != nil {
			return image.Descriptor{}, err
		}
		if e.content != content {
			return image.Descriptor{}, errChanged
		}
	}
	d := descriptor(image.Chunk{Size: p.size, Content: content, Blob: e.blob, BlobSize: e.size, MediaType: MediaTypeDisk})
	open := held(e.bytes)
	if e.bytes == nil {
		open = func() (io.ReadCloser, error) { return p.again(ctx, e.blob), nil }
	}
	return d, b.put(ctx, Layer{Blob: d.Blob(), Open: open})
}

// errChanged: two looks at the same bytes of disk saw different ones.
var errChanged = errors.New("the disk changed while it was read; stop the machine that uses it")

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
func (b *builder) manifest(ctx context.Context) ([]byte, error) {
	config := []byte(`{"architecture":"arm64","config":{"Labels":{"` + labelDiskFormat + `":"raw"}},"os":"darwin"}`)
	blob := image.Blob{Digest: image.DigestOf(config), Size: int64(len(config)), MediaType: mediaTypeOCI}
	if err := b.put(ctx, Layer{Blob: blob, Open: held(config)}); err != nil {
		return nil, fmt.Errorf("putting the OCI config: %w", err)
	}
	annotations := map[string]string{annotationDiskSize: strconv.FormatInt(b.src.Disk.Size(), 10)}
	if !b.src.UploadTime.IsZero() {
		annotations[annotationUploadTime] = b.src.UploadTime.UTC().Format(time.RFC3339)
	}
	return json.Marshal(image.Document{
		SchemaVersion: 2,
		MediaType:     image.MediaTypeManifest,
		Config:        image.Descriptor{MediaType: mediaTypeOCI, Digest: blob.Digest, Size: blob.Size},
		Layers:        b.layers,
		Annotations:   annotations,
	})
}
