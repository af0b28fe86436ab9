package process_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/vm"
	"github.com/paddock-ci/paddock/vm/process"
	"github.com/paddock-ci/paddock/vm/process/processtest"
	"github.com/paddock-ci/paddock/vm/vmtest"
)

func TestMain(m *testing.M) {
	processtest.Guest()
	os.Exit(m.Run())
}

func newDriver(t *testing.T, c process.Config) *process.Driver {
	t.Helper()
	if c.Command == nil {
		c.Command = processtest.Command(t)
	}
	c.Env = append(c.Env, processtest.Env...)
	d, err := process.New(c)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestConformance(t *testing.T) {
	vmtest.Run(t, func(t *testing.T, slots int) vmtest.Fixture {
		return processtest.Fixture(newDriver(t, process.Config{Slots: slots}), slots)
	})
}

// Two drivers with one slot directory stand for two vm-helper processes.
func TestSlotsSharedBetweenDrivers(t *testing.T) {
	dir := t.TempDir()
	one := newDriver(t, process.Config{Slots: 1, SlotDir: dir})
	two := newDriver(t, process.Config{Slots: 1, SlotDir: dir})
	m, err := one.Boot(t.Context(), processtest.Spec(t))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := two.Boot(t.Context(), processtest.Spec(t)); !errors.Is(err, vm.ErrAtCapacity) {
		t.Errorf("the other driver: %v, want ErrAtCapacity", err)
	}
	if err := m.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	m, err = two.Boot(t.Context(), processtest.Spec(t))
	if err != nil {
		t.Fatalf("the other driver, after the slot was freed: %v", err)
	}
	if err := m.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestImageCheck(t *testing.T) {
	d := newDriver(t, process.Config{})
	for name, spoil := range map[string]func(path string) error{
		"missing":   os.Remove,
		"empty":     func(path string) error { return os.Truncate(path, 0) },
		"directory": func(path string) error { return errors.Join(os.Remove(path), os.Mkdir(path, 0o700)) },
	} {
		t.Run(name, func(t *testing.T) {
			spec := processtest.Spec(t)
			if err := spoil(filepath.Join(spec.Dir, vm.DiskFile)); err != nil {
				t.Fatal(err)
			}
			_, err := d.Boot(t.Context(), spec)
			var boot *vm.BootError
			if !errors.As(err, &boot) || !strings.Contains(err.Error(), "disk") {
				t.Errorf("boot: %v, want a BootError about the disk", err)
			}
		})
	}
}

func TestCommandThatCannotRun(t *testing.T) {
	if _, err := process.New(process.Config{}); err == nil {
		t.Error("a driver without a command was made")
	}
	d := newDriver(t, process.Config{Command: []string{"/no/such/paddock"}, Slots: 1})
	for range 2 { // the slot comes back
		_, err := d.Boot(t.Context(), processtest.Spec(t))
		var boot *vm.BootError
		if err == nil || errors.As(err, &boot) || errors.Is(err, vm.ErrAtCapacity) {
			t.Errorf("boot: %v, want an error of ours", err)
		}
	}
}

// escape is a job that does what it can to outlive its machine: a daemon in a session
// of its own whose parent ended, one without the environment, one that ignores signals.
const escape = `
setsid sh -c 'sleep 98601 & exec sleep 98602' &
setsid env -i sh -c 'cd /; echo escaped > '"$PWD"'/bare; exec sleep 98603' &
setsid sh -c 'trap "" TERM HUP INT; while :; do sleep 98604; done' &
(setsid sleep 98605 &)
while [ ! -s bare ]; do sleep 0.01; done
echo "Running job: escape"
sleep 98606`

// startEscape boots a machine that runs escape, and returns once all of it runs.
func startEscape(t *testing.T, d vm.Driver, spec vm.Spec) vm.Machine {
	t.Helper()
	m, err := d.Boot(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := m.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	c := guest.New(conn)
	defer func() { _ = c.Close() }()
	if err := c.Start(t.Context(), guest.Run{Name: "r", Argv: []string{"sh", "-c", escape}}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if _, err := c.Watch(ctx, func(s guest.Status) {
		if s.State != guest.Running && s.State != guest.Idle {
			cancel()
		}
	}); !errors.Is(err, context.Canceled) {
		t.Fatalf("watch: %v", err)
	}
	return m
}

// sleepers names the sleeps of escape (their seconds are found nowhere else) that still run, wherever they hang: the scan by
// directory would not see the one without environment.
func sleepers() []string {
	var found []string
	paths, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range paths {
		args, _ := os.ReadFile(path)
		if strings.HasPrefix(string(args), "sleep\x009860") {
			found = append(found, filepath.Base(filepath.Dir(path))+" "+string(args))
		}
	}
	return found
}

func TestDestroyKillsWhatEscapes(t *testing.T) {
	d := newDriver(t, process.Config{})
	spec := processtest.Spec(t)
	m := startEscape(t, d, spec)
	if n := len(processtest.Find(t, spec.Dir)); n < 6 {
		t.Fatalf("only %d processes are there; the test is void", n)
	}
	start := time.Now()
	if err := m.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Logf("destroyed in %v", time.Since(start))
	if left := append(processtest.Leftovers(t, spec.Dir), sleepers()...); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

// A guest that is killed takes with it what is below it, as far as it kept a sign of
// where it comes from.
func TestGuestKilledTakesTheRestAlong(t *testing.T) {
	d := newDriver(t, process.Config{})
	spec := processtest.Spec(t)
	m := startEscape(t, d, spec)
	processtest.Kill(t, spec.Dir, "guest-agent")
	exit, err := m.Wait(t.Context())
	if err != nil || exit.Reason != "signal: killed" {
		t.Errorf("wait: %+v, %v", exit, err)
	}
	if left := processtest.Leftovers(t, spec.Dir); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
	for _, s := range sleepers() { // without environment, session and parent
		var pid int
		if _, err := fmt.Sscanf(s, "%d", &pid); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(s, "98603") {
			t.Errorf("left: %s", s)
		}
		_ = syscall.Kill(pid, syscall.SIGKILL)
		_, _ = syscall.Wait4(pid, nil, 0, nil)
	}
}

// A stopped guest cannot end itself when its driver's process is gone: Reap does it.
func TestReap(t *testing.T) {
	d := newDriver(t, process.Config{})
	spec := processtest.Spec(t)
	m := startEscape(t, d, spec)
	if err := newDriver(t, process.Config{}).Reap(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	// Both drivers are in this process, and either may take the guest's exit status.
	if exit, err := m.Wait(t.Context()); err != nil || exit.Reason != "signal: killed" && exit.Reason != "killed, and reaped by another driver" {
		t.Errorf("wait: %+v, %v", exit, err)
	}
	if left := append(processtest.Leftovers(t, spec.Dir), sleepers()...); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
	if err := d.Reap(t.Context(), spec); err != nil {
		t.Errorf("reaping what is not there: %v", err)
	}
}

// A directory whose path is too long for a socket.
func TestLongDirectory(t *testing.T) {
	d := newDriver(t, process.Config{})
	spec := processtest.Spec(t)
	long := filepath.Join(t.TempDir(), strings.Repeat("long/", 30))
	if err := errors.Join(os.MkdirAll(filepath.Dir(filepath.Clean(long)), 0o700), os.Rename(spec.Dir, filepath.Clean(long))); err != nil {
		t.Fatal(err)
	}
	spec.Dir = filepath.Clean(long)
	temp := func() []string {
		found, _ := filepath.Glob(filepath.Join(os.TempDir(), "pdk*"))
		return found
	}
	before := len(temp())
	m, err := d.Boot(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := m.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.Close()
	if err := m.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	if after := temp(); len(after) > before {
		t.Errorf("left in the temporary directory: %q", after)
	}
}

// Our own environment may hold the App's key.
func TestGuestSeesLittleOfOurEnvironment(t *testing.T) {
	t.Setenv("PADDOCK_GITHUB_KEY", "the-key")
	d := newDriver(t, process.Config{Env: []string{"GIVEN=yes"}})
	spec := processtest.Spec(t)
	m, err := d.Boot(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := m.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	c := guest.New(conn)
	if err := c.Start(t.Context(), guest.Run{Name: "r", Argv: []string{"env"}}); err != nil {
		t.Fatal(err)
	}
	s, err := c.Watch(t.Context(), nil)
	if err != nil || strings.Contains(s.Tail, "the-key") || !strings.Contains(s.Tail, "GIVEN=yes") || !strings.Contains(s.Tail, "PATH=") {
		t.Errorf("environment in the guest: %q, %v", s.Tail, err)
	}
	_ = c.Close()
	if err := m.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// GuestMain by hand says what it is.
func TestGuestMainByHand(t *testing.T) {
	err := process.GuestMain(t.Context(), guest.AgentConfig{})
	if err == nil || !strings.Contains(err.Error(), "not by hand") {
		t.Errorf("error %v, want a hint", err)
	}
}

// The figures that docs name: boot to hello, and destroy.
func BenchmarkBootHelloDestroy(b *testing.B) {
	self, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	d, err := process.New(process.Config{Command: []string{self, "guest-agent"}})
	if err != nil {
		b.Fatal(err)
	}
	dir := b.TempDir()
	if err := os.WriteFile(filepath.Join(dir, vm.DiskFile), []byte("disk"), 0o600); err != nil {
		b.Fatal(err)
	}
	var boot, destroy time.Duration
	for b.Loop() {
		start := time.Now()
		m, err := d.Boot(b.Context(), vm.Spec{ID: "bench000", Dir: dir})
		if err != nil {
			b.Fatal(err)
		}
		conn, err := m.Dial(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		c := guest.New(conn)
		if _, err := c.Hello(b.Context()); err != nil {
			b.Fatal(err)
		}
		up := time.Now()
		if err := m.Destroy(b.Context()); err != nil {
			b.Fatal(err)
		}
		boot, destroy = boot+up.Sub(start), destroy+time.Since(up)
		_ = c.Close()
	}
	b.ReportMetric(float64(boot.Microseconds())/1000/float64(b.N), "ms-boot-to-hello")
	b.ReportMetric(float64(destroy.Microseconds())/1000/float64(b.N), "ms-destroy")
}
