package cache

import (
	"errors"
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

// punch makes holes of the regions; false: the file system cannot, and they hold what
// they held, or zeros.
func punch(f *os.File, offsets []int64, size int64) bool {
	for _, offset := range offsets {
		if !punchOne(f, offset, offset+size) {
			return false
		}
	}
	return true
}

// punchOne makes a hole of [from, to). APFS takes whole blocks only; what is left of a
// block at an end is overwritten with zeros.
func punchOne(f *os.File, from, to int64) bool {
	first, last := (from+hole-1)/hole*hole, to/hole*hole
	if first >= last {
		_, err := f.WriteAt(zeros[:to-from], from) // less than two blocks
		return err == nil
	}
	if _, err := f.WriteAt(zeros[:first-from], from); err != nil {
		return false
	}
	if _, err := f.WriteAt(zeros[:to-last], last); err != nil {
		return false
	}
	// struct fpunchhole (flags, reserved, offset, length) is how struct fstore begins.
	region := unix.Fstore_t{Offset: first, Length: last - first}
	if err := unix.FcntlFstore(f.Fd(), unix.F_PUNCHHOLE, &region); err != nil {
		return false
	}
	// What is written into a hole leaves zeros out, so it had better be one.
	data, err := f.Seek(first, unix.SEEK_DATA)
	return errors.Is(err, unix.ENXIO) || err == nil && data >= last
}

// reflinkRange would share blocks of two files; APFS clones whole files only.
func reflinkRange(_, _ *os.File, _, _, _ int64) (bool, error) { return false, nil }
