package ssh

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	xssh "golang.org/x/crypto/ssh"

	"github.com/paddock-ci/paddock/fleet"
)

// soon bounds what should take a moment, on a slow machine under load.
const soon = 20 * time.Second

// accountPassword is that of the throwaway account.
const accountPassword = "correct horse"

// account is who logs into the real sshd: a throwaway user where we are root, since a
// password login needs one, and else ourselves, by key only.
var account struct {
	name      string
	throwaway bool
}

func TestMain(m *testing.M) {
	os.Exit(func() int {
		if os.Getuid() != 0 {
			me, err := user.Current()
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				return 1
			}
			account.name = me.Username
			return m.Run()
		}
		account.name, account.throwaway = fmt.Sprintf("paddockt%d", os.Getpid()), true
		if err := makeAccount(account.name); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer func() {
			if out, err := exec.CommandContext(context.Background(), "userdel", account.name).CombinedOutput(); err != nil {
				fmt.Fprintf(os.Stderr, "userdel: %v: %s", err, out)
			}
		}()
		return m.Run()
	}())
}

func makeAccount(name string) error {
	if out, err := exec.CommandContext(context.Background(), "useradd", "-M", "-d", "/", "-s", "/bin/sh", name).CombinedOutput(); err != nil {
		return fmt.Errorf("useradd: %w: %s", err, out)
	}
	set := exec.CommandContext(context.Background(), "chpasswd")
	set.Stdin = strings.NewReader(name + ":" + accountPassword)
	if out, err := set.CombinedOutput(); err != nil {
		return fmt.Errorf("chpasswd: %w: %s", err, out)
	}
	return nil
}

// sshd is a real OpenSSH server on loopback whose guests live in a home of their own.
type sshd struct {
	home     string
	dir      string
	port     int
	key      string // a private key that may log in
	password bool
	cmd      *exec.Cmd
}

// jobMask is the umask of an account's sessions, and of the jobs in them.
const jobMask = "0027"

// startSSHD starts a server. Extra lines go into its configuration.
func startSSHD(t *testing.T, extra ...string) *sshd {
	t.Helper()
	dir := openDir(t)
	s := &sshd{home: filepath.Join(dir, "home"), dir: dir, password: account.throwaway}
	must(t, os.Mkdir(s.home, 0o755))
	if account.throwaway {
		u, err := user.Lookup(account.name)
		must(t, err)
		uid, _ := strconv.Atoi(u.Uid)
		gid, _ := strconv.Atoi(u.Gid)
		must(t, os.Chown(s.home, uid, gid))
		must(t, os.MkdirAll("/run/sshd", 0o755)) // sshd wants it as root
	}
	var public string
	s.key, public = newKey(t)
	must(t, os.WriteFile(filepath.Join(dir, "authorized"), []byte(public), 0o644))
	s.newHostKey(t)
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	must(t, err)
	s.port = l.Addr().(*net.TCPAddr).Port
	must(t, l.Close())
	lines := append([]string{
		"ListenAddress 127.0.0.1:" + strconv.Itoa(s.port),
		"HostKey " + filepath.Join(dir, "host"),
		"AuthorizedKeysFile " + filepath.Join(dir, "authorized"),
		"PidFile none", "UsePAM no", "StrictModes no", "PrintMotd no",
		"SetEnv HOME=" + s.home,
	}, extra...)
	must(t, os.WriteFile(filepath.Join(dir, "config"), []byte(strings.Join(lines, "\n")+"\n"), 0o644))
	s.start(t)
	t.Cleanup(func() {
		s.kill(t)
		s.killGuests(t)
	})
	return s
}

// openDir is a temporary directory that another account may enter.
func openDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "paddock-ssh-")
	must(t, err)
	must(t, os.Chmod(dir, 0o755))
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func (s *sshd) newHostKey(t *testing.T) {
	t.Helper()
	private, _ := newKey(t)
	must(t, os.WriteFile(filepath.Join(s.dir, "host"), []byte(private), 0o600))
}

func (s *sshd) start(t *testing.T) {
	t.Helper()
	s.cmd = exec.CommandContext(context.Background(), "/bin/sh", "-c", "umask "+jobMask+`; exec "$@"`, "sh",
		"/usr/sbin/sshd", "-D", "-e", "-f", filepath.Join(s.dir, "config"))
	log, err := os.OpenFile(filepath.Join(s.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	must(t, err)
	defer log.Close()
	s.cmd.Stderr = log
	must(t, s.cmd.Start())
	t.Cleanup(func() {
		if t.Failed() {
			said, _ := os.ReadFile(log.Name())
			t.Logf("sshd said: %s", said[max(0, len(said)-4096):])
		}
	})
	within(t, "sshd listens", func() bool {
		conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", s.addr())
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
}

// kill ends the server and its sessions, as a crash would; what runs in them goes on.
func (s *sshd) kill(t *testing.T) {
	t.Helper()
	if s.cmd == nil {
		return
	}
	for _, p := range descendants(s.cmd.Process.Pid) {
		if comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", p)); strings.HasPrefix(string(comm), "sshd") {
			_ = syscall.Kill(p, syscall.SIGKILL)
		}
	}
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait()
	s.cmd = nil
}

// guests lists the processes that have this server's home in their environment.
func (s *sshd) guests() (pids []int) { return withHome(s.home) }

func withHome(home string) (pids []int) {
	for _, p := range processes() {
		env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", p))
		if err == nil && bytes.Contains(append([]byte{0}, env...), []byte("\x00HOME="+home+"\x00")) {
			pids = append(pids, p)
		}
	}
	return pids
}

// killGuests ends all that a test left in the guest.
func (s *sshd) killGuests(t *testing.T) {
	t.Helper()
	within(t, "the guest's processes are gone", func() bool {
		left := s.guests()
		for _, p := range left {
			_ = syscall.Kill(p, syscall.SIGKILL)
		}
		return len(left) == 0
	})
}

// noGuests fails if something of a runner that has ended stays, but for sessions.
func (s *sshd) noGuests(t *testing.T) {
	t.Helper()
	within(t, "no process is left in the guest", func() bool { return len(s.guests()) == 0 })
}

func processes() (pids []int) {
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		if p, err := strconv.Atoi(e.Name()); err == nil {
			pids = append(pids, p)
		}
	}
	return pids
}

// descendants lists a process's children and theirs.
func descendants(of int) (pids []int) {
	for _, p := range processes() {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p))
		if err != nil {
			continue
		}
		_, rest, _ := strings.Cut(string(stat[bytes.LastIndexByte(stat, ')'):]), " ")
		if fields := strings.Fields(rest); len(fields) > 1 && fields[1] == strconv.Itoa(of) {
			pids = append(append(pids, p), descendants(p)...)
		}
	}
	return pids
}

func (s *sshd) addr() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(s.port)) }

func (s *sshd) conn(t *testing.T) net.Conn {
	t.Helper()
	conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", s.addr())
	must(t, err)
	return conn
}

// dial logs in by key.
func (s *sshd) dial(t *testing.T) *Client {
	t.Helper()
	c, err := Dial(t.Context(), s.conn(t), Config{Login: s.byKey(), HostKey: anyKey{}, Key: "sha256:image"})
	must(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

func (s *sshd) byKey() fleet.Login { return fleet.Login{User: account.name, Key: s.key} }

// write puts a program into the guest's home.
func (s *sshd) write(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(s.home, name)
	must(t, os.WriteFile(path, []byte(text), 0o755))
	return path
}

// touch lets a stand-in runner go on that waits for a file.
func (s *sshd) touch(t *testing.T, name string) {
	t.Helper()
	s.write(t, name, "")
}

// anyKey trusts every host key: most tests are not about them.
type anyKey struct{}

func (anyKey) Check(string, []byte) error { return nil }

func newKey(t *testing.T) (private, public string) {
	t.Helper()
	pub, priv, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	block, err := xssh.MarshalPrivateKey(priv, "")
	must(t, err)
	line, err := xssh.NewPublicKey(pub)
	must(t, err)
	return string(pem.EncodeToMemory(block)), string(xssh.MarshalAuthorizedKey(line))
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// within polls until done; it fails the test in the end.
func within(t *testing.T, what string, done func() bool) {
	t.Helper()
	deadline := time.Now().Add(soon)
	for !done() {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", soon, what)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func bounded(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	t.Cleanup(cancel)
	return ctx
}

// diskUse is the size of all files below dir, in bytes.
func diskUse(t *testing.T, dir string) (sum int64) {
	t.Helper()
	_ = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			if info, err := d.Info(); err == nil {
				sum += info.Size()
			}
		}
		return nil
	})
	return sum
}
