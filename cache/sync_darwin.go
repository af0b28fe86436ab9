package cache

import (
	"os"

	"golang.org/x/sys/unix"
)

// datasync waits until a file's data is on disk. Sync is F_FULLFSYNC: a plain fsync leaves
// it in the drive's cache.
func datasync(f *os.File) error { return f.Sync() }

// preallocate asks for room of n bytes at the end of a file, without a change of its size.
// Where that cannot be had, it is merely not there when the disk is full.
func preallocate(f *os.File, _, n int64) {
	_ = unix.FcntlFstore(f.Fd(), unix.F_PREALLOCATE, &unix.Fstore_t{
		Flags: unix.F_ALLOCATEALL, Posmode: unix.F_PEOFPOSMODE, Length: n,
	})
}
