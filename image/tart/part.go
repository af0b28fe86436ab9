package tart

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"hash"
	"io"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// holdBytes is the largest encoded chunk that is kept in memory from its hashing to its
// upload. A usual chunk of zeros has 2 MB; a full one is encoded again instead, which
// costs less than the network takes and no room on a disk.
const holdBytes = 4 << 20

// part is a chunk of a disk that becomes a layer.
type part struct {
	disk         Disk
	offset, size int64
}

// zero reports whether the part is known to be zeros, all of it.
func (p part) zero() bool {
	_, err := image.ZeroDigest(p.size) // fails for what would take too long to hash
	return err == nil && p.empty(0, p.size)
}

// empty reports whether the disk knows that n bytes of the part are zeros.
func (p part) empty(at, n int64) bool {
	sparse, ok := p.disk.(Sparse)
	return ok && sparse.Zero(p.offset+at, n)
}

// reader reads the part's bytes once, without those that are known to be zeros. It ends
// with ctx.
func (p part) reader(ctx context.Context) io.Reader {
	var at int64
	return readerFunc(func(b []byte) (int, error) {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		b = b[:min(int64(len(b)), p.size-at)]
		if len(b) == 0 {
			return 0, io.EOF
		}
		n, err := len(b), error(nil)
		if p.empty(at, int64(n)) {
			clear(b)
		} else if n, err = p.disk.ReadAt(b, p.offset+at); n == len(b) {
			err = nil // io.ReaderAt may say the end already
		} else if errors.Is(err, io.EOF) {
			err = errShort
		}
		at += int64(n)
		return n, err
	})
}

// errShort: the disk ended before its size.
var errShort = errors.New("the disk is shorter than it was when the image was begun")

// readerFunc is a function as an io.Reader.
type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(b []byte) (int, error) { return f(b) }

// digest hashes the part's bytes.
func (p part) digest(ctx context.Context) (fleet.Digest, error) {
	h := sha256.New()
	_, err := io.CopyBuffer(h, p.reader(ctx), make([]byte, 2*window))
	return sum(h), err
}

// encoded is what a part became.
type encoded struct {
	content, blob fleet.Digest
	size          int64  // bytes of the blob
	bytes         []byte // the blob; nil if it is larger than holdBytes
}

// encode encodes a part and hashes both sides of it.
func (p part) encode(ctx context.Context) (encoded, error) {
	content, blob, kept := sha256.New(), sha256.New(), &keeper{}
	if _, err := Encode(io.MultiWriter(blob, kept), io.TeeReader(p.reader(ctx), content)); err != nil {
		return encoded{}, err
	}
	e := encoded{content: sum(content), blob: sum(blob), size: kept.size}
	if kept.size <= holdBytes {
		e.bytes = kept.Bytes()
	}
	return e, nil
}

// again encodes a part once more, and fails at its end if that is not the blob it was.
func (p part) again(ctx context.Context, blob fleet.Digest) io.ReadCloser {
	h, e := sha256.New(), newEncoder(p.reader(ctx))
	var block []byte // of it, what has not been read yet
	return io.NopCloser(readerFunc(func(b []byte) (n int, err error) {
		if len(block) == 0 {
			if block, err = e.next(); err == io.EOF && sum(h) != blob { //nolint:errorlint // the encoder's own end
				err = errChanged
			}
			if err != nil {
				return 0, err
			}
			h.Write(block)
		}
		n = copy(b, block)
		block = block[n:]
		return n, nil
	}))
}

// keeper counts what is written to it, and keeps it as long as it is small.
type keeper struct {
	bytes.Buffer
	size int64
}

func (k *keeper) Write(b []byte) (int, error) {
	k.size += int64(len(b))
	if k.size > holdBytes {
		k.Buffer = bytes.Buffer{}
		return len(b), nil
	}
	return k.Buffer.Write(b)
}

// held opens bytes that are in memory.
func held(data []byte) func() (io.ReadCloser, error) {
	return func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }
}

func sum(h hash.Hash) fleet.Digest {
	return fleet.Digest("sha256:" + hex.EncodeToString(h.Sum(nil)))
}
