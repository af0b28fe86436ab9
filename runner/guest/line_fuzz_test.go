package guest

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"
)

// muxFrame is a message of the multiplexer as bytes.
func muxFrame(kind byte, flags uint16, stream, length uint32, body ...byte) []byte {
	b := binary.BigEndian.AppendUint16([]byte{0, kind}, flags)
	b = binary.BigEndian.AppendUint32(b, stream)
	return append(binary.BigEndian.AppendUint32(b, length), body...)
}

// wicked is what a guest might send to harm its host.
var wicked = map[string][]byte{
	"a flood of pings":          bytes.Repeat(muxFrame(muxPing, muxOpens, 0, 7), 1000),
	"streams of its own":        bytes.Repeat(muxFrame(1, muxOpens, 2, 0), 1000),
	"a stream opened by data":   muxFrame(muxData, muxOpens, 4, 1, 'x'),
	"an endless message":        muxFrame(muxData, 0, 1, 1<<32-1),
	"more than the window":      muxFrame(muxData, 0, 1, maxBody+1),
	"a message that never ends": muxFrame(muxData, 0, 1, 1000, 'x'),
	"another version":           {9, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0},
	"another type":              muxFrame(9, 0, 1, 0),
	"two ends":                  append(muxFrame(1, 4, 1, 0), muxFrame(1, 4, 1, 0)...),
	"a reset":                   muxFrame(1, 8, 1, 0),
	"going away":                muxFrame(3, 0, 0, 1),
	"windows that overflow":     bytes.Repeat(muxFrame(1, 0, 1, 1<<32-1), 100),
	"answers twice":             bytes.Repeat(muxFrame(1, 2, 1, 0), 100),
}

// guestThatSays answers a host's mark, then sends what it is given and hangs up, or waits
// if stay is closed later.
func guestThatSays(raw net.Conn, says []byte, stay <-chan struct{}) {
	defer func() { _ = raw.Close() }()
	begins := scanner{meaning: wordBegin}
	buf := make([]byte, 4096)
	for {
		n, err := raw.Read(buf)
		if err != nil {
			return
		}
		if nonce, _, ok := begins.find(buf[:n]); ok {
			if _, err := raw.Write(mark(wordAnswer, nonce)); err != nil {
				return
			}
			break
		}
	}
	heard := make(chan struct{})
	go func() {
		defer close(heard)
		_, _ = io.Copy(io.Discard, raw)
	}()
	if len(says) > 0 {
		_, _ = raw.Write(says)
	}
	if stay != nil {
		<-stay
	}
	_ = raw.Close()
	<-heard
}

// Whatever a guest does on its line, calls end with their context and closing does not hang.
func TestAWickedGuest(t *testing.T) {
	for name, says := range wicked {
		t.Run(name, func(t *testing.T) {
			stay := make(chan struct{})
			var wg sync.WaitGroup
			l := NewLine(func(context.Context) (net.Conn, error) {
				host, inside := net.Pipe()
				wg.Go(func() { guestThatSays(inside, says, stay) })
				return host, nil
			})
			started := time.Now()
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			defer cancel()
			if conn, err := l.Dial(ctx); err == nil {
				c := New(conn)
				if _, err := c.Hello(ctx); err == nil {
					t.Error("it said hello")
				}
				_ = c.Close()
			}
			_ = l.Close()
			if took := time.Since(started); took > 15*time.Second {
				t.Errorf("it held us for %v", took)
			}
			close(stay)
			wg.Wait()
		})
	}
}

// A guest that answers and then reads nothing more stops the raw stream; nobody waits for
// it longer than asked.
func TestADeafGuest(t *testing.T) {
	for _, room := range []int{0, 12, 1000} { // bytes that it still reads
		host, inside := net.Pipe()
		go func() {
			begins := scanner{meaning: wordBegin}
			buf := make([]byte, markSize)
			for {
				n, err := inside.Read(buf)
				if err != nil {
					return
				}
				if nonce, _, ok := begins.find(buf[:n]); ok {
					_, _ = inside.Write(mark(wordAnswer, nonce))
					_, _ = io.ReadFull(inside, make([]byte, room))
					return
				}
			}
		}()
		started := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		l := NewLine(func(context.Context) (net.Conn, error) { return host, nil })
		conn, err := l.Dial(ctx)
		if err == nil {
			c := New(conn)
			for err == nil {
				_, err = c.Exec(ctx, Command{Argv: []string{"x"}, Input: make([]byte, 1000)}, nil)
			}
			_ = c.Close()
		}
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("room for %d: %v", room, err)
		}
		_ = l.Close()
		if took := time.Since(started); took > 15*time.Second {
			t.Errorf("room for %d: it held us for %v", room, took)
		}
		_ = inside.Close()
		cancel()
	}
}

// The guard lets nothing through that makes the multiplexer hold memory.
func TestGuardBoundsTheGuest(t *testing.T) {
	for _, name := range []string{"a flood of pings", "streams of its own", "a stream opened by data", "an endless message", "more than the window"} {
		g := &guard{in: bufio.NewReader(bytes.NewReader(wicked[name]))}
		n, err := io.Copy(io.Discard, g)
		if !errors.Is(err, errFrame) || n > maxPings*muxHeader {
			t.Errorf("%s: %d bytes passed, %v", name, n, err)
		}
	}
}

// FuzzLineHost: whatever a guest sends on the raw stream, the host's end neither panics
// nor hangs nor takes memory.
func FuzzLineHost(f *testing.F) {
	for _, says := range wicked {
		f.Add(says, true)
	}
	f.Add(mark(wordLost, word{}), true)
	f.Add(mark(wordAnswer, word{}), false)
	f.Fuzz(func(t *testing.T, says []byte, answers bool) {
		var wg sync.WaitGroup
		opened := 0
		l := NewLine(func(context.Context) (net.Conn, error) {
			if opened++; opened > 2 {
				return nil, net.ErrClosed
			}
			host, inside := net.Pipe()
			wg.Go(func() {
				if answers {
					guestThatSays(inside, says, nil)
					return
				}
				go func() { _, _ = io.Copy(io.Discard, inside) }()
				_, _ = inside.Write(says)
				_ = inside.Close()
			})
			return host, nil
		})
		l.reopen = 0
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		if conn, err := l.Dial(ctx); err == nil {
			c := New(conn)
			_, _ = c.Hello(ctx)
			_ = c.Close()
		}
		_ = l.Close()
		wg.Wait()
		if ctx.Err() != nil {
			t.Error("the host's end hung")
		}
	})
}

// FuzzLineGuest: whatever the host's side sends, the guest's end neither panics nor hangs,
// and a host that begins anew afterwards is served.
func FuzzLineGuest(f *testing.F) {
	begin := mark(wordBegin, word{1})
	f.Add([]byte(nil))
	f.Add(begin)
	f.Add(append(bytes.Clone(begin), begin...))
	f.Add(append(bytes.Clone(begin), begin[:20]...))
	f.Add(append(bytes.Clone(begin), mark(wordBegin, word{2})...))
	for _, says := range wicked {
		f.Add(append(bytes.Clone(begin), says...))
	}
	f.Fuzz(func(t *testing.T, sent []byte) {
		p := newPort()
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		gate := NewGate()
		var wg sync.WaitGroup
		wg.Go(func() { _ = ServeLine(ctx, p, gate.Feed) })
		wg.Go(func() {
			for {
				conn, err := gate.Accept()
				if err != nil {
					return
				}
				wg.Go(func() {
					_, _ = io.Copy(conn, conn)
					_ = conn.Close()
				})
			}
		})
		first := p.attach(-1, -1)
		wg.Go(func() { _, _ = io.Copy(io.Discard, first) })
		_, _ = first.Write(sent)
		_ = first.Close()
		l := NewLine(func(context.Context) (net.Conn, error) { return p.attach(-1, -1), nil })
		conn, err := l.Dial(ctx)
		if err != nil {
			t.Fatalf("a new host: %v", err)
		}
		_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
		echo := make([]byte, 4)
		if _, err := conn.Write([]byte("echo")); err != nil {
			t.Errorf("a new host: %v", err)
		}
		if _, err := io.ReadFull(conn, echo); err != nil || string(echo) != "echo" {
			t.Errorf("a new host heard %q, %v", echo, err)
		}
		_ = conn.Close()
		_ = l.Close()
		_ = p.Close()
		_ = gate.Close()
		wg.Wait()
	})
}

// FuzzVerbs: whatever a guest answers, every verb ends, within its bounds.
func FuzzVerbs(f *testing.F) {
	for _, k := range []kind{kindDone, kindStdout, kindStderr, kindExit, kindTaken, kindNetworkAnswer, kindError, kindStatus} {
		for _, body := range []any{nil, exitBody{3}, Network{Interface: "x", Addresses: []string{"10.0.0.1", "::1%x", "no"}}, errorBody{Code: codeUnsupported}} {
			b, err := encodeFrame(k, 1, body)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(b, uint8(k))
			f.Add(bytes.Repeat(b, window+3), uint8(k))
		}
	}
	f.Fuzz(func(t *testing.T, sent []byte, verb uint8) {
		host, inside := net.Pipe()
		var wg sync.WaitGroup
		wg.Go(func() {
			_, _ = readFrame(inside)
			wg.Go(func() { _, _ = io.Copy(io.Discard, inside) })
			_, _ = inside.Write(sent)
			_ = inside.Close()
		})
		c := New(host)
		var err error
		switch verb % 4 {
		case 0:
			var code int
			if code, err = c.Exec(t.Context(), Command{Argv: []string{"x"}}, func(_ Stream, p []byte) {
				if len(p) > maxChunk {
					t.Errorf("%d bytes of output at once", len(p))
				}
			}); code < -1 || code > 255 {
				t.Errorf("exit status %d", code)
			}
		case 1:
			err = c.Put(t.Context(), File{Path: "x", Size: 3 * maxChunk}, strings.NewReader(strings.Repeat("x", 3*maxChunk)))
		case 2:
			err = c.Output(t.Context(), func([]byte) {})
		case 3:
			var n Network
			if n, err = c.NetworkUp(t.Context()); len(n.Addresses) > maxAddresses || len(n.Interface) > 3*64 {
				t.Errorf("a network out of bounds: %+v", n)
			}
		}
		if err != nil && len(err.Error()) > 4*maxText {
			t.Errorf("an error of %d bytes", len(err.Error()))
		}
		_ = c.Close()
		wg.Wait()
	})
}

// FuzzJITFiles: what comes out stays in its directory and within its bounds.
func FuzzJITFiles(f *testing.F) {
	for _, text := range []string{`{".runner":"e30=",".credentials":""}`, `{"../x":"eA=="}`, `{"a/b":null}`, `[]`, `{"":"eA=="}`} {
		f.Add([]byte(base64.StdEncoding.EncodeToString([]byte(text))))
	}
	f.Fuzz(func(t *testing.T, jit []byte) {
		files, err := JITFiles(jit)
		if err == nil && (len(files) == 0 || len(files) > maxJITFiles) {
			t.Errorf("%d files", len(files))
		}
		for _, file := range files {
			if file.Name == "" || file.Name == "." || file.Name == ".." || strings.ContainsAny(file.Name, "/\\\x00") {
				t.Errorf("a file %q", file.Name)
			}
		}
	})
}
