package main

import (
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"strings"

	"github.com/paddock-ci/paddock/image/tart"
)

// imageNames are the two images, and the label by which a job picks one.
var imageNames = []string{"sequoia", "sonoma"}

const (
	imageChunk  = 1 << 20 // real images have 512 MiB
	imageChunks = 12
)

// pushImage pushes an image of the demo's kind of machine and returns its reference.
func (d *demo) pushImage(ctx context.Context, registryURL, name string, seed uint64) (string, error) {
	source, err := d.kind.image(ctx, name, seed)
	if err != nil {
		return "", err
	}
	_, err = d.registry.Push(ctx, "acme/"+name, "1", source)
	return strings.TrimPrefix(registryURL, "http://") + "/acme/" + name + ":1", err
}

// noise is a small image in Tart's format that nothing boots: a third of its chunks are
// zero, as in real ones, and the two images share a third.
func noise(_ context.Context, name string, seed uint64) (tart.Source, error) {
	var disk bytes.Buffer
	for i := range imageChunks {
		switch i % 3 {
		case 0:
			disk.Write(make([]byte, imageChunk))
		case 1:
			writeNoise(&disk, uint64(i)) // shared
		case 2:
			writeNoise(&disk, 1000*(seed+1)+uint64(i))
		}
	}
	return tart.Source{
		Config:    &tart.Config{Version: 1, OS: "linux", Arch: "arm64", CPUCount: 1, MemorySize: 64 << 20},
		NVRAM:     []byte("nvram of " + name),
		Disk:      bytes.NewReader(disk.Bytes()),
		ChunkSize: imageChunk,
	}, nil
}

// writeNoise writes one chunk that compresses by half.
func writeNoise(w io.Writer, seed uint64) {
	random := rand.New(rand.NewPCG(seed, 0))
	chunk := make([]byte, imageChunk)
	for i := range chunk {
		if i/64%2 == 0 {
			chunk[i] = byte(random.Uint32())
		}
	}
	_, _ = w.Write(chunk) // a bytes.Buffer never fails
}
