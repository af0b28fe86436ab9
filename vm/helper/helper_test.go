package helper_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/vm"
	"github.com/paddock-ci/paddock/vm/helper"
	"github.com/paddock-ci/paddock/vm/process"
	"github.com/paddock-ci/paddock/vm/process/processtest"
	"github.com/paddock-ci/paddock/vm/vmtest"
)

// The cast: this test binary is, by its first argument, also the guest in a machine
// (processtest), the vm-helper around it, and a node agent that gets killed.
func TestMain(m *testing.M) {
	processtest.Guest()
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "vm-helper":
			finish(helperRole(os.Args[2], os.Args[3], os.Args[4]))
		case "agent":
			finish(agentRole(os.Args[2], os.Args[3], os.Args[4]))
		}
	}
	os.Exit(m.Run())
}

func finish(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// helperRole is what `paddock vm-helper` does, with a driver that may go wrong and
// shares its slots with those of the other helpers.
func helperRole(mode, slotDir, slots string) error {
	n, err := strconv.Atoi(slots)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	var d vm.Driver
	d, err = process.New(process.Config{Command: []string{self, "guest-agent"}, Slots: n, SlotDir: slotDir, Env: processtest.Env})
	if err != nil {
		return err
	}
	switch mode {
	case "good":
	case "able":
		d = able{d}
	default:
		d = panicky{d, mode}
	}
	return helper.Main(context.Background(), d, os.Stdin)
}

// panicky is a driver that crashes its process, as a framework does.
type panicky struct {
	vm.Driver
	mode string
}

func (p panicky) Boot(ctx context.Context, spec vm.Spec) (vm.Machine, error) {
	m, err := p.Driver.Boot(ctx, spec)
	if p.mode == "panic-in-boot" {
		panic("NSInvalidArgumentException: as it may happen")
	}
	return crashing{m}, err
}

func (p panicky) Reap(ctx context.Context, spec vm.Spec) error {
	return p.Driver.(vm.Reaper).Reap(ctx, spec) //nolint:forcetypeassert // it is the process driver
}

// crashing is a machine whose Dial crashes.
type crashing struct{ vm.Machine }

func (crashing) Dial(context.Context) (net.Conn, error) { panic("crash in dial") }

// fixture is a runtime directory, the helper's command, and the driver on them.
type fixture struct {
	dir     string
	command []string
	log     *lockedBuffer
	driver  *helper.Driver
}

// lockedBuffer is a log that may be read while it is written.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// newFixture takes the helper's mode; "good" is the process driver as it is. Slots: 0
// is no limit.
func newFixture(t *testing.T, mode string, slots int) *fixture {
	t.Helper()
	dir, err := os.MkdirTemp("", "h") // short, for the sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	f := &fixture{dir: dir, command: []string{self, "vm-helper", mode, t.TempDir(), strconv.Itoa(slots)}, log: &lockedBuffer{}}
	log := slog.New(slog.NewTextHandler(f.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	f.driver, err = helper.New(helper.Config{Command: f.command, Dir: dir, Env: processtest.Env, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// leftovers adds the folder and the helper to what a machine may leave.
func (f *fixture) leftovers(t *testing.T, spec vm.Spec) []string {
	t.Helper()
	left := processtest.Leftovers(t, spec.Dir)
	if _, err := os.Stat(filepath.Join(f.dir, string(spec.ID))); !errors.Is(err, fs.ErrNotExist) {
		left = append(left, "folder")
	}
	return left
}

func TestConformance(t *testing.T) {
	vmtest.Run(t, func(t *testing.T, slots int) vmtest.Fixture {
		f := newFixture(t, "good", slots)
		suite := processtest.Fixture(f.driver, slots)
		suite.Leftovers = f.leftovers
		return suite
	})
}

// dial opens a client that lives as long as the test.
func dial(t *testing.T, m vm.Machine) *guest.Client {
	t.Helper()
	conn, err := m.Dial(t.Context())
	if err != nil {
		t.Fatalf("dialling: %v", err)
	}
	c := guest.New(conn)
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// gated is a runner that takes its config, has a job, and ends with status 4 once its
// gate is opened.
const gated = `read -r config; echo "Running job: gated"; read -r go < gate; echo "went $go"; exit 4`

// startGated boots spec with a gated runner in it, and returns once that is busy.
func startGated(ctx context.Context, d vm.Driver, spec vm.Spec, input []byte) (vm.Machine, error) {
	m, err := d.Boot(ctx, spec)
	if err != nil {
		return nil, err
	}
	work := filepath.Join(spec.Dir, "work")
	if err := syscall.Mkfifo(filepath.Join(work, "gate"), 0o600); err != nil {
		return nil, err
	}
	conn, err := m.Dial(ctx)
	if err != nil {
		return nil, err
	}
	c := guest.New(conn)
	defer func() { _ = c.Close() }()
	if err := c.Start(ctx, guest.Run{Name: "r1", Argv: []string{"sh", "-c", gated}, Input: append(input, '\n')}); err != nil {
		return nil, err
	}
	watching, busy := context.WithCancel(ctx)
	defer busy()
	_, err = c.Watch(watching, func(s guest.Status) {
		if s.State == guest.Busy {
			busy()
		}
	})
	if !errors.Is(err, context.Canceled) {
		return nil, fmt.Errorf("watch: %w", err)
	}
	return m, nil
}

func openGate(t *testing.T, spec vm.Spec) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(spec.Dir, "work", "gate"), []byte("on\n"), 0o600); err != nil {
		t.Fatal(err)
	}
}

// agentRole is a node agent with a running job; it says so and waits to be killed. Its
// input is the JIT config.
func agentRole(dir, slots, machineDir string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	input, err := bufio.NewReader(os.Stdin).ReadString('\n')
	if err != nil {
		return err
	}
	d, err := helper.New(helper.Config{Command: []string{self, "vm-helper", "good", slots, "0"}, Dir: dir, Env: processtest.Env})
	if err != nil {
		return err
	}
	_, err = startGated(context.Background(), d, vm.Spec{ID: "adoptme1", Dir: machineDir}, []byte(strings.TrimSpace(input)))
	if err != nil {
		return err
	}
	fmt.Println("busy")
	select {}
}

// startAgent runs agentRole until its job is busy; kill kills it with -9.
func startAgent(t *testing.T, f *fixture, spec vm.Spec, secret string) (kill func()) {
	t.Helper()
	agent := exec.CommandContext(t.Context(), f.command[0], "agent", f.dir, f.command[3], spec.Dir)
	agent.Stdin = strings.NewReader(secret + "\n")
	agent.Stderr = f.log
	out, err := agent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := agent.Start(); err != nil {
		t.Fatal(err)
	}
	kill = sync.OnceFunc(func() {
		_ = agent.Process.Kill()
		_ = agent.Wait()
	})
	t.Cleanup(kill)
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "busy\n" {
		t.Fatalf("the agent said %q, %v; log: %s", line, err, f.log)
	}
	return kill
}

// The JIT config goes to the runner and nowhere else: no argument, environment, file or
// log of any process on the host has it.
func TestInputLeavesNoTrace(t *testing.T) {
	// Made here, so that no file holds it before the test.
	secret := "jit" + strconv.FormatInt(time.Now().UnixNano(), 36) + "secret"
	f := newFixture(t, "good", 0)
	spec := processtest.Spec(t)
	spec.ID = "adoptme1"
	kill := startAgent(t, f, spec, secret)
	encoded := base64.StdEncoding.EncodeToString([]byte(secret + "\n"))
	look := func(where string, b []byte) {
		for _, form := range []string{secret, encoded} {
			if bytes.Contains(b, []byte(form)) {
				t.Errorf("the input is in %s", where)
			}
		}
	}
	looked := 0
	for _, pattern := range []string{"/proc/[0-9]*/cmdline", "/proc/[0-9]*/environ"} {
		paths, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range paths {
			if b, err := os.ReadFile(path); err == nil {
				looked++
				look(path, b)
			}
		}
	}
	for _, root := range []string{f.dir, spec.Dir, f.command[3]} {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			b, err := os.ReadFile(path)
			looked++
			look(path, b)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	look("the agent's log", []byte(f.log.String()))
	if looked < 10 {
		t.Errorf("only %d places were looked at", looked)
	}
	openGate(t, spec)
	m, err := f.driver.Adopt(t.Context(), spec.ID)
	if err != nil {
		t.Fatal(err)
	}
	if s, err := dial(t, m).Watch(t.Context(), nil); err != nil || s.ExitCode != 4 {
		t.Errorf("watch: %+v, %v", s, err)
	}
	kill()
	if err := m.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	look("the log", []byte(f.log.String()))
}

func TestBootTwiceUnderOneID(t *testing.T) {
	f := newFixture(t, "good", 0)
	spec := processtest.Spec(t)
	m, err := f.driver.Boot(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.driver.Boot(t.Context(), spec); err == nil || !strings.Contains(err.Error(), "adopt it or destroy it") {
		t.Errorf("a second boot: %v", err)
	}
	if _, err := dial(t, m).Hello(t.Context()); err != nil {
		t.Errorf("the first machine was harmed: %v", err)
	}
	if err := m.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestBadIDsAndDirectories(t *testing.T) {
	f := newFixture(t, "good", 0)
	for _, id := range []fleet.VMID{"", "../x", "A", "a/b", fleet.VMID(strings.Repeat("x", 120))} {
		spec := processtest.Spec(t)
		spec.ID = id
		if _, err := f.driver.Boot(t.Context(), spec); err == nil {
			t.Errorf("machine %q was booted", id)
		}
		if _, err := f.driver.Adopt(t.Context(), id); err == nil {
			t.Errorf("machine %q was adopted", id)
		}
	}
	if _, err := f.driver.Adopt(t.Context(), "nosuchvm"); !errors.Is(err, vm.ErrUnknown) {
		t.Errorf("adopting an unknown machine: %v, want ErrUnknown", err)
	}
	open := t.TempDir()
	if err := os.Chmod(open, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := helper.New(helper.Config{Command: f.command, Dir: open}); err == nil || !strings.Contains(err.Error(), "chmod 700") {
		t.Errorf("a directory open to others: %v, want a hint", err)
	}
	if _, err := helper.New(helper.Config{Command: []string{"/no/such/paddock"}, Dir: f.dir}); err == nil {
		t.Error("a command that does not exist was taken")
	}
}

// An agent that died between making a folder and starting its helper.
func TestFolderWithoutHelper(t *testing.T) {
	f := newFixture(t, "good", 0)
	if err := os.Mkdir(filepath.Join(f.dir, "halfmade"), 0o700); err != nil {
		t.Fatal(err)
	}
	m, err := f.driver.Adopt(t.Context(), "halfmade")
	if err != nil {
		t.Fatal(err)
	}
	if exit, err := m.Wait(t.Context()); err != nil || exit.Reason == "" {
		t.Errorf("wait: %+v, %v", exit, err)
	}
	if err := m.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	if ids, err := f.driver.List(); err != nil || len(ids) > 0 {
		t.Errorf("list: %v, %v; want none", ids, err)
	}
}
