package qemu_test

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/vm"
	"github.com/paddock-ci/paddock/vm/qemu"
)

// greet brings the guest's network up by hand, and greets on port 7 until it is stopped.
const greet = `ip link set lo up; ip link set eth0 up; ip addr add 10.0.2.15/24 dev eth0
while :; do echo greetings | nc -l -p 7; done`

func TestNetwork(t *testing.T) {
	t.Parallel()
	s := good(t)
	m := boot(t, newDriver(t, qemu.Config{}), s)
	ports, addresses := m.(vm.PortDialer), m.(vm.Addresser)
	if a, err := addresses.Address(t.Context()); a != "" || err != nil {
		t.Errorf("address before the network is up: %q, %v", a, err)
	}
	short, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := ports.DialPort(short, 7); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a port that nobody listens on: %v", err)
	}
	if _, err := ports.DialPort(t.Context(), 0); err == nil {
		t.Error("port 0 was dialled")
	}

	// Dialled before the guest is there: it waits.
	type dialled struct {
		greeting string
		err      error
	}
	early := make(chan dialled, 1)
	go func() {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		conn, err := ports.DialPort(ctx, 7)
		if err != nil {
			early <- dialled{err: err}
			return
		}
		defer conn.Close()
		raw, err := io.ReadAll(io.LimitReader(conn, 10))
		early <- dialled{string(raw), err}
	}()
	c := dial(t, m)
	greeting, stop := context.WithCancel(t.Context())
	defer stop()
	go func() {
		_, _ = c.Exec(greeting, guest.Command{Argv: []string{"/bin/sh", "-c", greet}}, nil)
	}()
	if d := <-early; d.err != nil || d.greeting != "greetings\n" {
		t.Errorf("port 7 of the guest: %q, %v", d.greeting, d.err)
	}
	if a, err := addresses.Address(t.Context()); a != "10.0.2.15" || err != nil {
		t.Errorf("address: %q, %v", a, err)
	}

	go func() {
		time.Sleep(100 * time.Millisecond) // somewhere in the middle of dialling
		_ = m.Destroy(context.WithoutCancel(t.Context()))
	}()
	if _, err := ports.DialPort(t.Context(), 9); !errors.Is(err, vm.ErrEnded) {
		t.Errorf("dialling a machine that ends: %v", err)
	}
	if _, err := addresses.Address(t.Context()); !errors.Is(err, vm.ErrEnded) {
		t.Errorf("address of what has ended: %v", err)
	}
}

func TestNoNetwork(t *testing.T) {
	t.Parallel()
	m := boot(t, newDriver(t, qemu.Config{Network: "none"}), good(t))
	if got := sh(t, dial(t, m), "ls /sys/class/net"); got != "lo" {
		t.Errorf("network devices in a guest without a network: %q", got)
	}
	if _, err := m.(vm.PortDialer).DialPort(t.Context(), 22); !errors.Is(err, vm.ErrUnsupported) {
		t.Errorf("dialling a port: %v", err)
	}
	if _, err := m.(vm.Addresser).Address(t.Context()); !errors.Is(err, vm.ErrUnsupported) {
		t.Errorf("address: %v", err)
	}
}

func TestAMD64(t *testing.T) {
	t.Parallel()
	s := spec(t, "amd64", "")
	s.Memory = 192 << 20
	m := boot(t, newDriver(t, qemu.Config{}), s)
	if got := sh(t, dial(t, m), "uname -m"); got != "x86_64" {
		t.Errorf("the guest is a %s", got)
	}
	if err := m.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, s)
}

// A directory of the host is the guest's to read and write; a machine with one is not
// saved, and says so.
func TestShare(t *testing.T) {
	t.Parallel()
	s, shared := good(t), t.TempDir()
	if err := os.WriteFile(filepath.Join(shared, "from-host"), []byte("hello, guest"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.Mounts = []fleet.Mount{{Name: "work", Path: shared}}
	m := boot(t, newDriver(t, qemu.Config{}), s)
	got := sh(t, dial(t, m), "mkdir -p /mnt/share && mount -t virtiofs work /mnt/share && cat /mnt/share/from-host && echo hello, host > /mnt/share/from-guest")
	if got != "hello, guest" {
		t.Errorf("the guest read %q", got)
	}
	if raw, err := os.ReadFile(filepath.Join(shared, "from-guest")); err != nil || string(raw) != "hello, host\n" {
		t.Errorf("the guest wrote %q, %v", raw, err)
	}
	if err := m.(vm.Saver).Save(t.Context(), t.TempDir()); !errors.Is(err, vm.ErrUnsupported) {
		t.Errorf("saving a machine with a share: %v", err)
	}
	if err := m.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, s)
}

// A share that nobody can serve is this host's fault, and said in virtiofsd's words: QEMU
// knows only that there is no answer.
func TestShareWithoutRoot(t *testing.T) {
	s := good(t)
	s.Mounts = []fleet.Mount{{Name: "work", Path: "/tmp"}} // everybody's
	program := filepath.Join(t.TempDir(), "virtiofsd")
	was := qemu.ServeShares(t, program)
	// The real one, as a user's service starts it.
	script := "#!/bin/sh\nexec /usr/bin/setpriv --bounding-set=-all --inh-caps=-all --no-new-privs --reuid=65534 --clear-groups " + was + " \"$@\"\n"
	if err := os.WriteFile(program, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	_, err := newDriver(t, qemu.Config{}).Boot(ctx, s)
	var failure *vm.BootError
	if err == nil || errors.As(err, &failure) || !strings.Contains(err.Error(), `the share "work"`) ||
		!strings.Contains(err.Error(), "not permitted") || !strings.Contains(err.Error(), "needs root") {
		t.Errorf("boot: %v", err)
	}
	nothingLeft(t, s)
}
