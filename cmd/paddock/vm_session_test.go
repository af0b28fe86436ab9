package main

import (
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/paddock-ci/paddock/cmd/internal/parts"
	"github.com/paddock-ci/paddock/fleet"
)

// The parts of TestVMSessions, on its town and its VM.

func (tw *town) testForward(t *testing.T, vm fleet.VMID, port string) {
	f := tw.forward(vm, port)
	var all sync.WaitGroup
	for i := range 3 {
		conn := dial(t, f.address)
		all.Go(func() { bounce(t, conn, uint64(i)) })
	}
	all.Wait()
	held := dial(t, f.address) // an open connection does not hold Ctrl-C up
	if _, err := io.WriteString(held, "x"); err != nil {
		t.Error(err)
	}
	if _, err := io.ReadFull(held, make([]byte, 1)); err != nil {
		t.Error(err)
	}
	f.end(t)
}

func (tw *town) testClosedPort(t *testing.T, vm fleet.VMID) {
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, closed, _ := net.SplitHostPort(l.Addr().String())
	_ = l.Close()
	out, errOut, err := tw.says("", "forward", "--stdio", string(vm), closed)
	if err == nil || out != "" || !strings.Contains(errOut, "node mac-1: connecting to port "+closed) || !strings.Contains(errOut, "refused") {
		t.Errorf("%q, %v: %s", out, err, errOut)
	}
	f := tw.forward(vm, closed)
	if text, err := io.ReadAll(dial(t, f.address)); err != nil || len(text) > 0 {
		t.Errorf("%q, %v", text, err)
	}
	f.end(t)
	if !strings.Contains(f.stderr.String(), "connecting to port "+closed) {
		t.Errorf("it says %q", f.stderr)
	}
}

func (tw *town) testLogs(t *testing.T, id string) {
	for _, args := range [][]string{{"logs", id}, {"logs", id, "-f"}} {
		cmd := tw.command(args...)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if len(args) == 2 { // ends by itself
			if text, err := io.ReadAll(out); err != nil || !strings.Contains(string(text), "Running job: build") {
				t.Errorf("%q, %v", text, err)
			}
			if err := cmd.Wait(); err != nil {
				t.Error(err)
			}
			continue
		}
		awaitText(t, out, "Running job: build")
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
}

func (tw *town) testWhoMay(t *testing.T, id string) {
	viewer := strings.TrimSpace(tw.run("token", "create", "eve", "--role", "viewer"))
	e, err := parts.ReadEndpoint(filepath.Join(tw.dir, "data", parts.CLIFile))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), tw.self, "--url", e.URL, "vm", "console", id)
	cmd.Env = append(os.Environ(), "PADDOCK_TOKEN="+viewer, "PADDOCK_CERTIFICATE="+e.Certificate)
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "the role viewer may not do this (hint: it needs a token of the role operator or admin)") {
		t.Errorf("%v: %s", err, out)
	}
}
