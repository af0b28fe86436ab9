package cache

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// reflink makes dst share the blocks of src (btrfs, xfs, bcachefs). false: this file
// system cannot, and there is no dst.
func reflink(src, dst string) (bool, error) {
	in, err := os.Open(src)
	if err != nil {
		return false, err
	}
	defer func() { _ = in.Close() }()
	return reflinkFrom(in, dst)
}

// reflinkFrom is reflink of an open file.
func reflinkFrom(in *os.File, dst string) (bool, error) {
	out, err := os.OpenFile(dst, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return false, err
	}
	err = unix.IoctlFileClone(int(out.Fd()), int(in.Fd()))
	if cerr := out.Close(); err == nil && cerr != nil {
		return false, cerr
	}
	if err == nil {
		return true, nil
	}
	if rerr := os.Remove(dst); rerr != nil {
		return false, errors.Join(err, rerr)
	}
	if unsupported(err) {
		return false, nil
	}
	return false, os.NewSyscallError("ficlone", err)
}

// punch makes holes of the regions; false: the file system cannot, and they hold what
// they held.
func punch(f *os.File, offsets []int64, size int64) bool {
	for _, offset := range offsets {
		mode := uint32(unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE)
		if err := unix.Fallocate(int(f.Fd()), mode, offset, size); err != nil {
			return false
		}
	}
	return true
}

// reflinkRange makes size bytes of dst at to share the blocks of src at from. false: this
// file system cannot, or not at these places, and dst may have been changed there.
func reflinkRange(dst, src *os.File, from, to, size int64) (bool, error) {
	err := unix.IoctlFileCloneRange(int(dst.Fd()), &unix.FileCloneRange{
		Src_fd: int64(src.Fd()), Src_offset: uint64(from), Src_length: uint64(size), Dest_offset: uint64(to),
	})
	switch {
	case err == nil:
		return true, nil
	case unsupported(err):
		return false, nil
	default:
		return false, os.NewSyscallError("ficlonerange", err)
	}
}
