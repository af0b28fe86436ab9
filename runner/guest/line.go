package guest

import (
	"context"
	"io"
	"net"
)

// Line is the host's end of the one stream that a machine has to its agent.
type Line struct {
	open func(ctx context.Context) (net.Conn, error)
}

// NewLine makes a line; open opens the raw stream, when it is first needed and again
// after it broke. It waits for the machine as long as that makes sense: its error is
// Dial's.
func NewLine(open func(ctx context.Context) (net.Conn, error)) *Line { return &Line{open: open} }

// Dial opens one more stream to the agent. It waits until the guest answers or ctx ends.
func (l *Line) Dial(ctx context.Context) (net.Conn, error) { return nil, ErrUnsupported }

// Close cuts all streams and closes the raw one; a later Dial opens it anew.
func (l *Line) Close() error { return nil }

// ServeLine is the guest's end for one life of the raw stream: it calls serve with a
// listener of the host's streams, and returns when raw has ended, or ctx, or serve.
func ServeLine(ctx context.Context, raw io.ReadWriteCloser, serve func(net.Listener) error) error {
	return ErrUnsupported
}
