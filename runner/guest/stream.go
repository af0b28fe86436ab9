package guest

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/yamux"
)

// Timing and bounds of a session on a line. A machine that stands still (it is being
// saved, somebody debugs it) keeps its session for half a minute.
const (
	backlog       = 256              // streams that are being opened
	keepAlive     = 20 * time.Second // between two looks whether the other side is there
	stallLimit    = 30 * time.Second // without a sign of it
	halfLimit     = 2 * time.Minute  // for which a stream may stay open in one direction only
	maxBody       = 256 << 10        // bytes of a stream that are under way; the multiplexer's own window
	closePatience = time.Second      // for a stream's end to be sent
	pingEvery     = keepAlive / 10   // on average, by the guest
	maxPings      = 10               // at once
)

// multiplexing is how both ends of a line talk.
func multiplexing() *yamux.Config {
	return &yamux.Config{
		AcceptBacklog:          backlog,
		EnableKeepAlive:        true,
		KeepAliveInterval:      keepAlive,
		ConnectionWriteTimeout: stallLimit,
		MaxStreamWindowSize:    maxBody,
		StreamOpenTimeout:      2 * stallLimit,
		StreamCloseTimeout:     halfLimit,
		LogOutput:              io.Discard,
	}
}

// stream is one stream of a session as a net.Conn. It adds to the multiplexer's that its
// Close ends both directions, that deadlines hold whatever the raw stream does, and the
// standard library's errors.
type stream struct {
	*yamux.Stream
	closed  atomic.Bool
	writing deadline
}

var _ net.Conn = (*stream)(nil)

func newStream(s *yamux.Stream) *stream {
	return &stream{Stream: s, writing: deadline{expired: make(chan struct{})}}
}

// Read fails with io.ErrUnexpectedEOF if the session was cut.
func (s *stream) Read(p []byte) (int, error) {
	n, err := s.Stream.Read(p)
	if errors.Is(err, io.EOF) && s.Session().IsClosed() {
		err = io.ErrUnexpectedEOF
	}
	return n, s.asStandard(err)
}

// Write returns at its deadline even if the raw stream is stuck; p may be sent later
// then, as a whole or in part.
func (s *stream) Write(p []byte) (int, error) {
	type result struct {
		n   int
		err error
	}
	expired := s.writing.channel()
	select {
	case <-expired:
		return 0, os.ErrDeadlineExceeded
	default:
	}
	written := make(chan result, 1)
	own := append([]byte(nil), p...) // the caller has p back at the deadline
	go func() {
		n, err := s.Stream.Write(own)
		written <- result{n, err}
	}()
	select {
	case r := <-written:
		return r.n, s.asStandard(r.err)
	case <-expired:
		return 0, os.ErrDeadlineExceeded
	}
}

// asStandard makes of the multiplexer's errors those that callers of a net.Conn know.
func (s *stream) asStandard(err error) error {
	switch {
	case err == nil:
		return nil
	case s.closed.Load(), errors.Is(err, yamux.ErrStreamClosed):
		return net.ErrClosed
	case errors.Is(err, yamux.ErrTimeout):
		return os.ErrDeadlineExceeded
	}
	return err
}

// CloseWrite ends our direction; the other may go on for halfLimit.
func (s *stream) CloseWrite() error { return s.Stream.Close() }

// Close ends both directions for us; what the other side still sends is dropped.
func (s *stream) Close() error {
	if s.closed.Swap(true) {
		return net.ErrClosed
	}
	s.writing.set(time.Unix(1, 0))
	sent := make(chan error, 1)
	go func() { sent <- s.Stream.Close() }() // a stuck raw stream holds it for stallLimit
	_ = s.Stream.SetReadDeadline(time.Unix(1, 0))
	patience := time.NewTimer(closePatience)
	defer patience.Stop()
	select {
	case err := <-sent:
		return err
	case <-patience.C:
		return nil
	}
}

// SetDeadline sets both.
func (s *stream) SetDeadline(t time.Time) error {
	s.writing.set(t)
	return s.SetReadDeadline(t)
}

// SetReadDeadline is not for a closed stream, whose reads fail already.
func (s *stream) SetReadDeadline(t time.Time) error {
	if s.closed.Load() {
		return net.ErrClosed
	}
	return s.Stream.SetReadDeadline(t)
}

// SetWriteDeadline wakes writes that wait, too.
func (s *stream) SetWriteDeadline(t time.Time) error {
	if s.closed.Load() {
		return net.ErrClosed
	}
	s.writing.set(t)
	return nil
}

// deadline is a channel that is closed at a time that can be changed.
type deadline struct {
	mu      sync.Mutex
	expired chan struct{}
	timer   *time.Timer // closes it; nil if there is none to wait for
	changes int         // of the time: a timer that was too late to stop is out of date
}

func (d *deadline) channel() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.expired
}

// set changes the time; zero means never. Who waits for the channel goes on with it.
func (d *deadline) set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
	d.changes++
	select {
	case <-d.expired:
		d.expired = make(chan struct{})
	default:
	}
	if t.IsZero() {
		return
	}
	wait := time.Until(t)
	if wait <= 0 {
		close(d.expired)
		return
	}
	change := d.changes
	d.timer = time.AfterFunc(wait, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.changes == change {
			close(d.expired)
		}
	})
}
