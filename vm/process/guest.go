package process

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"

	"github.com/paddock-ci/paddock/runner/guest"
)

// What a guest process gets from its driver: the path of its socket, and at a fixed
// number the stream that ends when the driver's process does.
const (
	socketEnv = "PADDOCK_GUEST_SOCKET"
	hostFD    = 3 // the first after standard error
)

// workDir is the runner's working directory in the machine's.
const workDir = "work"

// GuestMain is the body of the guest's process: it listens, says so, and serves the
// guest protocol until ctx ends or the driver's process is gone; then it kills all that
// descends from it. An empty c.Dir means a directory "work" in the current one.
func GuestMain(ctx context.Context, c guest.AgentConfig) error {
	socket := os.Getenv(socketEnv)
	if socket == "" {
		return fmt.Errorf("guest agent: %s is not set; this command is started by Paddock's process driver, not by hand", socketEnv)
	}
	host, err := openHost()
	if err != nil {
		return err
	}
	defer func() { _ = host.Close() }()
	if err := os.Unsetenv(socketEnv); err != nil { // the runner has no use for it
		return fmt.Errorf("guest agent: %w", err)
	}
	if err := inheritOrphans(); err != nil {
		return fmt.Errorf("guest agent: %w", err)
	}
	if c.Dir == "" {
		c.Dir = workDir
	}
	if c.Dir, err = filepath.Abs(c.Dir); err != nil {
		return fmt.Errorf("guest agent: %w", err)
	}
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return fmt.Errorf("guest agent: making the runner's directory: %w", err)
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "unix", socket)
	if err != nil {
		return fmt.Errorf("guest agent: %w", err)
	}
	return serveUntilHostEnds(ctx, l, host, c)
}

// serveUntilHostEnds serves, and cleans up behind the runner.
func serveUntilHostEnds(ctx context.Context, l net.Listener, host net.Conn, c guest.AgentConfig) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		defer cancel()
		_, _ = io.Copy(io.Discard, host) // nothing is ever sent; it ends with the host
	}()
	_, err := host.Write([]byte{1}) // we listen
	if err != nil {
		_ = l.Close()
		err = fmt.Errorf("guest agent: telling the driver that we listen: %w", err)
	} else {
		err = guest.Serve(ctx, l, c)
	}
	_ = host.Close()
	<-watched
	// Ourselves as the root: all that is left below us goes, and is reaped.
	t := tree{root: os.Getpid()}
	return errors.Join(err, t.end(context.WithoutCancel(ctx)))
}

// openHost takes over the stream to the driver, and keeps it from the runner.
func openHost() (net.Conn, error) {
	f := os.NewFile(hostFD, "host")
	if f == nil {
		return nil, errors.New("guest agent: no stream to the driver")
	}
	conn, err := net.FileConn(f) // its own copy, close-on-exec
	_ = f.Close()
	if err != nil {
		return nil, fmt.Errorf("guest agent: no stream to the driver; this command is not started by hand: %w", err)
	}
	return conn, nil
}
