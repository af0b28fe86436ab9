package qemu_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/vm"
	"github.com/paddock-ci/paddock/vm/process/processtest"
	"github.com/paddock-ci/paddock/vm/qemu"
)

// saved boots a machine that has written a mark into its memory, and saves it.
func saved(t testing.TB, d *qemu.Driver) (s vm.Spec, m vm.Machine, state string) {
	t.Helper()
	s, state = spec(t, "arm64", ""), t.TempDir()
	m = boot(t, d, s)
	c := dial(t, m)
	sh(t, c, "echo before > /tmp/mark; cat /sys/class/net/eth0/address > /tmp/mac")
	start := time.Now()
	if err := m.(vm.Saver).Save(t.Context(), state); err != nil {
		t.Fatalf("saving: %v", err)
	}
	t.Logf("saved in %v", time.Since(start))
	return s, m, state
}

// from is a machine that starts from a state, as a caller prepares it.
func from(t testing.TB, s vm.Spec, state string) vm.Spec {
	t.Helper()
	s.Dir, s.State = t.TempDir(), state
	for _, name := range vm.SavedFiles {
		raw, err := os.ReadFile(filepath.Join(state, name))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err := errors.Join(err, os.WriteFile(filepath.Join(s.Dir, name), raw, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// A machine that was saved runs on; what starts from the state goes on from that
// instant, as often as wanted, with the same address; and neither knows of the other.
func TestSaveAndRestore(t *testing.T) {
	t.Parallel()
	d := newDriver(t, qemu.Config{})
	s, m, state := saved(t, d)
	c := dial(t, m)
	mac := sh(t, c, "echo after >> /tmp/mark; cat /tmp/mac")
	for _, n := range []string{"first", "second"} {
		restored := from(t, s, state)
		start := time.Now()
		r := boot(t, d, restored)
		rc := dial(t, r)
		t.Logf("%s start from the state: %v to an answer", n, time.Since(start))
		if got := sh(t, rc, "cat /tmp/mark; cat /sys/class/net/eth0/address"); got != "before\n"+mac {
			t.Errorf("in the %s machine from the state: %q, want the file as it was and %s", n, got, mac)
		}
		before := time.Now()
		if err := rc.Wake(t.Context(), guest.Wake{Now: before, Entropy: []byte("0123456789abcdef0123456789abcdef")}); err != nil {
			t.Errorf("waking: %v", err)
		}
		sh(t, rc, "echo mine > /tmp/mark")
		if err := r.Destroy(t.Context()); err != nil {
			t.Fatal(err)
		}
		nothingLeft(t, restored)
	}
	if got := sh(t, c, "cat /tmp/mark"); got != "before\nafter" {
		t.Errorf("in the machine that was saved: %q", got)
	}
	other := spec(t, "arm64", "")
	if got := sh(t, dial(t, boot(t, d, other)), "cat /sys/class/net/eth0/address"); got == mac {
		t.Errorf("a cold machine has the same MAC address %s", got)
	}
}

// A state that is not this machine's, or broken, is vm.ErrState; nothing is left, and the
// slot is free for a cold boot.
func TestStateRefused(t *testing.T) {
	t.Parallel()
	d := newDriver(t, qemu.Config{Slots: 2}) // the saved one's and another
	s, _, state := saved(t, d)
	edit := func(name string, change func([]byte) []byte) func(*testing.T, *vm.Spec) {
		return func(t *testing.T, s *vm.Spec) {
			path := filepath.Join(s.State, name)
			raw, err := os.ReadFile(path)
			if err := errors.Join(err, os.WriteFile(path, change(raw), 0o600)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, c := range map[string]struct {
		spoil func(*testing.T, *vm.Spec)
		want  string
	}{
		"memory": {func(_ *testing.T, s *vm.Spec) { s.Memory += 16 << 20 }, "a memory in bytes of"},
		"another QEMU": {edit("state.json", func(b []byte) []byte {
			return []byte(strings.Replace(string(b), "version ", "version 1", 1))
		}), "the QEMU"},
		"no state":        {func(_ *testing.T, s *vm.Spec) { s.State = s.Dir }, "no such file"},
		"no identity":     {func(_ *testing.T, s *vm.Spec) { _ = os.Remove(filepath.Join(s.Dir, vm.IdentityFile)) }, "identity"},
		"another disk":    {func(_ *testing.T, s *vm.Spec) { _ = os.Truncate(filepath.Join(s.Dir, vm.DiskFile), 64<<20) }, "disk.img has"},
		"no json":         {edit("state.json", func(b []byte) []byte { return b[:20] }), "state.json"},
		"memory cut off":  {edit("memory.bin", func(b []byte) []byte { return b[:len(b)/2] }), "memory.bin has"},
		"memory spoilt":   {edit("memory.bin", func(b []byte) []byte { clear(b[len(b)/2:]); return b }), "QEMU ended"},
		"memory replaced": {edit("memory.bin", func(b []byte) []byte { clear(b); return b }), "QEMU ended"},
	} {
		t.Run(name, func(t *testing.T) {
			own := t.TempDir() // of the state, to be spoilt
			if err := os.CopyFS(own, os.DirFS(state)); err != nil {
				t.Fatal(err)
			}
			restored := from(t, s, own)
			c.spoil(t, &restored)
			start := time.Now()
			_, err := d.Boot(t.Context(), restored)
			if !errors.Is(err, vm.ErrState) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("boot: %v, want ErrState with %q", err, c.want)
			}
			t.Logf("%v: %v", time.Since(start), err)
			nothingLeft(t, restored)
		})
	}
	cold := spec(t, "arm64", "")
	if got := sh(t, dial(t, boot(t, d, cold)), "echo cold"); got != "cold" {
		t.Errorf("a cold boot afterwards: %q", got)
	}
}

// A save that fails leaves nothing in the directory, and a machine that runs.
func TestSaveFails(t *testing.T) {
	t.Parallel()
	full := errors.New("no space left")
	d := newDriver(t, qemu.Config{CloneFile: func(context.Context, string, string) error { return full }})
	m := boot(t, d, spec(t, "arm64", ""))
	state := t.TempDir()
	if err := m.(vm.Saver).Save(t.Context(), state); !errors.Is(err, full) {
		t.Errorf("save: %v", err)
	}
	ended, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if err := m.(vm.Saver).Save(ended, state); err == nil {
		t.Error("a save within a millisecond")
	}
	if left, err := os.ReadDir(state); err != nil || len(left) > 0 {
		t.Errorf("left in the state's directory: %v, %v", left, err)
	}
	if got := sh(t, dial(t, m), "echo it runs"); got != "it runs" {
		t.Errorf("afterwards: %q", got)
	}
	if err := m.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := m.(vm.Saver).Save(t.Context(), state); !errors.Is(err, vm.ErrEnded) {
		t.Errorf("saving what has ended: %v", err)
	}
}

// A machine that stands still, as one does whose QEMU hangs, is destroyed all the same.
func TestDestroyOfHanging(t *testing.T) {
	t.Parallel()
	s := good(t)
	m := boot(t, newDriver(t, qemu.Config{}), s)
	stopped := 0
	for _, p := range processtest.Find(t, s.Dir) {
		if strings.Contains(p.Args, "qemu-system") {
			stop(t, p.PID)
			stopped++
		}
	}
	if stopped != 1 {
		t.Fatalf("%d processes were stopped", stopped)
	}
	start := time.Now()
	if err := m.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Logf("destroyed in %v", time.Since(start))
	nothingLeft(t, s)
}
