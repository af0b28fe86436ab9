package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/paddock-ci/paddock/runner/guest"
)

// hostPause is how long a wait for the host lasts before it is looked at again whether
// we are to end; the host's coming itself is seen at once.
const hostPause = time.Second

// portPath is the device of the agent's virtio-serial port, "" if there is none (yet).
func portPath() string {
	names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
	if err != nil {
		return ""
	}
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err == nil && strings.TrimSpace(string(b)) == guest.Port {
			path := filepath.Join("/dev", filepath.Base(filepath.Dir(name)))
			if _, err := os.Stat(path); err == nil {
				return path
			}
		}
	}
	return ""
}

// servePort serves one life of the port after the other, until ctx ends. The kernel
// gives a port to one process at a time.
func servePort(ctx context.Context, path string, gate *guest.Gate, log *slog.Logger) error {
	for ctx.Err() == nil {
		raw, err := openPort(ctx, path)
		if errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("opening %s: %w; does another agent serve there?", path, err)
		}
		if err != nil {
			if ctx.Err() == nil {
				log.Warn("the port does not open", "path", path, "error", err)
			}
			pause(ctx, retryWait)
			continue
		}
		_ = guest.ServeLine(ctx, raw, gate.Feed)
	}
	return nil
}

// openPort opens the port and waits until the host has its end open.
func openPort(ctx context.Context, path string) (io.ReadWriteCloser, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if err := awaitHost(ctx, fd); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("waiting for the host: %w", err)
	}
	return os.NewFile(uintptr(fd), path), nil // non-blocking: closing it wakes reads and writes
}

// awaitHost waits without spinning: while the host is away a port is always readable (it
// reads as ended) and hung up, so only the change of that is waited for.
func awaitHost(ctx context.Context, fd int) error {
	changes, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(changes) }()
	const edge = unix.EPOLLET & 0xffffffff // negative in the package
	err = unix.EpollCtl(changes, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLOUT | edge, Fd: int32(fd)})
	if err != nil {
		return err
	}
	for {
		now := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN | unix.POLLOUT}}
		if _, err := unix.Poll(now, 0); err == nil && now[0].Revents&unix.POLLHUP == 0 {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if _, err := unix.EpollWait(changes, make([]unix.EpollEvent, 1), int(hostPause.Milliseconds())); err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// haveVsock tells a machine with a vsock device from a kernel that merely knows vsock.
func haveVsock() bool {
	devices, err := filepath.Glob("/sys/bus/virtio/drivers/vmw_vsock_virtio_transport/virtio*")
	return err == nil && len(devices) > 0
}
