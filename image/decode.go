package image

import (
	"io"
)

// Mark is a place in a blob where its decoding can begin anew: a border of blocks.
type Mark struct {
	In, Out int64 // bytes of the blob before it, and of the content
	// Window is the content just before Out that the next block may refer to: 64 KiB, or
	// all there is if less.
	Window []byte
}

// Decoder decodes one blob, a block at a time. It reads no more than it consumes, so that
// what hashes the reader's bytes has hashed those before the mark. It is used by one
// goroutine.
type Decoder interface {
	// Next returns the content of the next block, at most 1 MiB, valid until the next
	// call. After the last block, when all of the content came and nothing follows it, it
	// fails with io.EOF; what is wrong with the blob is an error that says at which offset.
	Next() ([]byte, error)
	// Mark is the border behind the last Next that gave a block or io.EOF, without its
	// Window. All that was read of the blob is before In, unless Next failed.
	Mark() Mark
}

// Decode writes the content of c to w, reading its blob from r to the end. It writes at
// most c.Size bytes, and fails unless it wrote exactly that many.
func Decode(codec Codec, w io.Writer, r io.Reader, c Chunk) error {
	d, err := codec.NewDecoder(r, c, Mark{})
	if err != nil {
		return err
	}
	for {
		block, err := d.Next()
		if err == io.EOF { //nolint:errorlint // a reader's own error that wraps it is no end
			return nil
		}
		if err != nil {
			return err
		}
		if _, err := w.Write(block); err != nil {
			return err
		}
	}
}
