package cache

import (
	"os"

	"golang.org/x/sys/unix"
)

// reflink makes dst share the blocks of src (APFS). false: this file system cannot, and
// there is no dst.
func reflink(src, dst string) (bool, error) {
	return cloned(unix.Clonefile(src, dst, unix.CLONE_NOFOLLOW), src, dst)
}

// reflinkFrom is reflink of an open file.
func reflinkFrom(in *os.File, dst string) (bool, error) {
	return cloned(unix.Fclonefileat(int(in.Fd()), unix.AT_FDCWD, dst, 0), in.Name(), dst)
}

func cloned(err error, src, dst string) (bool, error) {
	switch {
	case err == nil:
		// The clone has the mode and the times of the image.
		return true, os.Chmod(dst, 0o600)
	case unsupported(err):
		return false, nil
	default:
		return false, &os.LinkError{Op: "clonefile", Old: src, New: dst, Err: err}
	}
}

// punch would make holes of the regions; APFS wants whole blocks for that, which chunks
// need not be. They are overwritten in full instead, zeros too.
func punch(_ *os.File, _ []int64, _ int64) bool { return false }

// reflinkRange would share blocks of two files; APFS clones whole files only.
func reflinkRange(_, _ *os.File, _, _, _ int64) (bool, error) { return false, nil }
