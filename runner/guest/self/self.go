// Package self is the way into guests whose image starts its runner by itself: no agent
// and no SSH server, only a share of two directories and a launcher that the image's
// builder installed. It suits images that must not listen on anything.
//
//	in/run/jitconfig   the JIT config
//	in/run/jit/        the same as the files that GitHub's runner starts from
//	in/run/env         the pool's variables, as lines that a POSIX shell reads by "."
//	in/run/command     the pool's command as a line "set -- ...", if it names one
//	out/status         lines of the launcher: ready, running, busy JOB, exited N
//
// The guest sees in/ read-only as the share paddock-in, and out/ as paddock-out; on macOS
// both are below "/Volumes/My Shared Files". in/run appears as a whole, by a rename, and
// goes as soon as the launcher says running, and in any case when Start returns, or when the
// next agent looks if one was killed there: the JIT config lies on the host's disk for that
// moment, readable by its user only.
//
// The directory above both has mode 0700, so that nobody else on the host comes near. In
// it all has the host user's uid. macOS guests do not look at owners on such a share;
// Linux guests do, so there the launcher runs as root or under the host user's uid.
//
// LauncherScript is such a launcher, in POSIX sh. An image's builder installs it as a
// LaunchAgent of the user who is logged in (RunAtLoad, without KeepAlive), on Linux as a
// systemd unit (Type=exec, Restart=no), and sets there what differs: PADDOCK_IN,
// PADDOCK_OUT and PADDOCK_RUNNER_DIR. Any program that writes the four lines will do.
//
// Everything in out/ is the guest's and hostile: it is read by size, never followed,
// never waited for. It is looked at four times a second, since notifications of the
// host's file system (inotify, FSEvents) do not tell what a guest writes by virtiofs.
//
// It starts nothing itself and decides nothing about runners (node does). Called by node,
// for pools with bootstrap: self.
package self

import (
	"context"
	_ "embed" // the launcher
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/runner/guest"
)

// LauncherScript is the reference launcher: what an image's builder installs.
//
//go:embed launcher.sh
var LauncherScript string

// The names of the two mounts, as the guest sees them.
const (
	MountIn  = "paddock-in"
	MountOut = "paddock-out"
)

// pollEvery is how often out/ is looked at: a look costs some microseconds, and a job's
// start is told this much later at most.
const pollEvery = 250 * time.Millisecond

// Prepare makes the share's directories on the host, below dir, and says how they are
// mounted. What is there already stays, for an agent that starts anew.
func Prepare(dir string) ([]fleet.Mount, error) {
	if !filepath.IsAbs(dir) {
		return nil, fmt.Errorf("preparing the share: %q is not an absolute path, and the guest's machine runs elsewhere", dir)
	}
	// From the outside in: nothing is ever below a directory that others may enter.
	for _, name := range []string{dir, inDir(dir), outDir(dir)} {
		if err := os.MkdirAll(name, 0o700); err != nil {
			return nil, fmt.Errorf("preparing the share: %w", err)
		}
		if err := os.Chmod(name, 0o700); err != nil {
			return nil, fmt.Errorf("preparing the share: %w", err)
		}
	}
	return []fleet.Mount{
		{Name: MountIn, Path: inDir(dir), ReadOnly: true},
		{Name: MountOut, Path: outDir(dir)},
	}, nil
}

func inDir(dir string) string  { return filepath.Join(dir, "in") }
func outDir(dir string) string { return filepath.Join(dir, "out") }

// Client is the host's end of one share. Its methods are safe for concurrent use, and so
// are several clients of one share, since all they know is in its files; but of Start one
// at a time.
type Client struct {
	dir     string
	closing sync.Once
	closed  chan struct{}
}

// Open returns the host's end of a share that Prepare made. It opens nothing yet.
func Open(dir string) *Client {
	return &Client{dir: dir, closed: make(chan struct{})}
}

// Close ends every call; the runner goes on.
func (c *Client) Close() error {
	c.closing.Do(func() { close(c.closed) })
	return nil
}

// Hello waits until the launcher has said ready, and returns what it said last.
func (c *Client) Hello(ctx context.Context) (guest.Hello, error) {
	for {
		r, err := c.look()
		if err != nil {
			return guest.Hello{}, fmt.Errorf("hello: %w", err)
		}
		if err := c.settle(r); err != nil {
			return guest.Hello{}, fmt.Errorf("hello: %w", err)
		}
		if r.ready {
			return guest.Hello{Protocol: guest.Protocol, Version: r.version, Status: r.status}, nil
		}
		if err := c.pause(ctx); err != nil {
			return guest.Hello{}, fmt.Errorf("hello: %w: %s", err, notReady(r))
		}
	}
}

func notReady(r report) string {
	if r.odd != "" {
		return fmt.Sprintf("the image's launcher said %q where ready is due", r.odd)
	}
	return "the image's launcher has not said ready: this pool has bootstrap: self, whose image starts its runner by a launcher of its own"
}

// Start hands the runner over and waits until the launcher says that it runs. Starting
// the same name again is a success, also after it has exited; another name is
// guest.ErrOccupied. If ctx ends first the order is taken back: start it again.
func (c *Client) Start(ctx context.Context, r guest.Run) error {
	if err := c.start(ctx, r); err != nil {
		return fmt.Errorf("starting runner %s: %w", r.Name, err)
	}
	return nil
}

func (c *Client) start(ctx context.Context, r guest.Run) (err error) {
	taken, err := c.claim(r.Name)
	if err != nil {
		return err
	}
	if !taken {
		return fmt.Errorf("%w: it is %q", guest.ErrOccupied, c.name())
	}
	seen, err := c.look()
	if err != nil {
		return err
	}
	// Also what an agent left that was killed in here.
	defer func() { err = errors.Join(err, c.takeBack()) }()
	if seen.started() {
		return nil
	}
	if err := c.hand(r); err != nil {
		return err
	}
	for {
		if err := c.pause(ctx); err != nil {
			return fmt.Errorf("%w: the image's launcher did not take its order", err)
		}
		if seen, err = c.look(); err != nil || seen.started() {
			return err
		}
	}
}

// Watch calls changed with the status now and after each change, and returns the final
// one when the runner has exited. A nil changed is allowed.
func (c *Client) Watch(ctx context.Context, changed func(guest.Status)) (guest.Status, error) {
	var last guest.Status
	for {
		r, err := c.look()
		if err != nil {
			return guest.Status{}, fmt.Errorf("watching the runner: %w", err)
		}
		if err := c.settle(r); err != nil {
			return guest.Status{}, fmt.Errorf("watching the runner: %w", err)
		}
		// A guest that takes a word back changes nothing.
		if rank(r.status.State) > rank(last.State) {
			if !last.BusyAt.IsZero() {
				r.status.BusyAt = last.BusyAt
			}
			last = r.status
			if changed != nil {
				changed(last)
			}
		}
		if last.State == guest.Exited {
			return last, nil
		}
		if err := c.pause(ctx); err != nil {
			return guest.Status{}, fmt.Errorf("watching the runner: %w", err)
		}
	}
}

// pause waits until it is time to look again.
func (c *Client) pause(ctx context.Context) error {
	timer := time.NewTimer(pollEvery)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-c.closed:
		return fmt.Errorf("%w: closed", guest.ErrLost)
	case <-ctx.Done():
		return ctx.Err()
	}
}
