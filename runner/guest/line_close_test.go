package guest

import (
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"time"
)

// Close ends dials under way, wherever they stand, and the raw stream stays closed until
// somebody dials again.
func TestCloseEndsDials(t *testing.T) {
	for _, stage := range []string{"opening", "opening, deaf", "asking"} {
		t.Run(stage, func(t *testing.T) {
			p := newPort()
			opened, ready := make(chan struct{}, 10), make(chan struct{})
			l := NewLine(func(ctx context.Context) (net.Conn, error) {
				opened <- struct{}{}
				switch stage {
				case "opening":
					<-ctx.Done()
					return nil, ctx.Err()
				case "opening, deaf":
					<-ready
				}
				return p.attach(-1, -1), nil
			})
			ctx := within(t, time.Minute)
			dialled := make(chan error, 1)
			go func() {
				_, err := l.Dial(ctx)
				dialled <- err
			}()
			<-opened
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			close(ready)
			if err := <-dialled; !errors.Is(err, net.ErrClosed) {
				t.Errorf("the dial ended with %v", err)
			}
			if len(opened) > 0 {
				t.Error("the raw stream was opened again")
			}
			if stage = ""; t.Failed() {
				return
			}
			serveOn(t, t.TempDir(), once(p))
			hello(t, l, time.Minute)
			_ = l.Close()
		})
	}
}

func eventually(t *testing.T, what string, seen func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !seen(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not seen: %s", what)
		}
	}
}

func TestLineStreamsAreConnections(t *testing.T) {
	a, b := net.Pipe()
	streams := make(chan net.Conn, 1)
	done := make(chan error, 1)
	go func() {
		done <- ServeLine(t.Context(), b, func(l net.Listener) error {
			for {
				conn, err := l.Accept()
				if err != nil {
					return nil
				}
				streams <- conn
			}
		})
	}()
	l := NewLine(func(context.Context) (net.Conn, error) { return a, nil })
	conn, err := l.Dial(within(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	inside := <-streams
	_ = conn.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	if _, err := conn.Read(make([]byte, 1)); err == nil || !isTimeout(err) {
		t.Errorf("a read at its deadline: %v", err)
	}
	_ = conn.SetDeadline(time.Time{})
	_ = conn.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
	for err = nil; err == nil; { // nobody reads: the window fills
		_, err = conn.Write(make([]byte, 100_000))
	}
	if !isTimeout(err) {
		t.Errorf("a write at its deadline: %v", err)
	}
	// The other side may end first, and is heard to its end.
	if _, err := inside.Write([]byte("last words")); err != nil {
		t.Fatal(err)
	}
	if err := inside.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(conn); err != nil || string(got) != "last words" {
		t.Errorf("heard %q, %v", got, err)
	}
	reading := make(chan error, 1)
	go func() {
		_, err := io.Copy(io.Discard, inside)
		for err == nil {
			_, err = inside.Read(make([]byte, 1))
		}
		reading <- err
	}()
	_ = inside.Close()
	if err := <-reading; !errors.Is(err, net.ErrClosed) && !errors.Is(err, io.EOF) {
		t.Errorf("a read on a closed stream: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
	if err := <-done; err != nil {
		t.Errorf("ServeLine: %v", err)
	}
}

func isTimeout(err error) bool {
	var e net.Error
	return errors.As(err, &e) && e.Timeout()
}
