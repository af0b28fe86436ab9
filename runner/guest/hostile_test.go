package guest

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"
)

// An agent that is older than a request says so, and the connection goes on.
func TestUnknownRequest(t *testing.T) {
	c := serve(t).dial(t)
	if _, err := c.ask(t.Context(), kind(77), nil, kindDone); !errors.Is(err, ErrUnsupported) {
		t.Errorf("an unknown request: %v, want ErrUnsupported", err)
	}
	if _, err := c.Hello(t.Context()); err != nil {
		t.Errorf("the connection did not survive: %v", err)
	}
}

// A guest that sends what it likes: the client gives an error, does not hang, and holds
// every field within its bounds.
func TestHostileGuest(t *testing.T) {
	long := strings.Repeat("é", maxFrame/8)
	for name, answer := range map[string]func() ([]byte, error){
		"unknown state":  func() ([]byte, error) { return encodeFrame(kindStatus, 1, Status{State: "flying"}) },
		"wrong kind":     func() ([]byte, error) { return encodeFrame(kindDone, 1, nil) },
		"no json":        func() ([]byte, error) { return []byte{0, 0, 0, 6, byte(kindStatus), 0, 0, 0, 1, '{'}, nil },
		"endless length": func() ([]byte, error) { return []byte{255, 255, 255, 255, 1, 0, 0, 0, 1}, nil },
		"cut short":      func() ([]byte, error) { return []byte{0, 0, 1, 0, 1, 0, 0, 0, 1}, nil },
		"an error":       func() ([]byte, error) { return encodeFrame(kindError, 1, errorBody{Text: long}) },
	} {
		t.Run(name, func(t *testing.T) {
			b, err := answer()
			if err != nil {
				t.Fatal(err)
			}
			host, inside := net.Pipe()
			go func() {
				if _, err := readFrame(inside); err == nil {
					_, _ = inside.Write(b)
				}
				_ = inside.Close()
			}()
			c := New(host)
			defer func() { _ = c.Close() }()
			_, err = c.Watch(t.Context(), nil)
			if err == nil || len(err.Error()) > 2*maxText {
				t.Errorf("watch gave %.200v", err)
			}
		})
	}
	s, ok := Status{State: Exited, Job: long, Tail: long, BusyAt: time.Unix(1<<60, 0)}.checked()
	if !ok || len(s.Job) > maxText+3 || len(s.Tail) > maxTail+3 || !s.BusyAt.IsZero() {
		t.Errorf("a long status is not bounded: job %d, tail %d, busy %v", len(s.Job), len(s.Tail), s.BusyAt)
	}
}

// harmful reports whether an input would have an agent do something to this machine: run
// a program, write a file, connect to a port. The host may; a fuzzer must not.
func harmful(sent []byte) bool {
	for r := bytes.NewReader(sent); ; {
		f, err := readFrame(r)
		if err != nil {
			return false
		}
		var body struct { // of exec, put and connect
			Argv []string
			Path string
			Port int
		}
		_ = json.Unmarshal(f.body, &body) // also of a body that is broken further on
		if f.kind == kindExec && len(body.Argv) > 0 || f.kind == kindPut && body.Path != "" || f.kind == kindConnect && body.Port != 0 {
			return true
		}
	}
}

// FuzzAgent: whatever a host sends, the agent neither panics nor hangs. It has had its
// one runner, so that no input can start a program.
func FuzzAgent(f *testing.F) {
	for _, k := range []kind{kindHello, kindStart, kindWatch, kindCancel, kindPut, kindData, kindCredit, kindOutput, kindNetwork, kindWake, kindShutdown, kindError, 77} {
		b, err := encodeFrame(k, 1, startBody{Name: "r", Argv: []string{"false"}, Input: []byte("x")})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
		f.Add(append(bytes.Clone(b), b...))
		f.Add(b[:len(b)-1])
	}
	f.Fuzz(func(t *testing.T, sent []byte) {
		if harmful(sent) {
			return
		}
		a := &agent{log: slog.New(slog.DiscardHandler), changed: make(chan struct{}), process: &process{out: &output{}}, network: make(chan struct{}, 1),
			status: Status{State: Exited, Name: "earlier"}}
		host, inside := net.Pipe()
		var wg sync.WaitGroup
		wg.Go(func() { a.serveConn(t.Context(), inside) })
		wg.Go(func() { _, _ = io.Copy(io.Discard, host) })
		_, _ = host.Write(sent)
		_ = host.Close()
		wg.Wait()
		if now, _ := a.now(); now.Name != "earlier" {
			t.Errorf("the status became %+v", now)
		}
	})
}

// FuzzClient: whatever a guest sends, the client neither panics nor hangs, and what it
// returns is within its bounds.
func FuzzClient(f *testing.F) {
	for _, s := range []any{Status{State: Exited, Tail: "x"}, Status{State: Running}, Hello{Protocol: 1, Status: Status{State: Idle}}, errorBody{Code: codeOccupied}} {
		for _, k := range []kind{kindHelloAnswer, kindStatus, kindError, kindDone} {
			b, err := encodeFrame(k, 1, s)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(b)
			f.Add(append(bytes.Clone(b), b...))
		}
	}
	f.Fuzz(func(t *testing.T, sent []byte) {
		host, inside := net.Pipe()
		var wg sync.WaitGroup
		wg.Go(func() {
			_, _ = readFrame(inside)
			_, _ = inside.Write(sent)
			_ = inside.Close()
		})
		c := New(host)
		s, err := c.Watch(t.Context(), func(s Status) { checkBounds(t, s) })
		if err == nil && s.State != Exited {
			t.Errorf("watch returned %+v", s)
		}
		if err != nil && len(err.Error()) > 4*maxText {
			t.Errorf("an error of %d bytes", len(err.Error()))
		}
		_ = c.Close()
		wg.Wait()
	})
}

func checkBounds(t *testing.T, s Status) {
	t.Helper()
	if len(s.Tail) > 3*maxTail || len(s.Job) > 3*maxText || len(s.Name) > 3*maxText {
		t.Errorf("status out of bounds: tail %d, job %d, name %d bytes", len(s.Tail), len(s.Job), len(s.Name))
	}
	if _, err := json.Marshal(s); err != nil {
		t.Errorf("a status that cannot be passed on: %v", err)
	}
}

// FuzzFrame: what is read back is what was written, and nothing else is a frame.
func FuzzFrame(f *testing.F) {
	f.Add([]byte{0, 0, 0, 5, 1, 0, 0, 0, 1})
	f.Add([]byte{0, 0, 0, 7, 2, 0, 0, 0, 9, '{', '}', 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := readFrame(bytes.NewReader(b))
		if err != nil {
			return
		}
		if size := 4 + headerSize + len(got.body); size > len(b) || size > maxFrame+4 {
			t.Errorf("a frame of %d bytes from %d", size, len(b))
		}
	})
}

// FuzzOutput: no output panics the parser, and the tail is the end of it.
func FuzzOutput(f *testing.F) {
	f.Add([]byte("2026-01-02 03:04:05Z: Running job: build\n"), 7)
	f.Add(bytes.Repeat([]byte("x"), 3*maxTail), 100)
	f.Fuzz(func(t *testing.T, printed []byte, step int) {
		jobs := 0
		o := &output{busy: func(string) { jobs++ }}
		for rest := printed; len(rest) > 0; {
			n := min(len(rest), max(1, step))
			if _, err := o.Write(rest[:n]); err != nil {
				t.Fatal(err)
			}
			rest = rest[n:]
		}
		want := strings.ToValidUTF8(string(printed[max(0, len(printed)-maxTail):]), "\uFFFD")
		if o.tail() != want || jobs > 1 || len(o.last) > 2*maxTail || len(o.line) > maxLine {
			t.Errorf("tail %d bytes, want %d; %d jobs; holds %d and %d", len(o.tail()), len(want), jobs, len(o.last), len(o.line))
		}
	})
}
