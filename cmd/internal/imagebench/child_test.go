//go:build linux

package imagebench

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// cost is what a process took, as the kernel counted it.
type cost struct {
	wall, user, system time.Duration
	rss                int64 // bytes, at its height
	// written are the bytes that it made the page cache hold for files (write_bytes), by
	// when it ended or not; read are those that came from the disk itself (read_bytes),
	// which is next to none when they were in the page cache.
	written, read int64
	// calls are the bytes of its read and write calls, sockets included (rchar, wchar).
	callsRead, callsWritten int64
	out                     string
}

// measure runs a program to its end.
func measure(tb testing.TB, program string, args ...string) cost {
	tb.Helper()
	unix.Sync() // what others left behind is not to be waited for in here
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(tb.Context(), program, args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	start := time.Now()
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	// Waited for in two steps: between them it has ended, and is still to be asked.
	var err error
	for err = syscall.EINTR; err == syscall.EINTR; { //nolint:errorlint // a plain number
		err = unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
	}
	c := cost{wall: time.Since(start)}
	counted, ioErr := os.ReadFile(fmt.Sprintf("/proc/%d/io", cmd.Process.Pid))
	if failed := cmd.Wait(); failed != nil || err != nil || ioErr != nil {
		tb.Fatalf("%s %s: %v, %v, %v: %s", filepath.Base(program), strings.Join(args, " "), failed, err, ioErr, errs.String())
	}
	usage, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage)
	if !ok {
		tb.Fatal("no usage of a process that has ended")
	}
	c.user, c.system, c.rss, c.out = cmd.ProcessState.UserTime(), cmd.ProcessState.SystemTime(), usage.Maxrss<<10, out.String()
	for line := range strings.Lines(string(counted)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		n, err := strconv.ParseInt(value, 10, 64)
		if err != nil {
			tb.Fatalf("%q: %v", line, err)
		}
		switch name {
		case "write_bytes":
			c.written = n
		case "read_bytes":
			c.read = n
		case "rchar":
			c.callsRead = n
		case "wchar":
			c.callsWritten = n
		}
	}
	return c
}

// role runs a role of this binary.
func role(tb testing.TB, name string, args ...string) cost {
	tb.Helper()
	return measure(tb, self(tb), append([]string{name}, args...)...)
}

func self(tb testing.TB) string {
	tb.Helper()
	path, err := os.Executable()
	if err != nil {
		tb.Fatal(err)
	}
	return path
}

// served is a registry's process.
type served struct{ host string }

// serve starts a registry that gives rate bytes a second; 0: all it can.
func serve(tb testing.TB, dir string, rate int) served {
	tb.Helper()
	cmd := exec.CommandContext(tb.Context(), self(tb), "registry", dir, strconv.Itoa(rate))
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		tb.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		tb.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _, _ = in.Close(), cmd.Wait() })
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		tb.Fatal(err)
	}
	return served{strings.TrimSpace(line)}
}

func (s served) ref(tag string) string { return s.host + "/bench/disk:" + tag }

// counts says what was asked for since the last question.
func (s served) counts(tb testing.TB) (c counts) {
	tb.Helper()
	r, err := http.NewRequestWithContext(tb.Context(), http.MethodGet, "http://"+s.host+"/counts", nil)
	if err != nil {
		tb.Fatal(err)
	}
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		tb.Fatal(err)
	}
	defer func() { _ = answer.Body.Close() }()
	body, err := io.ReadAll(answer.Body)
	if err != nil {
		tb.Fatal(err)
	}
	if err := json.Unmarshal(body, &c); err != nil {
		tb.Fatal(err)
	}
	return c
}

var programDir string

// program is the product's binary, built once.
var program = sync.OnceValues(func() (_ string, err error) {
	if programDir, err = os.MkdirTemp("", "imagebench-"); err != nil {
		return "", err
	}
	path := filepath.Join(programDir, "paddock")
	out, err := exec.Command("go", "build", "-buildvcs=false", "-o", path, "github.com/paddock-ci/paddock/cmd/paddock").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("build the program: %w: %s", err, out)
	}
	return path, nil
})

func removeProgram() error {
	if programDir == "" {
		return nil
	}
	return os.RemoveAll(programDir)
}
