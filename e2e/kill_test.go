package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/paddock-ci/paddock/fleet"
)

// nodeOf waits until a job runs, and returns the node and the VM that it runs on.
func (s *stable) nodeOf(job fleet.JobID) (node, vm string) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), jobTime)
	defer cancel()
	if _, err := s.github.WaitJob(ctx, job, fleet.JobInProgress); err != nil {
		s.t.Fatal(err)
	}
	s.await("the busy VM", jobTime, func() error {
		for _, row := range s.vms() {
			if row.State == "busy" {
				node, vm = row.Node, row.ID
				return nil
			}
		}
		return fmt.Errorf("none is busy: %+v", s.vms())
	})
	return node, vm
}

// The agent is killed under a running job, started again, stopped as for an upgrade, and
// started again: the job never learns of it. Then a helper is killed: its machine goes down
// with it, the agent notices, and nothing is left of it.
func TestKillsUnderRunningJobs(t *testing.T) {
	s := openStable(t, pool{yaml: "    memory: 384MiB"})
	job := s.queue("echo begun; sleep 15; echo and well ended")[0]
	node, vm := s.nodeOf(job)
	before := s.machines()
	s.killNode(node)
	s.startNode(node)
	s.await("the adopted VM", jobTime, func() error {
		for _, row := range s.vms() {
			if row.ID == vm && row.State == "busy" {
				return nil
			}
		}
		return fmt.Errorf("%+v", s.vms())
	})
	upgraded := s.nodes[node]
	if err := upgraded.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	<-upgraded.gone
	if now := s.machines(); strings.Join(now, ";") != strings.Join(before, ";") {
		t.Errorf("the machine's processes were %q and are %q", before, now)
	}
	s.startNode(node)
	s.succeeds(job, "and well ended")

	doomed := s.queue("sleep 600")[0]
	node, vm = s.nodeOf(doomed)
	s.killHelper(node, vm)
	s.await("the lost VM's end", jobTime, func() error {
		for _, row := range s.vms() {
			if row.ID == vm && row.State == "done" && strings.Contains(row.Reason, "vm helper was killed") {
				return nil
			}
		}
		return fmt.Errorf("%+v", s.vms())
	})
	s.cleanHosts() // GitHub gives the silent runner up in its own time
}

// killHelper kills the process that keeps a VM.
func (s *stable) killHelper(node, vm string) {
	s.t.Helper()
	text, err := os.ReadFile(filepath.Join(s.dir, node, "vms", vm, "helper.pid"))
	if err != nil {
		s.t.Fatal(err)
	}
	pid, err := strconv.Atoi(string(text))
	if err != nil || pid < 2 {
		s.t.Fatalf("the helper's pid is %q", text)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		s.t.Fatal(err)
	}
}
