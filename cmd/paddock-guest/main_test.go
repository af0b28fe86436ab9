package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/runner/guest"
)

// start runs the program on a socket and returns it with the function that ends it.
func start(t *testing.T) (socket, dir string, stop func() error) {
	t.Helper()
	short, err := os.MkdirTemp("", "g") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(short) })
	socket, dir = filepath.Join(short, "s"), filepath.Join(short, "runner", "dir")
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- run(ctx, []string{"--socket", socket, "--dir", dir}, slog.New(slog.DiscardHandler))
	}()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
		if conn, err := (&net.Dialer{}).DialContext(t.Context(), "unix", socket); err == nil {
			_ = conn.Close()
			break
		} else if time.Now().After(deadline) {
			t.Fatal("it does not listen")
		}
	}
	return socket, dir, func() error {
		cancel()
		return <-ended
	}
}

// One agent serves one raw stream after the other, and keeps its state between them.
func TestServesLinesOneAfterAnother(t *testing.T) {
	socket, dir, stop := start(t)
	var raw net.Conn
	line := guest.NewLine(func(ctx context.Context) (net.Conn, error) {
		var err error
		raw, err = (&net.Dialer{}).DialContext(ctx, "unix", socket)
		return raw, err
	})
	dial := func() *guest.Client {
		conn, err := line.Dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return guest.New(conn)
	}
	c := dial()
	if err := c.Start(t.Context(), guest.Run{Name: "r1", Argv: []string{"sh", "-c", "cat > got; exit 6"}, Input: []byte("input")}); err != nil {
		t.Fatal(err)
	}
	if s, err := c.Watch(t.Context(), nil); err != nil || s.ExitCode != 6 {
		t.Fatalf("watch: %+v, %v", s, err)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "got")); err != nil || string(b) != "input" {
		t.Errorf("in its directory: %q, %v", b, err)
	}
	for range 2 * maxLines {
		_ = raw.Close()
		if _, err := c.Hello(t.Context()); !errors.Is(err, guest.ErrLost) {
			t.Errorf("on a cut line: %v", err)
		}
		_ = c.Close()
		c = dial()
		if h, err := c.Hello(t.Context()); err != nil || h.Status.Name != "r1" || h.Version == "" {
			t.Fatalf("hello on a new line: %+v, %v", h, err)
		}
	}
	_ = c.Close()
	if err := stop(); err != nil {
		t.Errorf("it ended with %v", err)
	}
	_ = line.Close()
}

// Raw streams that nobody uses any more make room for the next, and end with the agent.
func TestManyRawStreams(t *testing.T) {
	socket, _, stop := start(t)
	var conns []net.Conn
	for range 5 * maxLines {
		conn, err := (&net.Dialer{}).DialContext(t.Context(), "unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	_ = conns[0].SetReadDeadline(time.Now().Add(30 * time.Second))
	if _, err := conns[0].Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the oldest: %v, want its end", err)
	}
	if err := stop(); err != nil {
		t.Errorf("it ended with %v", err)
	}
	for _, conn := range conns {
		_ = conn.SetReadDeadline(time.Now().Add(30 * time.Second))
		if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error("a raw stream outlives the agent")
		}
		_ = conn.Close()
	}
}

func TestNeverTwoAgents(t *testing.T) {
	socket, _, stop := start(t)
	err := run(t.Context(), []string{"--socket", socket, "--dir", t.TempDir()}, slog.New(slog.DiscardHandler))
	if err == nil || !strings.Contains(err.Error(), "another agent") {
		t.Errorf("a second agent: %v", err)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
}

func TestWrongArguments(t *testing.T) {
	for _, args := range [][]string{{"serve"}, {"wake"}, {"wake", "soon"}, {"--no-such-flag"}, {"install", "x"}} {
		if err := run(t.Context(), args, slog.New(slog.DiscardHandler)); err == nil {
			t.Errorf("%q is accepted", args)
		}
	}
	if err := wakeByHand("tomorrow", bytes.NewReader(nil)); err == nil {
		t.Error("a time that is none is set")
	}
	if err := run(t.Context(), []string{"--version"}, slog.New(slog.DiscardHandler)); err != nil {
		t.Error(err)
	}
}
