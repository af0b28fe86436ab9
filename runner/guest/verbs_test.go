package guest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

// shell runs a script by Exec and returns what it printed.
func shell(t *testing.T, c *Client, text, input string) (stdout, stderr string, code int, err error) {
	t.Helper()
	var out, errs strings.Builder
	code, err = c.Exec(t.Context(), Command{Argv: []string{"sh", "-c", text}, Env: map[string]string{"WHO": "host"}, Input: []byte(input)}, func(s Stream, p []byte) {
		if s == Stderr {
			errs.Write(p)
		} else {
			out.Write(p)
		}
	})
	return out.String(), errs.String(), code, err
}

func TestExec(t *testing.T) {
	f := serve(t)
	c := f.dial(t)
	stdout, stderr, code, err := shell(t, c, `pwd; cat; echo "for $WHO" >&2; exit 3`, "the input")
	if err != nil || code != 3 || stdout != f.dir+"\nthe input" || stderr != "for host\n" {
		t.Errorf("stdout %q, stderr %q, code %d, %v", stdout, stderr, code, err)
	}
	if _, _, code, err := shell(t, c, `kill -9 $$`, ""); err != nil || code != 128+9 {
		t.Errorf("killed by itself: code %d, %v", code, err)
	}
	for name, cmd := range map[string]Command{"no program": {}, "unknown program": {Argv: []string{"no-such-program"}}, "unknown directory": {Argv: []string{"true"}, Dir: "/no/such"}} {
		if _, err := c.Exec(t.Context(), cmd, nil); err == nil || errors.Is(err, ErrLost) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// What a daemon keeps open does not hold the exit, and what was printed is not lost.
	started := time.Now()
	stdout, _, code, err = shell(t, c, `head -c 60000 /dev/zero; setsid sleep 20 & exit 4`, "")
	if err != nil || code != 4 || len(stdout) != 60000 || time.Since(started) > 15*time.Second {
		t.Errorf("with a daemon: %d bytes, code %d, %v, after %v", len(stdout), code, err, time.Since(started))
	}
	if h, err := c.Hello(t.Context()); err != nil || h.Status.State != Idle {
		t.Errorf("a command is no runner: %+v, %v", h, err)
	}
	if strings.Contains(f.log.String(), "the input") {
		t.Errorf("the input is in the log: %s", f.log)
	}
}

// A command ends with its group when nobody wants it any more.
func TestExecIsKilled(t *testing.T) {
	for name, end := range map[string]func(cancel func(), c *Client){
		"by the context":     func(cancel func(), _ *Client) { cancel() },
		"by losing the line": func(_ func(), c *Client) { _ = c.conn.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			c := serve(t).dial(t)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var pids [2]int
			_, err := c.Exec(ctx, Command{Argv: []string{"sh", "-c", "sleep 600 & echo $$ $!; wait"}}, func(_ Stream, p []byte) {
				if _, err := fmt.Sscan(string(p), &pids[0], &pids[1]); err != nil {
					t.Error(err)
				}
				end(cancel, c)
			})
			if err == nil {
				t.Error("no error")
			}
			for _, pid := range pids {
				for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
					if state := processState(pid); state == "" || state == "Z" {
						break
					} else if time.Now().After(deadline) {
						t.Fatalf("process %d of %v is in state %q", pid, pids, state)
					}
				}
			}
		})
	}
}

// Hundreds of megabytes through a reader that is slow at first: the command waits, other
// requests on the same connection do not, and no side keeps more than the window.
func TestExecFloodIsBounded(t *testing.T) {
	const size = 300 << 20
	c := serve(t).dial(t)
	runtime.GC()
	var before, now runtime.MemStats
	runtime.ReadMemStats(&before)
	got, most := 0, uint64(0)
	code, err := c.Exec(t.Context(), Command{Argv: []string{"sh", "-c", fmt.Sprintf("yes 0123456789 | head -c %d", size)}}, func(_ Stream, p []byte) {
		if got == 0 {
			eventually(t, "the window is full", func() bool {
				c.mu.Lock()
				defer c.mu.Unlock()
				waits := 0
				for _, call := range c.waiting {
					if call.streamed {
						waits = len(call.answers)
					}
				}
				return waits >= window-1 // beside the piece in hand
			})
			for range 3 {
				if _, err := c.Hello(within(t, time.Minute)); err != nil {
					t.Errorf("hello beside a flood: %v", err)
				}
			}
		}
		if got += len(p); got%(8<<20) < len(p) {
			runtime.ReadMemStats(&now)
			most = max(most, now.HeapInuse)
		}
	})
	if err != nil || code != 0 || got != size {
		t.Errorf("%d bytes, code %d, %v", got, code, err)
	}
	t.Logf("heap grew by %d KiB at most", (int64(most)-int64(before.HeapInuse))>>10)
	if most > before.HeapInuse+64<<20 { // what the collector lets lie, far from the flood
		t.Errorf("heap of %d MiB, %d before", most>>20, before.HeapInuse>>20)
	}
}

func TestPut(t *testing.T) {
	f := serve(t)
	c := f.dial(t)
	content := bytes.Repeat([]byte("0123456789abcdef"), 100_000)
	for name, file := range map[string]File{
		"a/b/relative": {Path: "a/b/relative", Mode: 0o755, Size: int64(len(content))},
		"absolute":     {Path: filepath.Join(f.dir, "absolute"), Size: 1000},
		"empty":        {Path: "empty", Mode: 0o640},
	} {
		for range 2 { // the second replaces the first
			if err := c.Put(t.Context(), file, bytes.NewReader(content)); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		got, err := os.ReadFile(filepath.Join(f.dir, name))
		if err != nil || sha256.Sum256(got) != sha256.Sum256(content[:file.Size]) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
		want := max(file.Mode, 0)
		if want == 0 {
			want = 0o600
		}
		if info, err := os.Stat(filepath.Join(f.dir, name)); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: mode %v, want %v, %v", name, info.Mode(), want, err)
		}
	}
	endless := readerFunc(func(p []byte) (int, error) { return len(p), nil })
	if err := c.Put(t.Context(), File{Path: "endless", Size: 1 << 20}, endless); err != nil {
		t.Errorf("an endless file: %v", err)
	}
	if info, err := os.Stat(filepath.Join(f.dir, "endless")); err != nil || info.Size() != 1<<20 {
		t.Errorf("an endless file is not cut: %v, %v", info, err)
	}
}

type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func TestPutThatFails(t *testing.T) {
	f := serve(t)
	c := f.dial(t)
	if err := os.WriteFile(filepath.Join(f.dir, "file"), []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		file File
		from io.Reader
	}{
		"home":          {File{Path: "~/x"}, nil},
		"leaving":       {File{Path: "../x"}, nil},
		"no path":       {File{}, nil},
		"a directory":   {File{Path: "x/"}, nil},
		"a negative":    {File{Path: "x", Size: -1}, nil},
		"too large":     {File{Path: "x", Size: maxFile + 1}, nil},
		"below a file":  {File{Path: "file/x"}, nil},
		"a short one":   {File{Path: "file", Size: 1 << 20}, strings.NewReader("short")},
		"a broken read": {File{Path: "file", Size: 1 << 20}, io.MultiReader(bytes.NewReader(make([]byte, 600<<10)), readerFunc(func([]byte) (int, error) { return 0, fs.ErrInvalid }))},
	} {
		if err := c.Put(t.Context(), test.file, test.from); err == nil || errors.Is(err, ErrLost) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := c.Hello(t.Context()); err != nil {
		t.Errorf("the connection did not survive: %v", err)
	}
	left := func() []os.DirEntry {
		entries, err := os.ReadDir(f.dir)
		if err != nil {
			t.Fatal(err)
		}
		return entries
	}
	for deadline := time.Now().Add(30 * time.Second); len(left()) != 1; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("left: %v", left())
		}
	}
	if b, err := os.ReadFile(filepath.Join(f.dir, "file")); err != nil || string(b) != "old" {
		t.Errorf("a put that failed changed the file: %q, %v", b, err)
	}
}

func TestOutputIsKeptAndFollowed(t *testing.T) {
	f := serve(t)
	c := f.dial(t)
	early := make(chan string, 1)
	go func() { // before there is a runner
		var all strings.Builder
		if err := f.dial(t).Output(t.Context(), func(p []byte) { all.Write(p) }); err != nil {
			t.Errorf("output: %v", err)
		}
		early <- all.String()
	}()
	gate := filepath.Join(f.dir, "gate")
	if err := c.Start(t.Context(), script("r1", `head -c 100000 /dev/zero | tr '\0' x; echo first; while [ ! -e gate ]; do sleep 0.05; done; echo last`, "")); err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	opened := false
	err := c.Output(t.Context(), func(p []byte) {
		all.Write(p)
		if !opened && strings.Contains(all.String(), "first") {
			opened = true
			if err := os.WriteFile(gate, nil, 0o600); err != nil {
				t.Error(err)
			}
		}
	})
	if err != nil || !strings.HasSuffix(all.String(), "xfirst\nlast\n") {
		t.Errorf("output %q, %v", all.String()[max(0, all.Len()-20):], err)
	}
	if got := <-early; !strings.HasSuffix(got, "xfirst\nlast\n") {
		t.Errorf("who waited for the runner got %d bytes", len(got))
	}
	all.Reset()
	if err := c.Output(t.Context(), func(p []byte) { all.Write(p) }); err != nil || all.Len() != ringSize || !strings.HasSuffix(all.String(), "last\n") {
		t.Errorf("after the end: %d bytes, %v; want the last %d", all.Len(), err, ringSize)
	}
}

// A follower that does not read misses something; the runner does not wait for it.
func TestASlowFollowerDoesNotHoldTheRunner(t *testing.T) {
	c := serve(t).dial(t)
	if err := c.Start(t.Context(), script("r1", `head -c 50000000 /dev/zero | tr '\0' y; echo end`, "")); err != nil {
		t.Fatal(err)
	}
	var all bytes.Buffer
	err := c.Output(t.Context(), func(p []byte) {
		if all.Len() == 0 {
			if s, err := c.Watch(t.Context(), nil); err != nil || s.ExitCode != 0 {
				t.Errorf("watch: %+v, %v", s, err)
			}
		}
		all.Write(p)
	})
	if err != nil || all.Len() > (window+2)*maxChunk+ringSize+100 || !strings.HasSuffix(all.String(), "end\n") {
		t.Errorf("%d bytes, %v", all.Len(), err)
	}
}

// machine is a System that notes what it is asked for.
type machine struct {
	mu    sync.Mutex
	asked []string
	wake  Wake
}

func (m *machine) note(what string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.asked = append(m.asked, what)
	return nil
}

func (m *machine) NetworkUp(context.Context) error { return m.note("network") }
func (m *machine) Shutdown(context.Context) error  { return m.note("shutdown") }
func (m *machine) Wake(_ context.Context, w Wake) error {
	m.wake = Wake{w.Now, bytes.Clone(w.Entropy)}
	return m.note("wake")
}

func TestTheMachineIsAskedFor(t *testing.T) {
	gate, m := NewGate(), &machine{}
	ctx, cancel := context.WithCancel(t.Context())
	var log bytes.Buffer
	served := make(chan error, 1)
	go func() {
		served <- Serve(ctx, gate, AgentConfig{System: m, Log: slog.New(slog.NewTextHandler(&log, nil))})
	}()
	host, inside := net.Pipe()
	gate.pass(inside, nil)
	c := New(host)
	n, err := c.NetworkUp(t.Context())
	if err != nil || len(n.Addresses) > 0 && n.Interface == "" {
		t.Errorf("network: %+v, %v", n, err)
	}
	now := time.Now()
	if err := c.Wake(t.Context(), Wake{Now: now, Entropy: []byte("the-secret")}); err != nil || !m.wake.Now.Equal(now) || string(m.wake.Entropy) != "the-secret" {
		t.Errorf("wake: %v, %v", m.wake, err)
	}
	if err := c.Wake(t.Context(), Wake{Now: now, Entropy: make([]byte, maxEntropy+1)}); err == nil {
		t.Error("any amount of entropy is taken")
	}
	if err := c.Shutdown(t.Context()); err != nil {
		t.Errorf("shutdown: %v", err)
	}
	_ = c.Close()
	cancel()
	if err := <-served; err != nil {
		t.Error(err)
	}
	if got := strings.Join(m.asked, " "); got != "network wake shutdown" {
		t.Errorf("asked for %s", got)
	}
	if w := (Wake{Now: now, Entropy: []byte("the-secret")}); strings.Contains(log.String()+fmt.Sprintf("%v %+v %#v", w, w, &w), "secret") {
		t.Error("the entropy is printed")
	}
	// An agent that is a process on somebody's host leaves that alone.
	foreign := serve(t).dial(t)
	if err := errors.Join(foreign.Shutdown(t.Context()), foreign.Wake(t.Context(), Wake{Now: now})); !errors.Is(err, ErrUnsupported) {
		t.Errorf("on a host: %v", err)
	}
	if _, err := foreign.NetworkUp(t.Context()); err != nil {
		t.Errorf("network on a host: %v", err)
	}
}

func TestConnect(t *testing.T) {
	f := serve(t)
	raw := func() net.Conn {
		conn, err := (&net.Dialer{}).DialContext(t.Context(), "unix", f.socket)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		return conn
	}
	for _, host := range []string{"127.0.0.1:0", "[::1]:0"} {
		l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", host)
		if err != nil {
			t.Fatal(err)
		}
		go func() { // hears all, and then answers
			conn, err := l.Accept()
			if err != nil {
				return
			}
			all, _ := io.ReadAll(conn)
			_, _ = conn.Write(bytes.ToUpper(all))
			_ = conn.Close()
		}()
		conn := raw()
		if err := Connect(t.Context(), conn, l.Addr().(*net.TCPAddr).Port); err != nil {
			t.Fatal(err)
		}
		_, _ = conn.Write([]byte("spoken"))
		_ = conn.(*net.UnixConn).CloseWrite()
		if got, err := io.ReadAll(conn); err != nil || string(got) != "SPOKEN" {
			t.Errorf("%s: %q, %v", host, got, err)
		}
		_ = l.Close()
		if err := Connect(t.Context(), raw(), l.Addr().(*net.TCPAddr).Port); err == nil || !strings.Contains(err.Error(), "refused") {
			t.Errorf("nobody listens: %v", err)
		}
	}
	if err := Connect(t.Context(), raw(), 70000); err == nil {
		t.Error("port 70000 was connected to")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	deaf, _ := net.Pipe()
	if err := Connect(ctx, deaf, 22); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a guest that never answers: %v", err)
	}
}

// An agent of before these verbs: it answers every kind above 4 as unknown.
func TestOlderAgent(t *testing.T) {
	host, inside := net.Pipe()
	go func() {
		for {
			f, err := readFrame(inside)
			if err != nil {
				return
			}
			b, _ := encodeFrame(kindError, f.id, errorBody{Code: codeUnsupported, Text: fmt.Sprintf("kind %d", f.kind)})
			if _, err := inside.Write(b); err != nil {
				return
			}
		}
	}()
	c := New(host)
	defer func() { _ = c.Close() }()
	for name, err := range everyVerb(t.Context(), c) {
		if !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "update the agent") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// everyVerb calls each and returns the errors.
func everyVerb(ctx context.Context, c *Client) map[string]error {
	all := map[string]error{}
	_, all["exec"] = c.Exec(ctx, Command{Argv: []string{"true"}}, nil)
	all["put"] = c.Put(ctx, File{Path: "x", Size: 10}, strings.NewReader("0123456789"))
	all["output"] = c.Output(ctx, func([]byte) {})
	_, all["network"] = c.NetworkUp(ctx)
	all["wake"] = c.Wake(ctx, Wake{Now: time.Now()})
	all["shutdown"] = c.Shutdown(ctx)
	return all
}

// A guest that reads and never answers, and one that does not even read: every call ends
// when its context does.
func TestAGuestThatNeverAnswers(t *testing.T) {
	for name, reads := range map[string]bool{"reads": true, "does not read": false} {
		t.Run(name, func(t *testing.T) {
			for i := range 6 {
				host, inside := net.Pipe()
				if reads {
					go func() { _, _ = io.Copy(io.Discard, inside) }()
				}
				c := New(host)
				calls := []func(context.Context) error{
					func(ctx context.Context) error { _, err := c.Exec(ctx, Command{Argv: []string{"x"}}, nil); return err },
					func(ctx context.Context) error { return c.Put(ctx, File{Path: "x", Size: 1}, strings.NewReader("x")) },
					func(ctx context.Context) error { return c.Output(ctx, func([]byte) {}) },
					func(ctx context.Context) error { _, err := c.NetworkUp(ctx); return err },
					func(ctx context.Context) error { return c.Wake(ctx, Wake{}) },
					func(ctx context.Context) error { return c.Shutdown(ctx) },
				}
				ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
				started := time.Now()
				if err := calls[i](ctx); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("call %d: %v", i, err)
				}
				if took := time.Since(started); took > 10*time.Second {
					t.Errorf("call %d ended after %v", i, took)
				}
				cancel()
				_ = c.Close()
				_ = inside.Close()
			}
		})
	}
}

func TestJITFiles(t *testing.T) {
	pack := func(files map[string]string) []byte {
		encoded := map[string][]byte{}
		for name, content := range files {
			encoded[name] = []byte(content)
		}
		b, err := json.Marshal(encoded)
		if err != nil {
			t.Fatal(err)
		}
		return []byte(base64.StdEncoding.EncodeToString(b) + "\n")
	}
	files, err := JITFiles(pack(map[string]string{".runner": `{"x":1}`, ".credentials": "the-secret", ".credentials_rsaparams": ""}))
	if err != nil || len(files) != 3 || files[0].Name != ".credentials" || string(files[0].Content) != "the-secret" || files[2].Name != ".runner" {
		t.Fatalf("%v, %v", files, err)
	}
	if printed := fmt.Sprintf("%v %+v %#v %s", files, files, files, files[0]); strings.Contains(printed, "secret") || strings.Contains(printed, "116") {
		t.Errorf("the content is printed: %s", printed)
	}
	for name, jit := range map[string][]byte{
		"nothing": nil, "no base64": []byte("{the-secret}"), "no JSON": []byte("dGhlLXNlY3JldA=="), "no files": pack(nil),
		"a path": pack(map[string]string{"a/b": "the-secret"}), "the parent": pack(map[string]string{"..": "the-secret"}),
		"the directory": pack(map[string]string{".": "the-secret"}), "absolute": pack(map[string]string{"/etc/passwd": "the-secret"}),
		"a backslash": pack(map[string]string{`..\x`: "the-secret"}), "no name": pack(map[string]string{"": "the-secret"}),
		"large": bytes.Repeat([]byte("a"), maxJIT+1),
	} {
		if files, err := JITFiles(jit); err == nil || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v, %v", name, files, err)
		}
	}
}
