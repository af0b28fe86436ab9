// Package ssh is the way into guests that have an SSH server instead of Paddock's agent:
// the stock images of the field, with their documented password, or a private key.
//
//  1. Dial logs in over a connection to the guest's port 22. The server's host key is
//     pinned under the image's digest when it is first seen; another key under the same
//     name is refused (HostKeys).
//  2. Start leaves a keeper in the guest: a few lines of POSIX sh (dash, bash, busybox)
//     that outlive the session, hold the runner, and write down what became of it in
//     ~/.paddock, under the id of the guest's current boot.
//  3. Watch and Hello read that; so a host that crashed logs in again and watches on.
//
// The methods mean what those of *guest.Client mean. The JIT config travels on the
// session's standard input, lives in a shell variable that is not exported, and reaches
// the runner's standard input by a pipe: it is in no argument, environment, file or log.
// What the runner prints is kept in two files of at most 1 MiB in turns, so a flood fills
// neither the guest's disk nor our memory. All that the guest sends is bounded and
// distrusted.
//
// The runner gets the environment of a command run over SSH, which has no more in its
// PATH than the server's default: a pool adds to it by env. The account's login shell
// may be any: it only has to start /bin/sh.
//
// It is no SSH terminal (paddock vm ssh runs the person's own client), it opens no
// connection (vm.PortDialer does) and decides nothing about runners (node does).
//
// Called by node, for pools with bootstrap: ssh.
package ssh

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"

	xssh "golang.org/x/crypto/ssh"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/runner/guest"
)

// Errors of Dial that a caller decides on. Trying again helps against ErrNoAnswer only,
// while the guest boots.
var (
	// ErrHostKey: the server has another host key than the one pinned for its image.
	ErrHostKey = errors.New("the guest's SSH host key is not the one pinned for its image")
	// ErrLogin: the server refused the account's password or key.
	ErrLogin = errors.New("the guest refused the SSH login")
	// ErrNotSSH: something else than an SSH server answered.
	ErrNotSSH = errors.New("no SSH server answered in the guest")
	// ErrNoAnswer: nothing, or not all of a login, came in time.
	ErrNoAnswer = errors.New("the guest's SSH server did not answer")
)

// Bounds in time of a connection.
const (
	handshakeLimit = 30 * time.Second // of the whole login; sshd's own patience is 120 s
	aliveEvery     = 15 * time.Second // between questions whether the server is there
	aliveLimit     = 30 * time.Second // for its answer, from a guest under heavy load
	closeLimit     = 5 * time.Second  // for a session to end before the connection is cut
)

// Config says how to log in.
type Config struct {
	Login   fleet.Login  // zero: fleet.StockLogin
	HostKey HostKeys     // where keys are pinned; required
	Key     string       // the name to pin under: the image's digest; required
	Dir     string       // the runner's directory in the guest; "": ~/actions-runner, or ~ where that is missing
	Log     *slog.Logger // nil: no log
}

// Client is one SSH connection to one guest. Its methods are safe for concurrent use.
// After an error that is guest.ErrLost, dial again: the guest keeps the runner's state.
type Client struct {
	conn    *xssh.Client
	raw     net.Conn // closing it ends everything at once, without a word to the server
	dir     string
	version string // of the server, as it named itself
	log     *slog.Logger

	reading sync.WaitGroup // of error outputs, which end with their sessions
	closing sync.Once
	closed  chan struct{} // closed by Close
	ended   chan struct{} // closed when the goroutine that asks for signs of life has ended
}

// Close ends the connection and every call on it; the runner goes on.
func (c *Client) Close() error {
	var err error
	c.closing.Do(func() {
		close(c.closed)
		err = c.raw.Close()
	})
	<-c.ended
	c.reading.Wait()
	_ = c.conn.Wait() // why it ended is known: it was closed
	if err != nil && !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("closing the SSH connection to the guest: %w", err)
	}
	return nil
}

// in is a directory that a caller asked for, or the runner's.
func (c *Client) in(dir string) string {
	if dir != "" {
		return dir
	}
	return c.dir
}

// stayAlive cuts the connection when the server stops answering: a machine that was
// stopped or a network that went away says nothing by itself.
func (c *Client) stayAlive() {
	defer close(c.ended)
	ticker := time.NewTicker(aliveEvery)
	defer ticker.Stop()
	for {
		select {
		case <-c.closed:
			return
		case <-ticker.C:
		}
		limit := time.AfterFunc(aliveLimit, func() { _ = c.raw.Close() })
		// A refusal is a sign of life as well.
		_, _, err := c.conn.SendRequest("keepalive@openssh.com", true, nil)
		limit.Stop()
		if err != nil {
			return // the connection has ended, and every call with it
		}
	}
}

// Hello asks for the runner's status; the version is the SSH server's.
func (c *Client) Hello(ctx context.Context) (guest.Hello, error) {
	hello := guest.Hello{Protocol: guest.Protocol, Version: c.version}
	err := c.run(ctx, job{script: script(scriptHello), answer: func(r *reader) (err error) {
		hello.Status, err = r.status()
		return err
	}})
	if err != nil {
		return guest.Hello{}, fmt.Errorf("hello: %w", err)
	}
	return hello, nil
}

// Start starts the runner. Starting the same name again is a success, also after it has
// exited; another name is guest.ErrOccupied. After guest.ErrLost it may run or not: ask
// again.
func (c *Client) Start(ctx context.Context, r guest.Run) error {
	text, err := startScript(r, c.in(r.Dir))
	if err != nil {
		return fmt.Errorf("starting runner %s: %w", r.Name, err)
	}
	input := strings.NewReader(encodeInput(r.Input))
	err = c.run(ctx, job{script: text, input: input, answer: func(r *reader) error { return r.word("ok") }})
	if err != nil {
		return fmt.Errorf("starting runner %s: %w", r.Name, err)
	}
	c.log.Info("runner started over SSH", "runner", r.Name)
	return nil
}

// Watch calls changed with the status now and after each change, and returns the final
// one when the runner has exited. A nil changed is allowed. The guest looks four times a
// second, on its own side: what is unchanged is not sent.
func (c *Client) Watch(ctx context.Context, changed func(guest.Status)) (guest.Status, error) {
	var last guest.Status
	err := c.run(ctx, job{script: script(scriptWatch), hold: true, answer: func(r *reader) (err error) {
		// A runner's life has four states; a guest that tells more is making them up.
		for range maxStatuses {
			if last, err = r.status(); err != nil {
				return err
			}
			if changed != nil {
				changed(last)
			}
			if last.State == guest.Exited {
				return nil
			}
		}
		return fmt.Errorf("%w: more than %d changes of one runner", errAnswer, maxStatuses)
	}})
	if err != nil {
		return guest.Status{}, fmt.Errorf("watching the runner: %w", err)
	}
	return last, nil
}
