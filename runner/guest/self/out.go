package self

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/paddock-ci/paddock/runner/guest"
)

// Bounds of what a guest may leave in out/.
const (
	maxStatus  = 64 << 10 // bytes of the status that are read; a launcher writes some 100
	maxOut     = 16 << 20 // bytes in all: out/ is for one small file, on the host's disk
	maxEntries = 64       // files and directories in all; macOS leaves one or two of its own on a share
	maxWord    = 1 << 10  // bytes of a version or an odd line
)

// ErrMisuse is the cause when out/ holds what no launcher would leave there: looking
// again does not help, and the guest should be ended, for out/ is on the host's disk.
var ErrMisuse = errors.New("the guest misuses its share")

// report is what the launcher has said so far.
type report struct {
	ready   bool
	version string // behind ready; "self" if it says none
	status  guest.Status
	odd     string // the first line that is none of the four
}

func (r report) started() bool { return rank(r.status.State) >= rank(guest.Running) }

// rank orders states: a guest goes from lower to higher only.
func rank(s guest.State) int {
	switch s {
	case guest.Idle:
		return 1
	case guest.Running:
		return 2
	case guest.Busy:
		return 3
	case guest.Exited:
		return 4
	}
	return 0
}

// look reads out/ once.
func (c *Client) look() (report, error) {
	out := outDir(c.dir)
	if err := measure(out); err != nil {
		return report{}, err
	}
	text, at, err := read(filepath.Join(out, "status"))
	if err != nil {
		return report{}, err
	}
	r := parse(text)
	if r.started() {
		r.status.Name = c.name()
	}
	// The host's time of the last line, as near as it gets: lines carry none.
	switch r.status.State {
	case guest.Busy:
		r.status.BusyAt = at
	case guest.Exited:
		r.status.ExitedAt = at
	case guest.Idle, guest.Running:
	}
	status, ok := guest.Checked(r.status)
	if !ok {
		return report{}, fmt.Errorf("%w: unknown state", ErrMisuse)
	}
	r.status = status
	return r, nil
}

// measure refuses a guest that fills the host's disk through its share. It goes into
// directories, of which macOS leaves one of its own, and no further than maxEntries. A
// file that the guest holds open and has removed is nowhere to be seen.
func measure(out string) error {
	root, err := os.OpenRoot(out)
	if err != nil {
		return misread(err)
	}
	defer func() { _ = root.Close() }() // was read
	entries, sum := 0, int64(0)
	for dirs := []string{"."}; len(dirs) > 0; dirs = dirs[1:] {
		within, err := list(root, dirs[0], maxEntries-entries+1)
		if err != nil {
			return err
		}
		if entries += len(within); entries > maxEntries {
			return fmt.Errorf("%w: more than %d files in %s, which is for one", ErrMisuse, maxEntries, out)
		}
		for _, info := range within {
			switch {
			case info.IsDir():
				dirs = append(dirs, filepath.Join(dirs[0], info.Name()))
			case info.Mode().IsRegular():
				sum += room(info)
			}
		}
	}
	if sum > maxOut {
		return fmt.Errorf("%w: %d bytes in %s, at most %d", ErrMisuse, sum, out, maxOut)
	}
	return nil
}

// list reads at most so many entries of a directory below root; none of one that is gone
// or something else by now. Nothing leads out of root, and no pipe is waited for.
func list(root *os.Root, name string, most int) ([]fs.FileInfo, error) {
	dir, err := root.OpenFile(name, os.O_RDONLY|syscall.O_DIRECTORY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return nil, nil
	}
	if err != nil {
		return nil, misread(err)
	}
	defer func() { _ = dir.Close() }() // was read
	infos, err := dir.Readdir(most)    // leaves out what goes meanwhile
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, misread(err)
	}
	return infos, nil
}

// room is what a file takes of the disk, or will: its size is less where room is set
// aside for more, and more where it has holes.
func room(info fs.FileInfo) int64 {
	taken := info.Size()
	if stat, ok := info.Sys().(*syscall.Stat_t); ok {
		taken = max(taken, stat.Blocks*512) // the unit of POSIX
	}
	return taken
}

// misread is the error of reading out/. A guest that shuts its directories or turns them
// into a maze misuses them: what cannot be measured can grow.
func misread(err error) error {
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.ELOOP) {
		return fmt.Errorf("%w: it cannot be read: %w", ErrMisuse, err)
	}
	return fmt.Errorf("reading the share: %w", err)
}

// read returns the beginning of a plain file and when it was last written; no file is an
// empty one. The guest may put anything in its place at any moment: a link is not
// followed, a pipe not waited for, a device not opened if it can be helped.
func read(name string) (text []byte, at time.Time, err error) {
	info, err := os.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, time.Time{}, nil
	}
	if err != nil {
		return nil, time.Time{}, misread(err)
	}
	if !info.Mode().IsRegular() {
		return nil, time.Time{}, notPlain(name, info)
	}
	file, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ELOOP) { // gone, or a link since
		return nil, time.Time{}, nil
	}
	if err != nil {
		return nil, time.Time{}, misread(err)
	}
	defer func() { _ = file.Close() }() // was read
	// Not what was there a moment ago.
	if info, err = file.Stat(); err != nil {
		return nil, time.Time{}, misread(err)
	}
	if !info.Mode().IsRegular() {
		return nil, time.Time{}, notPlain(name, info)
	}
	text, err = io.ReadAll(io.LimitReader(file, maxStatus))
	if err != nil {
		return nil, time.Time{}, misread(err)
	}
	return text, info.ModTime().UTC(), nil
}

func notPlain(name string, info fs.FileInfo) error {
	return fmt.Errorf("%w: %s must be a plain file, and is %v", ErrMisuse, name, info.Mode().Type())
}

// parse reads the launcher's lines. One that is still being written, without its end,
// does not count; none that is unknown does harm, for launchers may say more one day.
func parse(text []byte) report {
	r := report{status: guest.Status{State: guest.Idle}}
	for len(text) > 0 && r.status.State != guest.Exited {
		line, rest, whole := bytes.Cut(text, []byte{'\n'})
		if text = rest; whole {
			r.line(strings.TrimRight(string(line), " \t\r"))
		}
	}
	return r
}

func (r *report) line(text string) {
	word, rest, _ := strings.Cut(text, " ")
	switch {
	case word == "ready":
		if !r.ready {
			r.ready, r.version = true, "self"
		}
		if rest != "" {
			r.version = guest.Plain(rest, maxWord)
		}
	case word == "running" && !r.started():
		r.ready, r.status.State = true, guest.Running
	case word == "busy" && r.status.State != guest.Busy:
		r.ready, r.status.State, r.status.Job = true, guest.Busy, rest
	case word == "exited":
		if code, err := strconv.ParseUint(rest, 10, 8); err == nil {
			r.ready, r.status.State, r.status.ExitCode = true, guest.Exited, int(code)
			return
		}
		fallthrough
	default:
		if r.odd == "" && word != "running" && word != "busy" {
			r.odd = guest.Plain(text, maxWord)
		}
	}
}
