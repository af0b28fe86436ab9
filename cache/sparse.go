package cache

import (
	"bytes"
	"errors"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// sparseWriter writes a chunk at all its offsets at once and leaves zeros out, where
// there are none but zeros before.
type sparseWriter struct {
	file    *os.File
	offsets []int64
	clean   bool  // the regions read as zeros
	at      int64 // in the chunk
}

const (
	// hole is the piece in which zeros are looked for: the block size of APFS, ext4 and xfs. A
	// lone one is left out, too: of what the benchmark's disk has these are a tenth, and the second
	// write that each makes of one costs no more than what it does not copy.
	hole = 4096
)

var zeros [64 << 10]byte

// Write implements io.Writer; its errors are of class disk.
func (w *sparseWriter) Write(b []byte) (int, error) {
	total := len(b)
	for len(b) > 0 {
		data, skip := len(b), 0
		if w.clean {
			data, skip = split(b, int((w.offsets[0]+w.at)%hole))
		}
		for _, offset := range w.offsets {
			if data == 0 {
				break
			}
			if _, err := w.file.WriteAt(b[:data], offset+w.at); err != nil {
				return total - len(b), diskError(err)
			}
		}
		w.at += int64(data + skip)
		b = b[data+skip:]
	}
	return total, nil
}

// split says how b begins: with data bytes to be written, and then skip zeros that are
// worth to be left out. b lies lead bytes behind the start of a block.
func split(b []byte, lead int) (data, skip int) {
	run := 0 // zeros before n
	for n := 0; n < len(b); {
		piece := b[n:min(n+hole-lead, len(b))]
		lead = 0
		if bytes.Equal(piece, zeros[:len(piece)]) {
			run += len(piece)
		} else {
			if run >= hole {
				return n - run, run
			}
			run = 0
		}
		n += len(piece)
	}
	if run >= hole || run == len(b) {
		return len(b) - run, run
	}
	return len(b), 0
}

// shifted are offsets moved on by n bytes.
func shifted(offsets []int64, n int64) []int64 {
	moved := make([]int64, len(offsets))
	for i, offset := range offsets {
		moved[i] = offset + n
	}
	return moved
}

// blank makes size bytes at offset read as zeros: as a hole where the file system can, else
// by writing zeros over what is there.
func blank(f *os.File, offset, size int64) error {
	if punch(f, []int64{offset}, size) {
		return nil
	}
	for at, end := offset, offset+size; at < end; {
		data, err := f.Seek(at, unix.SEEK_DATA)
		switch {
		case errors.Is(err, unix.ENXIO):
			return nil // nothing but a hole to the end
		case unsupported(err):
			data = at
		case err != nil:
			return err
		}
		at = max(data, at)
		n, err := f.WriteAt(zeros[:max(0, min(end-at, int64(len(zeros))))], at)
		if err != nil {
			return err
		}
		at += int64(n)
	}
	return nil
}

// before reads what a file has just before an offset: up to size bytes, but none from
// before floor.
func before(f io.ReaderAt, offset, floor, size int64) ([]byte, error) {
	b := make([]byte, min(size, offset-floor))
	if _, err := f.ReadAt(b, offset-int64(len(b))); err != nil {
		return nil, err
	}
	return b, nil
}
