//go:build linux

package imagebench

import (
	"archive/tar"
	"errors"
	"io"
	"os"
	"strings"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// openTarball finds where each blob lies in a tarball, so that they can be read at once.
func openTarball(path string) (func(image.Chunk) (io.ReadCloser, error), error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	type place struct{ at, size int64 }
	places := map[fleet.Digest]place{}
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, errors.Join(err, f.Close())
		}
		at, err := f.Seek(0, io.SeekCurrent) // the reader has read the header, and no more
		if err != nil {
			return nil, errors.Join(err, f.Close())
		}
		hex, _, _ := strings.Cut(h.Name, ".")
		places[fleet.Digest("sha256:"+hex)] = place{at, h.Size}
	}
	// The file stays open as long as the process.
	return func(c image.Chunk) (io.ReadCloser, error) {
		p, ok := places[c.Blob]
		if !ok {
			return nil, errDisk
		}
		return io.NopCloser(io.NewSectionReader(f, p.at, p.size)), nil
	}, nil
}
