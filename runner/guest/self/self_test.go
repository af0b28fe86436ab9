package self

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/runner/guest"
)

// soon bounds what should take a moment, on a slow machine under load.
const soon = 30 * time.Second

// machine is a guest: the reference launcher with a home of its own, and the host's end.
type machine struct {
	dir    string // the share, on the host
	home   string
	client *Client
	cmd    *exec.Cmd
	out    bytes.Buffer
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	m := &machine{dir: filepath.Join(t.TempDir(), "share"), home: t.TempDir()}
	mounts, err := Prepare(m.dir)
	must(t, err)
	if len(mounts) != 2 || !mounts[0].ReadOnly || mounts[1].ReadOnly {
		t.Fatalf("mounts: %+v", mounts)
	}
	m.client = Open(m.dir)
	t.Cleanup(func() { m.client.Close() })
	return m
}

// jobMask is the umask under which the launcher is started, and jobs should run.
const jobMask = "0027"

// boot runs the launcher, in a process group of its own, by the shell that is named.
func (m *machine) boot(t *testing.T, shell ...string) {
	t.Helper()
	script := filepath.Join(t.TempDir(), "launcher.sh")
	must(t, os.WriteFile(script, []byte(LauncherScript), 0o755))
	words := append([]string{"-c", "umask " + jobMask + `; exec "$@"`, "sh"}, append(shell, script)...)
	m.cmd = exec.CommandContext(context.WithoutCancel(t.Context()), "/bin/sh", words...)
	m.cmd.Env = []string{"HOME=" + m.home, "PATH=" + os.Getenv("PATH"),
		"PADDOCK_IN=" + filepath.Join(m.dir, "in"), "PADDOCK_OUT=" + filepath.Join(m.dir, "out")}
	m.cmd.Stdout, m.cmd.Stderr = &m.out, &m.out
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	m.cmd.WaitDelay = time.Second
	must(t, m.cmd.Start())
	t.Cleanup(func() {
		_ = syscall.Kill(-m.cmd.Process.Pid, syscall.SIGKILL)
		_ = m.cmd.Wait()
		if t.Failed() {
			t.Logf("the launcher printed: %s", m.out.Bytes())
		}
	})
}

func (m *machine) status(t *testing.T, text string) {
	t.Helper()
	must(t, os.WriteFile(filepath.Join(m.dir, "out", "status"), []byte(text), 0o600))
}

// secrets lists the files of the host's end that have a text in them.
func (m *machine) secrets(text string) (places []string) {
	_ = filepath.WalkDir(m.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return nil
		}
		if info, err := d.Info(); err != nil || info.Size() > 1<<20 { // what a test made endless
			return nil
		}
		if b, err := os.ReadFile(path); err == nil && bytes.Contains(b, []byte(text)) {
			places = append(places, path)
		}
		return nil
	})
	return places
}

// standIn is a runner that prints what GitHub's prints, and waits for the test by files.
const standIn = `#!/bin/sh
cat >"$HOME/input.part" && mv "$HOME/input.part" "$HOME/input"
umask >"$HOME/mask"
echo "√ Connected to GitHub"
until [ -e "$HOME/job" ]; do sleep 0.05; done
echo "2026-01-02 03:04:06Z: Running job: build (arm64)"
until [ -e "$HOME/end" ]; do sleep 0.05; done
echo "$GREETING" >"$HOME/greeting"
exit 3
`

// TestLife: the reference launcher runs a real process as the runner, by each shell that
// may be a guest's /bin/sh; the JIT config is on the disk for a moment only.
func TestLife(t *testing.T) {
	for _, shell := range [][]string{{"/bin/sh"}, {"dash"}, {"bash", "--posix"}, {"busybox", "sh"}} {
		t.Run(shell[0], func(t *testing.T) {
			m := newMachine(t)
			runner := filepath.Join(m.home, "my runner")
			must(t, os.WriteFile(runner, []byte(standIn), 0o755))
			m.boot(t, shell...)
			ctx := bounded(t)
			hello, err := m.client.Hello(ctx)
			must(t, err)
			if hello.Status.State != guest.Idle || hello.Version != "launcher/1" {
				t.Errorf("hello: %+v", hello)
			}
			w := watch(ctx, m.client)
			run := guest.Run{Name: "r1", Argv: []string{runner}, Input: []byte("c2VjcmV0"), Env: map[string]string{"GREETING": "it's $HOME"}}
			must(t, m.client.Start(ctx, run))
			if places := m.secrets("c2VjcmV0"); len(places) > 0 {
				t.Errorf("the JIT config is still in %q", places)
			}
			if s := w.until(t, guest.Running); s.Name != "r1" {
				t.Errorf("running: %+v", s)
			}
			must(t, m.client.Start(ctx, run)) // again changes nothing
			other := guest.Run{Name: "r2", Input: []byte("c2VjcmV0")}
			if err := m.client.Start(ctx, other); !errors.Is(err, guest.ErrOccupied) || !strings.Contains(err.Error(), "r1") {
				t.Errorf("a second runner: %v", err)
			}
			m.searchProcesses(t, "c2VjcmV0")
			touch(t, m.home, "job")
			if s := w.until(t, guest.Busy); s.Job != "build (arm64)" || time.Since(s.BusyAt).Abs() > time.Hour {
				t.Errorf("busy: %+v", s)
			}
			touch(t, m.home, "end")
			last := w.end(t)
			if last.ExitCode != 3 || last.Job != "build (arm64)" || last.ExitedAt.IsZero() || last.BusyAt.IsZero() {
				t.Errorf("its end: %+v", last)
			}
			must(t, m.client.Start(ctx, run)) // also after its end
			if got, _ := os.ReadFile(filepath.Join(m.home, "input")); string(got) != "c2VjcmV0" {
				t.Errorf("the runner's input: %q", got)
			}
			if got, _ := os.ReadFile(filepath.Join(m.home, "mask")); string(got) != jobMask+"\n" {
				t.Errorf("the runner's umask: %q, want %s", got, jobMask)
			}
			if got, _ := os.ReadFile(filepath.Join(m.home, "greeting")); string(got) != "it's $HOME\n" {
				t.Errorf("the runner's environment: %q", got)
			}
			must(t, m.cmd.Wait()) // nothing of the launcher stays
		})
	}
}

// searchProcesses fails if a text is in the arguments or environment of a process of the
// guest; it must find the guest's home there, or the search is blind.
func (m *machine) searchProcesses(t *testing.T, text string) {
	t.Helper()
	seen := 0
	files, err := filepath.Glob("/proc/[0-9]*")
	must(t, err)
	for _, p := range files {
		for _, name := range []string{"cmdline", "environ"} {
			b, _ := os.ReadFile(filepath.Join(p, name))
			if bytes.Contains(b, []byte(text)) {
				t.Errorf("the JIT config is in %s/%s", p, name)
			}
			if bytes.Contains(b, []byte("HOME="+m.home)) {
				seen++
			}
		}
	}
	if seen < 2 {
		t.Errorf("the search saw %d processes of the guest", seen)
	}
}

// TestGitHubRunner: where the pool names no command, the files of GitHub's JIT config are
// in the runner's directory before its run.sh starts.
func TestGitHubRunner(t *testing.T) {
	m := newMachine(t)
	dir := filepath.Join(m.home, "actions-runner")
	must(t, os.Mkdir(dir, 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "run.sh"), []byte("#!/bin/sh\npwd; cat .runner .credentials; stat -c %a .credentials\n"), 0o755))
	config, err := json.Marshal(map[string][]byte{".runner": []byte("{}\n"), ".credentials": []byte("key\n")})
	must(t, err)
	m.boot(t, "/bin/sh")
	must(t, m.client.Start(bounded(t), guest.Run{Name: "r", Input: []byte(base64.StdEncoding.EncodeToString(config))}))
	if last := watch(bounded(t), m.client).end(t); last.ExitCode != 0 {
		t.Errorf("its end: %+v", last)
	}
	must(t, m.cmd.Wait())
	if want := dir + "\n{}\nkey\n600\n"; m.out.String() != want {
		t.Errorf("the runner printed %q, want %q", m.out.String(), want)
	}
}

// TestLeftovers: what a runner leaves behind holds its output open, and its end is told.
func TestLeftovers(t *testing.T) {
	m := newMachine(t)
	m.boot(t, "/bin/sh")
	must(t, m.client.Start(bounded(t), guest.Run{Name: "r", Argv: []string{"sh", "-c", "sleep 1000 & kill -9 $$"}}))
	if last := watch(bounded(t), m.client).end(t); last.ExitCode != 137 {
		t.Errorf("its end: %+v", last)
	}
}

// TestRestart: host and launcher die and come back.
func TestRestart(t *testing.T) {
	m := newMachine(t)
	runner := filepath.Join(m.home, "runner")
	must(t, os.WriteFile(runner, []byte(standIn), 0o755))
	run := guest.Run{Name: "r", Argv: []string{runner}, Input: []byte("c2VjcmV0")}

	// The host dies right after it handed over, before the guest is up.
	if taken, err := m.client.claim("r"); err != nil || !taken {
		t.Fatal(taken, err)
	}
	must(t, m.client.hand(run))
	must(t, m.client.Close())
	if _, err := Prepare(m.dir); err != nil {
		t.Fatal(err)
	}
	again := Open(m.dir)
	if err := again.Start(expired(t), run); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a start that nobody took: %v", err)
	}
	if places := m.secrets("c2VjcmV0"); len(places) > 0 {
		t.Errorf("the JIT config of a start that was given up is still in %q", places)
	}
	m.boot(t, "/bin/sh")
	must(t, again.Start(bounded(t), run))
	touch(t, m.home, "job")
	watch(bounded(t), again).until(t, guest.Busy)
	if s := watch(bounded(t), Open(m.dir)).until(t, guest.Busy); s.Name != "r" || s.Job != "build (arm64)" {
		t.Errorf("found by another: %+v", s)
	}

	// The launcher dies with its runner, and is started once more.
	must(t, syscall.Kill(-m.cmd.Process.Pid, syscall.SIGKILL))
	_ = m.cmd.Wait()
	m.boot(t, "/bin/sh")
	if last := watch(bounded(t), again).end(t); last.ExitCode != 137 {
		t.Errorf("its end: %+v", last)
	}
}

// TestWords: what a launcher may say, in whole and in part.
func TestWords(t *testing.T) {
	long := strings.Repeat("x", 10<<10)
	for _, test := range []struct {
		text string
		want guest.Status
		odd  string
	}{
		{"", guest.Status{State: guest.Idle}, ""},
		{"ready\n", guest.Status{State: guest.Idle}, ""},
		{"ready\nrunning\n", guest.Status{State: guest.Running}, ""},
		{"ready\nrunni", guest.Status{State: guest.Idle}, ""},
		{"ready\r\nrunning\r\nbusy build one\r\n", guest.Status{State: guest.Busy, Job: "build one"}, ""},
		{"running\nbusy a\nbusy b\nexited 3\nexited 4\nready\n", guest.Status{State: guest.Exited, Job: "a", ExitCode: 3}, ""},
		{"ready\nexited 256\n", guest.Status{State: guest.Idle}, "exited 256"},
		{"ready\nexited -1\n", guest.Status{State: guest.Idle}, "exited -1"},
		{"Ready\n", guest.Status{State: guest.Idle}, "Ready"},
		{"\x00\xff\x1b[2J\n", guest.Status{State: guest.Idle}, " \uFFFD [2J"},
		{"busy " + long + "\n", guest.Status{State: guest.Busy, Job: long}, ""},
	} {
		r := parse([]byte(test.text))
		if r.status != test.want || r.odd != test.odd {
			t.Errorf("%.60q: %+v, odd %q", test.text, r.status, r.odd)
		}
	}
	m := newMachine(t)
	m.status(t, "busy "+long+"\xff\n")
	hello, err := m.client.Hello(bounded(t))
	must(t, err)
	if len(hello.Status.Job) > 3<<10 {
		t.Errorf("a job of %d bytes", len(hello.Status.Job))
	}
}

// TestNotReady: what a person reads whose image has no launcher, or another one.
func TestNotReady(t *testing.T) {
	m := newMachine(t)
	if _, err := m.client.Hello(expired(t)); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "bootstrap: self") {
		t.Errorf("no word: %v", err)
	}
	m.status(t, "Ready.\n")
	if _, err := m.client.Hello(expired(t)); err == nil || !strings.Contains(err.Error(), `"Ready."`) {
		t.Errorf("an odd word: %v", err)
	}
	if err := m.client.Start(bounded(t), guest.Run{Name: "r", Env: map[string]string{"a b": ""}}); err == nil || !strings.Contains(err.Error(), `"a b"`) {
		t.Errorf("an odd variable: %v", err)
	}
	if _, err := Prepare("relative"); err == nil {
		t.Error("a share at a relative path")
	}
	done := make(chan error, 1)
	go func() {
		_, err := m.client.Watch(bounded(t), nil)
		done <- err
	}()
	must(t, m.client.Close())
	if err := <-done; !errors.Is(err, guest.ErrLost) {
		t.Errorf("a watch of a closed client: %v", err)
	}
	info, err := os.Stat(m.dir)
	must(t, err)
	if info.Mode().Perm() != 0o700 {
		t.Errorf("the share has mode %v, want 0700", info.Mode().Perm())
	}
}

// FuzzStatus: no bytes from a guest panic, and what is taken from them is bounded.
func FuzzStatus(f *testing.F) {
	f.Add([]byte("ready launcher/1\nrunning\nbusy build\nexited 3\n"))
	f.Add([]byte("busy \xff\nexited 999\n\nready"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := parse(b)
		s, ok := guest.Checked(r.status)
		if !ok || rank(s.State) == 0 {
			t.Fatalf("state %q", s.State)
		}
		if r.started() && !r.ready {
			t.Error("started and not ready")
		}
		if len(s.Job) > 3<<10 || len(r.odd) > 3*maxWord || len(r.version) > 3*maxWord || s.ExitCode < 0 || s.ExitCode > 255 {
			t.Errorf("out of bounds: job %d, odd %d, version %d bytes, exit %d", len(s.Job), len(r.odd), len(r.version), s.ExitCode)
		}
		if _, err := json.Marshal(s); err != nil {
			t.Errorf("a status that cannot be passed on: %v", err)
		}
		if more := parse(append(bytes.Clone(b), "\nready\n"...)); rank(more.status.State) < rank(r.status.State) {
			t.Errorf("more words brought it back from %s to %s", r.status.State, more.status.State)
		}
	})
}

// watcher follows a runner in the background.
type watcher struct {
	seen chan guest.Status
	last guest.Status
	err  error
	done chan struct{}
}

func watch(ctx context.Context, c *Client) *watcher {
	w := &watcher{seen: make(chan guest.Status, 8), done: make(chan struct{})}
	go func() {
		defer close(w.done)
		w.last, w.err = c.Watch(ctx, func(s guest.Status) { w.seen <- s })
	}()
	return w
}

func (w *watcher) until(t *testing.T, state guest.State) guest.Status {
	t.Helper()
	for {
		select {
		case s := <-w.seen:
			if s.State == state {
				return s
			}
		case <-time.After(soon):
			t.Fatalf("the runner did not become %s", state)
		}
	}
}

func (w *watcher) end(t *testing.T) guest.Status {
	t.Helper()
	<-w.done // its context is bounded
	must(t, w.err)
	return w.last
}

func touch(t *testing.T, dir, name string) {
	t.Helper()
	must(t, os.WriteFile(filepath.Join(dir, name), nil, 0o600))
}

func bounded(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), soon)
	t.Cleanup(cancel)
	return ctx
}

// expired is a context that leaves time for one look or two.
func expired(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), pollEvery*3/2)
	t.Cleanup(cancel)
	return ctx
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
