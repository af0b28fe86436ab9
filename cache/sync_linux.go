package cache

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// datasync waits until a file's data is on disk, and what is needed to read it back.
func datasync(f *os.File) error {
	for {
		err := unix.Fdatasync(int(f.Fd()))
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EINTR) {
			return &os.PathError{Op: "fdatasync", Path: f.Name(), Err: err}
		}
	}
}

// preallocate asks for room of n bytes from an offset, without a change of the file's size.
// Where that cannot be had, it is merely not there when the disk is full.
func preallocate(f *os.File, offset, n int64) {
	_ = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, offset, n)
}
