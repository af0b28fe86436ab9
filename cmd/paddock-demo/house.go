package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/paddock-ci/paddock/fleet"
)

// leftover counts what must be nothing.
type leftover struct {
	Processes int `json:"vm_processes"`
	Clones    int `json:"clones"`
	Runners   int `json:"runners"`
	Leases    int `json:"leases"`
	VMs       int `json:"live_vms"`
	// Unseen says why the machine could not be looked at: then nothing is proved.
	Unseen string `json:"unseen,omitempty"`
}

func (l leftover) clean() bool { return l == leftover{} }

// inspect looks at the machine and at GitHub themselves, not at what Paddock believes.
func (d *demo) inspect(ctx context.Context, r *result) {
	processes, err := processesOf(ctx, d.dir)
	clones, errClones := filepath.Glob(filepath.Join(d.dir, "mac-*", "clones", "*"))
	leases, errLeases := filepath.Glob(filepath.Join(d.dir, "mac-*", "images", "leases", "*", "*"))
	if err := errors.Join(err, errClones, errLeases); err != nil {
		r.Left.Unseen = err.Error()
	}
	r.Left.Processes, r.Left.Clones = len(processes), len(clones)
	// The nodes' files are what the next start would go by, whatever they last reported.
	r.Left.Leases = max(r.Left.Leases, len(leases))
	r.Left.Runners = len(d.github.Runners())
	for _, job := range d.github.Jobs() {
		if job.Starts > 1 {
			r.Twice++
		}
		if job.Status == fleet.JobCompleted && job.Conclusion == "success" && job.Starts == 1 {
			r.Succeeded++
		}
	}
	r.Violations = d.github.Violations()
	_, r.Pulled = d.registry.Counts().Total()
}

// processesOf lists the processes other than this one that belong to the machines under
// dir. A process may have left its parent, its session and its directory, but it has
// inherited an environment in which the process driver marks it by PADDOCK_MACHINE, a
// directory in dir; no other process has ever heard of dir, whose name is random.
func processesOf(ctx context.Context, dir string) ([]int, error) {
	if _, err := os.Stat("/proc/self/environ"); err != nil {
		return processesByPS(ctx, dir)
	}
	entries, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	var found []int
	for _, p := range entries {
		pid, err := strconv.Atoi(filepath.Base(p))
		if err != nil || pid == os.Getpid() {
			continue
		}
		// What cannot be read has ended, or is another user's and none of ours.
		environ, _ := os.ReadFile(filepath.Join(p, "environ"))
		cmdline, _ := os.ReadFile(filepath.Join(p, "cmdline"))
		cwd, _ := os.Readlink(filepath.Join(p, "cwd"))
		stderr, _ := os.Readlink(filepath.Join(p, "fd/2")) // a helper's is a file in dir
		for _, said := range []string{string(environ), string(cmdline), cwd, stderr} {
			if strings.Contains(said, dir) {
				found = append(found, pid)
				break
			}
		}
	}
	return found, nil
}

// processesByPS is processesOf where there is no /proc, as on macOS: there ps shows our
// own user's processes with their environment (-E), to its full length (-ww).
func processesByPS(ctx context.Context, dir string) ([]int, error) {
	out, err := exec.CommandContext(ctx, "ps", "-axEww", "-o", "pid=,command=").Output()
	if err != nil {
		return nil, fmt.Errorf("list processes with their environment by ps: %w", err)
	}
	return readPS(string(out), dir, os.Getpid())
}

// readPS picks the lines "pid command and environment" that name dir, but for self's. A
// list without self is not a list of all processes.
func readPS(out, dir string, self int) ([]int, error) {
	var found []int
	complete := false
	for line := range strings.Lines(out) {
		first, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		pid, err := strconv.Atoi(first)
		if err != nil {
			continue // the rest of a command with a line break in it, or a heading
		}
		if pid == self {
			complete = true
		} else if strings.Contains(rest, dir) {
			found = append(found, pid)
		}
	}
	if !complete {
		return nil, errors.New("ps does not list all processes")
	}
	return found, nil
}
