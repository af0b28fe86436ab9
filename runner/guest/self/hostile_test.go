package self

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/runner/guest"
)

// TestHostileShare: nothing in out/ makes a call hang, or read what it should not.
func TestHostileShare(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "secret")
	must(t, os.WriteFile(secret, []byte("running\nexited 0\n"), 0o600))
	for _, test := range []struct {
		name string
		make func(path string) error
		says string
	}{
		{"a directory", func(p string) error { return os.Mkdir(p, 0o700) }, "plain file"},
		{"a pipe", func(p string) error { return syscall.Mkfifo(p, 0o600) }, "plain file"},
		{"a link to a file of the host's", func(p string) error { return os.Symlink(secret, p) }, "plain file"},
		{"a link to nothing", func(p string) error { return os.Symlink("nothing", p) }, "plain file"},
		{"a socket", func(p string) error {
			fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
			if err != nil {
				return err
			}
			defer syscall.Close(fd)
			return syscall.Bind(fd, &syscall.SockaddrUnix{Name: p})
		}, "plain file"},
		{"an endless file", func(p string) error {
			if err := os.WriteFile(p, nil, 0o600); err != nil {
				return err
			}
			return os.Truncate(p, 1<<40)
		}, "bytes in"},
		{"files out of sight", func(p string) error {
			if err := os.MkdirAll(filepath.Join(filepath.Dir(p), "a", "b"), 0o700); err != nil {
				return err
			}
			for i := range 20 { // each is small enough
				name := filepath.Join(filepath.Dir(p), "a", "b", fmt.Sprint(i))
				if err := os.WriteFile(name, make([]byte, 1<<20), 0o600); err != nil {
					return err
				}
			}
			return nil
		}, "bytes in"},
		{"many files out of sight", func(p string) error {
			if err := os.Mkdir(filepath.Join(filepath.Dir(p), "a"), 0o700); err != nil {
				return err
			}
			for i := range maxEntries {
				if err := os.WriteFile(filepath.Join(filepath.Dir(p), "a", fmt.Sprint(i)), nil, 0o600); err != nil {
					return err
				}
			}
			return nil
		}, "more than"},
		{"directories without end", func(p string) error {
			name := filepath.Dir(p)
			for range maxEntries + 1 {
				name = filepath.Join(name, "d")
			}
			return os.MkdirAll(name, 0o700)
		}, "more than"},
		{"room that no size tells", func(p string) error {
			if err := os.WriteFile(p, nil, 0o600); err != nil {
				return err
			}
			return exec.CommandContext(t.Context(), "fallocate", "--keep-size", "--length", fmt.Sprint(maxOut+1<<20), p).Run()
		}, "bytes in"},
		{"many files", func(p string) error {
			for i := range maxEntries + 1 {
				if err := os.WriteFile(fmt.Sprintf("%s.%d", p, i), nil, 0o600); err != nil {
					return err
				}
			}
			return nil
		}, "more than"},
	} {
		t.Run(test.name, func(t *testing.T) {
			m := newMachine(t)
			must(t, test.make(filepath.Join(m.dir, "out", "status")))
			_, hello := m.client.Hello(bounded(t))
			_, watch := m.client.Watch(bounded(t), nil)
			start := m.client.Start(bounded(t), guest.Run{Name: "r", Input: []byte("c2VjcmV0")})
			for _, err := range []error{hello, watch, start} {
				if !errors.Is(err, ErrMisuse) || !strings.Contains(err.Error(), test.says) {
					t.Errorf("%v; want %q", err, test.says)
				}
			}
			if places := m.secrets("c2VjcmV0"); len(places) > 0 {
				t.Errorf("the JIT config is in %q", places)
			}
		})
	}
}

// TestSwapped: the guest changes what the status is all the time, while it is read.
func TestSwapped(t *testing.T) {
	m := newMachine(t)
	secret := filepath.Join(t.TempDir(), "secret")
	must(t, os.WriteFile(secret, []byte("exited 77\n"), 0o600))
	path := filepath.Join(m.dir, "out", "status")
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			_ = os.WriteFile(path+".a", []byte("ready\n"), 0o600)
			_ = os.Rename(path+".a", path)
			_ = syscall.Mkfifo(path+".b", 0o600)
			_ = os.Rename(path+".b", path)
			_ = os.Symlink(secret, path+".c")
			_ = os.Rename(path+".c", path)
		}
	})
	ready := 0
	for range 3000 {
		if r, err := m.client.look(); err == nil && r.ready {
			ready++
		} else if r.status.State == guest.Exited {
			t.Fatal("a link was followed")
		}
	}
	close(stop)
	wg.Wait()
	if ready == 0 {
		t.Error("the plain file was never read: this test shows nothing")
	}
}

// TestOddments: what macOS leaves on a share, and a launcher beside its status, is no
// misuse, and no link leads out of the share.
func TestOddments(t *testing.T) {
	m := newMachine(t)
	out := filepath.Join(m.dir, "out")
	big := filepath.Join(t.TempDir(), "big")
	must(t, os.WriteFile(big, nil, 0o600))
	must(t, os.Truncate(big, 1<<40))
	must(t, os.MkdirAll(filepath.Join(out, ".fseventsd", "x"), 0o700))
	must(t, os.WriteFile(filepath.Join(out, ".fseventsd", "x", "uuid"), []byte("x"), 0o600))
	must(t, os.Symlink(filepath.Dir(big), filepath.Join(out, "up")))
	must(t, os.Symlink(".", filepath.Join(out, "loop")))
	must(t, syscall.Mkfifo(filepath.Join(out, "pipe"), 0o600))
	m.status(t, "ready\n")
	if hello, err := m.client.Hello(bounded(t)); err != nil || hello.Status.State != guest.Idle {
		t.Errorf("hello: %+v, %v", hello, err)
	}
}

// TestMisread: what a guest does to out/ so that it cannot be measured is misuse as well.
func TestMisread(t *testing.T) {
	for _, test := range []struct {
		err    error
		misuse bool
	}{
		{fs.ErrPermission, true}, {syscall.EACCES, true}, {syscall.ELOOP, true},
		{syscall.EIO, false}, {syscall.EMFILE, false}, {fs.ErrNotExist, false},
	} {
		if err := misread(&fs.PathError{Op: "open", Path: "status", Err: test.err}); errors.Is(err, ErrMisuse) != test.misuse || !errors.Is(err, test.err) {
			t.Errorf("%v became %v", test.err, err)
		}
	}
}

// TestStarter is no test: it is a node agent that starts a runner and waits for the
// launcher, to be killed.
func TestStarter(t *testing.T) {
	share := os.Getenv("PADDOCK_TEST_SHARE")
	if share == "" {
		return // not asked to be one
	}
	_ = Open(share).Start(t.Context(), guest.Run{Name: "r", Argv: []string{"sh", "-c", "cat; sleep 1000"}, Input: []byte("c2VjcmV0")})
}

// TestKilledWhileStarting: the agent is killed with -9 between the hand-over and the
// launcher's word, which comes then; whoever looks next takes the JIT config back.
func TestKilledWhileStarting(t *testing.T) {
	for name, look := range map[string]func(context.Context, *Client) error{
		"hello": func(ctx context.Context, c *Client) error {
			_, err := c.Hello(ctx)
			return err
		},
		"watch": func(ctx context.Context, c *Client) error {
			ctx, stop := context.WithCancel(ctx)
			defer stop()
			_, err := c.Watch(ctx, func(guest.Status) { stop() })
			if errors.Is(err, context.Canceled) {
				return nil
			}
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			starter := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestStarter$")
			starter.Env = append(os.Environ(), "PADDOCK_TEST_SHARE="+m.dir)
			must(t, starter.Start())
			for deadline := time.Now().Add(soon); len(m.secrets("c2VjcmV0")) == 0 || !exists(m.client.order()); time.Sleep(time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatal("nothing was handed over")
				}
			}
			must(t, starter.Process.Kill())
			_ = starter.Wait()
			m.boot(t, "/bin/sh")
			for deadline := time.Now().Add(soon); ; time.Sleep(time.Millisecond) {
				if r, err := m.client.look(); err == nil && r.started() {
					break
				}
				if time.Now().After(deadline) {
					t.Fatal("the launcher took no order")
				}
			}
			must(t, look(bounded(t), Open(m.dir)))
			if places := m.secrets("c2VjcmV0"); len(places) > 0 {
				t.Errorf("the JIT config is still in %q", places)
			}
		})
	}
}

func exists(name string) bool {
	_, err := os.Lstat(name)
	return err == nil
}
