package ssh

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	xssh "golang.org/x/crypto/ssh"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/runner/guest"
)

// peer is an SSH server in this process. It is what a real sshd is not: a server that
// asks like macOS's, has another shell, or means harm.
type peer struct {
	config *xssh.ServerConfig
	// serve answers one session's command; the session ends when it returns.
	serve func(command string, ch xssh.Channel)
}

func newPeer(t *testing.T, serve func(string, xssh.Channel)) *peer {
	t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	signer, err := xssh.NewSignerFromKey(private)
	must(t, err)
	p := &peer{config: &xssh.ServerConfig{NoClientAuth: true}, serve: serve}
	p.config.AddHostKey(signer)
	return p
}

// connect returns a client's end.
func (p *peer) connect(t *testing.T) net.Conn {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	ours, err := new(net.Dialer).DialContext(t.Context(), "tcp", l.Addr().String())
	must(t, err)
	theirs, err := l.Accept()
	must(t, err)
	var wg sync.WaitGroup
	wg.Go(func() {
		defer theirs.Close()
		conn, chans, requests, err := xssh.NewServerConn(theirs, p.config)
		if err != nil {
			return
		}
		defer conn.Close()
		wg.Go(func() { xssh.DiscardRequests(requests) })
		for c := range chans {
			ch, requests, err := c.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { p.session(ch, requests, &wg) })
		}
	})
	t.Cleanup(func() {
		ours.Close()
		theirs.Close()
		wg.Wait()
	})
	return ours
}

func (p *peer) session(ch xssh.Channel, requests <-chan *xssh.Request, wg *sync.WaitGroup) {
	for r := range requests {
		if r.Type == "exec" {
			_ = r.Reply(true, nil)
			wg.Go(func() {
				defer ch.Close()
				p.serve(string(r.Payload[4:]), ch)
			})
			continue
		}
		_ = r.Reply(false, nil)
	}
}

func (p *peer) dial(t *testing.T) *Client {
	t.Helper()
	c, err := Dial(t.Context(), p.connect(t), Config{HostKey: anyKey{}, Key: "sha256:image"})
	must(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

// shell serves sessions with a shell of our choice, home and PATH of its own.
func shell(t *testing.T, home, path string, sh ...string) func(string, xssh.Channel) {
	return func(command string, ch xssh.Channel) {
		inner := strings.TrimSuffix(strings.TrimPrefix(command, "exec /bin/sh -c '"), "'")
		cmd := exec.CommandContext(context.WithoutCancel(t.Context()), sh[0], append(sh[1:], "-c", inner)...)
		cmd.Dir, cmd.Env = home, []string{"HOME=" + home, "PATH=" + path}
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Error(err)
			return
		}
		// Files, so that what stays behind does not hold the session.
		cmd.Stdout, cmd.Stderr = ch, ch.Stderr()
		cmd.WaitDelay = time.Second
		if err := cmd.Start(); err != nil {
			t.Error(err)
			return
		}
		go func() {
			_, _ = io.Copy(in, ch)
			_ = in.Close()
		}()
		code := byte(0)
		if err := cmd.Wait(); err != nil {
			code = byte(cmd.ProcessState.ExitCode())
		}
		_, _ = ch.SendRequest("exit-status", false, []byte{0, 0, 0, code})
	}
}

// TestShells: the scripts mean the same to every shell that may be a guest's /bin/sh, and
// with busybox's own programs, and where there is no setsid, as on macOS.
func TestShells(t *testing.T) {
	applets := t.TempDir()
	must(t, exec.CommandContext(t.Context(), "busybox", "--install", "-s", applets).Run())
	for _, test := range []struct {
		name string
		path string
		sh   []string
	}{
		{"dash", "/usr/bin:/bin", []string{"dash"}},
		{"bash as sh", "/usr/bin:/bin", []string{"bash", "--posix"}},
		{"busybox", applets, []string{filepath.Join(applets, "sh")}},
		{"dash without setsid", without(t, "setsid"), []string{"dash"}},
		{"dash without setsid and perl", without(t, "setsid", "perl"), []string{"dash"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			home := openDir(t)
			p := newPeer(t, shell(t, home, test.path, test.sh...))
			c := p.dial(t)
			must(t, c.Put(bounded(t), guest.File{Path: "run.sh", Mode: 0o755, Size: int64(len(standIn))}, strings.NewReader(standIn)))
			w := watch(bounded(t), c)
			w.until(t, guest.Idle)
			must(t, c.Start(bounded(t), guest.Run{Name: "r", Argv: []string{"./run.sh"}, Input: []byte("secret\n"), Env: map[string]string{"A": "it's\n"}}))
			w.until(t, guest.Running)
			must(t, os.WriteFile(filepath.Join(home, "job"), nil, 0o600))
			if s := w.until(t, guest.Busy); s.Job != "build (arm64)" || s.BusyAt.IsZero() {
				t.Errorf("busy: %+v", s)
			}
			must(t, os.WriteFile(filepath.Join(home, "end"), nil, 0o600))
			if s := w.end(t); s.ExitCode != 3 || !strings.HasSuffix(s.Tail, "Succeeded\n") {
				t.Errorf("its end: %+v", s)
			}
			var got strings.Builder
			must(t, c.Output(bounded(t), func(p []byte) { got.Write(p) }))
			if !strings.HasPrefix(got.String(), "√ Connected") || !strings.HasSuffix(got.String(), "Succeeded\n") {
				t.Errorf("its output: %q", got.String())
			}
			c.Close()
			within(t, "nothing is left", func() bool { return len(withHome(home)) == 0 })
		})
	}
}

// without is a PATH with the usual programs but for some.
func without(t *testing.T, names ...string) string {
	t.Helper()
	dir := t.TempDir()
	for _, from := range []string{"/usr/bin", "/bin"} {
		entries, err := os.ReadDir(from)
		must(t, err)
		for _, e := range entries {
			_ = os.Symlink(filepath.Join(from, e.Name()), filepath.Join(dir, e.Name())) // the first wins
		}
	}
	for _, name := range names {
		must(t, os.Remove(filepath.Join(dir, name)))
	}
	return dir
}

// TestLogin: what each way to fail says, against a real sshd.
func TestLogin(t *testing.T) {
	s := startSSHD(t)
	other, _ := newKey(t)
	closed := startSSHD(t, "PasswordAuthentication no", "KbdInteractiveAuthentication no")
	for _, test := range []struct {
		name  string
		at    *sshd
		login fleet.Login
		want  error
		says  string
	}{
		{"stock password", s, fleet.Login{}, ErrLogin, "password is wrong"},
		{"wrong password", s, fleet.Login{User: account.name, Password: "hunter2"}, ErrLogin, "password is wrong"},
		{"wrong key", s, fleet.Login{User: account.name, Key: other}, ErrLogin, "private key is wrong"},
		{"no passwords there", closed, fleet.Login{User: account.name, Password: "hunter2"}, ErrLogin, "takes no login by password"},
		{"nobody", s, fleet.Login{User: "nobody-of-that-name", Password: "hunter2"}, ErrLogin, "password is wrong"},
		{"not a key", s, fleet.Login{User: account.name, Key: "hunter2"}, nil, "cannot be read"},
		{"no user", s, fleet.Login{Password: "hunter2"}, nil, "needs a user"},
		{"nothing to show", s, fleet.Login{User: account.name}, nil, "a password or a key"},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := Dial(t.Context(), test.at.conn(t), Config{Login: test.login, HostKey: anyKey{}, Key: "k"})
			if err == nil || !strings.Contains(err.Error(), test.says) || test.want != nil && !errors.Is(err, test.want) {
				t.Errorf("%v; want %q", err, test.says)
			}
			if err != nil && strings.Contains(err.Error(), "hunter2") {
				t.Errorf("the error tells the password: %v", err)
			}
		})
	}
}

// TestKeyboardInteractive: the way macOS's sshd asks for a password.
func TestKeyboardInteractive(t *testing.T) {
	p := newPeer(t, nil)
	p.config = &xssh.ServerConfig{KeyboardInteractiveCallback: func(c xssh.ConnMetadata, ask xssh.KeyboardInteractiveChallenge) (*xssh.Permissions, error) {
		answers, err := ask("", "", []string{"Password:"}, []bool{false})
		if err == nil && (len(answers) != 1 || answers[0] != "admin" || c.User() != "admin") {
			err = errors.New("no")
		}
		return nil, err
	}}
	_, private, _ := ed25519.GenerateKey(rand.Reader)
	signer, err := xssh.NewSignerFromKey(private)
	must(t, err)
	p.config.AddHostKey(signer)
	c := p.dial(t) // by the stock login
	c.Close()
	_, err = Dial(t.Context(), p.connect(t), Config{Login: fleet.Login{User: "admin", Password: "x"}, HostKey: anyKey{}, Key: "k"})
	if !errors.Is(err, ErrLogin) || !strings.Contains(err.Error(), "password is wrong") {
		t.Errorf("a wrong password: %v", err)
	}
}

// TestStrangePorts: what is not an SSH server, or none that answers.
func TestStrangePorts(t *testing.T) {
	for _, test := range []struct {
		name string
		says string // by the port, and then it stays open
		hang bool
		want error
	}{
		{"silent", "", true, ErrNoAnswer},
		{"closed at once", "", false, ErrNoAnswer},
		{"a web server", "HTTP/1.1 400 Bad Request\r\n\r\n", false, ErrNotSSH},
		{"an endless word", strings.Repeat("x", 1<<20), true, ErrNotSSH},
		{"stops after its name", "SSH-2.0-OpenSSH_9.2\r\n", true, ErrNoAnswer},
		{"gone after its name", "SSH-2.0-OpenSSH_9.2\r\n", false, ErrNoAnswer},
	} {
		t.Run(test.name, func(t *testing.T) {
			ours, theirs := net.Pipe()
			defer theirs.Close()
			go func() {
				go func() { _, _ = io.Copy(io.Discard, theirs) }()
				_, _ = io.WriteString(theirs, test.says)
				if !test.hang {
					_ = theirs.Close()
				}
			}()
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			_, err := Dial(ctx, ours, Config{HostKey: anyKey{}, Key: "k"})
			if !errors.Is(err, test.want) {
				t.Errorf("%v; want %v", err, test.want)
			}
			if _, err := ours.Write(nil); !errors.Is(err, io.ErrClosedPipe) {
				t.Errorf("the connection is still open: %v", err)
			}
		})
	}
}

// TestHostileGuest: whatever a guest answers, calls end, and hold little.
func TestHostileGuest(t *testing.T) {
	mark := func(ch xssh.Channel) { // what our own script would say first
		buf := make([]byte, 64<<10)
		n, _ := io.ReadAtLeast(ch, buf, 40)
		line, _, _ := strings.Cut(string(buf[:n]), "\n")
		_, _ = io.WriteString(ch, strings.TrimPrefix(line, "echo ")+"\n")
	}
	forever := func(text string) func(string, xssh.Channel) {
		return func(_ string, ch xssh.Channel) {
			mark(ch)
			for {
				if _, err := io.WriteString(ch, text); err != nil {
					return
				}
			}
		}
	}
	for _, test := range []struct {
		name  string
		serve func(string, xssh.Channel)
		want  error
	}{
		{"an endless greeting", func(_ string, ch xssh.Channel) {
			for {
				if _, err := io.WriteString(ch, "welcome "); err != nil {
					return
				}
			}
		}, errAnswer},
		{"an endless line", forever("x"), errAnswer},
		{"endless statuses", forever("state running\n.\n"), errAnswer},
		{"an endless status", forever("name x\n"), errAnswer},
		{"an unknown state", forever("state tired\n.\n"), errAnswer},
		{"an endless tail", forever("state exited\nexit 0 1\n.\nx"), nil},
		{"no word", func(string, xssh.Channel) {}, guest.ErrLost},
		{"no shell", func(_ string, ch xssh.Channel) {
			_, _ = io.WriteString(ch.Stderr(), "This account is not available.\n")
		}, errAnswer},
		{"half an answer", func(_ string, ch xssh.Channel) { mark(ch); _, _ = io.WriteString(ch, "state ru") }, guest.ErrLost},
		{"complains for ever", func(_ string, ch xssh.Channel) {
			for {
				if _, err := io.WriteString(ch.Stderr(), "no "); err != nil {
					return
				}
			}
		}, context.DeadlineExceeded},
		{"silence", func(_ string, ch xssh.Channel) { mark(ch); _, _ = io.Copy(io.Discard, ch) }, context.DeadlineExceeded},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := newPeer(t, test.serve).dial(t)
			ctx, cancel := context.WithTimeout(t.Context(), soon)
			if errors.Is(test.want, context.DeadlineExceeded) {
				ctx, cancel = context.WithTimeout(t.Context(), time.Second)
			}
			defer cancel()
			last, err := c.Watch(ctx, nil)
			if !errors.Is(err, test.want) || test.want == nil && err != nil {
				t.Errorf("%v; want %v", err, test.want)
			}
			if len(last.Tail) > 3*4096 {
				t.Errorf("a tail of %d bytes", len(last.Tail))
			}
			if err != nil && len(err.Error()) > 4<<10 {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
			must(t, c.Close())
		})
	}
}
