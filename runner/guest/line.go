package guest

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/yamux"
)

// Patience of the host's end.
const (
	firstAsk = 50 * time.Millisecond  // until a mark that was not answered is sent again, doubled
	lastAsk  = time.Second            // each time up to this
	reopen   = 100 * time.Millisecond // until a stream that broke at once is opened again
	rawBlock = 64 << 10               // bytes read from it at once
)

// Line is the host's end of the one stream that a machine has to its agent. It carries
// as many streams as are dialled. It is safe for concurrent use.
//
// The raw stream may be cut anywhere and opened again: the machine was saved and started
// from there, or the process that held the host's end was replaced. Then all streams of
// before are lost, and new ones work.
type Line struct {
	open   func(ctx context.Context) (net.Conn, error)
	reopen time.Duration // the constant, but in tests
	turn   chan struct{} // holds a token while one goroutine connects

	mu      sync.Mutex
	raw     net.Conn       // nil: none
	session *yamux.Session // over raw; nil while that is being connected
	dials   map[*dial]struct{}
}

// dial is one call of Dial under way.
type dial struct{ end context.CancelCauseFunc }

// NewLine makes a line; open opens the raw stream, when it is first needed and again
// after it broke. It waits for the machine as long as that makes sense: its error is
// Dial's.
func NewLine(open func(ctx context.Context) (net.Conn, error)) *Line {
	return &Line{open: open, reopen: reopen, turn: make(chan struct{}, 1), dials: map[*dial]struct{}{}}
}

// Dial opens one more stream to the agent. It waits until the guest answers or ctx ends.
// The stream has a CloseWrite, which ends one direction (the other ends two minutes later
// at the latest), and its deadlines hold whatever the guest does.
func (l *Line) Dial(ctx context.Context) (net.Conn, error) {
	ctx, done := l.untilClose(ctx)
	defer done()
	for {
		session, err := l.live(ctx)
		if err != nil {
			return nil, undialled(ctx, err)
		}
		conn, err := openStream(ctx, session)
		if err == nil {
			return conn, nil
		}
		if err := pause(ctx, l.reopen); err != nil { // the session has just broken
			return nil, undialled(ctx, err)
		}
	}
}

// untilClose makes a context that the next Close ends.
func (l *Line) untilClose(ctx context.Context) (context.Context, func()) {
	ctx, end := context.WithCancelCause(ctx)
	d := &dial{end: end}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.dials[d] = struct{}{}
	return ctx, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.dials, d)
		end(nil)
	}
}

// undialled is a dial's error: what follows from Close is net.ErrClosed.
func undialled(ctx context.Context, err error) error {
	if errors.Is(context.Cause(ctx), net.ErrClosed) {
		err = net.ErrClosed
	}
	return fmt.Errorf("the line to the guest agent: %w", err)
}

// Close cuts all streams, ends every dial under way with net.ErrClosed, and closes the
// raw stream; a later Dial opens it anew.
func (l *Line) Close() error {
	l.mu.Lock()
	for d := range l.dials {
		d.end(net.ErrClosed)
	}
	raw, session := l.raw, l.session
	l.raw, l.session = nil, nil
	l.mu.Unlock()
	var err error
	if raw != nil {
		err = raw.Close()
	}
	if session != nil {
		_ = session.Close() // waits for its goroutines
	}
	if err != nil && !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("closing the line to the guest agent: %w", err)
	}
	return nil
}

// openStream gives up when ctx ends: a stuck raw stream holds the multiplexer for longer.
func openStream(ctx context.Context, session *yamux.Session) (net.Conn, error) {
	type result struct {
		s   *yamux.Stream
		err error
	}
	opened := make(chan result)
	go func() {
		s, err := session.OpenStream()
		select {
		case opened <- result{s, err}:
		case <-ctx.Done():
			if err == nil {
				_ = s.Close()
			}
		}
	}()
	select {
	case r := <-opened:
		if r.err != nil {
			return nil, r.err
		}
		return newStream(r.s), nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// live returns the session, and makes one if there is none.
func (l *Line) live(ctx context.Context) (*yamux.Session, error) {
	select {
	case l.turn <- struct{}{}:
		defer func() { <-l.turn }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if session := l.current(); session != nil {
		return session, nil
	}
	for {
		raw, err := l.open(ctx)
		if err != nil {
			return nil, err
		}
		session, err := l.begin(ctx, raw)
		if err == nil {
			return session, nil
		}
		_ = raw.Close()
		if err := pause(ctx, l.reopen); err != nil {
			return nil, err
		}
	}
}

func (l *Line) current() *yamux.Session {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.session == nil || l.session.IsClosed() {
		return nil
	}
	return l.session
}

// begin makes raw ours and begins a session on it. If it fails raw must be closed.
func (l *Line) begin(ctx context.Context, raw net.Conn) (*yamux.Session, error) {
	l.mu.Lock()
	if ctx.Err() != nil { // Close has been here, and will not see raw
		l.mu.Unlock()
		return nil, ctx.Err()
	}
	l.raw, l.session = raw, nil
	l.mu.Unlock()
	stop := context.AfterFunc(ctx, func() { _ = raw.Close() })
	in, err := agree(raw)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return nil, err
	}
	session, err := yamux.Client(struct {
		io.Reader
		io.WriteCloser
	}{&guard{in: in}, raw}, multiplexing())
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.raw != raw { // closed meanwhile
		go func() { _ = session.Close() }()
		return nil, net.ErrClosed
	}
	l.session = session
	return session, nil
}

// agree sends marks until the guest answers, and returns what follows the answer.
func agree(raw net.Conn) (*bufio.Reader, error) {
	var nonce word
	_, _ = rand.Read(nonce[:]) // never fails
	answered := make(chan struct{})
	asking := make(chan struct{})
	go func() {
		defer close(asking)
		ask(raw, mark(wordBegin, nonce), answered)
	}()
	defer func() {
		close(answered)
		<-asking // no mark may follow what comes next
		_ = raw.SetWriteDeadline(time.Time{})
	}()
	in := bufio.NewReaderSize(&watched{raw: raw, nonce: nonce, losses: scanner{meaning: wordLost}}, rawBlock)
	answers := scanner{meaning: wordAnswer}
	for {
		if _, err := in.Peek(1); err != nil {
			return nil, fmt.Errorf("waiting for the guest to answer: %w", err)
		}
		block, _ := in.Peek(in.Buffered())
		got, after, ok := answers.find(block)
		_, _ = in.Discard(after)
		if ok && got == nonce {
			return in, nil
		}
	}
}

// ask sends the mark again and again, since the guest may not listen yet; each is sent
// as a whole, unless nobody reads for lastAsk.
func ask(raw net.Conn, mark []byte, answered <-chan struct{}) {
	for wait := firstAsk; ; wait = min(2*wait, lastAsk) {
		_ = raw.SetWriteDeadline(time.Now().Add(lastAsk))
		_, _ = raw.Write(mark) // a stream that broke is noticed by who reads it
		select {
		case <-answered:
			return
		case <-time.After(wait):
		}
	}
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
