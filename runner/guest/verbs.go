package guest

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"time"
)

// Where the host finds the agent of a machine.
const (
	Port      = "org.paddock.agent" // the name of the virtio-serial port
	VsockPort = 7233                // where there is vsock instead
)

// Command is a program that the host runs in the guest, beside the runner.
type Command struct {
	Argv  []string          // the program is looked up in the guest's PATH
	Env   map[string]string // added to the agent's own environment
	Dir   string            // "": AgentConfig.Dir
	Input []byte            // its standard input, then end of file; at most 512 KiB
}

// Stream tells a command's outputs apart.
type Stream int

// The outputs of a command.
const (
	Stdout Stream = 1
	Stderr Stream = 2
)

// File is a file that the host puts into the guest.
type File struct {
	Path string      // absolute, or below AgentConfig.Dir; missing directories are made
	Mode fs.FileMode // permissions; 0: 0600
	Size int64       // bytes, exactly
}

// Network is what the guest says of its network.
type Network struct {
	Interface string   `json:"interface,omitempty"` // the one with the first address
	Addresses []string `json:"addresses"`           // without port and prefix, IPv4 first, no loopback
}

// Wake is what a guest that starts from a saved state cannot know.
type Wake struct {
	Now     time.Time // the host's clock
	Entropy []byte    // a secret, fresh for each start: two machines of one state share their pool
}

// LogValue hides the entropy.
func (w Wake) LogValue() slog.Value { return slog.TimeValue(w.Now) }

// String hides the entropy.
func (w Wake) String() string { return fmt.Sprintf("wake at %v", w.Now) }

// GoString hides the entropy from %#v, too.
func (w Wake) GoString() string { return w.String() }

// Exec runs a command and returns its exit status, 128 + n if signal n ended it. Its
// output is passed on as it comes, both streams from this one goroutine; a command that
// prints faster than output takes it waits. It is killed with its process group when
// ctx ends or the connection is lost. A nil output is allowed.
func (c *Client) Exec(ctx context.Context, cmd Command, output func(stream Stream, p []byte)) (exit int, err error) {
	fail := func(err error) (int, error) { return 0, fmt.Errorf("running a command in the guest: %w", err) }
	call, err := c.request(ctx, kindExec, execBody(cmd), true)
	if err != nil {
		return fail(err)
	}
	defer c.forget(call)
	f, err := c.follow(ctx, call, output)
	if err != nil {
		return fail(err)
	}
	var b exitBody
	if f.kind != kindExit || f.decode(&b) != nil || b.Code < -1 || b.Code > 255 {
		return fail(fmt.Errorf("%w: it does not say how the command ended", errFrame))
	}
	return b.Code, nil
}

// follow passes on a call's output until another answer comes, which it returns. If ctx
// ends first, the agent is told.
func (c *Client) follow(ctx context.Context, call *call, output func(Stream, []byte)) (frame, error) {
	credit, err := encodeFrame(kindCredit, call.id, nil)
	if err != nil {
		return frame{}, err
	}
	for {
		f, err := c.take(ctx, call)
		stream := Stdout
		switch {
		case err != nil:
			return frame{}, err
		case f.kind == kindStderr:
			stream = Stderr
		case f.kind != kindStdout:
			return f, nil
		}
		if output != nil {
			output(stream, f.body)
		}
		if err := c.write(ctx, credit); err != nil {
			if ctx.Err() != nil {
				c.cancel(ctx, call)
			}
			return frame{}, err
		}
	}
}

// Put writes a file of exactly f.Size bytes of r in the guest: beside its place and then
// renamed, so that it is there as a whole or not at all. What r has beyond is not read.
func (c *Client) Put(ctx context.Context, f File, r io.Reader) error {
	call, err := c.request(ctx, kindPut, putBody(f), true)
	if err == nil {
		defer c.forget(call)
		err = c.put(ctx, call, f.Size, r)
	}
	if err != nil {
		return fmt.Errorf("putting %s into the guest: %w", f.Path, err)
	}
	return nil
}

// put sends the data: a piece for each that the agent has taken, and window beyond.
func (c *Client) put(ctx context.Context, call *call, size int64, r io.Reader) error {
	if _, err := c.await(ctx, call, kindTaken); err != nil {
		return err // an older agent has not got beyond this
	}
	piece, under := make([]byte, maxChunk), 0
	for size > 0 {
		n, err := io.ReadFull(r, piece[:min(size, maxChunk)])
		if err != nil {
			c.cancel(ctx, call)
			return fmt.Errorf("reading what is put: %w", noEOF(err))
		}
		size -= int64(n)
		for ; under == window; under-- {
			if _, err := c.await(ctx, call, kindTaken); err != nil {
				return err
			}
		}
		b, err := encodeRaw(kindData, call.id, piece[:n])
		if err == nil {
			err = c.write(ctx, b)
		}
		if err != nil {
			c.cancel(ctx, call)
			return err
		}
		under++
	}
	for ; under > 0; under-- {
		if _, err := c.await(ctx, call, kindTaken); err != nil {
			return err
		}
	}
	_, err := c.await(ctx, call, kindDone)
	return err
}

// Output passes on what is kept of the runner's output (its last 64 KiB), and then what
// follows, until the runner has exited; if there is none yet it waits for it. What a slow
// reader misses is left out: the runner does not wait.
func (c *Client) Output(ctx context.Context, p func([]byte)) error {
	call, err := c.request(ctx, kindOutput, nil, true)
	if err == nil {
		defer c.forget(call)
		var f frame
		f, err = c.follow(ctx, call, func(_ Stream, b []byte) { p(b) })
		if err == nil && f.kind != kindDone {
			err = fmt.Errorf("%w: kind %d where %d was due", errFrame, f.kind, kindDone)
		}
	}
	if err != nil {
		return fmt.Errorf("following the runner's output: %w", err)
	}
	return nil
}

// NetworkUp returns the guest's addresses, and first brings the network up by DHCP where
// nothing else in the guest did. It may be called at any time and more than once.
func (c *Client) NetworkUp(ctx context.Context) (Network, error) {
	f, err := c.ask(ctx, kindNetwork, nil, kindNetworkAnswer)
	var n Network
	if err == nil {
		err = f.decode(&n)
	}
	if err != nil {
		return Network{}, fmt.Errorf("the guest's network: %w", err)
	}
	return n.checked(), nil
}

// Wake sets the guest's clock and stirs its random pool, after a start from a saved state.
func (c *Client) Wake(ctx context.Context, w Wake) error {
	if _, err := c.ask(ctx, kindWake, wakeBody(w), kindDone); err != nil {
		return fmt.Errorf("waking the guest: %w", err)
	}
	return nil
}

// Shutdown powers the guest off; it returns when the agent has agreed.
func (c *Client) Shutdown(ctx context.Context) error {
	if _, err := c.ask(ctx, kindShutdown, nil, kindDone); err != nil {
		return fmt.Errorf("shutting the guest down: %w", err)
	}
	return nil
}
