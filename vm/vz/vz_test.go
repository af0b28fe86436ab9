//go:build vzstandin

// The cast: a stand-in for Apple's framework, which knows its states, limits and rules,
// and which panics where the real one ends the process; guests that serve the real agent
// over vsock, or do not, as their disk says. What is proven is what the driver makes of
// the framework's answers, not that Apple's framework gives these answers.
package vz_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	framework "github.com/Code-Hex/vz/v3"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/vm"
	"github.com/paddock-ci/paddock/vm/vmtest"
	"github.com/paddock-ci/paddock/vm/vz"
)

// What a disk may hold to make its guest misbehave.
const (
	diskGood   = "bootable"
	diskBroken = "broken" // it panics and stops
	diskSilent = "silent" // it runs, and nobody listens
)

// panicText is what a broken guest prints.
const panicText = "Kernel panic - not syncing: no working init found"

// patience bounds waits of the tests.
const patience = 60 * time.Second

// inside is one guest as its tests see it.
type inside struct {
	*framework.Guest
	agent context.CancelFunc
}

// house is the stand-in as one test uses it, with the guests that ran in it.
type house struct {
	framework.Hooks
	mu     sync.Mutex
	guests map[string]*inside // by disk
	wg     sync.WaitGroup
}

// enter has the stand-in be as h says, and checks at the end that nothing is left of the
// test: machines, goroutines of guests, open files, misuse.
func (h *house) enter(t *testing.T) *house {
	t.Helper()
	h.guests = map[string]*inside{}
	if h.Guest == nil {
		h.Guest = h.live
	}
	files, faults := openFiles(t), len(framework.Faults())
	framework.Use(h.Hooks)
	t.Cleanup(func() {
		vmtest.Eventually(t, "machines left", func() string { return unless(framework.Alive() == 0, "some are alive") })
		h.mu.Lock()
		for _, g := range h.guests { // of a test that failed
			g.PowerOff()
		}
		h.mu.Unlock()
		h.wg.Wait()
		vmtest.Eventually(t, "files left open", func() string {
			now := openFiles(t)
			return unless(len(now) <= len(files), fmt.Sprintf("%q, before %q", now, files))
		})
		if now := framework.Faults(); len(now) > faults {
			t.Errorf("misuse of the framework: %q", now[faults:])
		}
		framework.Use(framework.Hooks{})
	})
	return h
}

func unless(good bool, said string) string {
	if good {
		return ""
	}
	return said
}

// openFiles lists what this process has open.
func openFiles(t *testing.T) []string {
	t.Helper()
	entries, err := os.ReadDir("/dev/fd")
	if err != nil {
		t.Fatal(err)
	}
	var files []string
	for _, e := range entries {
		if to, err := os.Readlink("/dev/fd/" + e.Name()); err == nil { // not the one of this list
			files = append(files, e.Name()+" "+to)
		}
	}
	return files
}

// live is what runs in a machine: it does what its disk says.
func (h *house) live(g *framework.Guest) {
	h.wg.Add(1)
	defer h.wg.Done()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	h.mu.Lock()
	h.guests[g.Disk()] = &inside{g, cancel}
	h.mu.Unlock()
	disk, err := os.ReadFile(g.Disk())
	if err != nil {
		g.Print([]byte(err.Error()))
		return
	}
	switch strings.TrimRight(string(disk), "\x00") {
	case diskBroken:
		g.Print([]byte(strings.Repeat("booting\n", 2000) + panicText + "\n"))
		g.PowerOff()
	case diskSilent:
		<-g.Done()
	default:
		g.Print([]byte("login: "))
		serve(ctx, g)
	}
}

// serve is the agent of a guest, until the guest stops.
func serve(ctx context.Context, g *framework.Guest) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	sessions := &sessions{conns: make(chan net.Conn), done: ctx.Done()}
	var wg sync.WaitGroup
	g.Listen(guest.VsockPort, func(raw net.Conn) {
		wg.Add(1)
		defer wg.Done()
		_ = guest.ServeLine(ctx, raw, sessions.forward)
		_ = raw.Close()
	})
	wg.Add(1)
	go func() {
		defer wg.Done()
		_ = guest.Serve(ctx, sessions, guest.AgentConfig{Version: "test"})
	}()
	<-g.Done()
	cancel()
	wg.Wait()
}

// sessions is one listener over the listeners of all raw streams: one agent outlives them.
type sessions struct {
	conns chan net.Conn
	done  <-chan struct{}
}

func (s *sessions) forward(l net.Listener) error {
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		select {
		case s.conns <- conn:
		case <-s.done:
			_ = conn.Close()
			return net.ErrClosed
		}
	}
}

func (s *sessions) Accept() (net.Conn, error) {
	select {
	case conn := <-s.conns:
		return conn, nil
	case <-s.done:
		return nil, net.ErrClosed
	}
}

func (s *sessions) Close() error   { return nil }
func (s *sessions) Addr() net.Addr { return &net.UnixAddr{Name: "vsock"} }

// of is the guest of a machine; it must have run.
func (h *house) of(t *testing.T, spec vm.Spec) *inside {
	t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	g := h.guests[filepath.Join(spec.Dir, vm.DiskFile)]
	if g == nil {
		t.Fatalf("no guest ran in %s", spec.Dir)
	}
	return g
}

var specs atomic.Int64

// config is the VM config of the tests' macOS image.
const config = `{"version":1,"os":"darwin","arch":"arm64","ecid":"c3RhbmRpbi1tYWNoaW5lLTA=","hardwareModel":"c3RhbmRpbi1tb2RlbC0x",
	"cpuCountMin":2,"cpuCount":4,"memorySizeMin":4294967296,"memorySize":8589934592,"macAddress":"02:00:00:00:00:01","display":{"width":1280,"height":800}}`

// mac is a macOS machine with a clone of its own.
func mac(t *testing.T, disk string) vm.Spec {
	t.Helper()
	dir := t.TempDir()
	put(t, dir, vm.DiskFile, disk)
	put(t, dir, vm.NVRAMFile, framework.NVRAM(framework.Model))
	put(t, dir, vm.ConfigFile, config)
	return vm.Spec{ID: fleet.VMID(fmt.Sprintf("test%04d", specs.Add(1))), Dir: dir, Agent: true}
}

func put(t *testing.T, dir, name, content string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func driver(t *testing.T, c vz.Config) *vz.Driver {
	t.Helper()
	d, err := vz.New(c)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func bounded(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// boot boots a machine, which is destroyed with the test.
func boot(t *testing.T, d *vz.Driver, spec vm.Spec) vm.Machine {
	t.Helper()
	m, err := d.Boot(bounded(t), spec)
	if err != nil {
		t.Fatalf("booting: %v", err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := m.Destroy(ctx); err != nil {
			t.Errorf("destroying: %v", err)
		}
	})
	return m
}

// refused boots a machine that must not boot, and returns why.
func refused(t *testing.T, d *vz.Driver, spec vm.Spec) error {
	t.Helper()
	m, err := d.Boot(bounded(t), spec)
	if err == nil {
		_ = m.Destroy(bounded(t))
		t.Fatal("it booted")
	}
	return err
}

// The contract of all drivers.
func TestConformance(t *testing.T) {
	vmtest.Run(t, func(t *testing.T, _ int) vmtest.Fixture {
		h := (&house{}).enter(t)
		return vmtest.Fixture{
			Driver:  driver(t, vz.Config{}),
			Spec:    func(t *testing.T) vm.Spec { return mac(t, diskGood) },
			Broken:  func(t *testing.T) vm.Spec { return mac(t, diskBroken) },
			Hanging: func(t *testing.T) vm.Spec { return mac(t, diskSilent) },
			Console: panicText,
			Slots:   2, // Apple's
			Kill:    func(t *testing.T, spec vm.Spec) { h.of(t, spec).PowerOff() },
			Leftovers: func(t *testing.T, spec vm.Spec) []string {
				return slices.DeleteFunc(openFiles(t), func(f string) bool { return !strings.Contains(f, spec.Dir) })
			},
		}
	})
}

// A Mac counts the machines of all its programs, and sometimes machines that are gone:
// the driver cannot tell, so it says both.
func TestCapacityIsAppleS(t *testing.T) {
	(&house{Hooks: framework.Hooks{Taken: 2}}).enter(t)
	err := refused(t, driver(t, vz.Config{}), mac(t, diskGood))
	if !errors.Is(err, vm.ErrAtCapacity) || !strings.Contains(err.Error(), "reboot") || !strings.Contains(err.Error(), "Code=6") {
		t.Errorf("%v, want ErrAtCapacity that says what to do", err)
	}
	var boot *vm.BootError
	if errors.As(err, &boot) {
		t.Errorf("%v is a BootError: it would blame the image", err)
	}
}

// Each cold clone is a machine of its own to the world, and none is the image's.
func TestFreshIdentity(t *testing.T) {
	h := (&house{}).enter(t)
	d := driver(t, vz.Config{})
	first, second := mac(t, diskGood), mac(t, diskGood)
	boot(t, d, first)
	boot(t, d, second)
	framework.Release()
	one, two := h.of(t, first), h.of(t, second)
	if one.MAC() == two.MAC() || one.MAC() == "02:00:00:00:00:01" || two.MAC() == "02:00:00:00:00:01" {
		t.Errorf("MAC addresses %s and %s", one.MAC(), two.MAC())
	}
	if one.Machine() == two.Machine() || one.Machine() == framework.Identifier || two.Machine() == framework.Identifier {
		t.Errorf("machine identifiers %s and %s", one.Machine(), two.Machine())
	}
	if one.CPU() != 4 || one.Memory() != 8<<30 || one.Display() != "1280 x 800" {
		t.Errorf("%d CPUs, %d bytes, a display of %s; want what the image says", one.CPU(), one.Memory(), one.Display())
	}
}

// A guest that prints for ever fills no disk, and waits for nobody.
func TestConsoleIsBounded(t *testing.T) {
	h := (&house{}).enter(t)
	spec := mac(t, diskGood)
	m := boot(t, driver(t, vz.Config{}), spec)
	g := h.of(t, spec)
	line := []byte(strings.Repeat("spam ", 1000) + "\n")
	for range 3 << 20 / len(line) {
		g.Print(line)
	}
	g.Print([]byte("last words"))
	if err := m.Destroy(bounded(t)); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(filepath.Join(spec.Dir, vm.ConsoleFile))
	if err != nil || info.Size() > 1<<20 || info.Size() < 1<<19 {
		t.Errorf("console of %v bytes (%v), want at most 1 MiB and at least half of it", info.Size(), err)
	}
	if tail := vm.ConsoleTail(spec.Dir); !strings.HasSuffix(tail, "spam \nlast words") {
		t.Errorf("it ends with %q", tail[max(0, len(tail)-40):])
	}
}

// A machine that the framework gives up has ended, and says by whose fault.
func TestFrameworkError(t *testing.T) {
	h := (&house{}).enter(t)
	spec := mac(t, diskGood)
	m := boot(t, driver(t, vz.Config{}), spec)
	h.of(t, spec).Crash()
	exit, err := m.Wait(bounded(t))
	if err != nil || !strings.Contains(exit.Reason, "error") {
		t.Errorf("%+v, %v", exit, err)
	}
}
