package tart

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/pierrec/lz4/v4"

	"github.com/paddock-ci/paddock/image"
)

// Apple's LZ4 framing, which is not the standard LZ4 frame:
//
//	"bv41" u32le decoded  u32le encoded  <encoded bytes: a raw LZ4 block>
//	"bv4-" u32le size                    <size bytes as they are>
//	"bv4$"                               end; nothing may follow
//
// A block may refer back into the 65,536 decoded bytes before it.
const (
	magicLZ4    = "bv41"
	magicStored = "bv4-"
	magicEnd    = "bv4$"

	// window is how far a block may refer back, by the LZ4 format.
	window = 64 << 10
	// maxBlock caps what one block may decode to, and so the memory of a decoder.
	// Apple emits 64 KiB; other writers may use more.
	maxBlock = 1 << 20
	// maxEncoded caps an encoded block: maxBlock that did not shrink, and room for
	// LZ4's own overhead of one byte in 255.
	maxEncoded = maxBlock + maxBlock/128
)

// What can be wrong with a stream; each comes inside a *DecodeError.
var (
	ErrMagic     = errors.New("no Apple-LZ4 block begins here")
	ErrBlockSize = errors.New("block size out of bounds")
	ErrCorrupt   = errors.New("corrupt LZ4 block")
	ErrTooLong   = errors.New("stream holds more than the layer's uncompressed size")
	ErrTooShort  = errors.New("stream holds less than the layer's uncompressed size")
	ErrTruncated = errors.New("stream ends in the middle")
	ErrTrailing  = errors.New("bytes follow the end of the stream")
)

// ErrMark: a mark that no stream of this size has, or one without its window.
var ErrMark = errors.New("no place in this stream")

// DecodeError says where a stream is bad: Offset in the compressed bytes (the start of
// the block), Out in the decoded ones.
type DecodeError struct {
	Offset, Out int64
	Err         error
}

func (e *DecodeError) Error() string {
	return fmt.Sprintf("at compressed offset %d (decoded offset %d): %v", e.Offset, e.Out, e.Err)
}

func (e *DecodeError) Unwrap() error { return e.Err }

// decoder is the state of one stream. Its memory is a block in, two blocks out and a
// window at most: the previous block is the next one's window, so that blocks of 64 KiB
// are decoded without a copy.
type decoder struct {
	r io.Reader

	in, out int64 // bytes consumed and produced before the current block
	read    int64 // bytes consumed of the current block
	left    int64 // decoded bytes still to come
	ended   error // what Next said last, once it is not a block

	header  [12]byte
	encoded []byte
	decoded []byte
	buffers [2][]byte // decoded lies in buffers[turn], a window may lie in the other
	turn    int
	window  []byte // the last decoded bytes, at most 64 KiB
	joined  []byte // what window lies in after a block shorter than it
}

// newDecoder begins a stream of size decoded bytes at a mark.
func newDecoder(r io.Reader, size int64, at image.Mark) (*decoder, error) {
	// Every block has bytes on both sides, so either both are 0 or none.
	if at.In < 0 || at.Out < 0 || at.Out > size || (at.In == 0) != (at.Out == 0) {
		return nil, fmt.Errorf("%w: compressed offset %d, decoded offset %d of %d", ErrMark, at.In, at.Out, size)
	}
	if want := min(at.Out, window); int64(len(at.Window)) != want {
		return nil, fmt.Errorf("%w: a window of %d bytes at decoded offset %d, want %d", ErrMark, len(at.Window), at.Out, want)
	}
	d := &decoder{r: r, in: at.In, out: at.Out, left: size - at.Out}
	if at.Out > 0 {
		d.joined = make([]byte, window)
		d.window = d.joined[:copy(d.joined, at.Window)]
	}
	return d, nil
}

// Next implements image.Decoder. Errors of the reader, other than its end, are returned as
// they are.
func (d *decoder) Next() ([]byte, error) {
	if d.ended != nil {
		return nil, d.ended
	}
	end, err := d.block()
	if err == nil && end {
		if err = d.finish(); err == nil {
			d.ended = io.EOF
			return nil, io.EOF
		}
	}
	if err != nil {
		d.ended = d.locate(err)
		return nil, d.ended
	}
	return d.decoded, nil
}

// Mark implements image.Decoder.
func (d *decoder) Mark() image.Mark { return image.Mark{In: d.in, Out: d.out} }

// damage marks an error as the stream's, to be told from the reader's.
type damage struct{ error }

func (d damage) Unwrap() error { return d.error }

// locate puts the offsets to an error of the stream.
func (d *decoder) locate(err error) error {
	if bad := (damage{}); errors.As(err, &bad) {
		return &DecodeError{Offset: d.in, Out: d.out, Err: bad.error}
	}
	return err
}

func bad(err error, format string, args ...any) error {
	return damage{fmt.Errorf("%w: %s", err, fmt.Sprintf(format, args...))}
}

// block decodes the next block; end is true at the end marker.
func (d *decoder) block() (end bool, err error) {
	d.read = 0
	header := d.header[:]
	if err := d.fill(header[:4]); err != nil {
		return false, err
	}
	switch string(header[:4]) {
	case magicEnd:
		return true, nil
	case magicStored:
		if err := d.fill(header[4:8]); err != nil {
			return false, err
		}
		err = d.stored(binary.LittleEndian.Uint32(header[4:8]))
	case magicLZ4:
		if err := d.fill(header[4:12]); err != nil {
			return false, err
		}
		err = d.compressed(binary.LittleEndian.Uint32(header[4:8]), binary.LittleEndian.Uint32(header[8:12]))
	default:
		return false, bad(ErrMagic, "found %q", header[:4])
	}
	return false, err
}

// stored passes a block through.
func (d *decoder) stored(size uint32) error {
	if err := d.admit(size); err != nil {
		return err
	}
	d.grow(int(size))
	if err := d.fill(d.decoded); err != nil {
		return err
	}
	d.emit()
	return nil
}

// compressed decodes an LZ4 block with the window before it.
func (d *decoder) compressed(decoded, encoded uint32) error {
	if err := d.admit(decoded); err != nil {
		return err
	}
	if encoded == 0 || encoded > maxEncoded {
		return bad(ErrBlockSize, "%d encoded bytes, want 1 to %d", encoded, maxEncoded)
	}
	if cap(d.encoded) < int(encoded) {
		d.encoded = make([]byte, max(int(encoded), window+window/128))
	}
	d.encoded = d.encoded[:encoded]
	if err := d.fill(d.encoded); err != nil {
		return err
	}
	d.grow(int(decoded))
	n, err := lz4.UncompressBlockWithDict(d.encoded, d.decoded, d.window)
	if err != nil {
		return bad(ErrCorrupt, "%v", err)
	}
	if n != int(decoded) {
		return bad(ErrCorrupt, "it decodes to %d bytes, its header says %d", n, decoded)
	}
	d.emit()
	return nil
}

// admit checks a block's decoded size before anything is allocated for it.
func (d *decoder) admit(size uint32) error {
	if size == 0 || size > maxBlock {
		return bad(ErrBlockSize, "%d decoded bytes, want 1 to %d", size, maxBlock)
	}
	if int64(size) > d.left {
		return bad(ErrTooLong, "a block of %d bytes where %d are left", size, d.left)
	}
	return nil
}

// grow makes d.decoded n bytes long, in the buffer that the window does not use.
func (d *decoder) grow(n int) {
	if cap(d.buffers[d.turn]) < n {
		d.buffers[d.turn] = make([]byte, max(n, window))
	}
	d.decoded = d.buffers[d.turn][:n]
}

// emit moves behind the decoded block and makes it the window of the next.
func (d *decoder) emit() {
	n := len(d.decoded)
	d.in += d.read
	d.out += int64(n)
	d.left -= int64(n)
	if n >= window {
		d.window = d.decoded[n-window:]
		d.turn = 1 - d.turn
		return
	}
	// A short block (in practice only the last): the window spans two blocks, and is
	// put together in a buffer of its own, in place.
	if d.joined == nil {
		d.joined = make([]byte, window)
	}
	kept := copy(d.joined, d.window[max(0, len(d.window)+n-window):])
	d.window = d.joined[:kept+copy(d.joined[kept:], d.decoded)]
}

// finish checks that the stream ended where it should.
func (d *decoder) finish() error {
	d.in += d.read
	if d.left != 0 {
		return bad(ErrTooShort, "%d bytes are missing", d.left)
	}
	var one [1]byte
	switch _, err := fill(d.r, one[:]); err {
	case nil:
		return damage{ErrTrailing}
	case io.EOF: //nolint:errorlint // as fill says it
		return nil
	default:
		return err
	}
}

// fill reads all of b; the end of the input before that is damage.
func (d *decoder) fill(b []byte) error {
	n, err := fill(d.r, b)
	d.read += int64(n)
	if err == io.EOF { //nolint:errorlint // as fill says it
		return damage{ErrTruncated}
	}
	return err
}

// fill is io.ReadFull, except that the reader's end is io.EOF also in the middle of b: an
// io.ErrUnexpectedEOF is the reader's own, such as a connection that was cut.
func fill(r io.Reader, b []byte) (n int, err error) {
	for n < len(b) && err == nil {
		var m int
		m, err = r.Read(b[n:])
		n += m
	}
	if n == len(b) {
		return n, nil
	}
	return n, err
}
