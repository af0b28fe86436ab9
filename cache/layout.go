package cache

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/paddock-ci/paddock/fleet"
)

// Names of files in an image's directory; the first three are in clones too.
const (
	diskFile     = "disk.img"
	nvramFile    = "nvram.bin"
	configFile   = "config.json"
	manifestFile = "manifest.json"
	metaFile     = "image.json"
	journalFile  = "journal"

	lockFile = "lock" // of the store

	tempSuffix = ".new" // of a file that is to replace another by a rename
)

// layout is a store's directory; the package comment draws it. Digests have been
// checked before they get here, so that none of these paths leaves the directory.
type layout string

func (l layout) image(d fleet.Digest) string   { return l.of("images", d) }
func (l layout) partial(d fleet.Digest) string { return l.of("partial", d) }
func (l layout) leases(d fleet.Digest) string  { return l.of("leases", d) }

func (l layout) of(kind string, d fleet.Digest) string {
	return filepath.Join(string(l), kind, strings.TrimPrefix(string(d), "sha256:"))
}

// lease is the file of one lease. Holders are escaped, so that any name is a file.
func (l layout) lease(d fleet.Digest, holder string) string {
	return filepath.Join(l.leases(d), "h-"+url.PathEscape(holder))
}

// holder is the inverse of lease, for a file's name.
func holder(name string) (string, bool) {
	escaped, ok := strings.CutPrefix(name, "h-")
	h, err := url.PathUnescape(escaped)
	return h, ok && err == nil
}

// trash is a new name in the trash.
func (l layout) trash(name string) string {
	return filepath.Join(string(l), "trash", name+"."+rand.Text())
}

// kinds are the store's directories.
var kinds = []string{"images", "partial", "leases", "trash"}

// make makes the directories.
func (l layout) make() error {
	for _, kind := range kinds {
		// 0700: images may hold an organization's secrets, and guests' disks do.
		if err := os.MkdirAll(filepath.Join(string(l), kind), 0o700); err != nil {
			return err
		}
	}
	return nil
}

// lock takes the store for this process, until the file is closed or the process ends.
func (l layout) lock() (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(string(l), lockFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("locking the image store: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		defer func() { _ = f.Close() }()
		if errors.Is(err, unix.EWOULDBLOCK) {
			pid, _ := io.ReadAll(io.LimitReader(f, 20)) // only for people
			return nil, fmt.Errorf("%s: %w (process %s); stop that one, or give this one a store of its own", l, ErrInUse, strings.TrimSpace(string(pid)))
		}
		return nil, fmt.Errorf("locking the image store %s: %w", l, err)
	}
	if err := f.Truncate(0); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("locking the image store: %w", err)
	}
	_, _ = fmt.Fprintf(f, "%d\n", os.Getpid()) // only for people
	return f, nil
}

// discard takes a directory out of the way by one rename, and then removes it.
func (l layout) discard(path string) error {
	if _, err := os.Lstat(path); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	trash := l.trash(filepath.Base(path))
	if err := os.Rename(path, trash); err != nil {
		return err
	}
	if err := syncDir(filepath.Dir(path)); err != nil {
		return err
	}
	return os.RemoveAll(trash)
}

// publish moves a complete partial image to the ready ones. Its files are on disk.
func (l layout) publish(d fleet.Digest) error {
	if err := syncDir(l.partial(d)); err != nil {
		return err
	}
	if err := os.Rename(l.partial(d), l.image(d)); err != nil {
		return err
	}
	if err := syncDir(filepath.Join(string(l), "images")); err != nil {
		return err
	}
	return syncDir(filepath.Join(string(l), "partial"))
}

// writeFile writes a whole file and waits until it is on disk.
func writeFile(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	if _, err := f.Write(data); err != nil {
		_ = f.Close()
		return err
	}
	if err := f.Sync(); err != nil {
		_ = f.Close()
		return err
	}
	return f.Close()
}

// syncDir waits until the names in a directory are on disk.
func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = d.Close() }()
	return d.Sync()
}

// allocated is what the files in a directory occupy on disk, in bytes: holes count
// nothing, and a clone counts in full although it shares its blocks.
func allocated(dir string) (int64, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0, err
	}
	var sum int64
	for _, e := range entries {
		var stat unix.Stat_t
		if err := unix.Lstat(filepath.Join(dir, e.Name()), &stat); err != nil {
			return 0, fmt.Errorf("asking for the size of %s: %w", e.Name(), err)
		}
		sum += stat.Blocks * 512 // POSIX: in units of 512 bytes, whatever the block size
	}
	return sum, nil
}
