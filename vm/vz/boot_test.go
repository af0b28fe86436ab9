//go:build vzstandin

package vz_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
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
	"github.com/paddock-ci/paddock/vm"
	"github.com/paddock-ci/paddock/vm/vmtest"
	"github.com/paddock-ci/paddock/vm/vz"
)

// Boot minds its context though the framework does not; the machine that comes up after
// all is stopped, even if it had not begun to when the caller gave up.
func TestStartHangs(t *testing.T) {
	for what, hooks := range map[string]func(wait func() error) framework.Hooks{
		"before it starts": func(wait func() error) framework.Hooks { return framework.Hooks{Queue: wait} },
		"while it starts": func(wait func() error) framework.Hooks {
			return framework.Hooks{Start: func(*framework.Guest) error { return wait() }}
		},
	} {
		t.Run(what, func(t *testing.T) {
			release := make(chan struct{})
			(&house{Hooks: hooks(func() error {
				<-release
				return nil
			})}).enter(t)
			ctx, cancel := context.WithTimeout(bounded(t), 100*time.Millisecond)
			defer cancel()
			time.AfterFunc(300*time.Millisecond, func() { close(release) })
			_, err := driver(t, vz.Config{}).Boot(ctx, mac(t, diskGood))
			var failed *vm.BootError
			if !errors.Is(err, context.DeadlineExceeded) || !errors.As(err, &failed) {
				t.Errorf("%v, want a BootError for the deadline", err)
			}
			select {
			case <-release:
			default:
				t.Error("Boot returned while the framework could still start the machine")
			}
			if n := framework.Alive(); n != 0 {
				t.Errorf("%d machines are alive after a boot that was given up", n)
			}
		})
	}
}

// A framework that answers neither Start nor Stop is said to hang; the caller ends the
// process, and with it the machine.
func TestStartNeverAnswers(t *testing.T) {
	release := make(chan struct{})
	(&house{Hooks: framework.Hooks{Start: func(*framework.Guest) error {
		<-release
		return errors.New("too late")
	}}}).enter(t)
	vz.Hasten(t, 100*time.Millisecond)
	ctx, cancel := context.WithCancel(bounded(t))
	time.AfterFunc(50*time.Millisecond, cancel)
	_, err := driver(t, vz.Config{}).Boot(ctx, mac(t, diskGood))
	if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "ends with this process") {
		t.Errorf("%v, want both the reason and what is left", err)
	}
	close(release)
}

// Destroy is one, however many ask; it minds its context, tries again where the framework
// refuses, and a second call takes up where the first gave up.
func TestStopIsDifficult(t *testing.T) {
	release := make(chan struct{})
	var stops atomic.Int64
	(&house{Hooks: framework.Hooks{Stop: func() error {
		switch stops.Add(1) {
		case 1:
			<-release
			return errors.New("not now")
		case 2, 3:
			return errors.New("not now either")
		}
		return nil
	}}}).enter(t)
	m := boot(t, driver(t, vz.Config{}), mac(t, diskGood))
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(bounded(t), 100*time.Millisecond)
			defer cancel()
			if err := m.Destroy(ctx); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "has not stopped") {
				t.Errorf("destroying while the framework hangs: %v", err)
			}
		})
	}
	wg.Wait()
	if _, err := m.Dial(bounded(t)); !errors.Is(err, vm.ErrEnded) {
		t.Errorf("dialling a machine that is being destroyed: %v", err)
	}
	if err := m.(vm.Saver).Save(bounded(t), t.TempDir()); !errors.Is(err, vm.ErrEnded) {
		t.Errorf("saving a machine that is being destroyed: %v", err)
	}
	close(release)
	if err := m.Destroy(bounded(t)); err != nil {
		t.Error(err)
	}
	if n := stops.Load(); n != 4 {
		t.Errorf("%d stops, want 4: one at a time, until one is taken", n)
	}
}

// What the framework says of a machine is in the error.
func TestStartFails(t *testing.T) {
	(&house{Hooks: framework.Hooks{Start: func(*framework.Guest) error {
		return &framework.NSError{Domain: "VZErrorDomain", Code: int(framework.ErrorInternal), LocalizedDescription: "Internal Virtualization error."}
	}}}).enter(t)
	d := driver(t, vz.Config{})
	for range 3 { // no slot is kept
		err := refused(t, d, mac(t, diskGood))
		var failed *vm.BootError
		if !errors.As(err, &failed) || !strings.Contains(err.Error(), "Internal Virtualization error") {
			t.Errorf("%v", err)
		}
	}
}

// Bad input: each a clear error of this image or order, and nothing left.
func TestRefusedImages(t *testing.T) {
	(&house{}).enter(t)
	d := driver(t, vz.Config{})
	file := filepath.Join(t.TempDir(), "file")
	put(t, filepath.Dir(file), "file", "no directory")
	set := func(old, new string) func(*testing.T, *vm.Spec) {
		return func(t *testing.T, s *vm.Spec) { put(t, s.Dir, vm.ConfigFile, strings.Replace(config, old, new, 1)) }
	}
	for _, test := range []struct {
		what string
		make func(t *testing.T, s *vm.Spec)
		want string
	}{
		{"no config", func(t *testing.T, s *vm.Spec) { _ = os.Remove(filepath.Join(s.Dir, vm.ConfigFile)) }, "no VM config"},
		{"a config that is none", func(t *testing.T, s *vm.Spec) { put(t, s.Dir, vm.ConfigFile, "{") }, "VM config"},
		{"no disk", func(t *testing.T, s *vm.Spec) { _ = os.Remove(filepath.Join(s.Dir, vm.DiskFile)) }, "no disk"},
		{"an empty disk", func(t *testing.T, s *vm.Spec) { put(t, s.Dir, vm.DiskFile, "") }, "empty"},
		{"no NVRAM", func(t *testing.T, s *vm.Spec) { _ = os.Remove(filepath.Join(s.Dir, vm.NVRAMFile)) }, "no NVRAM"},
		{"an empty NVRAM", func(t *testing.T, s *vm.Spec) { put(t, s.Dir, vm.NVRAMFile, "") }, "NVRAM nvram.bin is empty"},
		{"an NVRAM that does not fit", func(t *testing.T, s *vm.Spec) { put(t, s.Dir, vm.NVRAMFile, "of another") }, "auxiliary storage"},
		{"an empty hardware model", set(`"hardwareModel":"c3RhbmRpbi1tb2RlbC0x"`, `"hardwareModel":""`), "hardwareModel"},
		{"a newer hardware model", set("c3RhbmRpbi1tb2RlbC0x", "c3RhbmRpbi1tb2RlbC0y"), "update the host"},
		{"a hardware model of nothing", set("c3RhbmRpbi1tb2RlbC0x", "AAAA"), "hardware model"},
		{"an image for another processor", set("arm64", "amd64"), "amd64"},
		{"a display without height", set("800", "0"), "1280 × 0"},
		{"a display of another world", set("1280", "100000"), "100000 × 800"},
		{"too many CPUs", func(_ *testing.T, s *vm.Spec) { s.CPU = 64 }, "64 CPUs for a machine of this image on this host: 2 to 10"},
		{"too few CPUs", func(_ *testing.T, s *vm.Spec) { s.CPU = 1 }, "2 to 10"},
		{"too much memory", func(_ *testing.T, s *vm.Spec) { s.Memory = 1 << 40 }, "1048576 MiB of memory for a machine of this image on this host: 4096 to 32768"},
		{"too little memory", func(_ *testing.T, s *vm.Spec) { s.Memory = 1 << 30 }, "4096 to 32768"},
		{"a mount that is not there", mounts(fleet.Mount{Name: "cache", Path: "/nowhere"}), `mount "cache": its directory must exist`},
		{"a mount of a file", mounts(fleet.Mount{Name: "cache", Path: file}), "not a directory"},
		{"a mount with a path for a name", mounts(fleet.Mount{Name: "../up", Path: "/"}), "cannot be called"},
		{"a mount without a name", mounts(fleet.Mount{Path: "/"}), "cannot be called"},
		{"two mounts of one name", mounts(fleet.Mount{Name: "a", Path: "/"}, fleet.Mount{Name: "a", Path: "/tmp"}), "two mounts"},
	} {
		t.Run(test.what, func(t *testing.T) {
			spec := mac(t, diskGood)
			test.make(t, &spec)
			err := refused(t, d, spec)
			var failed *vm.BootError
			if !errors.As(err, &failed) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%v, want a BootError with %q", err, test.want)
			}
		})
	}
}

func mounts(m ...fleet.Mount) func(*testing.T, *vm.Spec) {
	return func(_ *testing.T, s *vm.Spec) { s.Mounts = m }
}

// Mounts are one share, which macOS finds by itself.
func TestMounts(t *testing.T) {
	h := (&house{}).enter(t)
	spec := mac(t, diskGood)
	a, b := t.TempDir(), t.TempDir()
	spec.Mounts = []fleet.Mount{{Name: "work", Path: a}, {Name: "cache", Path: b, ReadOnly: true}}
	boot(t, driver(t, vz.Config{}), spec)
	want := []string{"com.apple.virtio-fs.automount/cache=" + b + " ro", "com.apple.virtio-fs.automount/work=" + a}
	if got := h.of(t, spec).Shares(); !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

// A host whose macOS knows no Mac keyboard has machines nevertheless, which cannot be
// saved: even to ask would end the process there.
func TestOlderHost(t *testing.T) {
	(&house{Hooks: framework.Hooks{Version: 13}}).enter(t)
	m := boot(t, driver(t, vz.Config{}), mac(t, diskGood))
	if err := m.(vm.Saver).Save(bounded(t), t.TempDir()); !errors.Is(err, vm.ErrUnsupported) || !strings.Contains(err.Error(), "macOS 14") {
		t.Errorf("%v, want ErrUnsupported that says why", err)
	}
}

// kernel is an arm64 Image of 512 bytes.
func kernel() []byte {
	k := bytes.Repeat([]byte{'k'}, 512)
	copy(k[56:], "ARM\x64")
	return k
}

// linux is a Linux machine: its disk holds a kernel after the first sector.
func linux(t *testing.T, k []byte) vm.Spec {
	t.Helper()
	spec := mac(t, diskGood)
	disk := make([]byte, 512, 1600)
	copy(disk, diskGood)
	disk = append(append(disk, k...), "initrd"...)
	put(t, spec.Dir, vm.DiskFile, string(disk))
	put(t, spec.Dir, vm.ConfigFile, fmt.Sprintf(
		`{"version":1,"os":"linux","paddockBoot":{"kernel":{"offset":512,"size":%d},"initrd":{"offset":%d,"size":6},"commandLine":"quiet"}}`, len(k), 512+len(k)))
	return spec
}

// Linux guests boot their kernel, with a console that is read and a panic that ends
// them; they do not count, and are not saved.
func TestLinux(t *testing.T) {
	h := (&house{Hooks: framework.Hooks{Taken: 2}}).enter(t)
	d := driver(t, vz.Config{})
	var last vm.Spec
	var m vm.Machine
	for range 3 {
		last = linux(t, kernel())
		last.CPU, last.Memory, last.Mounts = 2, 1<<30, []fleet.Mount{{Name: "work", Path: t.TempDir()}}
		m = boot(t, d, last)
	}
	g := h.of(t, last)
	if line := g.CommandLine(); line != "quiet console=hvc0 panic=-1" {
		t.Errorf("command line %q", line)
	}
	if s := g.Shares(); len(s) != 1 || !strings.HasPrefix(s[0], vz.LinuxShareTag+"/work=") {
		t.Errorf("shares %q", s)
	}
	hello(t, m)
	if err := m.(vm.Saver).Save(bounded(t), t.TempDir()); !errors.Is(err, vm.ErrUnsupported) || !strings.Contains(err.Error(), "entropy") {
		t.Errorf("saving: %v", err)
	}
}

func TestLinuxByItsFirmware(t *testing.T) {
	(&house{}).enter(t)
	spec := mac(t, diskGood)
	put(t, spec.Dir, vm.ConfigFile, `{"version":1,"os":"linux"}`)
	hello(t, boot(t, driver(t, vz.Config{}), spec))
	spec = mac(t, diskGood)
	put(t, spec.Dir, vm.ConfigFile, `{"version":1,"os":"linux"}`)
	put(t, spec.Dir, vm.NVRAMFile, "")
	if err := refused(t, driver(t, vz.Config{}), spec); !strings.Contains(err.Error(), "NVRAM") {
		t.Errorf("%v", err)
	}
}

func TestLinuxKernels(t *testing.T) {
	(&house{}).enter(t)
	for what, k := range map[string][]byte{
		"compressed": append([]byte("MZ\x00\x00zimg"), make([]byte, 504)...),
		"short":      []byte("\x1f\x8b"),
	} {
		if err := refused(t, driver(t, vz.Config{}), linux(t, k)); !strings.Contains(err.Error(), "uncompressed arm64 kernel") {
			t.Errorf("%s: %v", what, err)
		}
	}
	spec := linux(t, kernel())
	put(t, spec.Dir, vm.DiskFile, "cut off")
	if err := refused(t, driver(t, vz.Config{}), spec); !strings.Contains(err.Error(), "the disk ends") {
		t.Errorf("a kernel that is not on the disk: %v", err)
	}
}

// A guest without an agent is up when it runs: nobody is waited for.
func TestWithoutAgent(t *testing.T) {
	(&house{}).enter(t)
	spec := mac(t, diskSilent)
	spec.Agent = false
	m := boot(t, driver(t, vz.Config{}), spec)
	vmtest.Eventually(t, "the guest", func() string { return unless(framework.Alive() == 1, "it does not run") })
	ctx, cancel := context.WithTimeout(bounded(t), 50*time.Millisecond)
	defer cancel()
	if _, err := m.Dial(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("dialling nobody: %v", err)
	}
}
