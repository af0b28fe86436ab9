package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/paddock-ci/paddock/placement"
	"github.com/paddock-ci/paddock/vm/helper"
)

// gigabyte for people, in bytes.
const gigabyte = 1e9

// directory is the node's as it is; false: with the finding that there is none yet.
func directory(s *Subject) (syscall.Stat_t, Finding, bool) {
	info, err := os.Stat(s.Node.Dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return syscall.Stat_t{}, skip("%s is not there yet: joining makes it", s.Node.Dir), false
	case err != nil:
		return syscall.Stat_t{}, skip("%v", err), false
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok || !info.IsDir() {
		return syscall.Stat_t{}, fail("move it away, or set node.dir", "%s is no directory", s.Node.Dir), false
	}
	return *stat, Finding{}, true
}

// checkDirectory: what the node keeps is its own alone, and images are on the file system
// of their clones, since blocks are not shared across two.
func checkDirectory(_ context.Context, s *Subject) Finding {
	stat, f, there := directory(s)
	if !there {
		return f
	}
	if int(stat.Uid) != s.Machine.UID {
		return fail(fmt.Sprintf("run as its owner, or: sudo chown -R %s '%s'", s.Machine.User, s.Node.Dir), "%s belongs to user %d", s.Node.Dir, stat.Uid)
	}
	if stat.Mode&0o077 != 0 {
		return fail(fmt.Sprintf("chmod 700 '%s'", s.Node.Dir), "%s is open to other users (mode %04o)", s.Node.Dir, stat.Mode&0o777)
	}
	var elsewhere []string
	for _, name := range []string{"images", "clones", "vms"} {
		info, err := os.Stat(filepath.Join(s.Node.Dir, name))
		if err != nil {
			continue // made when it is needed, and there
		}
		if part, ok := info.Sys().(*syscall.Stat_t); ok && part.Dev != stat.Dev {
			elsewhere = append(elsewhere, name)
		}
	}
	if len(elsewhere) > 0 {
		return warn("keep all of the node's directory on one file system; node.dir names it",
			"%s of %s lie on another file system: clones are copied", strings.Join(elsewhere, " and "), s.Node.Dir)
	}
	return found("%s is private, and on one file system", s.Node.Dir)
}

func checkClones(_ context.Context, s *Subject) Finding {
	if _, f, there := directory(s); !there {
		return f
	}
	switch shared, err := s.Machine.CanShare(s.Node.Dir); {
	case err != nil:
		return fail("make it writable, or set node.dir", "no file can be made in %s: %v", s.Node.Dir, err)
	case !shared:
		return warn("put node.dir on APFS (macOS), or on XFS or Btrfs (Linux)", "this file system shares no blocks: every VM's disk is copied")
	}
	return found("clones share their image's blocks")
}

// checkDisk uses placement's rule: below half of what clones may grow by, nothing new
// starts.
func checkDisk(_ context.Context, s *Subject) Finding {
	if _, f, there := directory(s); !there {
		return f
	}
	left, err := s.Machine.Free(s.Node.Dir)
	if err != nil {
		return skip("what is left on the disk is not known: %v", err)
	}
	growth := int64(0)
	for i := range s.Pools {
		growth = max(growth, int64(s.Pools[i].Growth))
	}
	if growth == 0 {
		growth = placement.DefaultGrowth
	}
	want := int64(s.Node.Slots) * growth
	text := fmt.Sprintf("%.0f GB left; %d slots may grow by %.0f GB", float64(left)/gigabyte, s.Node.Slots, float64(want)/gigabyte)
	fix := "make room, use fewer slots, or lower the pools' growth if their jobs write less"
	switch {
	case left < want/2:
		return fail(fix, "%s: no VM is placed here", text)
	case left < want:
		return warn(fix, "%s: an image is fetched only where another can go", text)
	}
	return found("%s", text)
}

func checkSockets(_ context.Context, s *Subject) Finding {
	dir, err := filepath.Abs(s.Helpers)
	if err != nil {
		return skip("%v", err)
	}
	if err := helper.CheckPath(dir); err != nil {
		return fail("set node.dir to a shorter path", "%v", err)
	}
	return found("paths of sockets in %s are short enough", dir)
}
