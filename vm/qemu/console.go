package qemu

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/paddock-ci/paddock/vm"
)

// A guest may print without end. Its console's file holds the beginning, where a boot
// goes wrong, and the end: at most maxConsole bytes, of which the middle is left out
// down to keepConsole when it is full.
const (
	maxConsole  = 1 << 20
	headConsole = 256 << 10
	keepConsole = 256 << 10 // of the end, each time
)

// console writes what a guest prints into a file of bounded size.
type console struct {
	file *os.File
	size int64 // of the file
	lost int64 // bytes left out so far
}

// openConsole begins a new console in dir.
func openConsole(dir string) (*console, error) {
	f, err := os.OpenFile(filepath.Join(dir, vm.ConsoleFile), os.O_CREATE|os.O_RDWR|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the console's file: %w", err)
	}
	return &console{file: f}, nil
}

// copy writes what comes from r, until it ends, and closes both ends. When the file
// cannot be written the guest must still be able to print: it is read on to nowhere.
func (c *console) copy(r io.ReadCloser) error {
	defer func() { _ = r.Close() }()
	_, err := io.Copy(c, r)
	if c.failed(err) {
		_, _ = io.Copy(io.Discard, r)
	} else {
		err = nil // the stream ended, in whatever way the process did
	}
	return errors.Join(err, c.file.Close())
}

// errConsole marks errors of the file, to be told from the stream's.
var errConsole = errors.New("writing the console's file")

func (c *console) failed(err error) bool { return errors.Is(err, errConsole) }

// Write appends to the file, and makes room in it first if need be.
func (c *console) Write(p []byte) (int, error) {
	if c.size+int64(len(p)) > maxConsole {
		if err := c.shrink(); err != nil {
			return 0, fmt.Errorf("%w: %w", errConsole, err)
		}
	}
	n, err := c.file.WriteAt(p, c.size)
	c.size += int64(n)
	if err != nil {
		return n, fmt.Errorf("%w: %w", errConsole, err)
	}
	return n, nil
}

// shrink leaves out the middle.
func (c *console) shrink() error {
	tail := make([]byte, keepConsole)
	if _, err := c.file.ReadAt(tail, c.size-keepConsole); err != nil {
		return err
	}
	c.lost += c.size - keepConsole - headConsole
	// The head ends in the middle of a line; the note before that which was here is
	// overwritten with the rest.
	note := fmt.Sprintf("\n[about %d bytes are left out here]\n", c.lost)
	if _, err := c.file.WriteAt(append([]byte(note), tail...), headConsole); err != nil {
		return err
	}
	c.size = headConsole + int64(len(note)) + keepConsole
	return c.file.Truncate(c.size)
}
