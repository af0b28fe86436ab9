//go:build (darwin && arm64 && cgo) || vzstandin

package vz

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/paddock-ci/paddock/vm"
)

// maxConsole bounds a console's file, in bytes: a guest may print for as long as it
// lives. When it is full, its older half is dropped.
const maxConsole = 1 << 20

// console carries what a guest prints into a file of bounded length. The framework gets
// the ends of two pipes, as file descriptors that stay ours: both must be open, and
// referenced, until the machine has ended.
type console struct {
	toGuest   *os.File // the framework reads: nothing ever comes
	fromGuest *os.File // the framework writes
	silent    *os.File // the other end of toGuest: closed, the guest would read its end again and again
	printed   *os.File // the other end of fromGuest
	drained   chan struct{}
}

// openConsole makes dir's console file anew and begins to fill it.
func openConsole(dir string) (_ *console, err error) {
	file, err := os.OpenFile(filepath.Join(dir, vm.ConsoleFile), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("making the console's file: %w", err)
	}
	c := &console{drained: make(chan struct{})}
	defer func() {
		if err != nil {
			_ = file.Close()
			c.closeFiles()
		}
	}()
	if c.toGuest, c.silent, err = os.Pipe(); err != nil {
		return nil, fmt.Errorf("making the console: %w", err)
	}
	if c.printed, c.fromGuest, err = os.Pipe(); err != nil {
		return nil, fmt.Errorf("making the console: %w", err)
	}
	go c.drain(file)
	return c, nil
}

// drain reads until all writers have closed, so that a guest that prints never waits for
// us; what cannot be written down is lost.
func (c *console) drain(file *os.File) {
	defer close(c.drained)
	b := &bounded{file: file}
	defer func() { _ = file.Close() }()
	buf := make([]byte, 32<<10)
	for {
		n, err := c.printed.Read(buf)
		b.write(buf[:n])
		if err != nil {
			return
		}
	}
}

// close ends the console of a machine that has ended. The framework's own process may
// hold its end for a moment longer: what it still writes is waited for, but not long,
// since what was written is here already.
func (c *console) close() {
	const patience = 200 * time.Millisecond
	_ = c.fromGuest.Close()
	select {
	case <-c.drained:
	case <-time.After(patience):
	}
	c.closeFiles()
	<-c.drained
}

// closeFiles closes what is open of the four, also a second time.
func (c *console) closeFiles() {
	for _, f := range []*os.File{c.toGuest, c.silent, c.fromGuest, c.printed} {
		_ = f.Close() // of a nil file: an error and no more
	}
}

// bounded is a file that forgets its older half when it is full.
type bounded struct {
	file *os.File
	size int64
}

// write appends; an error loses output, as a full disk would, and nothing else.
func (b *bounded) write(p []byte) {
	if b.size+int64(len(p)) > maxConsole {
		if err := b.halve(); err != nil {
			return
		}
	}
	n, _ := b.file.WriteAt(p, b.size)
	b.size += int64(n)
}

// halve moves the file's younger half to its beginning.
func (b *bounded) halve() error {
	young := make([]byte, min(b.size, maxConsole/2))
	if _, err := b.file.ReadAt(young, b.size-int64(len(young))); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if _, err := b.file.WriteAt(young, 0); err != nil {
		return err
	}
	b.size = int64(len(young))
	return b.file.Truncate(b.size)
}
