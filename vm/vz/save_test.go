//go:build vzstandin

package vz_test

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	framework "github.com/Code-Hex/vz/v3"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/vm"
	"github.com/paddock-ci/paddock/vm/vz"
)

// saved boots a machine, saves it and destroys it; what is left is its state.
func saved(t *testing.T, h *house, d *vz.Driver, spec vm.Spec) (state string, was *inside) {
	t.Helper()
	m := boot(t, d, spec)
	state = t.TempDir()
	framework.Release() // long before somebody saves
	if err := m.(vm.Saver).Save(bounded(t), state); err != nil {
		t.Fatalf("saving: %v", err)
	}
	was = h.of(t, spec)
	if err := m.Destroy(bounded(t)); err != nil {
		t.Fatal(err)
	}
	return state, was
}

// from is a machine like spec with clones of a state's files.
func from(t *testing.T, spec vm.Spec, state string) vm.Spec {
	t.Helper()
	again := mac(t, diskGood)
	again.CPU, again.Memory, again.Mounts, again.State = spec.CPU, spec.Memory, spec.Mounts, state
	for _, name := range vm.SavedFiles {
		raw, err := os.ReadFile(filepath.Join(state, name))
		if err != nil {
			t.Fatal(err)
		}
		put(t, again.Dir, name, string(raw))
	}
	return again
}

// A machine that starts from a state is the machine that was saved: its address, its
// identifier, its disk of that instant.
func TestSaveAndRestore(t *testing.T) {
	h := (&house{}).enter(t)
	d := driver(t, vz.Config{})
	spec := mac(t, diskGood)
	spec.Mounts = []fleet.Mount{{Name: "work", Path: t.TempDir()}}
	state, was := saved(t, h, d, spec)
	put(t, spec.Dir, vm.DiskFile, "gone on")
	again := from(t, spec, state)
	m := boot(t, d, again)
	g := h.of(t, again)
	if !g.Restored() || g.MAC() != was.MAC() || g.Machine() != was.Machine() {
		t.Errorf("restored %v with %s and %s, saved were %s and %s", g.Restored(), g.MAC(), g.Machine(), was.MAC(), was.Machine())
	}
	if now := hello(t, m); now.Status.State != guest.Idle {
		t.Errorf("%+v", now)
	}
	if disk, err := os.ReadFile(filepath.Join(again.Dir, vm.DiskFile)); string(disk) != diskGood {
		t.Errorf("disk %q, %v", disk, err)
	}
}

// A machine that was saved runs on; its streams were cut, and new ones work. A restored
// machine can be saved, too.
func TestSaveGoesOn(t *testing.T) {
	h := (&house{}).enter(t)
	d := driver(t, vz.Config{})
	spec := mac(t, diskGood)
	m := boot(t, d, spec)
	conn, err := m.Dial(bounded(t))
	if err != nil {
		t.Fatal(err)
	}
	first := guest.New(conn)
	defer first.Close()
	for range 2 {
		if err := m.(vm.Saver).Save(bounded(t), t.TempDir()); err != nil {
			t.Fatal(err)
		}
		hello(t, m)
	}
	if _, err := first.Hello(bounded(t)); !errors.Is(err, guest.ErrLost) {
		t.Errorf("a stream of before: %v, want ErrLost", err)
	}
	if err := m.Destroy(bounded(t)); err != nil {
		t.Fatal(err)
	}
	spec = mac(t, diskGood)
	state, was := saved(t, h, d, spec)
	again := from(t, spec, state)
	_, twice := saved(t, h, d, again)
	if was.MAC() != twice.MAC() {
		t.Errorf("the state of a restored machine is of %s, not of %s", twice.MAC(), was.MAC())
	}
}

// Who dials while a machine is being saved waits until that is over: a stream made before
// the machine stands still would be alive in the state. The stand-in minds.
func TestDialWhileSaving(t *testing.T) {
	var m atomic.Value // once it runs, the machine
	dialled := make(chan error, 1)
	(&house{Hooks: framework.Hooks{Pause: func() error { // the line is cut by now
		ctx := bounded(t)
		go func() {
			conn, err := m.Load().(vm.Machine).Dial(ctx)
			if err == nil {
				err = conn.Close()
			}
			dialled <- err
		}()
		select {
		case err := <-dialled: // in time to be saved with the machine
			dialled <- err
		case <-time.After(300 * time.Millisecond):
		}
		return nil
	}}}).enter(t)
	m.Store(boot(t, driver(t, vz.Config{}), mac(t, diskGood)))
	if err := m.Load().(vm.Saver).Save(bounded(t), t.TempDir()); err != nil {
		t.Fatal(err)
	}
	if err := <-dialled; err != nil {
		t.Errorf("who dialled meanwhile: %v", err)
	}
}

func TestSaveUnsupported(t *testing.T) {
	why := errors.New("a device that cannot be saved")
	(&house{Hooks: framework.Hooks{Unsaveable: why}}).enter(t)
	m := boot(t, driver(t, vz.Config{}), mac(t, diskGood))
	dir := t.TempDir()
	if err := m.(vm.Saver).Save(bounded(t), dir); !errors.Is(err, vm.ErrUnsupported) || !errors.Is(err, why) {
		t.Errorf("%v", err)
	}
	hello(t, m)
	nothingIn(t, dir)
}

func nothingIn(t *testing.T, dir string) {
	t.Helper()
	if left, err := os.ReadDir(dir); len(left) > 0 || err != nil {
		t.Errorf("left in %s: %v, %v", dir, left, err)
	}
}

// Whatever goes wrong with saving, the machine runs on and half a state is none.
func TestSaveFails(t *testing.T) {
	bad := errors.New("disk full")
	fail := func() error { return bad }
	for what, hooks := range map[string]framework.Hooks{"pausing": {Pause: fail}, "saving": {Save: fail}} {
		t.Run(what, func(t *testing.T) {
			(&house{Hooks: hooks}).enter(t)
			m := boot(t, driver(t, vz.Config{}), mac(t, diskGood))
			dir := t.TempDir()
			if err := m.(vm.Saver).Save(bounded(t), dir); !errors.Is(err, bad) || !strings.Contains(err.Error(), what) {
				t.Errorf("%v", err)
			}
			nothingIn(t, dir)
			hello(t, m)
		})
	}
	t.Run("cloning", func(t *testing.T) {
		(&house{}).enter(t)
		d := driver(t, vz.Config{CloneFile: func(context.Context, string, string) error { return bad }})
		m := boot(t, d, mac(t, diskGood))
		dir := t.TempDir()
		if err := m.(vm.Saver).Save(bounded(t), dir); !errors.Is(err, bad) {
			t.Errorf("%v", err)
		}
		nothingIn(t, dir)
		hello(t, m)
	})
	t.Run("resuming", func(t *testing.T) {
		(&house{Hooks: framework.Hooks{Resume: fail}}).enter(t)
		m := boot(t, driver(t, vz.Config{}), mac(t, diskGood))
		if err := m.(vm.Saver).Save(bounded(t), t.TempDir()); !errors.Is(err, bad) || !strings.Contains(err.Error(), "run on") {
			t.Errorf("%v", err)
		}
		if err := m.Destroy(bounded(t)); err != nil { // it stands still
			t.Error(err)
		}
	})
}

// A caller that gives up in the middle finds the machine running: what the framework
// began is waited for.
func TestSaveIsCancelled(t *testing.T) {
	release, saving := make(chan struct{}), make(chan struct{})
	(&house{Hooks: framework.Hooks{Save: func() error {
		close(saving)
		<-release
		return nil
	}}}).enter(t)
	m := boot(t, driver(t, vz.Config{}), mac(t, diskGood))
	dir := t.TempDir()
	ctx, cancel := context.WithCancel(bounded(t))
	go func() {
		<-saving
		cancel()
		time.AfterFunc(100*time.Millisecond, func() { close(release) })
	}()
	if err := m.(vm.Saver).Save(ctx, dir); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	nothingIn(t, dir)
	hello(t, m)
}

// A machine that is destroyed while it is saved waits for the framework to let go, and
// does not run on.
func TestDestroyWhileSaving(t *testing.T) {
	release, saving := make(chan struct{}), make(chan struct{})
	(&house{Hooks: framework.Hooks{Save: func() error {
		close(saving)
		<-release
		return nil
	}}}).enter(t)
	m := boot(t, driver(t, vz.Config{}), mac(t, diskGood))
	dir := t.TempDir()
	failed := make(chan error, 1)
	go func() { failed <- m.(vm.Saver).Save(bounded(t), dir) }()
	<-saving
	destroyed := make(chan error, 1)
	go func() { destroyed <- m.Destroy(bounded(t)) }()
	select {
	case err := <-destroyed:
		t.Errorf("destroyed in the middle of saving: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	close(release)
	if err := <-destroyed; err != nil {
		t.Error(err)
	}
	if err := <-failed; !errors.Is(err, vm.ErrEnded) {
		t.Errorf("saving: %v, want ErrEnded", err)
	}
	nothingIn(t, dir)
	if exit, err := m.Wait(bounded(t)); err != nil || exit.Reason != "destroyed" {
		t.Errorf("%+v, %v", exit, err)
	}
}

// A state that is not of this machine, this host or whole is refused, in words, and the
// image boots cold nevertheless.
func TestRestoreRefused(t *testing.T) {
	h := (&house{}).enter(t)
	d := driver(t, vz.Config{})
	spec := mac(t, diskGood)
	spec.CPU = 4
	state, _ := saved(t, h, d, spec)
	edit := func(key string, value any) func(*testing.T, *vm.Spec) {
		return func(t *testing.T, s *vm.Spec) {
			raw, err := os.ReadFile(filepath.Join(s.State, "state.json"))
			var m map[string]any
			if err != nil || json.Unmarshal(raw, &m) != nil {
				t.Fatalf("%s, %v", raw, err)
			}
			m[key] = value
			raw, _ = json.Marshal(m)
			put(t, s.State, "state.json", string(raw))
		}
	}
	for _, test := range []struct {
		what string
		make func(t *testing.T, s *vm.Spec)
		want string
	}{
		{"other CPUs", func(_ *testing.T, s *vm.Spec) { s.CPU = 6 }, "CPU count 4, wanted is 6"},
		{"other memory", func(_ *testing.T, s *vm.Spec) { s.Memory = 16 << 30 }, "memory size"},
		{"other mounts", mounts(fleet.Mount{Name: "work", Path: "/"}), "mounts"},
		{"another host system", edit("build", "23A344"), "host system 23A344"},
		{"another user", edit("user", 4242), "user 4242"},
		{"another format", edit("version", 2), "format 2"},
		{"no state", func(t *testing.T, s *vm.Spec) { s.State = t.TempDir() }, "state.json"},
		{"a state that is none", func(t *testing.T, s *vm.Spec) { put(t, s.State, "state.json", "[") }, "state.json"},
		{"no identity", func(t *testing.T, s *vm.Spec) { _ = os.Remove(filepath.Join(s.Dir, vm.IdentityFile)) }, vm.IdentityFile},
		{"half an identity", func(t *testing.T, s *vm.Spec) { put(t, s.Dir, vm.IdentityFile, `{"mac":"02:00:00:00:00:09"}`) }, "holds no identity"},
		{"an identity of nothing", func(t *testing.T, s *vm.Spec) {
			put(t, s.Dir, vm.IdentityFile, `{"mac":"02:00:00:00:00:09","machine":"AAAA"}`)
		}, "no machine identifier"},
		{"an address that is none", func(t *testing.T, s *vm.Spec) {
			put(t, s.Dir, vm.IdentityFile, `{"mac":"zz","machine":"c3RhbmRpbi1tYWNoaW5lLTA="}`)
		}, "MAC address"},
		{"the identity of another", func(t *testing.T, s *vm.Spec) {
			put(t, s.Dir, vm.IdentityFile, `{"mac":"02:00:00:00:00:09","machine":"c3RhbmRpbi1tYWNoaW5lLTA="}`)
		}, "Code=12"},
		{"memory of another host", func(t *testing.T, s *vm.Spec) { put(t, s.State, "machine.vzstate", "encrypted") }, "permission denied"},
		{"no memory", func(t *testing.T, s *vm.Spec) { _ = os.Remove(filepath.Join(s.State, "machine.vzstate")) }, "Code=12"},
	} {
		t.Run(test.what, func(t *testing.T) {
			own := t.TempDir() // a copy of the state, to be spoilt
			if err := os.CopyFS(own, os.DirFS(state)); err != nil {
				t.Fatal(err)
			}
			broken := from(t, spec, own)
			test.make(t, &broken)
			err := refused(t, d, broken)
			var failed *vm.BootError
			if !errors.Is(err, vm.ErrState) || errors.As(err, &failed) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%v, want ErrState alone, with %q", err, test.want)
			}
			broken.State, broken.CPU, broken.Memory, broken.Mounts = "", 0, 0, nil
			m := boot(t, d, broken)
			hello(t, m)
			if err := m.Destroy(bounded(t)); err != nil {
				t.Error(err)
			}
		})
	}
}

// What fails while restoring is the state's fault, unless the host is full or the caller
// has gone.
func TestRestoreFails(t *testing.T) {
	h := (&house{}).enter(t)
	d := driver(t, vz.Config{})
	spec := mac(t, diskGood)
	state, _ := saved(t, h, d, spec)
	bad := errors.New("internal error")
	hooks := h.Hooks
	for what, change := range map[string]func(*framework.Hooks){
		"resuming":       func(h *framework.Hooks) { h.Resume = func() error { return bad } },
		"restoring":      func(h *framework.Hooks) { h.Restore = func() error { return bad } },
		"now unsaveable": func(h *framework.Hooks) { h.Unsaveable = bad },
	} {
		now := hooks
		change(&now)
		framework.Use(now)
		if err := refused(t, d, from(t, spec, state)); !errors.Is(err, vm.ErrState) || !errors.Is(err, bad) {
			t.Errorf("%s: %v, want ErrState", what, err)
		}
	}
	full := hooks
	full.Taken = 2
	framework.Use(full)
	if err := refused(t, d, from(t, spec, state)); !errors.Is(err, vm.ErrAtCapacity) || errors.Is(err, vm.ErrState) {
		t.Errorf("a full host: %v, want ErrAtCapacity alone", err)
	}
	hanging := hooks
	release := make(chan struct{})
	hanging.Restore = func() error {
		<-release
		return nil
	}
	framework.Use(hanging)
	ctx, cancel := context.WithTimeout(bounded(t), 100*time.Millisecond)
	defer cancel()
	time.AfterFunc(200*time.Millisecond, func() { close(release) })
	if _, err := d.Boot(ctx, from(t, spec, state)); !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, vm.ErrState) {
		t.Errorf("a caller that gave up: %v", err)
	}
	silent := hooks
	silent.Guest = func(g *framework.Guest) { <-g.Done() }
	framework.Use(silent)
	vz.Hasten(t, 300*time.Millisecond)
	if err := refused(t, d, from(t, spec, state)); !errors.Is(err, vm.ErrState) {
		t.Errorf("a guest that does not wake: %v, want ErrState", err)
	}
}
