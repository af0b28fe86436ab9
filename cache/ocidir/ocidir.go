// Package ocidir is a store of images that a site's nodes share: an OCI image layout (a
// directory with oci-layout, index.json and blobs/sha256) on a mount such as NFS.
//
// It is a cache.Source for nodes, and a place that images are written to by whoever may
// write there. It keeps nothing on this node and verifies only what it writes; package
// cache verifies what it reads. A mount that hangs or vanishes is an error within the
// stall time, never a caller that hangs too: file operations run in goroutines of their
// own, of which a few may be left to the kernel. Called by cache, and by the CLI to push.
package ocidir

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// Layout is an OCI image layout. It is safe for concurrent use, by several processes too.
type Layout struct {
	// Stall is how long one operation on a file may take; Open sets 30 s, and it must not
	// be changed once the layout is used.
	Stall time.Duration

	dir   string
	plain func(path string) (*os.File, error) // openPlain, but in tests of what hangs
	hung  atomic.Int32                        // operations that have not come back in time, and may never

	mu     sync.Mutex
	absent map[fleet.Digest]time.Time // blobs that were not there, and when
	down   time.Time                  // until then, the directory is not asked for anything
}

var _ cache.Source = (*Layout)(nil)

const (
	// maxHung bounds what a mount that hangs may take of this process: each operation
	// is a thread in the kernel.
	maxHung = 16
	// forgetAbsent is how long a missing blob is taken for missing without another look.
	forgetAbsent = time.Minute
)

// Open names a layout. It does not touch the directory, which may be a mount that is not
// there yet, or hangs.
func Open(dir string) (*Layout, error) {
	if !filepath.IsAbs(dir) {
		return nil, fmt.Errorf("image layout %q: want an absolute path", dir)
	}
	return &Layout{Stall: 30 * time.Second, dir: filepath.Clean(dir), plain: openPlain, absent: make(map[fleet.Digest]time.Time)}, nil
}

// Name is what logs and metrics call the layout.
func (l *Layout) Name() string { return "store " + l.dir }

// Kind says that these bytes come from nearby.
func (l *Layout) Kind() cache.Kind { return cache.KindStore }

// Has reports that a piece is there unless it was looked for in vain a short while ago,
// or the directory does not answer: asking would be asking over a network.
func (l *Layout) Has(w cache.Want) (wire int64, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if time.Now().Before(l.down) {
		return 0, false
	}
	for _, b := range blobs(w.Chunk) {
		if at, missing := l.absent[b.Digest]; missing && time.Since(at) < forgetAbsent {
			return 0, false
		}
	}
	return w.Chunk.BlobSize, true
}

// blobs is what a chunk is stored as.
func blobs(c image.Chunk) []image.Blob {
	if c.Legacy() {
		return c.Parts
	}
	return []image.Blob{{Digest: c.Blob, Size: c.BlobSize, MediaType: c.MediaType}}
}

// Manifest reads a manifest; see cache.Source. Blobs are known by digest only, so ref
// does not matter.
func (l *Layout) Manifest(ctx context.Context, _ string, d fleet.Digest) ([]byte, error) {
	path, err := l.blob(d)
	if err != nil {
		return nil, err
	}
	var raw []byte
	err = l.do(ctx, func() (err error) {
		raw, err = l.readFile(path, image.MaxManifestBytes)
		return err
	})
	if err != nil {
		return nil, l.failed(ctx, d, fmt.Errorf("reading the manifest: %w", err))
	}
	if got := image.DigestOf(raw); got != d {
		return nil, &cache.Error{Class: cache.ClassDigest, Err: fmt.Errorf("%s: the manifest there has digest %s; remove the file, and push the image again", path, got)}
	}
	return raw, nil
}

// Open opens a blob from a byte on; see cache.Source.
func (l *Layout) Open(ctx context.Context, w cache.Want, from int64) (io.ReadCloser, error) {
	return cache.OpenParts(blobs(w.Chunk), from, func(b image.Blob, from int64) (io.ReadCloser, error) {
		return l.open(ctx, b, from)
	})
}

// open opens one blob of known size.
func (l *Layout) open(ctx context.Context, b image.Blob, from int64) (io.ReadCloser, error) {
	path, err := l.blob(b.Digest)
	if err != nil {
		return nil, err
	}
	r := &reader{layout: l, digest: b.Digest, left: b.Size - from, pieces: make(chan piece), quit: make(chan struct{}), ended: make(chan struct{})}
	err = l.do(ctx, func() (err error) {
		f, err := l.plain(path)
		if err != nil {
			return err
		}
		// Handed over by who opened it: a caller that gave up has no use for it.
		defer func() {
			if err != nil {
				_ = f.Close()
			}
		}()
		info, err := f.Stat()
		if err != nil {
			return err
		}
		if info.Size() != b.Size {
			return &cache.Error{Class: cache.ClassDigest, Err: fmt.Errorf("truncated or wrong layer: %s has %d bytes, the manifest says %d; remove it, and push the image again", path, info.Size(), b.Size)}
		}
		if _, err := f.Seek(from, io.SeekStart); err != nil {
			return err
		}
		go r.pump(f)
		return nil
	})
	if err != nil {
		close(r.quit) // a pump that begins after all ends at once
		return nil, l.failed(ctx, b.Digest, fmt.Errorf("opening a blob: %w", err))
	}
	return body{read: func(p []byte) (int, error) { return r.read(ctx, p) }, close: r.close}, nil
}

// blob is the path of a blob; a digest that is none leads nowhere.
func (l *Layout) blob(d fleet.Digest) (string, error) {
	if err := fleet.CheckDigest(d); err != nil {
		return "", &cache.Error{Class: cache.ClassFormat, Err: err}
	}
	return filepath.Join(l.dir, "blobs", "sha256", strings.TrimPrefix(string(d), "sha256:")), nil
}

// failed says what an error of reading means, and remembers what is not there.
func (l *Layout) failed(ctx context.Context, d fleet.Digest, err error) error {
	var known *cache.Error
	if errors.As(err, &known) || ctx.Err() != nil {
		return err
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return l.network(err)
	}
	marker := l.do(ctx, func() error {
		_, err := os.Stat(filepath.Join(l.dir, markerFile))
		return err
	})
	if marker != nil {
		return l.gone(marker)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.absent[d] = time.Now()
	return &cache.Error{Class: cache.ClassNotFound, Err: fmt.Errorf("the image layout %s has no %s", l.dir, d.Short())}
}

// network marks an error of the directory. If it says that the mount as a whole is of no
// use now, what comes soon goes to other sources; one bad file spoils no others.
func (l *Layout) network(err error) error {
	for _, mount := range []error{errHangs, syscall.ESTALE, syscall.ENOTCONN, syscall.ETIMEDOUT, syscall.EHOSTDOWN} {
		if errors.Is(err, mount) {
			l.rest()
		}
	}
	return &cache.Error{Class: cache.ClassNetwork, Err: fmt.Errorf("image layout %s: %w", l.dir, err)}
}

// gone is the error of a directory that is no layout, as a mount point without a mount is.
func (l *Layout) gone(err error) error {
	l.rest()
	return l.network(fmt.Errorf("%w; is it mounted, and an OCI image layout?", err))
}

// rest keeps the directory from being asked, for the time that asking in vain may take.
func (l *Layout) rest() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.down = time.Now().Add(l.Stall)
}
