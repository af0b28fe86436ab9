package ocidir

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/paddock-ci/paddock/cache"
)

// errHangs is a file operation that does not come back.
var errHangs = errors.New("the directory does not answer; check the mount")

// do runs one operation on the directory and waits for it as long as a stall. What op
// writes to must not be used when it failed: op may go on.
func (l *Layout) do(ctx context.Context, op func() error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if l.hung.Load() >= maxHung {
		return fmt.Errorf("%w (%d operations hang)", errHangs, maxHung)
	}
	done := make(chan struct{})
	var failed error // set before done is closed
	go func() {
		defer close(done)
		failed = op()
	}()
	timer := time.NewTimer(l.Stall)
	defer timer.Stop()
	var why error
	select {
	case <-done:
		return failed
	case <-ctx.Done():
		why = ctx.Err()
	case <-timer.C:
		why = fmt.Errorf("%w: nothing for %s", errHangs, l.Stall)
	}
	l.lost(done)
	return why
}

// lost counts a goroutine that hangs, until it ends after all.
func (l *Layout) lost(ended <-chan struct{}) {
	l.hung.Add(1)
	go func() {
		<-ended
		l.hung.Add(-1)
	}()
}

// openFile opens a file; one that comes too late is closed again.
func (l *Layout) openFile(ctx context.Context, path string, flag int, mode os.FileMode) (*os.File, error) {
	var settled atomic.Bool // by the first of: the file came, the caller gave up
	came := make(chan *os.File, 1)
	err := l.do(ctx, func() error {
		f, err := os.OpenFile(path, flag, mode)
		if err != nil {
			return err
		}
		if !settled.CompareAndSwap(false, true) {
			return f.Close()
		}
		came <- f
		return nil
	})
	if err != nil && !settled.CompareAndSwap(false, true) {
		_ = (<-came).Close() // nothing was done with it
	}
	if err != nil {
		return nil, err
	}
	return <-came, nil
}

// writer is a function that writes.
type writer func(p []byte) (int, error)

func (w writer) Write(p []byte) (int, error) { return w(p) }

// write writes to a file; after an error, p must not be used again.
func (l *Layout) write(ctx context.Context, f *os.File, p []byte) (int, error) {
	if err := l.do(ctx, func() error { _, err := f.Write(p); return err }); err != nil {
		return 0, err
	}
	return len(p), nil
}

// syncDir waits until the names in a directory are on disk.
func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// openPlain opens a regular file for reading. It does not wait for who would write to a
// pipe, and what is no file is what somebody has to remove, not a mount that hangs.
func openPlain(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = &cache.Error{Class: cache.ClassDigest, Err: fmt.Errorf("%s is no file (%s); remove it, and push the image again", path, info.Mode().Type())}
	}
	if err != nil {
		_ = f.Close() // nothing was done with it
		return nil, err
	}
	return f, nil
}

// readFile reads a whole file of at most limit bytes.
func (l *Layout) readFile(path string, limit int64) ([]byte, error) {
	f, err := l.plain(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }() // it was only read
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = fmt.Errorf("%s has more than %d bytes", path, limit)
	}
	return data, err
}
