package guest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// The cast: an agent that listens on a unix socket in a directory of its own, its log
// in a buffer, and clients that come and go. Runners are small shell scripts.
type fixture struct {
	dir    string
	socket string
	log    *lockedBuffer
	stop   func() // ends the agent and waits for it
}

// lockedBuffer is a log that may be read while it is written.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func serve(t *testing.T) *fixture {
	t.Helper()
	short, err := os.MkdirTemp("", "g") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(short) })
	f := &fixture{dir: t.TempDir(), socket: filepath.Join(short, "s"), log: &lockedBuffer{}}
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "unix", f.socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	served := make(chan error, 1)
	go func() {
		served <- Serve(ctx, l, AgentConfig{Dir: f.dir, Version: "v-test", Log: slog.New(slog.NewTextHandler(f.log, nil))})
	}()
	f.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	t.Cleanup(f.stop)
	return f
}

func (f *fixture) dial(t *testing.T) *Client {
	t.Helper()
	conn, err := (&net.Dialer{}).DialContext(t.Context(), "unix", f.socket)
	if err != nil {
		t.Fatal(err)
	}
	c := New(conn)
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func script(name, text string, input string) Run {
	return Run{Name: name, Argv: []string{"sh", "-c", text}, Input: []byte(input)}
}

func TestRunnerLife(t *testing.T) {
	f := serve(t)
	c := f.dial(t)
	h, err := c.Hello(t.Context())
	if err != nil || h.Protocol != Protocol || h.Version != "v-test" || h.Status.State != Idle {
		t.Fatalf("hello: %+v, %v", h, err)
	}
	r := script("r1", `read -r config; pwd; echo "got ${#config} bytes, $GREETING";
		echo "2026-01-02 03:04:05Z: Running job: build (a, b)"; read -r more || echo ended; exit 3`, "secret-config\n")
	r.Env = map[string]string{"GREETING": "hello"}
	if err := c.Start(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	var seen []State
	s, err := c.Watch(t.Context(), func(s Status) { seen = append(seen, s.State) })
	if err != nil {
		t.Fatal(err)
	}
	if s.State != Exited || s.Name != "r1" || s.Job != "build (a, b)" || s.ExitCode != 3 || s.BusyAt.IsZero() || s.ExitedAt.Before(s.BusyAt) {
		t.Errorf("final status %+v", s)
	}
	for _, want := range []string{f.dir, "got 13 bytes, hello", "ended"} {
		if !strings.Contains(s.Tail, want) {
			t.Errorf("tail %q does not have %q", s.Tail, want)
		}
	}
	if seen[len(seen)-1] != Exited {
		t.Errorf("watch reported %v, want Exited last", seen)
	}
	if strings.Contains(f.log.String(), "secret") {
		t.Errorf("the input is in the log: %s", f.log)
	}
}

func TestStartIsIdempotentByName(t *testing.T) {
	f := serve(t)
	c := f.dial(t)
	r := script("r1", `echo run >> runs; cat`, "x")
	for range 3 {
		if err := c.Start(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.Watch(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if err := c.Start(t.Context(), r); err != nil {
		t.Errorf("the same name after its exit: %v", err)
	}
	if err := c.Start(t.Context(), script("r2", "true", "")); !errors.Is(err, ErrOccupied) {
		t.Errorf("another name: %v, want ErrOccupied", err)
	}
	runs, err := os.ReadFile(filepath.Join(f.dir, "runs"))
	if err != nil || string(runs) != "run\n" {
		t.Errorf("it ran %q, %v; want once", runs, err)
	}
}

func TestStartThatFailsLeavesTheGuestIdle(t *testing.T) {
	f := serve(t)
	c := f.dial(t)
	err := c.Start(t.Context(), Run{Name: "r1", Argv: []string{"no-such-program"}, Input: []byte("secret")})
	if err == nil || !strings.Contains(err.Error(), "no-such-program") || strings.Contains(err.Error(), "secret") {
		t.Fatalf("error %v, want one that names the program", err)
	}
	if err := c.Start(t.Context(), Run{Name: "r1"}); err == nil {
		t.Error("a runner without a program was started")
	}
	h, err := c.Hello(t.Context())
	if err != nil || h.Status.State != Idle {
		t.Errorf("hello: %+v, %v; want idle", h, err)
	}
}

func TestStateOutlivesConnections(t *testing.T) {
	f := serve(t)
	gate := filepath.Join(f.dir, "gate")
	if err := syscall.Mkfifo(gate, 0o600); err != nil {
		t.Fatal(err)
	}
	c := f.dial(t)
	if err := c.Start(t.Context(), script("r1", `cat; echo "Running Job 'lint'"; read -r x < gate; exit 5`, "")); err != nil {
		t.Fatal(err)
	}
	busy := errors.New("seen")
	ctx, cancel := context.WithCancelCause(t.Context())
	_, err := c.Watch(ctx, func(s Status) {
		if s.State == Busy {
			cancel(busy)
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("a cancelled watch: %v", err)
	}
	if _, err := c.Hello(t.Context()); err != nil {
		t.Fatalf("hello on the same connection after a cancelled watch: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Hello(t.Context()); !errors.Is(err, ErrLost) {
		t.Errorf("hello on a closed client: %v, want ErrLost", err)
	}

	again := f.dial(t)
	h, err := again.Hello(t.Context())
	if err != nil || h.Status.State != Busy || h.Status.Job != "lint" {
		t.Fatalf("hello on a new connection: %+v, %v; want busy with lint", h, err)
	}
	if err := os.WriteFile(gate, []byte("go\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if s, err := again.Watch(t.Context(), nil); err != nil || s.ExitCode != 5 {
		t.Errorf("watch on a new connection: %+v, %v", s, err)
	}
}

func TestServeEndKillsTheRunnersGroup(t *testing.T) {
	f := serve(t)
	c := f.dial(t)
	if err := c.Start(t.Context(), script("r1", `sleep 600 & echo $! > child; echo "Running job: x"; sleep 600`, "")); err != nil {
		t.Fatal(err)
	}
	busy := make(chan struct{})
	lost := make(chan error, 1)
	go func() {
		_, err := c.Watch(t.Context(), func(s Status) {
			if s.State == Busy {
				close(busy)
			}
		})
		lost <- err
	}()
	<-busy
	b, err := os.ReadFile(filepath.Join(f.dir, "child"))
	if err != nil {
		t.Fatal(err)
	}
	child, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	f.stop()
	if err := <-lost; !errors.Is(err, ErrLost) {
		t.Errorf("the watch ended with %v, want ErrLost", err)
	}
	// Killed when Serve returned, but a killed process needs a moment to die.
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(30 * time.Second); ; <-tick.C {
		state := processState(child)
		if state == "" || state == "Z" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the runner's child %d is in state %q after Serve returned", child, state)
		}
	}
}

// processState is the state letter of a process, "" if there is none. Without /proc a
// signal tells whether it is there.
func processState(pid int) string {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err == nil {
		return string(stat[bytes.LastIndexByte(stat, ')')+2])
	}
	if _, noProc := os.Stat("/proc/self"); noProc != nil && syscall.Kill(pid, 0) == nil {
		return "?"
	}
	return ""
}

func TestDaemonThatHoldsThePipeDoesNotHoldTheExit(t *testing.T) {
	f := serve(t)
	c := f.dial(t)
	// A shell's background job is in the same group and killed with it; perl's or
	// python's daemons leave the group, as setsid does here.
	if err := c.Start(t.Context(), script("r1", `setsid sleep 5 & exit 0`, "")); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	if s, err := c.Watch(t.Context(), nil); err != nil || s.ExitCode != 0 {
		t.Fatalf("%+v, %v", s, err)
	}
	if took := time.Since(start); took > 4*time.Second {
		t.Errorf("exit was seen after %v; the daemon held it", took)
	}
}

func TestOutputFloodIsBounded(t *testing.T) {
	f := serve(t)
	c := f.dial(t)
	// 64 MB without a single line end, then the line that matters, then the end.
	if err := c.Start(t.Context(), script("r1", `head -c 64000000 /dev/zero | tr '\0' x; echo; echo "Running job: late"; printf end; kill -9 $$`, "")); err != nil {
		t.Fatal(err)
	}
	s, err := c.Watch(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Tail) != maxTail || !strings.HasSuffix(s.Tail, "end") || s.Job != "late" || s.ExitCode != 128+9 {
		t.Errorf("job %q, code %d, tail of %d bytes ending in %q", s.Job, s.ExitCode, len(s.Tail), s.Tail[max(0, len(s.Tail)-10):])
	}
}

func TestInputIsHidden(t *testing.T) {
	r := Run{Name: "r1", Argv: []string{"run"}, Input: []byte("the-secret")}
	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "run", r)
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "run", r, "pointer", &r)
	asJSON, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	encoded, err := json.Marshal(r.Input)
	if err != nil {
		t.Fatal(err)
	}
	printed := fmt.Sprintf("%v %+v %#v %s %v", r, r, r, r, &r) + log.String() + string(asJSON)
	for _, form := range []string{"the-secret", strings.Trim(string(encoded), `"`), "[116 104 101 45"} { // as text, as base64, as numbers
		if strings.Contains(printed, form) {
			t.Errorf("the input is printed: %s", printed)
		}
	}
	if !strings.Contains(printed, "r1") {
		t.Errorf("the name is not printed: %s", printed)
	}
}

func TestTooLargeInputIsRefusedBeforeItIsSent(t *testing.T) {
	c := serve(t).dial(t)
	err := c.Start(t.Context(), Run{Name: "r1", Argv: []string{"true"}, Input: make([]byte, maxFrame)})
	if err == nil || errors.Is(err, ErrLost) {
		t.Errorf("error %v, want one about the size", err)
	}
	if _, err := c.Hello(t.Context()); err != nil {
		t.Errorf("the connection did not survive: %v", err)
	}
}

func TestParseBusy(t *testing.T) {
	for _, test := range []struct {
		line, job string
	}{
		{"2026-01-02 03:04:05Z: Running job: build", "build"},
		{"2026-01-02T03:04:05.123Z: Running job: build (macos, 15)\r", "build (macos, 15)"},
		{"Running job: x", "x"},
		{"Running Job 'test'", "test"},
		{"paddock-a-1 ( http://127.0.0.1:1/ ): Running Job 'test'", "test"},
		{"Running job: ", ""},
		{"echo Running job: x", ""},
		{"2026-01-02 03:04:05Z: Listening for Jobs", ""},
		{"2026-01-02 03:04:05Z: Job build completed with result: Succeeded", ""},
	} {
		job, ok := parseBusy(test.line)
		if job != test.job || ok != (test.job != "") {
			t.Errorf("parseBusy(%q) = %q, %v; want %q", test.line, job, ok, test.job)
		}
	}
}
