//go:build linux

package imagebench

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"time"

	"github.com/google/go-containerregistry/pkg/crane"
	"golang.org/x/sync/errgroup"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/cache/registry"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
	"github.com/paddock-ci/paddock/image/tart"
)

// cranePull is the other way to a disk: crane pull, then a decode that is checked (both
// digests of each chunk), sparse, and has a thread for each core: FORMAT, REF, DIR. The
// format is what "crane pull --format" takes: tarball, its default, or oci. The disk is
// DIR/disk.img; nothing is waited for to be on the disk.
func cranePull(ctx context.Context, args []string) error {
	if err := want(args, "FORMAT", "REF", "DIR"); err != nil {
		return err
	}
	format, ref, dir := args[0], args[1], args[2]
	img, err := crane.Pull(ref, crane.Insecure, crane.WithContext(ctx))
	if err != nil {
		return err
	}
	raw, err := img.RawManifest()
	if err != nil {
		return err
	}
	m, _, err := image.Parse(raw, []image.Codec{tart.Codec{}})
	if err != nil {
		return err
	}
	var open func(c image.Chunk) (io.ReadCloser, error)
	switch format {
	case "oci":
		layout := filepath.Join(dir, "layout")
		if err := crane.SaveOCI(img, layout); err != nil {
			return err
		}
		open = func(c image.Chunk) (io.ReadCloser, error) {
			return os.Open(filepath.Join(layout, "blobs", "sha256", string(c.Blob[len("sha256:"):])))
		}
	case "tarball":
		path := filepath.Join(dir, "image.tar")
		if err := crane.Save(img, ref, path); err != nil {
			return err
		}
		if open, err = openTarball(path); err != nil {
			return err
		}
	default:
		return fmt.Errorf("format %q", format)
	}
	return decode(ctx, m, open, filepath.Join(dir, "disk.img"))
}

// decodeAlone is the work that cannot be left out, without any way for the bytes to come:
// DIR, TAG. The blobs are read from files, hashed, decoded, and the content hashed.
func decodeAlone(ctx context.Context, args []string) error {
	if err := want(args, "DIR", "TAG"); err != nil {
		return err
	}
	m, err := readImage(args[0], args[1])
	if err != nil {
		return err
	}
	return decode(ctx, m, func(c image.Chunk) (io.ReadCloser, error) { return os.Open(blobPath(args[0], c.Blob)) }, "")
}

// decode decodes each distinct chunk once and verifies both its digests, on every core; it
// writes what is not zero to path, or nothing if that is empty.
func decode(ctx context.Context, m *image.Manifest, open func(image.Chunk) (io.ReadCloser, error), path string) (err error) {
	var out *os.File
	if path != "" {
		if out, err = os.Create(path); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, out.Close()) }()
		if err := out.Truncate(m.DiskSize); err != nil {
			return err
		}
	}
	places := map[fleet.Digest][]int64{}
	for _, c := range m.Chunks {
		places[c.Content] = append(places[c.Content], c.Offset)
	}
	group, _ := errgroup.WithContext(ctx)
	group.SetLimit(runtime.GOMAXPROCS(0))
	for _, c := range m.Distinct() {
		group.Go(func() error {
			r, err := open(c)
			if err != nil {
				return err
			}
			defer func() { _ = r.Close() }()
			blob, content := sha256.New(), sha256.New()
			w := io.Writer(content)
			if out != nil {
				w = io.MultiWriter(content, &sparse{out: out, places: places[c.Content]})
			}
			if err := image.Decode(tart.Codec{}, w, io.TeeReader(r, blob), c); err != nil {
				return err
			}
			if digest(blob) != c.Blob || digest(content) != c.Content {
				return fmt.Errorf("%w: chunk %d", errDisk, c.Index)
			}
			return nil
		})
	}
	return group.Wait()
}

func digest(h hash.Hash) fleet.Digest {
	return fleet.Digest("sha256:" + hex.EncodeToString(h.Sum(nil)))
}

// sparse writes what is not a page of zeros.
type sparse struct {
	out    *os.File
	places []int64
	at     int64
}

var zeros [4096]byte

func (s *sparse) Write(b []byte) (int, error) {
	for n := 0; n < len(b); {
		end := n
		for end < len(b) && !bytes.Equal(b[end:min(end+4096, len(b))], zeros[:min(4096, len(b)-end)]) {
			end = min(end+4096, len(b))
		}
		for _, p := range s.places {
			if end == n {
				break
			}
			if _, err := s.out.WriteAt(b[n:end], p+s.at+int64(n)); err != nil {
				return 0, err
			}
		}
		n = min(end+4096, len(b))
		if end == len(b) {
			n = end
		}
	}
	s.at += int64(len(b))
	return len(b), nil
}

// pullAlone is Paddock's way without its program: REF, DIGEST, STORE.
func pullAlone(ctx context.Context, args []string) error {
	if err := want(args, "REF", "DIGEST", "STORE"); err != nil {
		return err
	}
	client, err := registry.New(registry.Config{})
	if err != nil {
		return err
	}
	s, err := cache.Open(cache.Config{Dir: args[2], Sources: []cache.Source{client}})
	if err != nil {
		return err
	}
	return errors.Join(s.Pull(ctx, fleet.Hold{Digest: fleet.Digest(args[1]), Ref: args[0], Demand: true}), s.Close())
}

// cloneAlone clones an image of a store: STORE, DIGEST, DIR, COUNT. It prints how long each
// clone took, in microseconds, and what the file system had shared.
func cloneAlone(ctx context.Context, args []string) error {
	if err := want(args, "STORE", "DIGEST", "DIR", "COUNT"); err != nil {
		return err
	}
	s, err := cache.Open(cache.Config{Dir: args[0]})
	if err != nil {
		return err
	}
	defer func() { _ = s.Close() }()
	d := fleet.Digest(args[1])
	release, err := s.Lease(d, "bench")
	if err != nil {
		return err
	}
	count, err := strconv.Atoi(args[3])
	for i := 0; i < count && err == nil; i++ {
		start := time.Now()
		if err = s.Clone(ctx, d, filepath.Join(args[2], strconv.Itoa(i)), 0); err == nil {
			fmt.Println(time.Since(start).Microseconds())
		}
	}
	return errors.Join(err, release())
}
