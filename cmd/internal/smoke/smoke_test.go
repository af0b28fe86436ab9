package smoke

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/vm"
	"github.com/paddock-ci/paddock/vm/process"
	"github.com/paddock-ci/paddock/vm/process/processtest"
)

func TestMain(m *testing.M) {
	processtest.Guest()
	os.Exit(m.Run())
}

// bed is the ground of one trial: machines are processes, of which two may run. What
// they lack of a real machine (a saved state, an address, a port) is put around them, and
// each field plants a fault.
type bed struct {
	vm.Driver
	ssh net.Listener // plays the guest's port 22

	bootErr   func(spec vm.Spec) error
	afterBoot func(spec vm.Spec)
	saveErr   error
	address   string
	destroy   error
	dial      func(context.Context) (net.Conn, error)
}

type machine struct {
	vm.Machine
	bed  *bed
	spec vm.Spec
}

func (b *bed) Boot(ctx context.Context, spec vm.Spec) (vm.Machine, error) {
	if b.bootErr != nil {
		if err := b.bootErr(spec); err != nil {
			return nil, err
		}
	}
	if spec.State != "" { // the state of a process is that it was saved
		if _, err := os.Stat(filepath.Join(spec.State, "memory")); err != nil {
			return nil, fmt.Errorf("%w: %w", vm.ErrState, err)
		}
	}
	m, err := b.Driver.Boot(ctx, spec)
	if err != nil {
		return nil, err
	}
	if b.afterBoot != nil {
		b.afterBoot(spec)
	}
	return &machine{Machine: m, bed: b, spec: spec}, nil
}

func (m *machine) Save(_ context.Context, dir string) error {
	if m.bed.saveErr != nil {
		return m.bed.saveErr
	}
	return errors.Join(
		os.WriteFile(filepath.Join(dir, "memory"), make([]byte, 1<<20), 0o600),
		os.Link(filepath.Join(m.spec.Dir, vm.DiskFile), filepath.Join(dir, vm.DiskFile)))
}

func (m *machine) Address(context.Context) (string, error) { return m.bed.address, nil }

func (m *machine) DialPort(ctx context.Context, _ int) (net.Conn, error) {
	return (&net.Dialer{}).DialContext(ctx, m.bed.ssh.Addr().Network(), m.bed.ssh.Addr().String())
}

func (m *machine) Dial(ctx context.Context) (net.Conn, error) {
	if m.bed.dial != nil {
		return m.bed.dial(ctx)
	}
	return m.Machine.Dial(ctx)
}

func (m *machine) Destroy(ctx context.Context) error {
	return errors.Join(m.Machine.Destroy(ctx), m.bed.destroy)
}

// newBed makes a ground and a trial on which everything is well.
func newBed(t *testing.T) (*bed, Config) {
	t.Helper()
	d, err := process.New(process.Config{Command: processtest.Command(t), Env: processtest.Env, Slots: 2})
	if err != nil {
		t.Fatal(err)
	}
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(conn, "SSH-2.0-planted\r\n")
			_ = conn.Close()
		}
	}()
	t.Cleanup(func() { _ = l.Close(); <-served })
	b := &bed{Driver: d, ssh: l, address: "192.168.64.2"}
	dir := filepath.Join(t.TempDir(), "m")
	return b, Config{
		Driver: b, Image: processtest.Spec(t).Dir, Dir: dir, Slots: 2, Patience: time.Minute,
		Clone: func(_ context.Context, src, dst string) error {
			content, err := os.ReadFile(src)
			if err != nil {
				return err
			}
			return os.WriteFile(dst, content, 0o600)
		},
		Open: open,
		Left: func(context.Context) ([]string, error) { return processtest.Leftovers(t, dir), nil },
	}
}

// plain is a guest as SSH shows it: it runs programs and has no other verbs.
type plain struct{ Guest }

func open(ctx context.Context, m vm.Machine) (Guest, error) {
	conn, err := m.Dial(ctx)
	if err != nil {
		return nil, err
	}
	return plain{guest.New(conn)}, nil
}

// try runs a trial, and holds it to leaving nothing.
func try(t *testing.T, ctx context.Context, c Config) map[string]Result {
	t.Helper()
	var told []Result
	c.Told = func(r Result) { told = append(told, r) }
	results, err := Run(ctx, c)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(told, results) {
		t.Errorf("it told %v and returned %v", told, results)
	}
	if left := processtest.Leftovers(t, c.Dir); len(left) > 0 {
		t.Errorf("left over: %q", left)
	}
	if _, err := os.Stat(c.Dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the machines' directory is still there (%v)", err)
	}
	by := map[string]Result{}
	for _, r := range results {
		by[r.Step] = r
		if r.Outcome != OK && r.Detail == "" || r.Outcome == Failed && r.Advice == "" {
			t.Errorf("%+v does not say why, or what to do", r)
		}
	}
	return by
}

func TestAllIsWell(t *testing.T) {
	_, c := newBed(t)
	by := try(t, t.Context(), c)
	if len(by) != len(steps) {
		t.Errorf("%d results of %d steps", len(by), len(steps))
	}
	for _, s := range steps {
		want := OK
		if slices.Contains([]string{"guest's address", "wake", "clock after waking"}, s.name) {
			want = Skipped // they need Paddock's agent
		}
		if r := by[s.name]; r.Outcome != want {
			t.Errorf("%+v, want %s", r, want)
		}
	}
	for name, want := range map[string]string{
		"answer": "version test", "command": "Linux", "clock": "0s off", "host's address": "192.168.64.2", "port 22": "SSH-2.0-planted",
		"fill the host": "2 machines run", "one too many": "no free machine slot", "resume": "answers after", "destroy": "destroyed", "leftovers": "none",
	} {
		if !strings.Contains(by[name].Detail, want) {
			t.Errorf("%s says %q, want %q in it", name, by[name].Detail, want)
		}
	}
}

// Each fault is planted alone. Its step must fail, what stands on it must be skipped for
// that reason, and nothing may be left.
func TestPlantedFaults(t *testing.T) {
	for _, p := range slices.Concat(startFaults, roomFaults, endFaults) {
		t.Run(p.name, func(t *testing.T) {
			b, c := newBed(t)
			p.plant(b, &c)
			by := try(t, t.Context(), c)
			r := by[p.failed]
			if r.Outcome != Failed || !strings.Contains(r.Detail, p.detail) || !strings.Contains(r.Advice, p.advice) {
				t.Errorf("%+v, want it failed with %q and advice %q", r, p.detail, p.advice)
			}
			for _, s := range p.skipped {
				if r := by[s]; r.Outcome != Skipped || !strings.Contains(r.Detail, "needs ") {
					t.Errorf("%+v, want it skipped for what it needs", r)
				}
			}
		})
	}
}

// fault is one that is planted.
type fault struct {
	name    string
	plant   func(*bed, *Config)
	failed  string // the step
	detail  string
	advice  string
	skipped []string
}

// Of a machine's start and its network.
var startFaults = []fault{
	{
		"no boot", func(b *bed, _ *Config) {
			b.bootErr = func(vm.Spec) error {
				return &vm.BootError{Console: "panic: no root", Err: errors.New("it stopped")}
			}
		}, "boot", "panic: no root", "read its console", []string{"answer", "command", "save", "resume", "fill the host", "destroy", "boot again"},
	}, {
		"a leaked slot", func(b *bed, _ *Config) { b.bootErr = func(vm.Spec) error { return vm.ErrAtCapacity } },
		"boot", "no free machine slot", "reboot the host", []string{"answer"},
	}, {
		"no answer", func(b *bed, c *Config) {
			c.Patience = 2 * time.Second
			b.dial = func(ctx context.Context) (net.Conn, error) { <-ctx.Done(); return nil, ctx.Err() }
			b.afterBoot = func(s vm.Spec) {
				_ = os.WriteFile(filepath.Join(s.Dir, vm.ConsoleFile), []byte(strings.Repeat("booting\n", 999)+"kernel panic"), 0o600)
			}
		}, "answer", "not within 2s: reaching the guest: context deadline exceeded; its console ends: ", "does the guest boot", []string{"command", "clock", "save", "resume"},
	}, {
		"no clone", func(_ *bed, c *Config) {
			c.Clone = func(context.Context, string, string) error { return errors.New("the volume is full") }
		}, "clone", "the volume is full", "have room", []string{"boot", "leftovers"},
	}, {
		"two addresses", func(b *bed, c *Config) {
			c.Open = func(ctx context.Context, m vm.Machine) (Guest, error) {
				g, err := open(ctx, m)
				return addressed{g}, err
			}
			b.address = "192.168.64.9"
		}, "host's address", "the guest 192.168.64.2", "lease", nil,
	},
}

// Of the room for machines, and of its port.
var roomFaults = []fault{
	{
		"a port that says nothing", func(b *bed, _ *Config) { _ = b.ssh.Close() },
		"port 22", "refused", "Local Network", nil,
	}, {
		"room for one only", func(b *bed, _ *Config) {
			b.bootErr = func(s vm.Spec) error {
				if strings.HasPrefix(string(s.ID), beside) {
					return vm.ErrAtCapacity
				}
				return nil
			}
		}, "fill the host", "machine 2 of 2", "reboot the host", []string{"one too many", "destroy the others"},
	}, {
		"no limit", func(_ *bed, c *Config) { c.Slots = 1 },
		"one too many", "machine 2 of 1 boots", "limit is not seen", nil,
	}, {
		"another error than the limit's", func(b *bed, _ *Config) {
			b.bootErr = func(s vm.Spec) error {
				if s.ID == surplus {
					return errors.New("code 6")
				}
				return nil
			}
		}, "one too many", "not for want of a slot: code 6", "broken image", nil,
	},
}

// Of states and of what machines leave.
var endFaults = []fault{
	{
		"no state", func(b *bed, _ *Config) { b.saveErr = errors.New("disk full") },
		"save", "disk full", "start cold", []string{"answer after saving", "resume", "wake", "destroy the resumed"},
	}, {
		"a broken state", func(b *bed, c *Config) {
			b.bootErr = func(s vm.Spec) error {
				if s.State != "" {
					return errors.Join(vm.ErrState, os.Remove(filepath.Join(s.State, "memory")))
				}
				return nil
			}
		}, "resume", "cannot be started from", "fall back", []string{"wake", "destroy the resumed"},
	}, {
		"no end", func(b *bed, _ *Config) { b.destroy = errors.New("it hangs") },
		"destroy", "it hangs", "reboot", []string{"resume", "boot again"},
	}, {
		"a socket is left", func(b *bed, _ *Config) {
			b.afterBoot = func(s vm.Spec) {
				if s.ID == first {
					l, err := (&net.ListenConfig{}).Listen(context.Background(), "unix", filepath.Join(s.Dir, "odd.sock"))
					if err == nil {
						l.(*net.UnixListener).SetUnlinkOnClose(false)
						_ = l.Close()
					}
				}
			}
		}, "destroy", "odd.sock", "reboot", []string{"resume"},
	}, {
		"a process is left", func(_ *bed, c *Config) {
			asked := 0
			c.Left = func(context.Context) ([]string, error) { asked++; return []string{fmt.Sprint("process ", asked)}, nil }
		}, "leftovers", "process ", "send this report", nil,
	}, {
		"a command that fails", func(_ *bed, c *Config) {
			c.Open = func(ctx context.Context, m vm.Machine) (Guest, error) {
				g, err := open(ctx, m)
				return failing{g}, err
			}
		}, "command", "status 3", "by hand", []string{"clock"},
	}, {
		"a clock of another day", func(_ *bed, c *Config) {
			c.Open = func(ctx context.Context, m vm.Machine) (Guest, error) {
				g, err := open(ctx, m)
				return late{g}, err
			}
		}, "clock", "off the host's", "time service", nil,
	},
}

type addressed struct{ Guest }

func (addressed) NetworkUp(context.Context) (guest.Network, error) {
	return guest.Network{Addresses: []string{"192.168.64.2"}}, nil
}

type failing struct{ Guest }

func (failing) Exec(context.Context, guest.Command, func(guest.Stream, []byte)) (int, error) {
	return 3, nil
}

type late struct{ Guest }

func (late) Exec(_ context.Context, _ guest.Command, output func(guest.Stream, []byte)) (int, error) {
	output(guest.Stdout, []byte("Linux 1 arm64\n86400\n"))
	return 0, nil
}

// An interrupt ends the trial and its machines.
func TestInterrupt(t *testing.T) {
	b, c := newBed(t)
	ctx, cancel := context.WithCancel(t.Context())
	b.afterBoot = func(vm.Spec) { cancel() }
	by := try(t, ctx, c)
	if r := by["boot"]; r.Outcome != OK {
		t.Errorf("%+v", r)
	}
	for _, s := range steps[2:] {
		if r := by[s.name]; r.Outcome != Skipped || r.Detail != "interrupted" {
			t.Errorf("%+v, want it skipped as interrupted", r)
		}
	}
}

func TestNothingIsTried(t *testing.T) {
	_, c := newBed(t)
	for name, spoil := range map[string]func(*Config){
		"needs a driver":        func(c *Config) { c.Driver = nil },
		"has no disk":           func(c *Config) { c.Image = t.TempDir() },
		"making a directory":    func(c *Config) { c.Dir = t.TempDir() },
		"machines that run alr": func(c *Config) { c.Left = func(context.Context) ([]string, error) { return nil, errors.New("no ps") } },
	} {
		bad := c
		spoil(&bad)
		if results, err := Run(t.Context(), bad); err == nil || !strings.Contains(err.Error(), name) || len(results) > 0 {
			t.Errorf("%v, %v: want an error with %q", results, err, name)
		}
	}
}

// What a guest says is a short line in a report, whatever it is, and its clock a number.
func FuzzGuestsWord(f *testing.F) {
	f.Add("Linux 6.1 aarch64\n1700000000\n")
	f.Add("\x1b[2J\xff\n9223372036854775807")
	f.Add("1e400 -1")
	f.Fuzz(func(t *testing.T, said string) {
		line := plainLine(said)
		if len(line) > 2000 || strings.ContainsFunc(line, func(r rune) bool { return r < ' ' || r == 0x7f }) || !utf8.ValidString(line) {
			t.Errorf("%q became %q", said, line)
		}
		now := time.Now()
		for _, word := range strings.Fields(said) {
			if off, err := skew(word, now, now.Add(time.Second)); err != nil && off != 0 {
				t.Errorf("%q is %s off, and %v", word, off, err)
			}
		}
	})
}
