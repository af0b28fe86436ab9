package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/cmd/internal/parts"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github/githubtest"
)

// The cast: a town with one Mac, on which a VM serves a job that runs until the test lets
// it go. Machines of the process driver share the host's loopback, so what the test
// serves there is a service in the guest.

// busyVM queues a job and returns its VM, once it is busy, and what lets the job end.
func (tw *town) busyVM() (vm api.VMRow, release func()) {
	tw.t.Helper()
	gate := filepath.Join(tw.dir, "gate"+strconv.Itoa(len(tw.github.Jobs())))
	_, ids, err := tw.github.QueueRun(githubtest.Run{Repository: "acme/app", Jobs: []githubtest.JobSpec{{
		Name: "build", Labels: []string{"self-hosted", "macOS"}, Steps: []string{"until [ -e " + gate + " ]; do sleep 0.1; done"},
	}}})
	if err != nil {
		tw.t.Fatal(err)
	}
	client := tw.client()
	tw.eventually(time.Minute, func() error {
		rows, err := client.VMs(tw.t.Context())
		for _, row := range rows {
			if row.Job == ids[0] && row.State == fleet.VMBusy {
				vm = row
				return nil
			}
		}
		return errors.Join(errors.New("no VM is busy with the job"), err)
	})
	return vm, func() {
		if err := os.WriteFile(gate, nil, 0o600); err != nil {
			tw.t.Error(err)
		}
	}
}

func (tw *town) client() *api.Client {
	tw.t.Helper()
	e, err := parts.ReadEndpoint(filepath.Join(tw.dir, "data", parts.CLIFile))
	if err != nil {
		tw.t.Fatal(err)
	}
	client, err := e.Client()
	if err != nil {
		tw.t.Fatal(err)
	}
	return client
}

// command is paddock vm ARGS; it is ended with the test.
func (tw *town) command(args ...string) *exec.Cmd {
	tw.t.Helper()
	ctx, stop := context.WithTimeout(tw.t.Context(), 2*time.Minute)
	tw.t.Cleanup(stop)
	cmd := exec.CommandContext(ctx, tw.self, append([]string{"--config", tw.config, "vm"}, args...)...)
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// says runs paddock vm ARGS with an input and returns what it prints.
func (tw *town) says(input string, args ...string) (out, errOut string, err error) {
	tw.t.Helper()
	cmd := tw.command(args...)
	var o, e bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(input), &o, &e
	err = cmd.Run()
	return o.String(), e.String(), err
}

// guestService serves TCP on loopback until the test ends.
func guestService(t *testing.T, serve func(net.Conn)) (port string) {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var conns sync.WaitGroup
	t.Cleanup(func() { _ = l.Close(); conns.Wait() })
	conns.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			conns.Go(func() {
				defer func() { _ = conn.Close() }()
				serve(conn)
			})
		}
	})
	_, port, _ = net.SplitHostPort(l.Addr().String())
	return port
}

// echo answers with what it gets, and ends when that ends.
func echo(conn net.Conn) { _, _ = io.Copy(conn, conn) }

// forwarded is a paddock vm forward that runs.
type forwarded struct {
	cmd     *exec.Cmd
	address string
	stderr  *bytes.Buffer
}

func (tw *town) forward(vm fleet.VMID, ports string) forwarded {
	tw.t.Helper()
	cmd := tw.command("forward", string(vm), ports)
	out, err := cmd.StdoutPipe()
	if err != nil {
		tw.t.Fatal(err)
	}
	f := forwarded{cmd: cmd, stderr: &bytes.Buffer{}}
	cmd.Stderr = f.stderr
	if err := cmd.Start(); err != nil {
		tw.t.Fatal(err)
	}
	line := make([]byte, 200)
	n, err := out.Read(line)
	if f.address = regexp.MustCompile(`^127\.0\.0\.1:\d+`).FindString(string(line[:n])); f.address == "" {
		tw.t.Fatalf("it says %q, %v: %s", line[:n], err, f.stderr)
	}
	return f
}

// end is Ctrl-C.
func (f forwarded) end(t *testing.T) {
	t.Helper()
	_ = f.cmd.Process.Signal(os.Interrupt)
	if err := f.cmd.Wait(); err != nil {
		t.Errorf("forward ends with %v: %s", err, f.stderr)
	}
}

func dial(t *testing.T, address string) *net.TCPConn {
	t.Helper()
	conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	return conn.(*net.TCPConn)
}

// bounce sends 10 MB to an echo, ends its direction and gets them all back.
func bounce(t *testing.T, conn *net.TCPConn, seed uint64) {
	t.Helper()
	const size = 10 << 20
	sent, got := sha256.New(), sha256.New()
	var both sync.WaitGroup
	both.Go(func() {
		source := rand.NewChaCha8([32]byte{byte(seed)})
		if _, err := io.CopyN(io.MultiWriter(conn, sent), source, size); err != nil {
			t.Error(err)
		}
		if err := conn.CloseWrite(); err != nil {
			t.Error(err)
		}
	})
	n, err := io.Copy(got, conn)
	both.Wait()
	if err != nil || n != size || !bytes.Equal(sent.Sum(nil), got.Sum(nil)) {
		t.Errorf("%d of %d bytes came back, %v", n, size, err)
	}
}

func TestVMSessions(t *testing.T) {
	tw := openTown(t, 2, "mac-1")
	vm, release := tw.busyVM()
	id := string(vm.ID)
	port := guestService(t, echo)

	t.Run("forward", func(t *testing.T) { tw.testForward(t, vm.ID, port) })
	t.Run("forward by a beginning of the name and by the job", func(t *testing.T) {
		for _, word := range []string{id[:5], strconv.FormatInt(int64(vm.Job), 10)} {
			if out, errOut, err := tw.says("ping", "forward", "--stdio", word, port); err != nil || out != "ping" {
				t.Errorf("%s: %q, %v: %s", word, out, err, errOut)
			}
		}
	})
	t.Run("a port that nobody listens on", func(t *testing.T) { tw.testClosedPort(t, vm.ID) })
	t.Run("console", func(t *testing.T) { tw.testConsole(t, id) })
	t.Run("logs", func(t *testing.T) { tw.testLogs(t, id) })
	t.Run("ssh", func(t *testing.T) { tw.testSSH(t, id) })
	t.Run("who may", func(t *testing.T) { tw.testWhoMay(t, id) })
	t.Run("the events say who", func(t *testing.T) {
		events, err := tw.client().Events(t.Context(), api.EventFilter{VM: vm.ID})
		if err != nil {
			t.Fatal(err)
		}
		seen := map[string]int{}
		for _, e := range events {
			if e.Kind == "vm.session" && e.Actor == "admin:local" {
				seen[strings.TrimPrefix(e.Text, "admin:local opened a session: ")]++
			}
		}
		if seen["port "+port] < 5 || seen["console"] == 0 || seen["logs"] != 2 {
			t.Errorf("%v", seen)
		}
	})
	release()
	tw.waitDone(1, time.Minute)
	tw.cleanHouse()
}

// awaitText reads until a text has come.
func awaitText(t *testing.T, from io.Reader, want string) {
	t.Helper()
	var got []byte
	piece := make([]byte, 4096)
	for !bytes.Contains(got, []byte(want)) {
		n, err := from.Read(piece)
		got = append(got, piece[:n]...)
		if err != nil {
			t.Fatalf("%q without %q: %v", got, want, err)
		}
	}
}

// testConsole adds to a console as its driver does, and sees it come.
func (tw *town) testConsole(t *testing.T, id string) {
	f, err := os.OpenFile(filepath.Join(tw.dir, "mac-1", "clones", id, "console.log"), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if _, err := f.WriteString("first words\n"); err != nil {
		t.Fatal(err)
	}
	if out, errOut, err := tw.says("", "console", id, "--follow=false"); err != nil || !strings.HasSuffix(out, "first words\n") {
		t.Errorf("%q, %v: %s", out, err, errOut)
	}
	cmd := tw.command("console", id)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	awaitText(t, out, "first words\n")
	if _, err := f.WriteString("more of it\n"); err != nil {
		t.Fatal(err)
	}
	awaitText(t, out, "more of it\n")
	_ = cmd.Process.Signal(os.Interrupt)
	_ = cmd.Wait()
}

// testSSH logs in with the system's ssh at a real server.
func (tw *town) testSSH(t *testing.T, id string) {
	for _, program := range []string{"sshd", "ssh", "ssh-keygen"} {
		if _, err := exec.LookPath(program); err != nil {
			if os.Getenv("CI") == "true" {
				t.Fatalf("no %s on this machine, and CI=true: install it (Debian: apt-get install openssh-server openssh-client)", program)
			}
			t.Skipf("no %s on this machine", program)
		}
	}
	port, key, user := sshServer(t)
	args := []string{"ssh", id, "--port", port, "--user", user}
	options := []string{"--", "-F", "none", "-i", key, "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes"}
	out, errOut, err := tw.says("what I say", append(append(args, options...), "cat; echo; echo $((6*7)) of 'a b'")...)
	if err != nil || out != "what I say\n42 of a b\n" || errOut != "" {
		t.Errorf("%q, %v: %s", out, err, errOut)
	}
	out, errOut, err = tw.says("", append(append(args, options...), "exit 7")...)
	if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.ExitCode() != 7 {
		t.Errorf("the command's own status: %q, %v: %s", out, err, errOut)
	}
	// What --print shows is what a shell may run.
	line, _, err := tw.says("", append(append([]string{"ssh", "--print"}, args[1:]...), append(options, "echo printed")...)...)
	if err != nil || !strings.HasPrefix(line, "ssh -o 'ProxyCommand=") || !strings.Contains(line, "HostKeyAlias=paddock-"+id) {
		t.Fatalf("%q, %v", line, err)
	}
	text, err := exec.CommandContext(t.Context(), "sh", "-c", line).CombinedOutput()
	if err != nil || string(text) != "printed\n" {
		t.Errorf("%s: %q, %v", line, text, err)
	}
}

// sshServer runs OpenSSH's server on a loopback port until the test ends; key lets user in.
func sshServer(t *testing.T) (port, key, user string) {
	t.Helper()
	dir := t.TempDir()
	key = filepath.Join(dir, "key")
	for _, file := range []string{key, filepath.Join(dir, "host")} {
		if out, err := exec.CommandContext(t.Context(), "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", file).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	name, err := exec.CommandContext(t.Context(), "id", "-un").Output()
	if err != nil {
		t.Fatal(err)
	}
	user = strings.TrimSpace(string(name))
	if os.Getuid() == 0 {
		if err := os.MkdirAll("/run/sshd", 0o755); err != nil { // a server of root's wants it
			t.Fatal(err)
		}
	}
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ = net.SplitHostPort(l.Addr().String())
	_ = l.Close()
	config := filepath.Join(dir, "sshd_config")
	if err := os.WriteFile(config, fmt.Appendf(nil, `
ListenAddress 127.0.0.1:%s
HostKey %s/host
AuthorizedKeysFile %s.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
`, port, dir, key), 0o600); err != nil {
		t.Fatal(err)
	}
	path, err := exec.LookPath("sshd")
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	server := exec.CommandContext(ctx, path, "-D", "-e", "-f", config)
	server.Stderr = &log
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stop()
		_ = server.Wait()
		if t.Failed() {
			t.Logf("sshd:\n%s", log.String())
		}
	})
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		conn, err := new(net.Dialer).DialContext(t.Context(), "tcp", "127.0.0.1:"+port)
		if err == nil {
			_ = conn.Close()
			return port, key, user
		}
		if time.Now().After(deadline) {
			t.Fatalf("sshd does not listen: %v", err)
		}
	}
}

// A VM ends under its sessions, its agent is killed, its controller is killed: sessions
// end within seconds, and nothing of them holds anything up.
func TestVMSessionsCut(t *testing.T) {
	tw := openTown(t, 2, "mac-1")
	vm, release := tw.busyVM()
	port := guestService(t, echo)
	cut := func(what string, end func()) {
		t.Helper()
		f := tw.forward(vm.ID, port)
		conn := dial(t, f.address)
		if _, err := io.WriteString(conn, "x"); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		end()
		if _, err := conn.Read(make([]byte, 1)); err == nil || time.Since(began) > 30*time.Second {
			t.Errorf("%s: the connection goes on: %v", what, err)
		}
		_ = conn.Close()
		t.Logf("%s: ended after %v", what, time.Since(began))
		f.end(t)
	}
	cut("the agent is killed", func() { tw.nodes["mac-1"].kill() })
	tw.startNode("mac-1")
	tw.eventually(time.Minute, func() error {
		out, errOut, err := tw.says("again", "forward", "--stdio", string(vm.ID), port)
		if err != nil || out != "again" {
			return fmt.Errorf("%q, %w: %s", out, err, errOut)
		}
		return nil
	})
	cut("the controller is killed", func() {
		tw.control.kill()
		tw.control = tw.start("controller", "controller")
	})
	tw.waitReady()
	tw.eventually(time.Minute, func() error {
		_, errOut, err := tw.says("", "console", "--follow=false", string(vm.ID))
		if err != nil {
			return fmt.Errorf("%w: %s", err, errOut)
		}
		return nil
	})
	cut("the VM ends", func() {
		release()
		tw.waitDone(1, time.Minute)
	})
	if _, errOut, err := tw.says("", "console", string(vm.ID)); err == nil || !strings.Contains(errOut, "(hint: ") {
		t.Errorf("a VM that is over: %v, %s", err, errOut)
	}
	tw.cleanHouse()
}
