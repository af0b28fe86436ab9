package ocidir

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// readSize is how much is read at a time; each reader has two such buffers, so that one
// is filled while the other is decoded.
const readSize = 256 << 10

// piece is what one read of a file gave.
type piece struct {
	data []byte
	err  error
}

// reader reads a file that another goroutine, which may hang, reads for it.
type reader struct {
	layout *Layout
	digest fleet.Digest
	left   int64 // bytes not delivered yet
	pieces chan piece
	quit   chan struct{} // closed by Close
	ended  chan struct{} // closed by pump

	now  piece // what is being delivered
	err  error // that ended it
	shut bool
}

// pump reads ahead until the end, an error or Close, and closes the file.
func (r *reader) pump(f *os.File) {
	defer close(r.ended)
	defer func() { _ = f.Close() }() // it was only read
	var buffers [2][]byte
	for i := 0; ; i = 1 - i {
		if buffers[i] == nil {
			buffers[i] = make([]byte, readSize)
		}
		n, err := f.Read(buffers[i])
		select {
		// The other buffer is the reader's until it takes this one.
		case r.pieces <- piece{buffers[i][:n], err}:
		case <-r.quit:
			return
		}
		if err != nil {
			return
		}
	}
}

// read delivers bytes, waiting for the file no longer than a stall.
func (r *reader) read(ctx context.Context, p []byte) (int, error) {
	for len(r.now.data) == 0 && r.err == nil {
		switch {
		case r.left == 0:
			r.err = io.EOF
		case errors.Is(r.now.err, io.EOF):
			r.err = r.layout.network(fmt.Errorf("blob %s became shorter: %d bytes are missing", r.digest.Short(), r.left))
		case r.now.err != nil:
			r.err = r.layout.network(fmt.Errorf("reading blob %s: %w", r.digest.Short(), r.now.err))
		default:
			r.err = r.await(ctx)
		}
	}
	if r.err != nil {
		return 0, r.err
	}
	n := copy(p, r.now.data[:min(int64(len(r.now.data)), r.left)])
	r.now.data = r.now.data[n:]
	if r.left -= int64(n); r.left == 0 {
		r.now.data = nil // the file has grown since it was opened
	}
	return n, nil
}

// await takes the next piece.
func (r *reader) await(ctx context.Context) error {
	timer := time.NewTimer(r.layout.Stall)
	defer timer.Stop()
	select {
	case r.now = <-r.pieces:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		r.layout.lost(r.ended)
		return r.layout.network(fmt.Errorf("%w: no byte of blob %s for %s", errHangs, r.digest.Short(), r.layout.Stall))
	}
}

func (r *reader) close() {
	if !r.shut {
		r.shut, r.err = true, os.ErrClosed
		close(r.quit)
	}
}

// body is a reader with the functions that know its context.
type body struct {
	read  func([]byte) (int, error)
	close func()
}

func (b body) Read(p []byte) (int, error) { return b.read(p) }
func (b body) Close() error               { b.close(); return nil }
