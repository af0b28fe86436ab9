package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestMain lets the test's binary play the roles of the demo's own.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && roles[os.Args[1]] != nil {
		main()
		return
	}
	os.Exit(m.Run())
}

// temporary has demos of this test work below a directory of its own, and returns the
// pattern of their directories. Unix sockets have short paths, which t.TempDir's are not.
func temporary(t *testing.T) (pattern string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "d")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("left in the temporary directory: %v, %v", left, err)
		}
		_ = os.RemoveAll(dir)
	})
	t.Setenv("TMPDIR", dir)
	return filepath.Join(dir, "paddock-demo-*")
}

// showing runs the demo with --json while meanwhile runs beside it.
func showing(t *testing.T, meanwhile func(ctx context.Context, interrupt func())) (code int, r result, errOut string) {
	t.Helper()
	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	beside := make(chan struct{})
	go func() { defer close(beside); meanwhile(ctx, interrupt) }()
	var out, errs bytes.Buffer
	code = run(ctx, []string{"--json"}, &out, &errs)
	interrupt()
	<-beside
	if err := json.Unmarshal(out.Bytes(), &r); err != nil {
		t.Fatalf("%v in %q; errors: %s", err, out.String(), errs.String())
	}
	return code, r, errs.String()
}

// appears waits for a file of that pattern; "" if ctx ends before.
func appears(ctx context.Context, pattern string) string {
	again := time.NewTicker(5 * time.Millisecond)
	defer again.Stop()
	for {
		if found, _ := filepath.Glob(pattern); len(found) > 0 {
			return found[0]
		}
		select {
		case <-ctx.Done():
			return ""
		case <-again.C:
		}
	}
}

// stray starts a process as a leaking job would leave one: in a session of its own and
// in a directory that says nothing. It ends with the test.
func stray(t *testing.T, dir string, env ...string) (pid int) {
	cmd := exec.CommandContext(t.Context(), "sleep", "600")
	cmd.Dir, cmd.Env = dir, append(os.Environ(), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		t.Error(err)
		return 0
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	return cmd.Process.Pid
}

func TestDemo(t *testing.T) {
	temporary(t)
	code, r, errOut := showing(t, func(context.Context, func()) {})
	if code != 0 || !r.Good() || r.Succeeded != jobs || len(r.Rows) != jobs {
		t.Errorf("exit status %d, %+v, errors %s", code, r, errOut)
	}
	if r.ColdStarts == 0 || r.Pulled == 0 || r.P95 < r.P50 || r.P50 <= 0 {
		t.Errorf("figures that cannot be: %+v", r)
	}
}

func TestLastLine(t *testing.T) {
	temporary(t)
	var out, errOut bytes.Buffer
	if code := run(t.Context(), nil, &out, &errOut); code != 0 {
		t.Errorf("exit status %d, errors %s", code, errOut.String())
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if last := lines[len(lines)-1]; last != "12 of 12 jobs ran, and a clean house" {
		t.Errorf("the last line is %q in\n%s", last, out.String())
	}
}

// TestLeak: a process of a machine that no node knows any more hides as well as it can,
// and the demo says so. One of a known machine is found and killed by its driver.
func TestLeak(t *testing.T) {
	pattern := temporary(t)
	code, r, _ := showing(t, func(ctx context.Context, _ func()) {
		if clone := appears(ctx, filepath.Join(pattern, "mac-*", "clones", "*")); clone != "" {
			stray(t, "/", "PADDOCK_MACHINE="+clone+"-lost")
		}
	})
	if code != 1 || r.Good() || r.Left.Processes != 1 || r.Succeeded != jobs {
		t.Errorf("exit status %d, %+v; want one process left", code, r)
	}
}

// TestInterrupt: nothing is left, at GitHub neither, when the demo ends in the middle.
func TestInterrupt(t *testing.T) {
	pattern := temporary(t)
	code, r, errOut := showing(t, func(ctx context.Context, interrupt func()) {
		appears(ctx, filepath.Join(pattern, "mac-*", "clones", "*"))
		interrupt()
	})
	if code != 1 || !r.Left.clean() || r.Succeeded == jobs {
		t.Errorf("exit status %d, %+v, errors %s", code, r, errOut)
	}
	if !strings.Contains(errOut, "interrupted; everything was torn down") {
		t.Errorf("errors %q", errOut)
	}
}
