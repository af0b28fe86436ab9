package helper

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/vm"
)

func TestErrorsSurviveTheWay(t *testing.T) {
	boot := &vm.BootError{Console: strings.Repeat("\x01é", 1300), Err: errors.New("exit status 1")}
	for _, test := range []struct {
		err  error
		want func(error) bool
	}{
		{boot, func(err error) bool {
			var got *vm.BootError
			return errors.As(err, &got) && got.Console == boot.Console && got.Err.Error() == "exit status 1"
		}},
		{errors.Join(vm.ErrAtCapacity), func(err error) bool { return errors.Is(err, vm.ErrAtCapacity) }},
		{vm.ErrEnded, func(err error) bool { return errors.Is(err, vm.ErrEnded) && err.Error() == vm.ErrEnded.Error() }},
		{errors.New("other"), func(err error) bool { return err.Error() == "other" && !errors.Is(err, vm.ErrEnded) }},
	} {
		var b bytes.Buffer
		if err := write(&b, report{State: failed, Error: newFailure(test.err)}); err != nil {
			t.Fatal(err)
		}
		var r report
		if err := read(&b, &r); err != nil {
			t.Fatal(err)
		}
		if got := r.Error.asError(); !test.want(got) {
			t.Errorf("%.100v became %.100v", test.err, got)
		}
	}
	if err := (*failure)(nil).asError(); err != nil {
		t.Errorf("no failure became %v", err)
	}
}

func TestMessagesAreBounded(t *testing.T) {
	if err := write(io.Discard, request{Op: strings.Repeat("x", maxMessage)}); err == nil {
		t.Error("a message over the bound was written")
	}
	var r request
	if err := read(bytes.NewReader([]byte{255, 255, 255, 255, '{'}), &r); err == nil || !strings.Contains(err.Error(), "at most") {
		t.Errorf("a length over the bound: %v", err)
	}
}

// The uid of a real peer is ours; another's is refused, root's too.
func TestPeer(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	out, err := (&net.Dialer{}).DialContext(t.Context(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = out.Close() }()
	in, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = in.Close() }()
	if err := errors.Join(checkPeer(out), checkPeer(in)); err != nil {
		t.Errorf("our own peer: %v", err)
	}
	if allow(0, 501) == nil || allow(502, 501) == nil || allow(501, 501) != nil {
		t.Error("another user is let in, or our own is not")
	}
	pipe, _ := net.Pipe()
	if checkPeer(pipe) == nil {
		t.Error("a stream without a peer's uid is let in")
	}
}

func TestMainByHand(t *testing.T) {
	for _, stdin := range []string{"", "\x00\x00\x00\x02{}", "\x00\x00\x00\x0d{\"op\":\"fly\"}x"} {
		if err := Main(t.Context(), nil, strings.NewReader(stdin)); err == nil {
			t.Errorf("standard input %q was taken for an order", stdin)
		}
	}
}

// echo is a machine whose guest says back what it is told, until it is destroyed.
type echo struct{ done chan struct{} }

func (e *echo) Boot(context.Context, vm.Spec) (vm.Machine, error) { return e, nil }

func (e *echo) Dial(context.Context) (net.Conn, error) {
	near, far := net.Pipe()
	go func() {
		_, _ = io.Copy(far, far)
		_ = far.Close()
	}()
	return near, nil
}

func (e *echo) Wait(ctx context.Context) (vm.Exit, error) {
	select {
	case <-e.done:
		return vm.Exit{At: time.Now(), Reason: "destroyed"}, nil
	case <-ctx.Done():
		return vm.Exit{}, ctx.Err()
	}
}

func (e *echo) Destroy(context.Context) error {
	select {
	case <-e.done:
	default:
		close(e.done)
	}
	return nil
}

// A helper that is told to stop (its context ends) destroys its machine, and tells who
// watches how it ended.
func TestHelperToldToStop(t *testing.T) {
	dir := t.TempDir()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "unix", filepath.Join(dir, socketName))
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	s := newServer(&echo{done: make(chan struct{})}, order{Folder: dir})
	over := make(chan error, 1)
	go func() { over <- s.run(ctx, l) }()
	m := newMachine(&Driver{}, folder(dir))
	if _, err := m.watch(t.Context(), func(r report) bool { return r.State == running }); err != nil {
		t.Fatal(err)
	}
	conn, err := m.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	back := make([]byte, 5)
	if _, err := io.ReadFull(conn, back); err != nil || string(back) != "hello" {
		t.Errorf("through the helper came %q, %v", back, err)
	}
	waited := make(chan vm.Exit, 1)
	go func() {
		exit, err := m.Wait(t.Context())
		if err != nil {
			t.Errorf("wait: %v", err)
		}
		waited <- exit
	}()
	stop()
	if err := <-over; err != nil {
		t.Errorf("run: %v", err)
	}
	if exit := <-waited; exit.Reason != "destroyed" {
		t.Errorf("exit %+v", exit)
	}
	if _, err := conn.Read(back); !errors.Is(err, io.EOF) {
		t.Errorf("the guest's stream: %v, want its end", err)
	}
	_ = conn.Close()
	if _, err := os.Stat(filepath.Join(dir, resultName)); err != nil {
		t.Errorf("no result: %v", err)
	}
}

// FuzzMessage: nothing that comes over a socket, by standard input or from a file
// panics a reader or makes it read on.
func FuzzMessage(f *testing.F) {
	for _, v := range []any{request{Op: opDial}, order{Op: orderBoot, Spec: vm.Spec{ID: "x"}},
		report{State: ended, Exit: vm.Exit{At: time.Unix(1, 0), Reason: "x"}, Error: newFailure(vm.ErrEnded)}} {
		b, err := encode(v)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
		f.Add(b[:len(b)-2])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, v := range []any{&request{}, &order{}, &report{}} {
			in := bytes.NewReader(b)
			if err := read(in, v); err != nil {
				continue
			}
			if used := len(b) - in.Len(); used > 4+maxMessage {
				t.Errorf("a message of %d bytes", used)
			}
			if r, ok := v.(*report); ok {
				if err := r.Error.asError(); err != nil && r.Error == nil {
					t.Errorf("an error out of nothing: %v", err)
				}
			}
		}
	})
}

// FuzzHandle: whatever a peer sends to a helper, it is answered or dropped, and the
// helper lives on.
func FuzzHandle(f *testing.F) {
	for _, op := range []string{opWatch, opDial, opDestroy, "fly", ""} {
		b, err := encode(request{Op: op})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
		f.Add(append(b, "bytes for the guest"...))
	}
	f.Fuzz(func(t *testing.T, sent []byte) {
		s := newServer(&echo{done: make(chan struct{})}, order{})
		s.set(report{State: running}, &echo{})
		near, far := net.Pipe()
		var wg sync.WaitGroup
		wg.Go(func() {
			s.handle(t.Context(), far)
			_ = far.Close()
		})
		wg.Go(func() { _, _ = io.Copy(io.Discard, near) })
		_, _ = near.Write(sent)
		_ = near.Close()
		wg.Wait()
		if r, _, _ := s.now(); r.State != running {
			t.Errorf("the machine became %s", r.State)
		}
	})
}

// FuzzAnswer: whatever a process that calls itself a helper answers, the agent gets a
// report or an error, and does not hang.
func FuzzAnswer(f *testing.F) {
	for _, r := range []report{{State: running}, {State: ended}, {State: "odd"}, {State: failed, Error: &failure{Kind: kindBoot}}} {
		b, err := encode(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
		f.Add(append(bytes.Clone(b), b...))
	}
	f.Fuzz(func(t *testing.T, answer []byte) {
		near, far := net.Pipe()
		var wg sync.WaitGroup
		wg.Go(func() {
			_, _ = far.Write(answer)
			_ = far.Close()
		})
		m := newMachine(&Driver{}, "")
		for {
			var r report
			if err := m.receive(t.Context(), near, &r); err != nil {
				break
			}
			_ = r.Error.asError()
		}
		_ = near.Close()
		wg.Wait()
	})
}
