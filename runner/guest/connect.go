package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync"
	"time"
)

// connectLimit bounds a connection inside the guest: its loopback answers at once.
const connectLimit = 10 * time.Second

// connectID is the only request's id on such a stream.
const connectID = 1

// Connect makes conn, a fresh stream to the agent on which nothing was said yet, a raw
// stream to a TCP port of the guest's loopback. After an error conn is of no more use.
func Connect(ctx context.Context, conn net.Conn, port int) error {
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	err := connect(conn, port)
	if !stop() {
		return fmt.Errorf("connecting to port %d of the guest: %w", port, ctx.Err())
	}
	if err != nil {
		return fmt.Errorf("connecting to port %d of the guest: %w", port, err)
	}
	return nil
}

func connect(conn net.Conn, port int) error {
	b, err := encodeFrame(kindConnect, connectID, connectBody{Port: port})
	if err != nil {
		return err
	}
	if _, err := conn.Write(b); err != nil {
		return fmt.Errorf("%w: %w", ErrLost, err)
	}
	f, err := readFrame(conn) // not a byte more than the answer
	switch {
	case errors.Is(err, errFrame):
		return err
	case err != nil:
		return fmt.Errorf("%w: %w", ErrLost, err)
	case f.kind == kindError:
		return f.asError()
	case f.kind != kindDone || f.id != connectID:
		return fmt.Errorf("%w: kind %d where %d was due", errFrame, f.kind, kindDone)
	}
	return nil
}

// connect is the agent's end: it carries the stream until both directions have ended, or
// one has failed, or ctx ends, which closes both.
func (s *session) connect(ctx context.Context, f frame) {
	var b connectBody
	if err := f.decode(&b); err != nil {
		s.fail(f.id, err)
		return
	}
	service, err := dialLoopback(ctx, b.Port)
	if err != nil {
		s.fail(f.id, err)
		return
	}
	defer func() { _ = service.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = service.Close() })
	defer stop()
	if !s.send(kindDone, f.id, nil) {
		return
	}
	var wg sync.WaitGroup
	wg.Go(func() { carry(service, s.conn) })
	carry(s.conn, service)
	wg.Wait()
}

// dialLoopback connects to whichever loopback somebody listens on.
func dialLoopback(ctx context.Context, port int) (net.Conn, error) {
	if port < 1 || port > 65535 {
		return nil, fmt.Errorf("port %d: want 1 to 65535", port)
	}
	ctx, cancel := context.WithTimeout(ctx, connectLimit)
	defer cancel()
	var failed error
	for _, host := range []string{"127.0.0.1", "::1"} {
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(port)))
		if err == nil {
			return conn, nil
		}
		if failed == nil {
			failed = err
		}
	}
	return nil, failed
}

// carry copies until from ends and passes the end on, by half where the stream can; if
// either fails it closes both, so that the other direction ends, too.
func carry(to, from net.Conn) {
	_, err := io.Copy(to, from)
	if half, ok := to.(interface{ CloseWrite() error }); ok && err == nil {
		err = half.CloseWrite()
	} else if err == nil {
		err = to.Close()
	}
	if err != nil {
		_, _ = to.Close(), from.Close()
	}
}
