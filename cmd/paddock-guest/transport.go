package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/paddock-ci/paddock/runner/guest"
)

// Limits of the transports.
const (
	findLimit = 15 * time.Second      // for the port to appear: its driver may be loaded later than we start
	findPause = 20 * time.Millisecond // between two looks
	maxLines  = 4                     // raw streams at once: one, and those that are about to end
	retryWait = time.Second           // after an error that may pass
)

// transport is a way to the host. serve takes the raw streams that come, one after the
// other or a few at once, and feeds the gate with them until ctx ends.
type transport struct {
	name  string
	serve func(ctx context.Context, gate *guest.Gate, log *slog.Logger) error
}

// findTransport waits for the machine's stream: a virtio-serial port, or else vsock.
// Either is taken by one process at a time, so there are never two agents.
func findTransport(ctx context.Context, socket string) (transport, error) {
	if socket != "" {
		l, err := (&net.ListenConfig{}).Listen(ctx, "unix", socket)
		if err != nil {
			return transport{}, fmt.Errorf("%w; does another agent serve there?", err)
		}
		return overListener(socket, l.Close, func(context.Context) (io.ReadWriteCloser, error) { return l.Accept() }), nil
	}
	for deadline := time.Now().Add(findLimit); ; {
		if path := portPath(); path != "" {
			return transport{name: path, serve: func(ctx context.Context, gate *guest.Gate, log *slog.Logger) error {
				return servePort(ctx, path, gate, log)
			}}, nil
		}
		if haveVsock() {
			return overVsock()
		}
		if time.Now().After(deadline) {
			return transport{}, fmt.Errorf("no stream to a host: there is neither a virtio-serial port %q nor vsock; is this a machine of Paddock's, and are its drivers (virtio_console, vmw_vsock_virtio_transport) loaded?", guest.Port)
		}
		select {
		case <-time.After(findPause):
		case <-ctx.Done():
			return transport{}, ctx.Err()
		}
	}
}

// overListener serves each connection as a raw stream. The host has one; when there are
// more, the oldest are left over from before and are closed.
func overListener(name string, closeAll func() error, accept func(context.Context) (io.ReadWriteCloser, error)) transport {
	return transport{name: name, serve: func(ctx context.Context, gate *guest.Gate, log *slog.Logger) error {
		var wg sync.WaitGroup
		defer wg.Wait()
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		stop := context.AfterFunc(ctx, func() { _ = closeAll() })
		defer stop()
		var lines []io.Closer
		for {
			raw, err := accept(ctx)
			if ctx.Err() != nil {
				if err == nil {
					_ = raw.Close()
				}
				return nil
			}
			if errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("serving on %s: %w", name, err)
			}
			if err != nil {
				log.Warn("a stream was not accepted", "error", err)
				pause(ctx, retryWait)
				continue
			}
			if lines = append(lines, raw); len(lines) > maxLines {
				_ = lines[0].Close()
				lines = lines[1:]
			}
			wg.Go(func() { _ = guest.ServeLine(ctx, raw, gate.Feed) })
		}
	}}
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}
