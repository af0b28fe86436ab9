//go:build linux

package imagebench

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"

	"github.com/pierrec/lz4/v4"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
	"github.com/paddock-ci/paddock/image/tart"
)

// The images of a registry's directory: manifests by tag, blobs by digest.
const (
	base     = "v1"
	next     = "v2"        // 70 % of its chunks are base's
	recoded  = "v2recoded" // the same disk as next; no blob is any other image's
	blobsDir = "blobs"
)

// makeImages is the role that makes them: DIR, MiB of disk, MiB of chunk.
func makeImages(ctx context.Context, args []string) error {
	if err := want(args, "DIR", "MIB", "CHUNK"); err != nil {
		return err
	}
	size, err := strconv.ParseInt(args[1], 10, 64)
	chunk, cerr := strconv.ParseInt(args[2], 10, 64)
	if err := errors.Join(err, cerr, os.MkdirAll(filepath.Join(args[0], blobsDir), 0o700)); err != nil {
		return err
	}
	d := disk{size: size << 20, chunk: chunk << 20}
	parent, err := makeImage(ctx, args[0], base, d, nil)
	if err != nil {
		return err
	}
	d.next = true
	child, err := makeImage(ctx, args[0], next, d, parent)
	if err != nil {
		return err
	}
	return recode(args[0], child)
}

func makeImage(ctx context.Context, dir, tag string, d disk, parent *image.Manifest) (*image.Manifest, error) {
	raw, err := tart.Build(ctx, tart.Source{
		Config: &tart.Config{Version: 1, OS: "linux", CPUCount: 2, MemorySize: 1 << 30},
		NVRAM:  []byte("no variables"), Disk: d, ChunkSize: d.chunk, Workers: runtime.GOMAXPROCS(0), Parent: parent,
	}, func(_ context.Context, l tart.Layer) error {
		r, err := l.Open()
		if err != nil {
			return err
		}
		defer func() { _ = r.Close() }()
		return writeBlob(dir, l.Digest, r)
	})
	if err != nil {
		return nil, err
	}
	m, _, err := image.Parse(raw, []image.Codec{tart.Codec{}})
	return m, errors.Join(err, os.WriteFile(filepath.Join(dir, tag), raw, 0o600))
}

func blobPath(dir string, d fleet.Digest) string {
	return filepath.Join(dir, blobsDir, string(d[len("sha256:"):]))
}

func writeBlob(dir string, d fleet.Digest, r io.Reader) error {
	f, err := os.Create(blobPath(dir, d))
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	return errors.Join(err, f.Close())
}

// recode stores an image again whose disk has the same content in other blobs.
func recode(dir string, m *image.Manifest) error {
	var doc image.Document
	if err := json.Unmarshal(m.Raw, &doc); err != nil {
		return err
	}
	made := map[fleet.Digest]image.Descriptor{}
	for _, c := range m.Chunks {
		layer := &doc.Layers[c.Layer]
		if d, ok := made[c.Content]; ok {
			*layer = d
			continue
		}
		blob, err := recodeBlob(dir, c)
		if err != nil {
			return err
		}
		layer.Digest, layer.Size = image.DigestOf(blob), int64(len(blob))
		if err := writeBlob(dir, layer.Digest, bytes.NewReader(blob)); err != nil {
			return err
		}
		made[c.Content] = *layer
	}
	raw, err := json.Marshal(doc)
	return errors.Join(err, os.WriteFile(filepath.Join(dir, recoded), raw, 0o600))
}

// recodeBlob encodes a chunk in blocks of another size.
func recodeBlob(dir string, c image.Chunk) ([]byte, error) {
	f, err := os.Open(blobPath(dir, c.Blob))
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	var plain, out bytes.Buffer
	if err := image.Decode(tart.Codec{}, &plain, f, c); err != nil {
		return nil, err
	}
	const size = 48 << 10
	var compressor lz4.Compressor
	block := make([]byte, lz4.CompressBlockBound(size))
	for plain.Len() > 0 {
		piece := plain.Next(size)
		n, err := compressor.CompressBlock(piece, block)
		if err != nil {
			return nil, err
		}
		if n == 0 || n >= len(piece) {
			out.WriteString("bv4-")
			out.Write(little(len(piece)))
			out.Write(piece)
			continue
		}
		out.WriteString("bv41")
		out.Write(little(len(piece)))
		out.Write(little(n))
		out.Write(block[:n])
	}
	out.WriteString("bv4$")
	return out.Bytes(), nil
}

func little(n int) []byte { return []byte{byte(n), byte(n >> 8), byte(n >> 16), byte(n >> 24)} }

// readImage reads one of the images.
func readImage(dir, tag string) (*image.Manifest, error) {
	raw, err := os.ReadFile(filepath.Join(dir, tag))
	if err != nil {
		return nil, err
	}
	m, _, err := image.Parse(raw, []image.Codec{tart.Codec{}})
	return m, err
}

// checkDisk compares a file with the disk that was made, as far as the digests of its
// chunks go.
func checkDisk(path string, m *image.Manifest) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	for _, c := range m.Chunks {
		hash := sha256.New()
		if _, err := io.Copy(hash, io.NewSectionReader(f, c.Offset, c.Size)); err != nil {
			return err
		}
		if got := "sha256:" + hex.EncodeToString(hash.Sum(nil)); got != string(c.Content) {
			return fmt.Errorf("%w: chunk %d", errDisk, c.Index)
		}
	}
	return nil
}
