package guest

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"

	"github.com/hashicorp/yamux"
)

// Gate is a listener whose connections come from others that come and go: an agent
// serves one Gate for as long as it lives, and each life of a line is fed into it.
type Gate struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

var _ net.Listener = (*Gate)(nil)

// NewGate makes one.
func NewGate() *Gate { return &Gate{conns: make(chan net.Conn), done: make(chan struct{})} }

// Accept fails with net.ErrClosed after Close.
func (g *Gate) Accept() (net.Conn, error) {
	select {
	case conn := <-g.conns:
		return conn, nil
	case <-g.done:
		return nil, net.ErrClosed
	}
}

// Close wakes Accept; connections that were accepted go on.
func (g *Gate) Close() error {
	g.once.Do(func() { close(g.done) })
	return nil
}

// Addr says nothing: there is no address.
func (g *Gate) Addr() net.Addr { return gateAddr{} }

type gateAddr struct{}

func (gateAddr) Network() string { return "line" }
func (gateAddr) String() string  { return "line" }

// Feed passes on what l accepts, until either is closed; then it closes l.
func (g *Gate) Feed(l net.Listener) error {
	defer func() { _ = l.Close() }()
	fed := make(chan struct{})
	defer close(fed)
	go func() {
		select {
		case <-g.done:
			_ = l.Close()
		case <-fed:
		}
	}()
	for {
		conn, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		g.pass(conn, nil)
	}
}

// pass hands one connection to whoever accepts, unless the gate or over is closed.
func (g *Gate) pass(conn net.Conn, over <-chan struct{}) {
	select {
	case g.conns <- conn:
	case <-g.done:
		_ = conn.Close()
	case <-over:
		_ = conn.Close()
	}
}

// ServeLine is the guest's end for one life of the raw stream: it calls serve with a
// listener of the host's streams, in as many sessions as the host begins, and returns
// when raw has ended, or ctx, or serve; then raw is closed. Closing raw must end a Read
// and a Write on it. The error is serve's.
func ServeLine(ctx context.Context, raw io.ReadWriteCloser, serve func(net.Listener) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g := NewGate()
	served := make(chan error, 1)
	go func() {
		served <- serve(g)
		cancel()
	}()
	hangUp := sync.OnceFunc(func() { _ = raw.Close() })
	defer hangUp()
	stop := context.AfterFunc(ctx, hangUp)
	defer stop()

	(&pump{raw: raw, gate: g, begins: scanner{meaning: wordBegin}}).run(hangUp)
	_ = g.Close()
	return <-served
}

// pump reads a raw stream for one session after the other.
type pump struct {
	raw    io.ReadWriteCloser
	gate   *Gate
	begins scanner
	now    *lineSession // nil: none
}

// lineSession is one session, from a mark to the next.
type lineSession struct {
	nonce word
	in    *io.PipeWriter // what the host sends
	mux   *yamux.Session
	fresh []byte        // what came and may be one more copy of the mark; nil: that is over
	over  chan struct{} // closed when nothing of it runs
}

// run reads until the stream ends; hangUp closes it.
func (p *pump) run(hangUp func()) {
	buf := make([]byte, maxChunk)
	for {
		n, err := p.raw.Read(buf)
		if e := p.take(buf[:n]); err == nil {
			err = e
		}
		if err != nil {
			hangUp() // ends what is being written
			p.endSession()
			return
		}
	}
}

// take looks for marks in what was read, and gives the rest to the session.
func (p *pump) take(b []byte) error {
	for len(b) > 0 {
		nonce, after, found := p.begins.find(b)
		switch {
		case found && p.now != nil && p.now.fresh != nil && nonce == p.now.nonce:
			p.now.fresh = p.now.fresh[:0] // sent again before it was answered
		case found:
			if err := p.beginSession(nonce); err != nil {
				return err
			}
		default:
			p.deliver(b[:after])
		}
		b = b[after:]
	}
	return nil
}

// deliver gives bytes to the session; without one they are dropped. What begins like a
// mark at the session's begin is kept back until it is known not to be one.
func (p *pump) deliver(b []byte) {
	s := p.now
	if s == nil {
		return
	}
	if s.fresh != nil {
		if s.fresh = append(s.fresh, b...); s.fresh[0] == wordBegin[0] && len(s.fresh) < markSize {
			return
		}
		b, s.fresh = s.fresh, nil
	}
	if _, err := s.in.Write(b); err != nil {
		p.endSession() // it broke, and what follows is nobody's until the next mark
	}
}

// beginSession answers a mark.
func (p *pump) beginSession(nonce word) error {
	p.endSession()
	if _, err := p.raw.Write(mark(wordAnswer, nonce)); err != nil {
		return err
	}
	out, in := io.Pipe()
	mux, err := yamux.Server(&guestEnd{PipeReader: out, raw: p.raw}, multiplexing())
	if err != nil {
		return err
	}
	s := &lineSession{nonce: nonce, in: in, mux: mux, fresh: []byte{}, over: make(chan struct{})}
	p.now = s
	go func() {
		defer close(s.over)
		p.accept(s)
	}()
	return nil
}

// accept passes on the host's streams until the session ends, and tells the host, which
// would otherwise notice by silence only.
func (p *pump) accept(s *lineSession) {
	for {
		conn, err := s.mux.AcceptStream()
		if err != nil {
			break
		}
		p.gate.pass(newStream(conn), s.mux.CloseChan())
	}
	_ = s.in.CloseWithError(errCut) // what comes now has no reader
	_ = s.mux.Close()
	_, _ = p.raw.Write(mark(wordLost, s.nonce))
}

// endSession ends the session and waits until nothing of it writes any more.
func (p *pump) endSession() {
	if p.now == nil {
		return
	}
	_ = p.now.mux.Close()
	<-p.now.over
	p.now = nil
}

// guestEnd is the stream as a session sees it: closing it ends the session only.
type guestEnd struct {
	*io.PipeReader
	raw io.Writer
}

func (g *guestEnd) Write(p []byte) (int, error) { return g.raw.Write(p) }
