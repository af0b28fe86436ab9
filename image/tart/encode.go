package tart

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/pierrec/lz4/v4"
)

// Encode reads r to its end and writes it to w as one Apple-LZ4 stream of independent
// 64 KiB blocks; a block that does not shrink is stored. It returns the bytes read. The
// output differs from Apple's encoder, and decodes to the same.
func Encode(w io.Writer, r io.Reader) (int64, error) {
	var (
		compressor lz4.Compressor
		plain      = make([]byte, window)
		// Room for the longest header, so that a block is one write.
		block = make([]byte, 12+lz4.CompressBlockBound(window))
		total int64
	)
	for {
		n, err := io.ReadFull(r, plain)
		if n > 0 {
			total += int64(n)
			encoded, lerr := compressor.CompressBlock(plain[:n], block[12:])
			if lerr != nil {
				return total, fmt.Errorf("compressing 64 KiB: %w", lerr)
			}
			if _, werr := w.Write(frame(block, plain[:n], encoded)); werr != nil {
				return total, werr
			}
		}
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			_, werr := io.WriteString(w, magicEnd)
			return total, werr
		case err != nil:
			return total, err
		}
	}
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
