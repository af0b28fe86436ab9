package qemu_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image/tart"
	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/vm"
	"github.com/paddock-ci/paddock/vm/process/processtest"
	"github.com/paddock-ci/paddock/vm/qemu"
	"github.com/paddock-ci/paddock/vm/qemu/qemutest"
	"github.com/paddock-ci/paddock/vm/vmtest"
)

// The cast: one arm64 guest with Paddock's agent as its init, one CPU and 96 MB, booted
// for real. What is wrong with a machine in a test is wrong in its clone's config: a
// kernel without an init, an init that sleeps, or one that prints for ever.

// memory of the guests, in bytes.
const memory = 96 << 20

var (
	images   sync.Map // by architecture, a func that builds once
	machines atomic.Int64
)

// image is the guest of an architecture, built by whoever needs it first.
func image(t testing.TB, arch string) *qemutest.Image {
	t.Helper()
	build, _ := images.LoadOrStore(arch, sync.OnceValues(func() (*qemutest.Image, error) {
		return qemutest.Build(context.WithoutCancel(t.Context()), qemutest.Guest{Arch: arch})
	}))
	i, err := build.(func() (*qemutest.Image, error))()
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// spec is a machine in a directory of its own, with line added to its kernel's command
// line.
func spec(t testing.TB, arch, line string) vm.Spec {
	t.Helper()
	dir := t.TempDir()
	if err := image(t, arch).Clone(dir, func(c *tart.Config) { c.Boot.CommandLine += " " + line }); err != nil {
		t.Fatal(err)
	}
	return vm.Spec{ID: fleet.VMID(fmt.Sprintf("qemu%04d", machines.Add(1))), Dir: dir, CPU: 1, Memory: memory, Agent: true}
}

func good(t *testing.T) vm.Spec    { return spec(t, "arm64", "") }
func broken(t *testing.T) vm.Spec  { return spec(t, "arm64", "rdinit=/no/such/init") }
func hanging(t *testing.T) vm.Spec { return spec(t, "arm64", "rdinit=/bin/sleep -- 1000") }

// networkEnv is the network of drivers whose config says none, so that a test can be run
// again with another one. "": the driver's default.
const networkEnv = "PADDOCK_TEST_NETWORK"

func newDriver(t testing.TB, c qemu.Config) *qemu.Driver {
	t.Helper()
	if c.Network == "" {
		c.Network = os.Getenv(networkEnv)
	}
	d, err := qemu.New(c)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// boot boots a machine that is destroyed with the test.
func boot(t testing.TB, d *qemu.Driver, s vm.Spec) vm.Machine {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	m, err := d.Boot(ctx, s)
	if err != nil {
		t.Fatalf("booting %s: %v", s.ID, err)
	}
	t.Cleanup(func() {
		if err := m.Destroy(context.WithoutCancel(ctx)); err != nil {
			t.Errorf("destroying %s: %v", s.ID, err)
		}
	})
	return m
}

// dial says hello to the agent, within a minute.
func dial(t testing.TB, m vm.Machine) *guest.Client {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	conn, err := m.Dial(ctx)
	if err != nil {
		t.Fatalf("dialling: %v", err)
	}
	c := guest.New(conn)
	t.Cleanup(func() { c.Close() })
	if _, err := c.Hello(ctx); err != nil {
		t.Fatalf("hello: %v", err)
	}
	return c
}

// sh runs a shell command in the guest and returns what it printed.
func sh(t testing.TB, c *guest.Client, script string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var out strings.Builder
	exit, err := c.Exec(ctx, guest.Command{Argv: []string{"/bin/sh", "-c", script}}, func(_ guest.Stream, p []byte) { out.Write(p) })
	if err != nil || exit != 0 {
		t.Fatalf("%s: exit %d, %v: %s", script, exit, err, out.String())
	}
	return strings.TrimSpace(out.String())
}

func nothingLeft(t testing.TB, s vm.Spec) {
	t.Helper()
	if left := processtest.Leftovers(t.(*testing.T), s.Dir); len(left) > 0 {
		t.Errorf("left of %s: %q", s.ID, left)
	}
}

func TestConformance(t *testing.T) {
	vmtest.Run(t, func(t *testing.T, slots int) vmtest.Fixture {
		return vmtest.Fixture{
			Driver:    newDriver(t, qemu.Config{Slots: slots}),
			Spec:      good,
			Broken:    broken,
			Hanging:   hanging,
			Console:   "Kernel panic - not syncing",
			Slots:     slots,
			Kill:      func(t *testing.T, s vm.Spec) { processtest.Kill(t, s.Dir, "qemu-system") },
			Leftovers: func(t *testing.T, s vm.Spec) []string { return processtest.Leftovers(t, s.Dir) },
			Runner:    []string{"/bin/sh", "-c", "cat; exit 7"},
			Crowd:     4,
		}
	})
}

// What is wrong with an image or an order is said at once, by name, and leaves nothing.
func TestRefused(t *testing.T) {
	t.Parallel()
	config := func(edit func(*tart.Config)) func(*testing.T, *vm.Spec) {
		return func(t *testing.T, s *vm.Spec) {
			if err := image(t, "arm64").Clone(s.Dir, edit); err != nil {
				t.Fatal(err)
			}
		}
	}
	disk := func(size int64) func(*testing.T, *vm.Spec) {
		return func(t *testing.T, s *vm.Spec) {
			path := filepath.Join(s.Dir, vm.DiskFile)
			if err := errors.Join(os.Truncate(path, 0), os.Truncate(path, size)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, c := range map[string]struct {
		spoil func(*testing.T, *vm.Spec)
		want  string
		boot  bool // a BootError: another node may do better
	}{
		"a disk of zero bytes":        {disk(0), "is empty", true},
		"a disk of zeroes":            {disk(200 << 20), "no Linux kernel for arm64", true},
		"a disk that ends early":      {disk(2 << 20), "the disk ends after", true},
		"no config":                   {func(_ *testing.T, s *vm.Spec) { _ = os.Remove(filepath.Join(s.Dir, vm.ConfigFile)) }, "no VM config", true},
		"no boot loader":              {config(func(c *tart.Config) { c.Boot = nil }), "no boot loader", true},
		"a guest of macOS":            {config(func(c *tart.Config) { c.OS, c.Boot, c.ECID, c.HardwareModel = "darwin", nil, []byte("x"), []byte("x") }), "linux guests only", true},
		"a kernel for another CPU":    {config(func(c *tart.Config) { c.Arch = "amd64" }), "no Linux kernel for amd64", true},
		"more CPUs than the host":     {func(_ *testing.T, s *vm.Spec) { s.CPU = 100_000 }, "100000 CPUs, this host has", true},
		"memory over the host's":      {func(_ *testing.T, s *vm.Spec) { s.Memory = 1 << 50 }, "bytes of memory, this host has", true},
		"too little memory":           {func(_ *testing.T, s *vm.Spec) { s.Memory = 1 << 20 }, "at least", true},
		"a share that does not exist": {func(_ *testing.T, s *vm.Spec) { s.Mounts = []fleet.Mount{{Name: "work", Path: "/no/such/path"}} }, "/no/such/path", false},
		"a share that is a file":      {func(_ *testing.T, s *vm.Spec) { s.Mounts = []fleet.Mount{{Name: "work", Path: "/etc/passwd"}} }, "is no directory", false},
		"a share that is read only":   {func(_ *testing.T, s *vm.Spec) { s.Mounts = []fleet.Mount{{Name: "w", Path: "/tmp", ReadOnly: true}} }, "not possible", false},
		"two shares of one name": {func(_ *testing.T, s *vm.Spec) {
			s.Mounts = []fleet.Mount{{Name: "work", Path: "/tmp"}, {Name: "work", Path: "/etc"}}
		}, `two shares are called "work"`, false},
		"the share of the bootstrap self": {func(_ *testing.T, s *vm.Spec) {
			s.Mounts = []fleet.Mount{{Name: "paddock-in", Path: "/tmp", ReadOnly: true}}
		}, "bootstrap self", false},
		"a share without a name": {func(_ *testing.T, s *vm.Spec) { s.Mounts = []fleet.Mount{{Path: "/tmp"}} }, "1 to 36 bytes", false},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDriver(t, qemu.Config{Slots: 1})
			s := good(t)
			c.spoil(t, &s)
			for range 2 { // the slot comes back
				_, err := d.Boot(t.Context(), s)
				var failure *vm.BootError
				if err == nil || !strings.Contains(err.Error(), c.want) || errors.As(err, &failure) != c.boot {
					t.Errorf("boot: %v, want %q", err, c.want)
				}
			}
			nothingLeft(t, s)
		})
	}
}

func TestNotInstalled(t *testing.T) {
	s := good(t)
	t.Setenv("PATH", t.TempDir())
	_, err := newDriver(t, qemu.Config{}).Boot(t.Context(), s)
	if err == nil || !strings.Contains(err.Error(), "apt-get install qemu-system-arm") || !strings.Contains(err.Error(), "brew install qemu") {
		t.Errorf("boot without QEMU: %v, want a hint", err)
	}
	nothingLeft(t, s)
}

func TestConfig(t *testing.T) {
	for _, c := range []qemu.Config{{Accel: "hvf?"}, {Network: "bridge"}} {
		if _, err := qemu.New(c); err == nil {
			t.Errorf("%+v was taken", c)
		}
	}
}

// An agent that never comes is a boot that ends with its context, and says what the
// console said.
func TestNoAgent(t *testing.T) {
	t.Parallel()
	s := spec(t, "arm64", "rdinit=/bin/echo -- nobody-home")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	_, err := newDriver(t, qemu.Config{}).Boot(ctx, s)
	var failure *vm.BootError
	if !errors.As(err, &failure) || !strings.Contains(failure.Console, "nobody-home") || !strings.Contains(err.Error(), "panicked") {
		t.Errorf("boot: %v", err)
	}
	nothingLeft(t, s)

	s = hanging(t)
	ctx, cancel = context.WithTimeout(t.Context(), 3*time.Second) // enough to be waiting for the agent
	defer cancel()
	_, err = newDriver(t, qemu.Config{}).Boot(ctx, s)
	if !errors.As(err, &failure) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("boot: %v, want a BootError whose time is up", err)
	}
	nothingLeft(t, s)
}

// A guest that prints without end fills no disk, and what it printed first and last is
// there.
func TestConsoleFlood(t *testing.T) {
	t.Parallel()
	s := spec(t, "arm64", "rdinit=/bin/yes -- "+strings.Repeat("flood", 100))
	s.Agent = false
	m := boot(t, newDriver(t, qemu.Config{}), s)
	path := filepath.Join(s.Dir, vm.ConsoleFile)
	var largest int64
	vmtest.Eventually(t, "the console is never full", func() string {
		info, err := os.Stat(path)
		if err != nil {
			return err.Error()
		}
		if info.Size() < largest {
			return "" // it was cut
		}
		largest = info.Size()
		return fmt.Sprintf("%d bytes", largest)
	})
	if largest > 1<<20 {
		t.Errorf("the console grew to %d bytes", largest)
	}
	if err := m.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(path)
	if err != nil || len(raw) > 1<<20 || !strings.Contains(string(raw), "bytes are left out here") || !strings.HasPrefix(vm.ConsoleTail(s.Dir), "flood") && !strings.Contains(vm.ConsoleTail(s.Dir), "floodflood") {
		t.Errorf("console of %d bytes, %v", len(raw), err)
	}
}

// stop makes a process stand still.
func stop(t *testing.T, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
}

// A root file system on the disk is the guest's, and what is written to it is there.
func TestRoot(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	arm := image(t, "arm64")
	if err := errors.Join(
		os.CopyFS(root, os.DirFS(filepath.Join("testdata", "root"))),
		os.MkdirAll(filepath.Join(root, "bin"), 0o755),
		os.Link(filepath.Join(filepath.Dir(filepath.Dir(arm.Dir)), "arm64", "busybox"), filepath.Join(root, "bin", "sh")),
	); err != nil {
		t.Fatal(err)
	}
	i, err := qemutest.Build(t.Context(), qemutest.Guest{Root: root, RootSize: 8 << 20})
	if err != nil {
		t.Fatal(err)
	}
	s := vm.Spec{ID: "rooted00", Dir: t.TempDir(), CPU: 1, Memory: memory, Agent: true}
	if err := i.Clone(s.Dir, nil); err != nil {
		t.Fatal(err)
	}
	c := dial(t, boot(t, newDriver(t, qemu.Config{}), s))
	if got := sh(t, c, "read said < /etc/mark; echo $said; echo written > /etc/new && read said < /etc/new; echo $said"); got != "from the disk\nwritten" {
		t.Errorf("in the root file system: %q", got)
	}
}
