package ocidir

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

const (
	// incoming is where files are written before they get their names; other tools
	// ignore it.
	incoming = ".incoming"
	lockFile = "index.lock"
	// abandoned is the age at which a file that nobody finished is removed.
	abandoned = 24 * time.Hour
	// lockEvery is the pause between two tries to get the index's lock, which is held for
	// some milliseconds.
	lockEvery = 20 * time.Millisecond
)

// Blob is one blob of an image that is written. It has the shape of tart.Layer.
type Blob struct {
	image.Blob
	Open func() (io.ReadCloser, error)
}

// Add writes an image: its blobs, those that are there already left alone, then its
// manifest, then its entry in the index under ref, whose place it takes. Each file is
// whole and on disk before it has its name, so that readers never see a part of one, and
// an Add that is broken off leaves nothing but blobs that the next one need not write.
// Several may write to one directory.
func (l *Layout) Add(ctx context.Context, ref string, manifest []byte, blobs []Blob) (fleet.Digest, error) {
	r, err := image.ParseReference(ref)
	if err != nil {
		return "", &cache.Error{Class: cache.ClassFormat, Err: err}
	}
	doc, err := image.ParseDocument(manifest)
	if err != nil {
		return "", &cache.Error{Class: cache.ClassFormat, Err: err}
	}
	if err := l.prepare(ctx); err != nil {
		return "", l.writing(ctx, err)
	}
	for _, b := range blobs {
		if err := l.put(ctx, b); err != nil {
			return "", l.writing(ctx, fmt.Errorf("writing blob %s: %w", b.Digest.Short(), err))
		}
	}
	if err := l.complete(ctx, doc); err != nil {
		return "", err
	}
	own := image.Descriptor{MediaType: image.MediaTypeManifest, Digest: doc.Digest, Size: int64(len(manifest))}
	if doc.MediaType != "" {
		own.MediaType = doc.MediaType
	}
	err = l.put(ctx, Blob{own.Blob(), func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(manifest)), nil }})
	if err != nil {
		return "", l.writing(ctx, fmt.Errorf("writing the manifest: %w", err))
	}
	if err := l.enter(ctx, r.String(), own); err != nil {
		return "", l.writing(ctx, fmt.Errorf("writing the index: %w", err))
	}
	return doc.Digest, nil
}

// Put writes a blob, unless it is there, for an Add that names it. So an image can come
// blob by blob, from several goroutines.
func (l *Layout) Put(ctx context.Context, b Blob) error {
	if err := l.prepare(ctx); err != nil {
		return l.writing(ctx, err)
	}
	if err := l.put(ctx, b); err != nil {
		return l.writing(ctx, fmt.Errorf("writing blob %s: %w", b.Digest.Short(), err))
	}
	return nil
}

// prepare makes the directories and the marker, and removes what was abandoned.
func (l *Layout) prepare(ctx context.Context) error {
	return l.do(ctx, func() error {
		for _, dir := range []string{filepath.Join("blobs", "sha256"), incoming} {
			// 0755: the nodes that read are other users.
			if err := os.MkdirAll(filepath.Join(l.dir, dir), 0o755); err != nil {
				return err
			}
		}
		entries, err := os.ReadDir(filepath.Join(l.dir, incoming))
		if err != nil {
			return err
		}
		for _, e := range entries {
			if info, err := e.Info(); err == nil && time.Since(info.ModTime()) > abandoned {
				_ = os.Remove(filepath.Join(l.dir, incoming, e.Name())) // the next Add tries again
			}
		}
		if _, err := os.Stat(filepath.Join(l.dir, markerFile)); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return l.replace(markerFile, []byte(marker))
	})
}

// put writes a blob, unless it is there.
func (l *Layout) put(ctx context.Context, b Blob) error {
	path, err := l.blob(b.Digest)
	if err != nil {
		return err
	}
	there := false
	err = l.do(ctx, func() error {
		info, err := os.Stat(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		// One of another size was damaged by somebody else, and is replaced.
		there = err == nil && info.Size() == b.Size
		return err
	})
	if err != nil || there {
		return err
	}
	in, err := b.Open()
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }() // it was only read
	return l.receive(ctx, b.Blob, in, path)
}

// receive copies a blob to a file without a name, and gives it one if it is right.
func (l *Layout) receive(ctx context.Context, b image.Blob, in io.Reader, path string) (err error) {
	temporary := filepath.Join(l.dir, incoming, rand.Text())
	f, err := l.openFile(ctx, temporary, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = l.do(context.WithoutCancel(ctx), func() error { // else it is removed when it counts as abandoned
				_ = f.Close()
				return os.Remove(temporary)
			})
		}
	}()
	sum := sha256.New()
	n, err := io.CopyBuffer(writer(func(p []byte) (int, error) { return l.write(ctx, f, p) }), io.TeeReader(io.LimitReader(in, b.Size+1), sum), make([]byte, 1<<20))
	if err != nil {
		return err
	}
	if got := fleet.Digest("sha256:" + hex.EncodeToString(sum.Sum(nil))); n != b.Size || got != b.Digest {
		return &cache.Error{Class: cache.ClassDigest, Err: fmt.Errorf("%d bytes came with digest %s, want %d bytes with %s", n, got, b.Size, b.Digest)}
	}
	return l.do(ctx, func() error {
		if err := errors.Join(f.Sync(), f.Close()); err != nil {
			return err
		}
		if err := os.Rename(temporary, path); err != nil {
			return err
		}
		return syncDir(filepath.Dir(path))
	})
}

// complete refuses a manifest of which a blob is missing.
func (l *Layout) complete(ctx context.Context, doc *image.Document) error {
	for i, d := range append([]image.Descriptor{doc.Config}, doc.Layers...) {
		path, err := l.blob(d.Digest)
		if err != nil {
			return err
		}
		err = l.do(ctx, func() error {
			info, err := os.Stat(path)
			if err == nil && info.Size() != d.Size {
				err = fmt.Errorf("%s has %d bytes, the manifest says %d", path, info.Size(), d.Size)
			}
			return err
		})
		if errors.Is(err, fs.ErrNotExist) {
			return &cache.Error{Class: cache.ClassNotFound, Err: fmt.Errorf("the manifest names blob %s (%d of %d), which is neither in the image layout %s nor among those to write", d.Digest, i, len(doc.Layers)+1, l.dir)}
		}
		if err != nil {
			return l.writing(ctx, err)
		}
	}
	return nil
}

// enter writes an entry of the index, under the lock of all who write.
func (l *Layout) enter(ctx context.Context, ref string, d image.Descriptor) error {
	unlock, err := l.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	return l.do(ctx, func() error {
		raw, err := l.readFile(filepath.Join(l.dir, indexFile), maxIndexBytes)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		x, err := parseIndex(raw)
		if err != nil {
			return &cache.Error{Class: cache.ClassFormat, Err: err}
		}
		if err := x.put(ref, d); err != nil {
			return err
		}
		if raw, err = x.marshal(); err != nil {
			return err
		}
		return l.replace(indexFile, raw)
	})
}

// lock takes the lock of the index, waiting for it as long as a stall. It ends with the
// process, whatever becomes of it.
func (l *Layout) lock(ctx context.Context) (unlock func(), err error) {
	f, err := l.openFile(ctx, filepath.Join(l.dir, lockFile), os.O_RDWR|os.O_CREATE, 0o666)
	if err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(l.Stall); ; {
		err := l.do(ctx, func() error { return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) })
		if err == nil {
			return func() {
				// It waits for nothing but the mount; that the lock goes is all that counts.
				_ = l.do(context.WithoutCancel(ctx), f.Close)
			}, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) || time.Now().After(deadline) {
			_ = f.Close()
			return nil, fmt.Errorf("locking %s: %w", lockFile, err)
		}
		timer := time.NewTimer(lockEvery)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			_ = f.Close()
			return nil, ctx.Err()
		}
	}
}

// writing says what an error of writing means.
func (l *Layout) writing(ctx context.Context, err error) error {
	var known *cache.Error
	switch {
	case errors.As(err, &known), ctx.Err() != nil:
		return err
	case errors.Is(err, errHangs):
		return l.network(err)
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		err = fmt.Errorf("%w; make room there: what was written is kept", err)
	}
	return &cache.Error{Class: cache.ClassDisk, Err: fmt.Errorf("image layout %s: %w", l.dir, err)}
}

// replace writes a small file of the layout in one step.
func (l *Layout) replace(name string, data []byte) error {
	temporary := filepath.Join(l.dir, incoming, rand.Text())
	f, err := os.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(temporary, filepath.Join(l.dir, name))
	}
	if err != nil {
		_ = os.Remove(temporary) // else it is removed when it counts as abandoned
		return err
	}
	return syncDir(l.dir)
}
