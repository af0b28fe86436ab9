package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/paddock-ci/paddock/fleet"
)

// ErrNotLeased: a clone needs a lease, or the image might be evicted under it.
var ErrNotLeased = errors.New("the image is not leased; take a lease for as long as its clones live")

// Clone makes dir, which must not exist, with disk.img, nvram.bin and config.json of a
// leased image, for a VM to write to. Where the file system can, the clone shares the
// image's blocks; else only what is not a hole is copied. A disk smaller than grow
// bytes is enlarged to that by a hole; 0: it is left as it is. After an error, dir is
// gone again.
func (s *Store) Clone(ctx context.Context, d fleet.Digest, dir string, grow int64) (err error) {
	if err := s.checkLeased(d); err != nil {
		return fmt.Errorf("cloning image %s: %w", d.Short(), err)
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("cloning image %s: %w", d.Short(), err)
		}
	}()
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}()
	source := s.dir.image(d)
	for _, name := range []string{configFile, nvramFile, diskFile} {
		if err := CloneFile(ctx, filepath.Join(source, name), filepath.Join(dir, name)); err != nil {
			return diskError(err)
		}
	}
	return diskError(enlarge(filepath.Join(dir, diskFile), grow))
}

func (s *Store) checkLeased(d fleet.Digest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch e := s.images[d]; {
	case e == nil || e.State != fleet.ImageReady:
		return ErrNotReady
	case len(e.leases) == 0:
		return ErrNotLeased
	}
	return nil
}

// enlarge makes a disk at least size bytes long.
func enlarge(path string, size int64) error {
	info, err := os.Stat(path)
	if err != nil || info.Size() >= size {
		return err
	}
	return os.Truncate(path, size)
}

// CloneFile makes dst, which must not exist, a writable copy of the file src: sharing its
// blocks where the file system can, else copying what is not a hole.
func CloneFile(ctx context.Context, src, dst string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	shared, err := reflink(src, dst)
	if shared || err != nil {
		return err
	}
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }()
	out, err := os.OpenFile(dst, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if err := sparseCopy(ctx, out, in); err != nil {
		_ = out.Close()
		return err
	}
	return out.Close()
}

// CanShare reports whether files in dir can share their blocks, so that a clone costs
// nothing: it tries, with a file of its own.
func CanShare(dir string) (ok bool, err error) {
	src, err := os.CreateTemp(dir, ".share-*")
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, os.Remove(src.Name())) }()
	_, err = src.Write(make([]byte, 1<<16))
	if err := errors.Join(err, src.Close()); err != nil {
		return false, err
	}
	dst := src.Name() + ".clone"
	ok, err = reflink(src.Name(), dst)
	if ok {
		err = errors.Join(err, os.Remove(dst))
	}
	return ok, err
}

// unsupported reports whether a file system merely cannot do what was asked of it.
func unsupported(err error) bool {
	for _, errno := range []unix.Errno{unix.ENOTSUP, unix.EOPNOTSUPP, unix.ENOSYS, unix.ENOTTY, unix.EINVAL, unix.EXDEV, unix.EPERM} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

// sparseCopy copies the data of in to out and leaves holes where in has them; out is
// empty.
func sparseCopy(ctx context.Context, out, in *os.File) error {
	info, err := in.Stat()
	if err != nil {
		return err
	}
	size := info.Size()
	if err := out.Truncate(size); err != nil {
		return err
	}
	for at := int64(0); at < size; {
		// The values of SEEK_DATA and SEEK_HOLE are swapped between Linux and macOS:
		// only the named constants are right.
		data, err := in.Seek(at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil // nothing but a hole to the end
		}
		if unsupported(err) {
			return copyNonZero(ctx, out, in, at, size)
		}
		if err != nil {
			return err
		}
		end, err := in.Seek(data, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		if err := copyRange(ctx, out, in, data, end); err != nil {
			return err
		}
		at = end
	}
	return nil
}

// copyPiece is how much is copied before the context is asked again.
const copyPiece = 16 << 20

// copyRange copies bytes [from, to); the kernel does it without us, where it can.
func copyRange(ctx context.Context, out, in *os.File, from, to int64) error {
	if _, err := in.Seek(from, io.SeekStart); err != nil {
		return err
	}
	if _, err := out.Seek(from, io.SeekStart); err != nil {
		return err
	}
	for from < to {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := io.CopyN(out, in, min(to-from, copyPiece))
		if err != nil {
			return err
		}
		from += n
	}
	return nil
}

// copyNonZero copies [from, to) where holes cannot be asked for: it reads all, and
// writes what is not zero.
func copyNonZero(ctx context.Context, out, in *os.File, from, to int64) error {
	piece := make([]byte, 1<<20)
	w := &sparseWriter{file: out, offsets: []int64{from}, clean: true}
	for at := from; at < to; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := in.ReadAt(piece[:min(to-at, int64(len(piece)))], at)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if n == 0 {
			return io.ErrUnexpectedEOF // the source shrank, which no image does
		}
		if _, err := w.Write(piece[:n]); err != nil {
			return err
		}
		at += int64(n)
	}
	return nil
}
