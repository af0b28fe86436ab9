package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// manager does what systemd does of the unit as far as the story goes: the command and
// the environment as they are written, and with KillMode=process a signal to the agent's
// process alone. The agent has two minutes, so that none outlives a test that failed.
const manager = `#!/bin/sh
unit="$XDG_CONFIG_HOME/systemd/user/$3"
stop() {
	[ -e "$DESK/pid" ] || return 0
	pid=$(cat "$DESK/pid")
	kill -TERM "$pid"
	while [ -e "/proc/$pid" ] && ! grep -q '^State:.Z' "/proc/$pid/status"; do sleep 0.05; done
	rm "$DESK/pid"
}
start() {
	grep -q '^KillMode=process$' "$unit" || exit 7
	eval "set -- $(sed -n 's/^ExecStart=://p' "$unit")"
	eval "export $(sed -n 's/^Environment=//p' "$unit" | tr '\n' ' ')"
	timeout --foreground 120 "$@" >> "$DESK/log" 2>&1 < /dev/null &
	echo $! > "$DESK/pid"
}
case $2 in
start) [ -e "$DESK/pid" ] || start ;;
restart) stop; start ;;
disable) unit="$XDG_CONFIG_HOME/systemd/user/$4"; stop ;;
esac
`

// An agent that its service manager runs: a second installation restarts it under a job,
// which does not notice; uninstalling leaves the next job's VM running and nothing else,
// and an agent that is started by hand takes it over.
func TestInstalledAgent(t *testing.T) {
	tw := openTown(t, 1)
	desk := t.TempDir()
	if err := os.WriteFile(filepath.Join(desk, "systemctl"), []byte(manager), 0o755); err != nil {
		t.Fatal(err)
	}
	dir, home := filepath.Join(tw.dir, "mac-1"), t.TempDir()
	environ := append(os.Environ(), "PATH="+desk+":"+os.Getenv("PATH"), "DESK="+desk, "XDG_CONFIG_HOME="+home, "PADDOCK_NODE_DIR="+dir)
	node := func(args ...string) string {
		t.Helper()
		cmd := exec.CommandContext(context.WithoutCancel(t.Context()), tw.self, append(append([]string{"node"}, args...), "--config", tw.config)...)
		cmd.Env = environ
		said, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("paddock node %s: %v: %s", args[0], err, said)
		}
		return string(said)
	}
	tw.run("node", "join", strings.TrimSpace(tw.run("token", "create", "--node", "mac-1")), "--name", "mac-1", "--dir", dir)
	t.Cleanup(func() {
		node("uninstall")
		if log, err := os.ReadFile(filepath.Join(desk, "log")); t.Failed() && err == nil {
			t.Logf("log of the installed agent:\n%s", tail(string(log), 60))
		}
	})
	listed := func(want string, command ...string) {
		t.Helper()
		tw.eventually(time.Minute, func() error {
			list, err := tw.try(command...)
			if err == nil && !strings.Contains(list, want) {
				err = fmt.Errorf("no %q in %s", want, list)
			}
			return err
		})
	}

	node("install", "--name", "mac-1")
	tw.queue(1, 12)
	listed(" busy ", "vm", "list")
	before := tw.machines()
	if said := node("install", "--name", "mac-1", "--slots", "3"); !strings.Contains(said, "updated: ") {
		t.Errorf("installed again: %s", said)
	}
	listed(" 1/3 ", "nodes", "list")
	if after := tw.machines(); len(before) == 0 || !slices.Equal(before, after) {
		t.Errorf("machines before the restart %v, after it %v", before, after)
	}
	tw.waitDone(1, time.Minute)

	tw.queue(1, 12)
	listed(" busy ", "vm", "list")
	tw.eventually(time.Minute, func() error { // the first VM's helper may still be ending
		before = tw.machines()
		if n := strings.Count(strings.Join(before, "\n"), " vm-helper "); n != 1 {
			return fmt.Errorf("%d VMs run: %v", n, before)
		}
		return nil
	})
	if said := node("uninstall"); !strings.Contains(said, "1 VM of this node may still run") {
		t.Errorf("uninstalled: %s", said)
	}
	if after := tw.machines(); len(before) == 0 || !slices.Equal(before, after) {
		t.Errorf("machines before uninstalling %v, after it %v", before, after)
	}
	if left, err := os.ReadDir(home); err != nil || len(left) > 0 {
		t.Errorf("left in the configuration's home: %v (%v)", left, err)
	}
	tw.startNode("mac-1")
	tw.waitDone(2, time.Minute)
	tw.cleanHouse()
}
