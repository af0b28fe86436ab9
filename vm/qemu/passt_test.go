//go:build linux

package qemu_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/vm"
	"github.com/paddock-ci/paddock/vm/process/processtest"
	"github.com/paddock-ci/paddock/vm/qemu"
	"github.com/paddock-ci/paddock/vm/vmtest"
)

// behindPasst runs the calling test again inside a host's namespace, where passt finds a
// network however poor the machine's own is, and tells whether it is in there.
func behindPasst(t *testing.T) bool {
	t.Helper()
	if os.Getenv(networkEnv) != "" {
		return true
	}
	if os.Geteuid() != 0 {
		t.Fatalf("this test makes network namespaces: it needs root (sudo go test ./vm/qemu -run %s)", t.Name())
	}
	t.Parallel()
	image(t, "arm64")
	newHost(t).run(t, "-test.run=^"+t.Name()+"$", networkEnv+"=passt")
	return false
}

// What holds for the lives and ends of machines, and for saved ones, holds behind passt.
func TestPasstConformance(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("this test makes network namespaces: it needs root")
	}
	t.Parallel()
	image(t, "arm64")
	newHost(t).run(t, "-test.run=^(TestConformance|TestSaveAndRestore|TestOwnerKilled|TestReap|TestDestroyOfHanging)$/^(boot|many|a_boot_that_is|destroy_while)", networkEnv+"=passt")
}

// An agent makes the connections to its guest's ports, and the address is known when the
// guest has said something.
func TestPasst(t *testing.T) {
	if !behindPasst(t) {
		return
	}
	s := good(t)
	m := boot(t, newDriver(t, qemu.Config{}), s)
	c := dial(t, m)
	if a, err := m.(vm.Addresser).Address(t.Context()); a != "" || err != nil {
		t.Errorf("address before the network is up: %q, %v", a, err)
	}
	up(t, c)
	if got := run(t, c, ask("10.77.0.2")); !strings.HasPrefix(got, "LAN 10.77.0.2\n") {
		t.Errorf("from the LAN: %q", got)
	}
	if a, err := m.(vm.Addresser).Address(t.Context()); a != "10.0.2.15" || err != nil {
		t.Errorf("address: %q, %v", a, err)
	}
	greeted(t, m, c, 7)
	if err := m.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, s)
}

// greeted dials a port of the guest before anybody is there, and is greeted.
func greeted(t *testing.T, m vm.Machine, c *guest.Client, port int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	go func() {
		time.Sleep(300 * time.Millisecond) // so that some tries fail
		_, _ = c.Exec(ctx, guest.Command{Argv: []string{"/bin/sh", "-c", fmt.Sprintf("while :; do echo greetings | nc -l -p %d; done", port)}}, nil)
	}()
	conn, err := m.(vm.PortDialer).DialPort(ctx, port)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	// As SSH's clients do: passt 2023-03 ends the handshake with the guest with the first
	// bytes for it.
	if _, err := io.WriteString(conn, "hello\n"); err != nil {
		t.Error(err)
	}
	if raw, err := io.ReadAll(io.LimitReader(conn, 10)); string(raw) != "greetings\n" {
		t.Errorf("port %d of the guest: %q, %v", port, raw, err)
	}
}

// A guest without an agent has SSH's port forwarded for its life, on the loopback, and
// no other.
func TestPasstWithoutAgent(t *testing.T) {
	if !behindPasst(t) {
		return
	}
	before := listening(t)
	s := good(t)
	s.Agent = false // as far as the driver knows
	m := boot(t, newDriver(t, qemu.Config{}), s)
	ports := m.(vm.PortDialer)
	short, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := ports.DialPort(short, 22); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a port that nobody listens on: %v", err)
	}
	if _, err := ports.DialPort(t.Context(), 80); !errors.Is(err, vm.ErrUnsupported) {
		t.Errorf("another port than SSH's: %v", err)
	}
	c := dial(t, m)
	up(t, c)
	greeted(t, m, c, 22)
	added := slices.DeleteFunc(listening(t), func(l string) bool { return slices.Contains(before, l) })
	if len(added) != 1 || !strings.HasPrefix(added[0], "127.0.0.1:") {
		t.Errorf("since before the machine somebody listens on %q", added)
	}
	if err := m.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, s)
	if left := listening(t); !slices.Equal(left, before) {
		t.Errorf("after the machine somebody listens on %q", left)
	}
}

// A machine that was saved while it talked has its network again, as often as it starts;
// its state is none for another network.
func TestPasstRestored(t *testing.T) {
	if !behindPasst(t) {
		return
	}
	d := newDriver(t, qemu.Config{})
	s, state := good(t), t.TempDir()
	m := boot(t, d, s)
	c := dial(t, m)
	up(t, c)
	if got := run(t, c, ask("10.77.0.2")); !strings.HasPrefix(got, "LAN 10.77.0.2\n") {
		t.Fatalf("before it was saved: %q", got)
	}
	if err := m.(vm.Saver).Save(t.Context(), state); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		r := boot(t, d, from(t, s, state))
		if got := run(t, dial(t, r), ask("10.77.0.2")); !strings.HasPrefix(got, "LAN 10.77.0.2\n") {
			t.Errorf("a machine from the state: %q", got)
		}
	}
	if _, err := newDriver(t, qemu.Config{Network: "user"}).Boot(t.Context(), from(t, s, state)); !errors.Is(err, vm.ErrState) || !strings.Contains(err.Error(), "the network") {
		t.Errorf("with another network: %v", err)
	}
}

// A passt that is killed takes the guest's network, not the guest, and is missed.
func TestPasstKilled(t *testing.T) {
	if !behindPasst(t) {
		return
	}
	var log bytes.Buffer
	s := good(t)
	m := boot(t, newDriver(t, qemu.Config{Log: slog.New(slog.NewTextHandler(&log, nil))}), s)
	c := dial(t, m)
	killed := processtest.Kill(t, s.Dir, "--no-map-gw")
	vmtest.Eventually(t, "passt lives", func() string {
		for _, p := range processtest.Find(t, s.Dir) {
			if p.PID == killed[0] {
				return p.Args
			}
		}
		return ""
	})
	if got := sh(t, c, "echo it runs"); got != "it runs" {
		t.Errorf("the guest without passt: %q", got)
	}
	if err := m.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, s)
	if !strings.Contains(log.String(), "passt has ended") {
		t.Errorf("logged: %q", log.String())
	}
}

// Where passt cannot be, that is said, and the host is left as it was.
func TestPasstRefused(t *testing.T) {
	if os.Getenv(networkEnv) == "" {
		if os.Geteuid() != 0 {
			t.Fatal("this test makes a network namespace: it needs root")
		}
		image(t, "arm64")
		h := &host{host: newNamespace(t)} // without any network
		h.run(t, "-test.run=^TestPasstRefused$", networkEnv+"=passt")
		return
	}
	d := newDriver(t, qemu.Config{})
	for _, agent := range []bool{true, false} {
		s := good(t)
		s.Agent = agent
		_, err := d.Boot(t.Context(), s)
		if err == nil || !strings.Contains(err.Error(), "passt does not come up") || !strings.Contains(err.Error(), "interface") {
			t.Errorf("without a network: %v", err)
		}
		t.Log(err)
		nothingLeft(t, s)
	}
	path, err := exec.LookPath("qemu-system-aarch64")
	if err != nil {
		t.Fatal(err)
	}
	s, bin := good(t), t.TempDir()
	if err := os.Symlink(path, filepath.Join(bin, "qemu-system-aarch64")); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin)
	if _, err := d.Boot(t.Context(), s); err == nil || !strings.Contains(err.Error(), "apt-get install passt") {
		t.Errorf("without passt: %v", err)
	}
}
