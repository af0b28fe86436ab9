package node

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
)

// sshd is a real OpenSSH server in inetd mode: one process per connection, as a guest of
// this user whose home is a directory of the test's.
type sshd struct {
	dir, home string
	login     api.PoolLogin
	failed    chan error
}

func newSSHD(t *testing.T) *sshd {
	t.Helper()
	dir, err := os.MkdirTemp("", "node-ssh")
	must(t, err)
	s := &sshd{dir: dir, home: filepath.Join(dir, "home"), failed: make(chan error, 100)}
	t.Cleanup(func() {
		for _, pid := range s.guests() {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		_ = os.RemoveAll(dir)
	})
	must(t, os.Mkdir(s.home, 0o700))
	if os.Getuid() == 0 {
		must(t, os.MkdirAll("/run/sshd", 0o755)) // sshd wants it as root
	}
	me, err := user.Current()
	must(t, err)
	private, public := newSSHKey(t)
	s.login = api.PoolLogin{Pool: "p", User: me.Username, Key: private}
	must(t, os.WriteFile(filepath.Join(dir, "authorized"), []byte(public), 0o600))
	s.newHostKey(t)
	config := strings.Join([]string{
		"HostKey " + filepath.Join(dir, "host"), "AuthorizedKeysFile " + filepath.Join(dir, "authorized"),
		"PermitRootLogin yes", "UsePAM no", "StrictModes no", "PidFile none", "SetEnv HOME=" + s.home,
	}, "\n")
	must(t, os.WriteFile(filepath.Join(dir, "config"), []byte(config+"\n"), 0o600))
	return s
}

func newSSHKey(t *testing.T) (private, public string) {
	t.Helper()
	pub, priv, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	block, err := ssh.MarshalPrivateKey(priv, "")
	must(t, err)
	line, err := ssh.NewPublicKey(pub)
	must(t, err)
	return string(pem.EncodeToMemory(block)), string(ssh.MarshalAuthorizedKey(line))
}

func (s *sshd) newHostKey(t *testing.T) {
	t.Helper()
	private, _ := newSSHKey(t)
	must(t, os.WriteFile(filepath.Join(s.dir, "host"), []byte(private), 0o600))
}

// serve is one connection to the guest's port 22.
func (s *sshd) serve(c net.Conn) {
	defer func() { _ = c.Close() }()
	pair, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err != nil {
		s.failed <- err
		return
	}
	syscall.CloseOnExec(pair[0]) // macOS has no flag for it
	syscall.CloseOnExec(pair[1])
	theirs := os.NewFile(uintptr(pair[1]), "sshd")
	ours := os.NewFile(uintptr(pair[0]), "guest")
	near, err := net.FileConn(ours)
	_ = ours.Close()
	if err != nil {
		s.failed <- err
		return
	}
	cmd := exec.CommandContext(context.Background(), "/usr/sbin/sshd", "-i", "-f", filepath.Join(s.dir, "config"))
	cmd.Stdin, cmd.Stdout = theirs, theirs
	if err := cmd.Start(); err != nil {
		s.failed <- err
	}
	_ = theirs.Close()
	go func() {
		_, _ = io.Copy(near, c)
		_ = near.Close()
	}()
	_, _ = io.Copy(c, near)
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
}

// guests are the processes whose home is this guest's.
func (s *sshd) guests() (pids []int) {
	all, _ := filepath.Glob("/proc/[0-9]*/environ")
	for _, path := range all {
		env, err := os.ReadFile(path)
		if err == nil && bytes.Contains(append([]byte{0}, env...), []byte("\x00HOME="+s.home+"\x00")) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			pids = append(pids, pid)
		}
	}
	return pids
}

func (s *sshd) check(t *testing.T) {
	t.Helper()
	select {
	case err := <-s.failed:
		t.Error(err)
	default:
	}
	for late := time.Now().Add(time.Minute); len(s.guests()) > 0; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(late) {
			for _, pid := range s.guests() {
				args, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
				stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
				t.Logf("%s: %.300q", stat, args)
			}
			t.Fatalf("left in the guest: %v", s.guests())
		}
	}
}

// TestSSH: a stock guest runs a job. Its login comes late, and after a restart of the
// agent in the middle of the job it comes late again; nothing of the login is on disk or
// in a log, and the host key is pinned under the image's digest.
func TestSSH(t *testing.T) {
	s, guest := newStand(t), newSSHD(t)
	var log bytes.Buffer
	lock := &locked{w: io.MultiWriter(&log, t.Output())}
	s.log = slog.New(slog.NewTextHandler(lock, &slog.HandlerOptions{Level: slog.LevelDebug}))
	s.keep, s.yard.port = true, guest.serve
	const secret = "c2VjcmV0IGNvbmZpZw"
	end := filepath.Join(guest.dir, "end")
	order := s.order("aaaaaaaa", `read jit; test -n "$jit" || exit 9; echo "Running job: build"; until test -e `+end+`; do sleep 0.05; done`)
	order.Bootstrap = fleet.BootstrapSSH
	runner := runnerOrder(order.ID)
	runner.JIT = secret
	s.office.order(func() { s.office.start[order.ID] = runner })
	s.office.place(order)
	stop := s.agent(t)
	s.office.awaitState(t, order.ID, fleet.VMBooting)
	s.office.order(func() { s.office.logins = []api.PoolLogin{guest.login} })
	if r := s.office.awaitState(t, order.ID, fleet.VMBusy); r.Tier != fleet.TierCold {
		t.Errorf("%+v", r)
	}
	stop()
	s.office.order(func() { s.office.logins = nil })
	session := s.office.latest().Session
	stop = s.agent(t)
	s.office.await(t, "the next agent reports the job", func() bool { return s.office.last.Session != session })
	must(t, os.WriteFile(end, nil, 0o600))
	s.office.order(func() { s.office.logins = []api.PoolLogin{guest.login} })
	if r := s.office.awaitState(t, order.ID, fleet.VMDone); r.Reason != "runner exited 0" || r.Failed {
		t.Errorf("%+v", r)
	}
	stop()
	s.checkEmpty(t)
	guest.check(t)
	pins, err := os.ReadFile(filepath.Join(s.dir, "hostkeys"))
	if err != nil || !strings.HasPrefix(string(pins), string(base)+" ssh-ed25519 ") {
		t.Errorf("pinned: %q (%v)", pins, err)
	}
	secrets := []string{secret, strings.Split(guest.login.Key, "\n")[2]}
	noSecrets(t, s.dir, log.String(), secrets...)

	// An impostor, or an image that makes its keys anew, ends at once and says so.
	guest.newHostKey(t)
	s.keep = false
	stop = s.agent(t)
	other := s.order("bbbbbbbb", jobGood)
	other.Bootstrap = fleet.BootstrapSSH
	s.office.place(other)
	if r := s.office.awaitState(t, other.ID, fleet.VMDone); !r.Failed || !strings.Contains(r.Reason, "SSH host key is not the one pinned") {
		t.Errorf("%+v", r)
	}
	stop()
	s.checkEmpty(t)
	guest.check(t)
}

// noSecrets fails the test if a secret is in a file below dir or in the log.
func noSecrets(t *testing.T, dir, log string, secrets ...string) {
	t.Helper()
	for _, secret := range secrets {
		if strings.Contains(log, secret) {
			t.Errorf("the log has a secret")
		}
		err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			data, err := os.ReadFile(path)
			if bytes.Contains(data, []byte(secret)) {
				t.Errorf("%s has a secret", path)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
}

// TestSecretsStayInMemory: while a job runs, neither its JIT config nor a login is in
// any file of the node.
func TestSecretsStayInMemory(t *testing.T) {
	s := newSavingStand(t)
	log := &locked{w: &bytes.Buffer{}}
	s.log = slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	s.office.logins = []api.PoolLogin{{Pool: "p", User: "admin", Password: "hunter22hunter22"}}
	runner := runnerOrder("aaaaaaaa")
	runner.JIT = "ZXlKMGIzQnpaV055WlhRaU9q"
	s.office.start["aaaaaaaa"] = runner
	s.office.place(s.order("aaaaaaaa", `cat >/dev/null; echo "Running job: build"; exec sleep 300`))
	stop := s.agent(t)
	s.office.awaitState(t, "aaaaaaaa", fleet.VMBusy)
	noSecrets(t, s.dir, "", runner.JIT, "hunter22hunter22")
	if n := len(s.stateDirs(t)); n != 1 {
		t.Errorf("%d states", n)
	}
	s.destroy(t, "aaaaaaaa")
	stop()
	noSecrets(t, s.dir, fmt.Sprint(log.w), runner.JIT, "hunter22hunter22")
	s.checkEmpty(t)
}

// locked is a writer for several goroutines.
type locked struct {
	mu sync.Mutex
	w  io.Writer
}

func (l *locked) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}
