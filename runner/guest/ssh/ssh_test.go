package ssh

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/runner/guest"
)

// standIn is a runner that prints what GitHub's prints, and waits for the test by files
// in its home: job lets it begin, end lets it end, with status 3.
const standIn = `#!/bin/sh
sha256sum >"$HOME/input.part" && mv "$HOME/input.part" "$HOME/input"
umask >"$HOME/mask"
echo "√ Connected to GitHub"
echo "2026-01-02 03:04:05Z: Listening for Jobs"
until [ -e "$HOME/job" ]; do sleep 0.05; done
echo "2026-01-02 03:04:06Z: Running job: build (arm64)"
until [ -e "$HOME/end" ]; do sleep 0.05; done
echo "2026-01-02 03:04:07Z: Job build (arm64) completed with result: Succeeded"
exit 3
`

// watcher follows a runner in the background.
type watcher struct {
	seen chan guest.Status
	last guest.Status
	err  error
	done chan struct{}
}

func watch(ctx context.Context, c *Client) *watcher {
	w := &watcher{seen: make(chan guest.Status, maxStatuses), done: make(chan struct{})}
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
	select {
	case <-w.done:
	case <-time.After(soon):
		t.Fatal("the watch did not end")
	}
	must(t, w.err)
	return w.last
}

// TestLife: one job from beginning to end, by password, with every status on the way.
func TestLife(t *testing.T) {
	if !account.throwaway {
		t.Skip("a password login needs an account of its own, which only root can make")
	}
	s := startSSHD(t)
	keys, err := OpenHostKeys(filepath.Join(t.TempDir(), "hosts"))
	must(t, err)
	c, err := Dial(t.Context(), s.conn(t), Config{
		Login: fleet.Login{User: account.name, Password: accountPassword}, HostKey: keys, Key: "sha256:image",
	})
	must(t, err)
	defer c.Close()
	ctx := bounded(t)
	hello, err := c.Hello(ctx)
	must(t, err)
	if hello.Status.State != guest.Idle || !strings.HasPrefix(hello.Version, "ssh OpenSSH") {
		t.Errorf("before the start: %+v", hello)
	}
	w := watch(ctx, c)
	w.until(t, guest.Idle)
	run := guest.Run{Name: "paddock-1", Argv: []string{s.write(t, "runner", standIn)}, Input: []byte("c2VjcmV0")}
	must(t, c.Start(ctx, run))
	must(t, c.Start(ctx, run)) // again changes nothing
	if running := w.until(t, guest.Running); running.Name != "paddock-1" {
		t.Errorf("running: %+v", running)
	}
	other := guest.Run{Name: "paddock-2", Argv: []string{"true"}}
	if err := c.Start(ctx, other); !errors.Is(err, guest.ErrOccupied) || !strings.Contains(err.Error(), "paddock-1") {
		t.Errorf("a second runner: %v", err)
	}
	s.touch(t, "job")
	if busy := w.until(t, guest.Busy); busy.Job != "build (arm64)" || time.Since(busy.BusyAt).Abs() > time.Hour {
		t.Errorf("busy: %+v", busy)
	}
	s.touch(t, "end")
	last := w.end(t)
	if last.ExitCode != 3 || last.Job != "build (arm64)" || !strings.HasPrefix(last.Tail, "√ Connected") || !strings.HasSuffix(last.Tail, "Succeeded\n") {
		t.Errorf("exited: %+v", last)
	}
	must(t, c.Start(ctx, run)) // also after its end
	hello, err = c.Hello(ctx)
	must(t, err)
	if hello.Status.State != guest.Exited || hello.Status.ExitCode != 3 {
		t.Errorf("after the end: %+v", hello)
	}
	want := sha256.Sum256([]byte("c2VjcmV0"))
	if got, _ := os.ReadFile(filepath.Join(s.home, "input")); !strings.HasPrefix(string(got), hex.EncodeToString(want[:])) {
		t.Errorf("the runner's input: %s", got)
	}
	if got, _ := os.ReadFile(filepath.Join(s.home, "mask")); string(got) != jobMask+"\n" {
		t.Errorf("the runner's umask: %q, want %s", got, jobMask)
	}
	code, err := c.Exec(ctx, guest.Command{Argv: []string{"/bin/sh", "-c", "test $(umask) = " + jobMask}}, nil)
	if must(t, err); code != 0 {
		t.Errorf("a command's umask is not %s", jobMask)
	}
	c.Close()
	s.noGuests(t)
}

// TestCrash: the server dies with all its sessions, and our side with it, while a job
// runs; a new login finds the runner and its end.
func TestCrash(t *testing.T) {
	s := startSSHD(t)
	c := s.dial(t)
	w := watch(bounded(t), c)
	must(t, c.Start(bounded(t), guest.Run{Name: "r", Argv: []string{s.write(t, "runner", standIn)}}))
	s.touch(t, "job")
	w.until(t, guest.Busy)
	s.kill(t)
	<-w.done
	if !errors.Is(w.err, guest.ErrLost) {
		t.Errorf("a watch whose server died: %v", w.err)
	}
	if _, err := c.Hello(bounded(t)); !errors.Is(err, guest.ErrLost) {
		t.Errorf("hello to a server that died: %v", err)
	}
	s.start(t)
	again := s.dial(t)
	w = watch(bounded(t), again)
	if busy := w.until(t, guest.Busy); busy.Name != "r" || busy.Job != "build (arm64)" {
		t.Errorf("found again: %+v", busy)
	}
	s.touch(t, "end")
	if last := w.end(t); last.ExitCode != 3 {
		t.Errorf("its end: %+v", last)
	}
	again.Close()
	s.noGuests(t) // not even the script of the watch that was lost
}

// TestSecret: while a runner runs, its input is in no process's arguments or environment
// and in no file, and the search would have found it.
func TestSecret(t *testing.T) {
	s := startSSHD(t)
	secret := "c" + hex.EncodeToString([]byte(rand.Text()))
	find := func() (places []string) {
		for _, p := range processes() {
			for _, file := range []string{"cmdline", "environ"} {
				if b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/%s", p, file)); bytes.Contains(b, []byte(secret)) {
					places = append(places, fmt.Sprintf("%s of %d", file, p))
				}
			}
		}
		_ = filepath.WalkDir(s.home, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.Type().IsRegular() {
				if b, _ := os.ReadFile(path); bytes.Contains(b, []byte(secret)) {
					places = append(places, path)
				}
			}
			return nil
		})
		return places
	}
	c := s.dial(t)
	// The search runs all the time, so that it meets what is there for a moment only.
	stop, stopped := make(chan struct{}), make(chan struct{})
	var found []string
	go func() {
		defer close(stopped)
		for {
			found = append(found, find()...)
			select {
			case <-stop:
				return
			default:
			}
		}
	}()
	run := guest.Run{Name: "r", Argv: []string{s.write(t, "runner", standIn)}, Env: map[string]string{"GREETING": "it's"}, Input: []byte(secret)}
	must(t, c.Start(bounded(t), run))
	within(t, "the runner has read its input", func() bool {
		_, err := os.Stat(filepath.Join(s.home, "input"))
		return err == nil
	})
	close(stop)
	<-stopped
	if found = append(found, find()...); len(found) > 0 {
		t.Errorf("the input is in %q", found)
	}
	s.touch(t, "job")
	s.touch(t, "end")
	w := watch(bounded(t), c)
	w.end(t)

	planted := s.write(t, "planted", secret)
	if got := find(); !slices.Contains(got, planted) {
		t.Errorf("the search finds %q, not what was planted", got)
	}
	must(t, os.Remove(planted))
}

// TestRunner: what a runner may be and do.
func TestRunner(t *testing.T) {
	for _, test := range []struct {
		name   string
		script string
		env    map[string]string
		input  string
		exit   int
		tail   string
	}{
		{name: "ends at once", script: "exit 0"},
		{name: "exit status", script: "exit 42", exit: 42},
		{name: "a signal", script: "kill -9 $$", exit: 137},
		{name: "input is not read", script: "exec <&-; echo done", input: strings.Repeat("x", 200<<10), tail: "done\n"},
		{name: "input of every byte", script: `od -An -tx1 | tr -d ' \n'`, input: "\x00\x01.\\%s'\"\n\xff\n", tail: "00012e5c257327220aff0a"},
		{name: "odd values", script: `printf '%s|' "$A" "$B"`, env: map[string]string{"A": "it's $HOME `x` \\ \"", "B": "two\n# lines\n"}, tail: "it's $HOME `x` \\ \"|two\n# lines\n|"},
		{name: "both outputs", script: "echo out; echo err >&2", tail: "out\nerr\n"},
		{name: "no text", script: `printf 'a\377b'`, tail: "a\uFFFDb"},
		{name: "can be interrupted", script: `trap 'echo caught; exit 5' INT HUP PIPE; kill -INT $$; kill -HUP $$`, exit: 5, tail: "caught\n"},
		{name: "killed by a hang-up", script: `kill -HUP $$`, exit: 129},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := startSSHD(t)
			c := s.dial(t)
			run := guest.Run{Name: "r", Argv: []string{"/bin/sh", "-c", test.script}, Env: test.env, Input: []byte(test.input)}
			must(t, c.Start(bounded(t), run))
			last := watch(bounded(t), c).end(t)
			if last.ExitCode != test.exit || last.Tail != test.tail {
				t.Errorf("exit %d, tail %q; want %d, %q", last.ExitCode, last.Tail, test.exit, test.tail)
			}
			c.Close()
			s.noGuests(t)
		})
	}
}

// TestDaemon: what a runner leaves behind holds its output open; its end is told all the
// same, and what is in its process group is killed.
func TestDaemon(t *testing.T) {
	s := startSSHD(t)
	c := s.dial(t)
	must(t, c.Start(bounded(t), guest.Run{Name: "r", Argv: []string{"/bin/sh", "-c", `sleep 1000 & setsid sh -c 'touch "$HOME/up"; exec sleep 1001' & until [ -e "$HOME/up" ]; do sleep 0.05; done; echo left; exit 7`}}))
	last := watch(bounded(t), c).end(t)
	if last.ExitCode != 7 || last.Tail != "left\n" {
		t.Errorf("its end: %+v", last)
	}
	c.Close()
	within(t, "only the daemon and the shells that hear it are left", func() bool {
		var names []string
		for _, p := range s.guests() {
			line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", p))
			if strings.HasPrefix(string(line), "sleep") {
				names = append(names, strings.TrimRight(string(line), "\x00"))
			}
		}
		return slices.Equal(names, []string{"sleep\x001001"})
	})
}

// TestFlood: a job that prints 64 MB without and with ends of lines fills neither disk
// nor memory, and the line that named its job is not lost in it.
func TestFlood(t *testing.T) {
	for _, test := range []struct{ name, script string }{
		{"one endless line", "echo Running job: flood; head -c 64000000 /dev/zero | tr '\\0' x"},
		{"many lines", "echo Running job: flood; yes no | head -c 64000000"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := startSSHD(t)
			c := s.dial(t)
			must(t, c.Start(bounded(t), guest.Run{Name: "r", Argv: []string{"/bin/sh", "-c", test.script}}))
			w := watch(bounded(t), c)
			most := int64(0)
			for running := true; running; {
				select {
				case <-w.done:
					running = false
				case <-time.After(5 * time.Millisecond):
				}
				most = max(most, diskUse(t, s.home))
			}
			last := w.end(t)
			if last.State != guest.Exited || last.Job != "flood" || last.ExitCode != 0 || len(last.Tail) != 4096 {
				t.Errorf("its end: job %q, exit %d, tail of %d bytes", last.Job, last.ExitCode, len(last.Tail))
			}
			if most > 3<<20 {
				t.Errorf("%d bytes on the guest's disk", most)
			}
		})
	}
}

// TestKeeperKilled: a job that kills everything around it is at its end, not running for
// ever.
func TestKeeperKilled(t *testing.T) {
	s := startSSHD(t)
	c := s.dial(t)
	must(t, c.Start(bounded(t), guest.Run{Name: "r", Argv: []string{"/bin/sh", "-c", `read keeper <"$(ls -d "$HOME"/.paddock/run-*)/claim"; kill -9 $keeper; sleep 1000`}}))
	if last := watch(bounded(t), c).end(t); last.ExitCode != 137 {
		t.Errorf("its end: %+v", last)
	}
}

// TestNoStart: what cannot be started is said, and leaves the guest idle.
func TestNoStart(t *testing.T) {
	s := startSSHD(t)
	c := s.dial(t)
	for _, test := range []struct {
		run  guest.Run
		want string
	}{
		{guest.Run{Name: "r", Argv: []string{"no-such-program"}}, "no program no-such-program"},
		{guest.Run{Name: "r", Argv: []string{"true"}, Dir: "/no/such/directory"}, "no directory /no/such/directory"},
		{guest.Run{Name: "r"}, "needs a program"},
		{guest.Run{Argv: []string{"true"}}, "needs a name"},
		{guest.Run{Name: "a\nb", Argv: []string{"true"}}, "needs a name"},
		{guest.Run{Name: "r", Argv: []string{"true"}, Env: map[string]string{"a b": "c"}}, `"a b"`},
		{guest.Run{Name: "r", Argv: []string{"true", "\x00"}}, "NUL"},
		{guest.Run{Name: "r", Argv: []string{"true"}, Input: make([]byte, maxInput+1)}, "input of"},
		{guest.Run{Name: "r", Argv: []string{"true", strings.Repeat("x", maxScript)}}, "at most"},
	} {
		if err := c.Start(bounded(t), test.run); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%v: %v; want %q", test.run, err, test.want)
		}
	}
	hello, err := c.Hello(bounded(t))
	must(t, err)
	if hello.Status.State != guest.Idle {
		t.Errorf("after that: %+v", hello.Status)
	}
}

// TestDirectory: the runner's directory is ~/actions-runner where there is one, and what
// is put goes there.
func TestDirectory(t *testing.T) {
	s := startSSHD(t)
	c := s.dial(t)
	text := []byte("#!/bin/sh\npwd; cat .runner; exec ./bin/listener\n")
	must(t, c.Put(bounded(t), guest.File{Path: "run.sh", Mode: 0o755, Size: int64(len(text))}, bytes.NewReader(text)))
	must(t, c.Put(bounded(t), guest.File{Path: ".runner", Size: 7}, strings.NewReader("secret\n")))
	must(t, c.Put(bounded(t), guest.File{Path: "bin/listener", Mode: 0o700, Size: 18}, strings.NewReader("#!/bin/sh\necho hi\n")))
	must(t, c.Start(bounded(t), guest.Run{Name: "r", Argv: []string{"./run.sh"}}))
	if last := watch(bounded(t), c).end(t); last.ExitCode != 0 || last.Tail != s.home+"/actions-runner\nsecret\nhi\n" {
		t.Errorf("its end: %+v", last)
	}
	info, err := os.Stat(filepath.Join(s.home, "actions-runner", ".runner"))
	must(t, err)
	if info.Mode() != 0o600 {
		t.Errorf("mode %v, want 0600", info.Mode())
	}
}

// TestPut: large files arrive as they are; those that are cut leave nothing.
func TestPut(t *testing.T) {
	s := startSSHD(t)
	c := s.dial(t)
	big := make([]byte, 20<<20)
	_, _ = rand.Read(big)
	path := filepath.Join(s.home, "deep er", "it's", "big")
	must(t, c.Put(bounded(t), guest.File{Path: path, Mode: 0o640, Size: int64(len(big))}, io.MultiReader(bytes.NewReader(big), strings.NewReader("more"))))
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, big) {
		t.Errorf("%d bytes arrived, %v", len(got), err)
	}
	must(t, c.Put(bounded(t), guest.File{Path: path}, strings.NewReader(""))) // replaced, by nothing
	if info, err := os.Stat(path); err != nil || info.Size() != 0 || info.Mode() != 0o600 {
		t.Errorf("replaced: %v, %v", info, err)
	}
	broken := errors.New("the disk is broken")
	for _, test := range []struct {
		file guest.File
		from io.Reader
		want string
	}{
		{guest.File{Path: path, Size: 10}, strings.NewReader("short"), "5 bytes are missing"},
		{guest.File{Path: path, Size: 10}, io.MultiReader(strings.NewReader("abc"), failing{broken}), broken.Error()},
		{guest.File{Path: s.home, Size: 1}, strings.NewReader("x"), "is a directory"},
		{guest.File{Path: "/proc/nothing", Size: 1}, strings.NewReader("x"), "cannot be written"},
		{guest.File{Path: "", Size: 1}, strings.NewReader("x"), "not the path"},
		{guest.File{Path: "x", Size: -1}, strings.NewReader("x"), "must be known"},
	} {
		if err := c.Put(bounded(t), test.file, test.from); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%+v: %v; want %q", test.file, err, test.want)
		}
	}
	within(t, "no part is left", func() bool {
		entries, err := os.ReadDir(filepath.Dir(path))
		must(t, err)
		return len(entries) == 1
	})
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

// TestOutput: all that a runner prints comes in order, from its first word on, and the
// following ends with it.
func TestOutput(t *testing.T) {
	s := startSSHD(t)
	c := s.dial(t)
	var mu sync.Mutex
	var got bytes.Buffer
	done := make(chan error, 1)
	go func() {
		done <- c.Output(bounded(t), func(p []byte) {
			mu.Lock()
			defer mu.Unlock()
			got.Write(p)
		})
	}()
	must(t, c.Start(bounded(t), guest.Run{Name: "r", Argv: []string{"/bin/sh", "-c", `i=0; while [ $i -lt 4000 ]; do i=$((i+1)); echo "line $i"; done; until [ -e "$HOME/end" ]; do sleep 0.05; done; echo last`}}))
	within(t, "the output comes while it runs", func() bool {
		mu.Lock()
		defer mu.Unlock()
		return strings.HasSuffix(got.String(), "line 4000\n")
	})
	s.touch(t, "end")
	must(t, <-done)
	var want strings.Builder
	for i := range 4000 {
		fmt.Fprintf(&want, "line %d\n", i+1)
	}
	want.WriteString("last\n")
	// 4000 lines may be 4000 reads, of which the last 1024 to 2048 are kept: what comes
	// is an end of all, and without a gap unless the reader was late.
	if text := got.String(); !strings.HasSuffix(text, "line 4000\nlast\n") {
		t.Errorf("the output ends %q", text[max(0, len(text)-50):])
	}
	before := got.Len()
	must(t, c.Output(bounded(t), func(p []byte) { got.Write(p) })) // also after its end
	if after := got.String()[before:]; !strings.HasSuffix(want.String(), after) || len(after) < 4096 {
		t.Errorf("%d bytes after the end, not the end of what was printed", len(after))
	}
}

// TestCancel: what is given up ends on both sides, and leaves the connection of use.
func TestCancel(t *testing.T) {
	s := startSSHD(t)
	c := s.dial(t)
	ctx, cancel := context.WithCancel(t.Context())
	w := watch(ctx, c)
	w.until(t, guest.Idle)
	cancel()
	<-w.done
	if !errors.Is(w.err, context.Canceled) {
		t.Errorf("a watch that was given up: %v", w.err)
	}
	if _, err := c.Hello(bounded(t)); err != nil {
		t.Errorf("the next call: %v", err)
	}
	s.noGuests(t)
}
