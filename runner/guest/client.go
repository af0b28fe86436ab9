package guest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// writeLimit bounds one write to a guest that does not read.
const writeLimit = 30 * time.Second

// Client talks to one agent over one connection. Its methods are safe for concurrent
// use. After an error that is ErrLost, dial again: the agent keeps its state.
type Client struct {
	conn net.Conn
	read chan struct{} // closed when the reading goroutine has ended

	writing sync.Mutex // one frame at a time
	mu      sync.Mutex // guards what follows
	next    uint32
	waiting map[uint32]chan frame // by request id; holds the latest answer only
	failure error                 // why the stream ended
}

// New takes over conn; Close it to end the goroutine that reads it.
func New(conn net.Conn) *Client {
	c := &Client{conn: conn, read: make(chan struct{}), waiting: map[uint32]chan frame{}}
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
	f, err := c.call(ctx, kindHello, nil, kindHelloAnswer)
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
	return Hello{Protocol: h.Protocol, Version: clip(h.Version, maxText), Status: status}, nil
}

// Start starts the runner. Starting the same name again is a success, also after it
// has exited; another name is ErrOccupied. After ErrLost it may run or not: ask again.
func (c *Client) Start(ctx context.Context, r Run) error {
	if _, err := c.call(ctx, kindStart, startBody(r), kindDone); err != nil {
		return fmt.Errorf("starting runner %s: %w", r.Name, err)
	}
	return nil
}

// Watch calls changed with the status now and after each change, and returns the final
// one when the runner has exited. A status that is outrun by the next may be left out:
// each carries all that is known. A nil changed is allowed.
func (c *Client) Watch(ctx context.Context, changed func(Status)) (Status, error) {
	id, answers, err := c.request(kindWatch, nil)
	if err != nil {
		return Status{}, fmt.Errorf("watching the runner: %w", err)
	}
	defer c.forget(id)
	for {
		f, err := c.await(ctx, id, answers, kindStatus)
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

// call sends one request and waits for its one answer.
func (c *Client) call(ctx context.Context, k kind, body any, want kind) (frame, error) {
	id, answers, err := c.request(k, body)
	if err != nil {
		return frame{}, err
	}
	defer c.forget(id)
	return c.await(ctx, id, answers, want)
}

// request sends a request; its answers come on the channel.
func (c *Client) request(k kind, body any) (uint32, <-chan frame, error) {
	c.mu.Lock()
	if c.failure != nil {
		c.mu.Unlock()
		return 0, nil, c.failure
	}
	c.next++
	id, answers := c.next, make(chan frame, 1)
	c.waiting[id] = answers
	c.mu.Unlock()
	if err := c.write(k, id, body); err != nil {
		c.forget(id)
		return 0, nil, err
	}
	return id, answers, nil
}

// await takes the next answer of a request. If ctx ends first, the agent is told.
func (c *Client) await(ctx context.Context, id uint32, answers <-chan frame, want kind) (frame, error) {
	var f frame
	var open bool
	select {
	case f, open = <-answers:
	case <-ctx.Done():
		_ = c.write(kindCancel, id, nil) // if it fails the connection is gone, and with it the request
		return frame{}, ctx.Err()
	}
	switch {
	case !open:
		c.mu.Lock()
		defer c.mu.Unlock()
		return frame{}, c.failure
	case f.kind == kindError:
		var e errorBody
		if err := f.decode(&e); err != nil {
			return frame{}, err
		}
		return frame{}, e.asError()
	case f.kind != want:
		return frame{}, fmt.Errorf("%w: kind %d where %d was due", errFrame, f.kind, want)
	}
	return f, nil
}

func (c *Client) forget(id uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.waiting, id)
}

func (c *Client) write(k kind, id uint32, body any) error {
	b, err := encodeFrame(k, id, body)
	if err != nil {
		return err
	}
	c.writing.Lock()
	defer c.writing.Unlock()
	_ = c.conn.SetWriteDeadline(time.Now().Add(writeLimit)) // a stream without deadlines is closed by its owner
	if _, err := c.conn.Write(b); err != nil {
		_ = c.conn.Close() // half a frame may be out: nothing sensible can follow
		return fmt.Errorf("%w: %w", ErrLost, err)
	}
	return nil
}

// receive hands answers to the calls that wait for them until the stream ends. An
// answer that was not yet taken is replaced by the next, so a flood costs no memory.
func (c *Client) receive() {
	defer close(c.read)
	for {
		f, err := readFrame(c.conn)
		if err != nil {
			c.fail(err)
			return
		}
		c.mu.Lock()
		answers, ok := c.waiting[f.id]
		c.mu.Unlock()
		if !ok {
			continue // a request that was given up
		}
		select {
		case <-answers:
		default:
		}
		answers <- f // has room: only this goroutine sends
	}
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
	for _, answers := range c.waiting {
		close(answers)
	}
	clear(c.waiting)
}
