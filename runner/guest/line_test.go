package guest

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

// The cast: port is a machine's one raw stream as a virtio-serial port has it. The guest
// holds its end all the time; host connections come and go, and the guest is not told
// (its end of file is missed, as after a start from a saved state), unless eof is set.
type port struct {
	in   chan []byte // to the guest
	gone chan struct{}
	rest []byte

	mu   sync.Mutex
	cond *sync.Cond
	host net.Conn      // our end of the present host's connection; nil: none
	last chan struct{} // closed when all that it sent has arrived
	left int           // bytes that the guest may send before it is cut; < 0: all
	shut bool
}

func newPort() *port {
	p := &port{in: make(chan []byte), gone: make(chan struct{})}
	p.cond = sync.NewCond(&p.mu)
	return p
}

// attach connects a host, whose connection is cut after so many bytes in a direction;
// negative: never.
func (p *port) attach(toGuest, toHost int) net.Conn {
	host, ours := net.Pipe()
	p.mu.Lock()
	if p.host != nil {
		_ = p.host.Close()
	}
	before, arrived := p.last, make(chan struct{})
	p.host, p.left, p.last = ours, toHost, arrived
	p.cond.Broadcast()
	p.mu.Unlock()
	go func() {
		defer close(arrived)
		defer p.detach(ours)
		if before != nil {
			<-before // no stream mixes what two hosts sent
		}
		buf := make([]byte, 4096)
		for toGuest != 0 {
			size := len(buf)
			if toGuest > 0 {
				size = min(size, toGuest)
			}
			n, err := ours.Read(buf[:size])
			if err != nil {
				return
			}
			toGuest -= n
			select {
			case p.in <- append([]byte(nil), buf[:n]...):
			case <-p.gone:
				return
			}
		}
	}()
	return host
}

func (p *port) detach(conn net.Conn) {
	_ = conn.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.host == conn {
		p.host = nil
	}
}

func (p *port) Read(b []byte) (int, error) {
	for len(p.rest) == 0 {
		select {
		case p.rest = <-p.in:
		case <-p.gone:
			return 0, io.EOF
		}
	}
	n := copy(b, p.rest)
	p.rest = p.rest[n:]
	return n, nil
}

// Write waits for a host, like the kernel does; what a host did not take is lost.
func (p *port) Write(b []byte) (int, error) {
	for sent := 0; sent < len(b); {
		p.mu.Lock()
		for p.host == nil && !p.shut {
			p.cond.Wait()
		}
		host, size := p.host, len(b)-sent
		if p.shut {
			p.mu.Unlock()
			return sent, io.ErrClosedPipe
		}
		if p.left >= 0 {
			size = min(size, p.left)
			p.left -= size
		}
		cut := p.left == 0
		p.mu.Unlock()
		if _, err := host.Write(b[sent : sent+size]); err == nil {
			sent += size
		} else {
			p.detach(host)
			sent = len(b)
		}
		if cut {
			p.detach(host)
		}
	}
	return len(b), nil
}

func (p *port) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.shut {
		p.shut = true
		close(p.gone)
	}
	if p.host != nil {
		_ = p.host.Close()
	}
	p.cond.Broadcast()
	return nil
}

// serveOn runs an agent at the guest's end of raw streams; next gives one after another,
// nil at the end.
func serveOn(t *testing.T, dir string, next func() io.ReadWriteCloser) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	gate := NewGate()
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := Serve(ctx, gate, AgentConfig{Dir: dir, Version: "v-line"}); err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	wg.Go(func() {
		for raw := next(); raw != nil; raw = next() {
			wg.Go(func() {
				if err := ServeLine(ctx, raw, gate.Feed); err != nil {
					t.Errorf("ServeLine: %v", err)
				}
			})
		}
	})
	t.Cleanup(func() {
		cancel()
		wg.Wait()
	})
}

// once gives one raw stream.
func once(raw io.ReadWriteCloser) func() io.ReadWriteCloser {
	return func() io.ReadWriteCloser {
		r := raw
		raw = nil
		return r
	}
}

// within bounds one step of a test: the machine may be slow.
func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func hello(t *testing.T, l *Line, d time.Duration) {
	t.Helper()
	ctx := within(t, d)
	conn, err := l.Dial(ctx)
	if err != nil {
		t.Fatalf("dial: %v", err)
	}
	c := New(conn)
	defer func() { _ = c.Close() }()
	if h, err := c.Hello(ctx); err != nil || h.Version != "v-line" {
		t.Fatalf("hello: %+v, %v", h, err)
	}
}

// newLine is an agent and a line to it whose raw stream is a pipe.
func newLine(t *testing.T) *Line {
	t.Helper()
	raws := make(chan io.ReadWriteCloser)
	over := make(chan struct{})
	serveOn(t, t.TempDir(), func() io.ReadWriteCloser {
		select {
		case raw := <-raws:
			return raw
		case <-over:
			return nil
		}
	})
	l := NewLine(func(ctx context.Context) (net.Conn, error) {
		host, inside := net.Pipe()
		select {
		case raws <- inside:
			return host, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		close(over)
	})
	return l
}

func TestLineCarriesManyStreams(t *testing.T) {
	l := newLine(t)
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			ctx := within(t, time.Minute)
			conn, err := l.Dial(ctx)
			if err != nil {
				t.Errorf("dial: %v", err)
				return
			}
			c := New(conn)
			defer func() { _ = c.Close() }()
			got := 0
			code, err := c.Exec(ctx, Command{Argv: []string{"head", "-c", "300000", "/dev/zero"}}, func(_ Stream, p []byte) { got += len(p) })
			if err != nil || code != 0 || got != 300000 {
				t.Errorf("exec: %d bytes, code %d, %v", got, code, err)
			}
		})
	}
	wg.Wait()
	// A cut line is opened anew, also from many goroutines.
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	for range 5 {
		wg.Go(func() { hello(t, l, time.Minute) })
	}
	wg.Wait()
}

// A host that was cut anywhere, in either direction, without the guest being told, gets
// through again with a new session.
func TestLineIsInStepAgainAfterACutAnywhere(t *testing.T) {
	p := newPort()
	serveOn(t, t.TempDir(), once(p))
	random := rand.New(rand.NewPCG(1, 2))
	cuts := []int{0, 1, 11, 12, 13, 47, 48, 49, 59, 60, 61, 95, 96, 97, 100, 110, 120, 130, 140, 150}
	for range 40 {
		cuts = append(cuts, random.IntN(3000), random.IntN(200_000))
	}
	slowest := time.Duration(0)
	for _, cut := range cuts {
		for _, toGuest := range []bool{true, false} {
			in, out := cut, -1
			if !toGuest {
				in, out = -1, cut
			}
			l := NewLine(func(context.Context) (net.Conn, error) {
				defer func() { in, out = -1, -1 }()
				return p.attach(in, out), nil
			})
			traffic(t, l)
			started := time.Now()
			hello(t, l, 20*time.Second)
			slowest = max(slowest, time.Since(started))
			_ = l.Close()
		}
	}
	t.Logf("%d cuts; the slowest was in step after %v", 2*len(cuts), slowest)
	if slowest > 10*time.Second {
		t.Errorf("in step after %v only", slowest)
	}
}

// traffic goes both ways until it is cut, or enough.
func traffic(t *testing.T, l *Line) {
	t.Helper()
	ctx := within(t, 20*time.Second)
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			conn, err := l.Dial(ctx)
			if err != nil {
				t.Errorf("dial: %v", err)
				return
			}
			c := New(conn)
			defer func() { _ = c.Close() }()
			_ = c.Put(ctx, File{Path: "x", Size: 100_000}, strings.NewReader(strings.Repeat("x", 100_000)))
			_, _ = c.Exec(ctx, Command{Argv: []string{"head", "-c", "100000", "/dev/zero"}}, nil)
		})
	}
	wg.Wait()
}

// marked says when something is written.
type marked struct {
	net.Conn
	marks chan<- struct{}
}

func (m marked) Write(p []byte) (int, error) {
	select {
	case m.marks <- struct{}{}:
	default:
	}
	return m.Conn.Write(p)
}

// A guest that comes late, and one whose stream breaks, are waited for; one that never
// answers is waited for until the context ends.
func TestLineWaitsForTheGuest(t *testing.T) {
	p := newPort()
	marks := make(chan struct{}, 1)
	l := NewLine(func(context.Context) (net.Conn, error) { return marked{p.attach(-1, -1), marks}, nil })
	defer func() { _ = l.Close() }()
	short, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := l.Dial(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("nobody is there: %v", err)
	}
	<-marks // of that dial, which has sent its last
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		hello(t, l, time.Minute)
	}()
	<-marks // the next one's wait for the guest, which may come at any time
	serveOn(t, t.TempDir(), once(p))
	<-answered
	failing := errors.New("no machine")
	if _, err := NewLine(func(context.Context) (net.Conn, error) { return nil, failing }).Dial(t.Context()); !errors.Is(err, failing) {
		t.Errorf("open's error became %v", err)
	}
}

// 10,000 connections, 50 at a time, leave nothing.
func TestTenThousandConnections(t *testing.T) {
	l := newLine(t)
	hello(t, l, time.Minute)
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	goroutines := runtime.NumGoroutine()
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			for range 200 {
				if t.Failed() {
					return
				}
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				conn, err := l.Dial(ctx)
				if err != nil {
					t.Errorf("dial: %v", err)
				} else {
					c := New(conn)
					if _, err := c.Hello(ctx); err != nil {
						t.Errorf("hello: %v", err)
					}
					_ = c.Close()
				}
				cancel()
			}
		})
	}
	wg.Wait()
	eventually(t, "no goroutines but those of before", func() bool { return runtime.NumGoroutine() <= goroutines+5 })
	runtime.GC()
	runtime.ReadMemStats(&after)
	if grown := int64(after.HeapInuse) - int64(before.HeapInuse); grown > 20<<20 {
		t.Errorf("%d MiB more than before", grown>>20)
	}
}

func BenchmarkHello(b *testing.B) {
	for _, kind := range []string{"pipe", "line"} {
		b.Run(kind, func(b *testing.B) {
			gate := NewGate()
			ctx, cancel := context.WithCancel(b.Context())
			host, inside := net.Pipe()
			var wg sync.WaitGroup
			wg.Go(func() { _ = Serve(ctx, gate, AgentConfig{}) })
			conn := host
			if kind == "line" {
				wg.Go(func() { _ = ServeLine(ctx, inside, gate.Feed) })
				var err error
				if conn, err = NewLine(func(context.Context) (net.Conn, error) { return host, nil }).Dial(ctx); err != nil {
					b.Fatal(err)
				}
			} else {
				gate.pass(inside, nil)
			}
			c := New(conn)
			for b.Loop() {
				if _, err := c.Hello(ctx); err != nil {
					b.Fatal(err)
				}
			}
			_ = c.Close()
			cancel()
			wg.Wait()
		})
	}
}
