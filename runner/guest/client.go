package guest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// Limits of talking to a guest that does not read.
const (
	writeLimit  = 30 * time.Second // for one message
	cancelLimit = time.Second      // for the word that nobody waits any more
)

// Client talks to one agent over one connection. Its methods are safe for concurrent
// use. After an error that is ErrLost, dial again: the agent keeps its state.
type Client struct {
	conn net.Conn
	read chan struct{} // closed when the reading goroutine has ended

	writing chan struct{} // holds a token while one frame is written
	mu      sync.Mutex    // guards what follows
	next    uint32
	waiting map[uint32]*call
	failure error // why the stream ended
}

// call is a request that waits for its answers.
type call struct {
	id       uint32
	answers  chan frame // with room for one, or for a stream's window
	streamed bool       // each answer counts; otherwise only the latest
}

// New takes over conn; Close it to end the goroutine that reads it.
func New(conn net.Conn) *Client {
	c := &Client{conn: conn, read: make(chan struct{}), writing: make(chan struct{}, 1), waiting: map[uint32]*call{}}
	go c.receive()
	return c
}

// Close ends the connection and every call on it; the runner goes on.
func (c *Client) Close() error {
	err := c.conn.Close()
	<-c.read
	if err != nil {
		return fmt.Errorf("closing the connection to the guest agent: %w", err)
	}
	return nil
}

// Hello asks for the agent's version and status.
func (c *Client) Hello(ctx context.Context) (Hello, error) {
	f, err := c.ask(ctx, kindHello, nil, kindHelloAnswer)
	if err != nil {
		return Hello{}, fmt.Errorf("hello: %w", err)
	}
	var h Hello
	if err := f.decode(&h); err != nil {
		return Hello{}, fmt.Errorf("hello: %w", err)
	}
	status, ok := h.Status.checked()
	if !ok {
		return Hello{}, fmt.Errorf("hello: %w: unknown state", errFrame)
	}
	return Hello{Protocol: h.Protocol, Version: Plain(h.Version, maxText), Status: status}, nil
}

// Start starts the runner. Starting the same name again is a success, also after it
// has exited; another name is ErrOccupied. After ErrLost it may run or not: ask again.
func (c *Client) Start(ctx context.Context, r Run) error {
	if _, err := c.ask(ctx, kindStart, startBody(r), kindDone); err != nil {
		return fmt.Errorf("starting runner %s: %w", r.Name, err)
	}
	return nil
}

// Watch calls changed with the status now and after each change, and returns the final
// one when the runner has exited. A status that is outrun by the next may be left out:
// each carries all that is known. A nil changed is allowed.
func (c *Client) Watch(ctx context.Context, changed func(Status)) (Status, error) {
	call, err := c.request(ctx, kindWatch, nil, false)
	if err != nil {
		return Status{}, fmt.Errorf("watching the runner: %w", err)
	}
	defer c.forget(call)
	for {
		f, err := c.await(ctx, call, kindStatus)
		if err != nil {
			return Status{}, fmt.Errorf("watching the runner: %w", err)
		}
		var s Status
		if err := f.decode(&s); err != nil {
			return Status{}, fmt.Errorf("watching the runner: %w", err)
		}
		s, ok := s.checked()
		if !ok {
			return Status{}, fmt.Errorf("watching the runner: %w: unknown state", errFrame)
		}
		if changed != nil {
			changed(s)
		}
		if s.State == Exited {
			return s, nil
		}
	}
}

// ask sends one request and waits for its one answer.
func (c *Client) ask(ctx context.Context, k kind, body any, want kind) (frame, error) {
	call, err := c.request(ctx, k, body, false)
	if err != nil {
		return frame{}, err
	}
	defer c.forget(call)
	return c.await(ctx, call, want)
}

// request sends a request; its answers come to the call, which must be forgotten.
func (c *Client) request(ctx context.Context, k kind, body any, streamed bool) (*call, error) {
	c.mu.Lock()
	if c.failure != nil {
		c.mu.Unlock()
		return nil, c.failure
	}
	room := 1
	if streamed {
		room = window + 2 // and the first and last answers, which are not data
	}
	c.next++
	call := &call{id: c.next, answers: make(chan frame, room), streamed: streamed}
	c.waiting[call.id] = call
	c.mu.Unlock()
	b, err := encodeFrame(k, call.id, body)
	if err == nil {
		err = c.write(ctx, b)
	}
	if err != nil {
		c.forget(call)
		return nil, err
	}
	return call, nil
}

// await takes the next answer of a request, which must be of one kind.
func (c *Client) await(ctx context.Context, call *call, want kind) (frame, error) {
	f, err := c.take(ctx, call)
	if err == nil && f.kind != want {
		err = fmt.Errorf("%w: kind %d where %d was due", errFrame, f.kind, want)
	}
	return f, err
}

// take takes the next answer of a request, if it is no error. If ctx ends first, the
// agent is told.
func (c *Client) take(ctx context.Context, call *call) (frame, error) {
	var f frame
	var open bool
	select {
	case f, open = <-call.answers:
	case <-ctx.Done():
		c.cancel(ctx, call)
		return frame{}, ctx.Err()
	}
	switch {
	case !open:
		c.mu.Lock()
		defer c.mu.Unlock()
		return frame{}, c.failure
	case f.kind == kindError:
		return frame{}, f.asError()
	}
	return f, nil
}

// cancel gives a request up. If the agent cannot be told, it is told by hanging up.
func (c *Client) cancel(ctx context.Context, call *call) {
	ctx, stop := context.WithTimeout(context.WithoutCancel(ctx), cancelLimit)
	defer stop()
	b, err := encodeFrame(kindCancel, call.id, nil)
	if err != nil || c.write(ctx, b) != nil {
		_ = c.conn.Close()
	}
}

func (c *Client) forget(call *call) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.waiting, call.id)
}

// write sends one encoded message. When it is cut short the connection is closed: half of
// the message may be out, or all of it later, and nothing sensible can follow.
func (c *Client) write(ctx context.Context, b []byte) error {
	limit, cancel := context.WithTimeout(ctx, writeLimit)
	defer cancel()
	select {
	case c.writing <- struct{}{}:
	case <-limit.Done():
		return c.unwritten(ctx, limit.Err())
	}
	// A stream without deadlines is closed by its owner.
	_ = c.conn.SetWriteDeadline(time.Time{})
	cut := make(chan struct{})
	stop := context.AfterFunc(limit, func() {
		_ = c.conn.SetWriteDeadline(time.Unix(1, 0))
		close(cut)
	})
	_, err := c.conn.Write(b)
	if !stop() { // a deadline that is about to be set must not meet the next message
		<-cut
	}
	<-c.writing
	if err == nil {
		return nil
	}
	_ = c.conn.Close()
	return c.unwritten(ctx, err)
}

// unwritten is the error of a message that did not go out.
func (c *Client) unwritten(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return fmt.Errorf("%w: %w", ErrLost, err)
}

// receive hands answers to the calls that wait for them until the stream ends.
func (c *Client) receive() {
	defer close(c.read)
	for {
		f, err := readFrame(c.conn)
		if err == nil {
			err = c.hand(f)
		}
		if err != nil {
			c.fail(err)
			return
		}
	}
}

// hand gives an answer to its call, and never waits. A status that was not yet taken is
// replaced by the next, and a stream has its window: so a flood costs no memory.
func (c *Client) hand(f frame) error {
	c.mu.Lock()
	call, ok := c.waiting[f.id]
	c.mu.Unlock()
	if !ok {
		return nil // a request that was given up
	}
	if call.streamed {
		if (f.kind == kindStdout || f.kind == kindStderr) && len(f.body) > maxChunk {
			return fmt.Errorf("%w: %d bytes of output at once", errFrame, len(f.body))
		}
		select {
		case call.answers <- f:
			return nil
		default:
			return fmt.Errorf("%w: more output than was asked for", errFrame)
		}
	}
	select {
	case <-call.answers:
	default:
	}
	call.answers <- f // has room: only this goroutine sends
	return nil
}

// fail ends every call that waits.
func (c *Client) fail(err error) {
	_ = c.conn.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.failure = fmt.Errorf("%w: %w", ErrLost, err)
	if errors.Is(err, errFrame) {
		c.failure = err // not the line's fault: dialling again will not help
	}
	for _, call := range c.waiting {
		close(call.answers)
	}
	clear(c.waiting)
}
