package tart

import (
	"encoding/binary"
	"fmt"
	"io"

	"github.com/pierrec/lz4/v4"
)

// Encode reads r to its end and writes it to w as one Apple-LZ4 stream of independent
// 64 KiB blocks; a block that does not shrink is stored. It returns the bytes read. The
// output differs from Apple's encoder, and decodes to the same; equal input gives equal
// output.
func Encode(w io.Writer, r io.Reader) (int64, error) {
	e := newEncoder(r)
	for {
		block, err := e.next()
		if err == io.EOF { //nolint:errorlint // the encoder's own end
			return e.total, nil
		}
		if err != nil {
			return e.total, err
		}
		if _, err := w.Write(block); err != nil {
			return e.total, err
		}
	}
}

// encoder makes one stream, a block at a time.
type encoder struct {
	r          io.Reader
	compressor lz4.Compressor
	plain      []byte
	block      []byte // room for the longest header before the encoded bytes
	total      int64  // bytes read
	last, over bool   // the input has ended; the end marker was given
}

func newEncoder(r io.Reader) *encoder {
	return &encoder{r: r, plain: make([]byte, window), block: make([]byte, 12+lz4.CompressBlockBound(window))}
}

// next returns the next block with its header, valid until the next call, then the end
// marker, then io.EOF.
func (e *encoder) next() ([]byte, error) {
	if e.last {
		return e.end()
	}
	n, err := fill(e.r, e.plain)
	e.last = err == io.EOF //nolint:errorlint // as fill says it
	if err != nil && !e.last {
		return nil, err
	}
	if n == 0 {
		return e.end()
	}
	e.total += int64(n)
	encoded, err := e.compressor.CompressBlock(e.plain[:n], e.block[12:])
	if err != nil {
		return nil, fmt.Errorf("compressing 64 KiB: %w", err)
	}
	return frame(e.block, e.plain[:n], encoded), nil
}

func (e *encoder) end() ([]byte, error) {
	if e.over {
		return nil, io.EOF
	}
	e.over = true
	return []byte(magicEnd), nil
}

// frame puts the header before the encoded bytes that lie at block[12:], or the plain
// bytes if those are not fewer. encoded is 0 for incompressible data.
func frame(block, plain []byte, encoded int) []byte {
	if encoded == 0 || encoded >= len(plain) {
		copy(block, magicStored)
		binary.LittleEndian.PutUint32(block[4:], uint32(len(plain)))
		return append(block[:8], plain...)
	}
	copy(block, magicLZ4)
	binary.LittleEndian.PutUint32(block[4:], uint32(len(plain)))
	binary.LittleEndian.PutUint32(block[8:], uint32(encoded))
	return block[:12+encoded]
}
