package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// One Mac: paddock up with the embedded store, behind a public name that this host itself
// cannot reach. SIGTERM leaves the VM to the next start; Ctrl-C tears it down, and the
// store hears of it. A renamed machine joins again by itself.
func TestUp(t *testing.T) {
	tw := openTown(t, 1)
	tw.control.signal(syscall.SIGINT) // up takes its port
	<-tw.control.exited
	data := filepath.Join(tw.dir, "up")
	tw.env = []string{"PADDOCK_DATA=" + data, "PADDOCK_URL=https://paddock.invalid:8443", "PADDOCK_REDIS="}
	up := func(name string) *program {
		p := tw.start("up", "up", "--name", name)
		tw.eventually(30*time.Second, func() error {
			if p.ended() {
				t.Fatal("paddock up has ended")
			}
			list, err := tw.try("nodes", "list")
			if err == nil && !strings.Contains(list, name) {
				err = fmt.Errorf("no node %s in %s", name, list)
			}
			return err
		})
		return p
	}
	end := func(p *program, s syscall.Signal) {
		p.signal(s)
		<-p.exited
		if code := p.cmd.ProcessState.ExitCode(); code != 0 {
			t.Errorf("after %s paddock up ended with status %d", s, code)
		}
	}
	running := func(seconds float64) {
		job := tw.queue(1, seconds)[0]
		if _, err := tw.github.WaitJob(t.Context(), job, fleet.JobInProgress); err != nil {
			t.Fatal(err)
		}
	}

	p := up("mac-1")
	running(4)
	end(p, syscall.SIGTERM)
	if len(tw.machines()) == 0 {
		t.Error("the VM ended with SIGTERM")
	}
	p = up("mac-1")
	tw.waitDone(1, time.Minute)
	running(600)
	end(p, syscall.SIGINT)
	if left := tw.machines(); len(left) > 0 {
		t.Errorf("after Ctrl-C there are %v", left)
	}
	end(up("mac-2"), syscall.SIGINT)
	ledger, err := os.ReadFile(filepath.Join(data, "ledger.json"))
	if err != nil || !strings.Contains(string(ledger), "mac-2") {
		t.Errorf("the ledger does not know mac-2: %v", err)
	}
}

func (p *program) ended() bool {
	select {
	case <-p.exited:
		return true
	default:
		return false
	}
}

// try is run that may fail.
func (tw *town) try(args ...string) (string, error) {
	cmd := exec.CommandContext(tw.t.Context(), tw.self, append(args, "--config", tw.config)...)
	cmd.Env = append(os.Environ(), tw.env...)
	out, err := cmd.Output()
	return string(out), err
}
