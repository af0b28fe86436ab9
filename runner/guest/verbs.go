package guest

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
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
	return 0, ErrUnsupported
}

// Put writes a file of exactly f.Size bytes of r in the guest: beside its place and then
// renamed, so that it is there as a whole or not at all. What r has beyond is not read.
func (c *Client) Put(ctx context.Context, f File, r io.Reader) error { return ErrUnsupported }

// Output passes on what is kept of the runner's output (its last 64 KiB), and then what
// follows, until the runner has exited; if there is none yet it waits for it. What a slow
// reader misses is left out: the runner does not wait.
func (c *Client) Output(ctx context.Context, p func([]byte)) error { return ErrUnsupported }

// NetworkUp returns the guest's addresses, and first brings the network up by DHCP where
// nothing else in the guest did. It may be called at any time and more than once.
func (c *Client) NetworkUp(ctx context.Context) (Network, error) { return Network{}, ErrUnsupported }

// Wake sets the guest's clock and stirs its random pool, after a start from a saved state.
func (c *Client) Wake(ctx context.Context, w Wake) error { return ErrUnsupported }

// Shutdown powers the guest off; it returns when the agent has agreed.
func (c *Client) Shutdown(ctx context.Context) error { return ErrUnsupported }

// Connect makes conn, a fresh stream to the agent on which nothing was said yet, a raw
// stream to a TCP port of the guest's loopback. After an error conn is of no more use.
func Connect(ctx context.Context, conn net.Conn, port int) error { return ErrUnsupported }

// JITFile is one file of a runner's just-in-time configuration. Its content is a secret.
type JITFile struct {
	Name    string // of a file in the runner's own directory
	Content []byte `json:"-"`
}

// JITFiles makes of a JIT config, as GitHub returned it, the files that GitHub's runner
// starts from.
func JITFiles(jit []byte) ([]JITFile, error) { return nil, ErrUnsupported }
