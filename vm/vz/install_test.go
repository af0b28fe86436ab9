//go:build vzstandin

package vz_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	framework "github.com/Code-Hex/vz/v3"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/vm"
	"github.com/paddock-ci/paddock/vm/vz"
)

// ipsw is a restore image on disk.
func ipsw(t *testing.T, content string) string {
	t.Helper()
	dir := t.TempDir()
	put(t, dir, "restore.ipsw", content)
	return filepath.Join(dir, "restore.ipsw")
}

// An installed image boots, and its directory holds what an image is, no more.
func TestInstall(t *testing.T) {
	for what, path := range map[string]string{"from a file": ipsw(t, framework.IPSW(framework.Model)), "from Apple": ""} {
		t.Run(what, func(t *testing.T) {
			(&house{Hooks: framework.Hooks{Install: func(g *framework.Guest, progress func(float64), _ <-chan struct{}) error {
				progress(0.5)
				framework.Release()
				return os.WriteFile(g.Disk(), []byte(diskGood), 0o600)
			}}}).enter(t)
			dir := filepath.Join(t.TempDir(), "image")
			var mu sync.Mutex
			var told []float64
			err := vz.Install(bounded(t), vz.InstallConfig{IPSW: path, Dir: dir, CPU: 3, Progress: func(f float64) {
				mu.Lock()
				defer mu.Unlock()
				told = append(told, f)
			}})
			if err != nil {
				t.Fatal(err)
			}
			checkImage(t, dir)
			if !slices.IsSorted(told) || told[0] != 0 || told[len(told)-1] != 1 {
				t.Errorf("progress %v, want 0 to 1", told)
			}
			hello(t, boot(t, driver(t, vz.Config{}), vm.Spec{ID: fleet.VMID("installed"), Dir: dir, Agent: true}))
		})
	}
}

func checkImage(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if want := []string{vm.ConfigFile, vm.DiskFile, vm.NVRAMFile}; !slices.Equal(names, want) {
		t.Errorf("the image is %q, want %q", names, want)
	}
	c, err := vm.ReadConfig(dir)
	if err != nil {
		t.Fatal(err)
	}
	if string(c.HardwareModel) != framework.Model || !strings.HasPrefix(string(c.ECID), "standin-machine-") || c.MACAddress == "" {
		t.Errorf("config %+v", c)
	}
	if c.CPUCount != 3 || c.CPUCountMin != 2 || c.MemorySize != 8<<30 || c.MemorySizeMin != 4<<30 {
		t.Errorf("config %+v", c)
	}
}

// What cannot be installed is refused in words, and nothing is left.
func TestInstallRefused(t *testing.T) {
	(&house{}).enter(t)
	good := framework.IPSW(framework.Model)
	for _, test := range []struct {
		what string
		c    vz.InstallConfig
		ipsw string
		want string
	}{
		{"a small disk", vz.InstallConfig{DiskSize: 1e9}, good, "too small for macOS: give at least 32"},
		{"a newer macOS", vz.InstallConfig{}, framework.IPSW(framework.NewerModel), "update this Mac"},
		{"no restore image", vz.InstallConfig{}, "something else", "restore image"},
		{"too few CPUs", vz.InstallConfig{CPU: 1}, good, "2 to 10"},
		{"too much memory", vz.InstallConfig{Memory: 1 << 40}, good, "MiB of memory"},
	} {
		t.Run(test.what, func(t *testing.T) {
			test.c.IPSW, test.c.Dir = ipsw(t, test.ipsw), filepath.Join(t.TempDir(), "image")
			if err := vz.Install(bounded(t), test.c); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%v, want %q", err, test.want)
			}
			nothingIn(t, filepath.Dir(test.c.Dir))
		})
	}
	dir := t.TempDir()
	put(t, dir, "mine", "precious")
	if err := vz.Install(bounded(t), vz.InstallConfig{Dir: dir, IPSW: ipsw(t, good)}); err == nil || !strings.Contains(err.Error(), "exists already") {
		t.Errorf("a directory that exists: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "mine")); err != nil {
		t.Error(err)
	}
	if err := vz.Install(bounded(t), vz.InstallConfig{Dir: filepath.Join(dir, "new"), IPSW: "/nowhere.ipsw"}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no restore image at all: %v", err)
	}
}

// An installation that fails leaves nothing.
func TestInstallFails(t *testing.T) {
	bad := errors.New("the restore image's signature is broken")
	offline := errors.New("no network")
	for what, test := range map[string]struct {
		hooks framework.Hooks
		want  error
	}{
		"installing": {framework.Hooks{Install: func(*framework.Guest, func(float64), <-chan struct{}) error { return bad }}, bad},
		"fetching":   {framework.Hooks{Fetch: func(context.Context) (string, error) { return "", offline }}, offline},
		"full host":  {framework.Hooks{Taken: 2}, vm.ErrAtCapacity},
	} {
		t.Run(what, func(t *testing.T) {
			(&house{Hooks: test.hooks}).enter(t)
			dir := t.TempDir()
			if err := vz.Install(bounded(t), vz.InstallConfig{Dir: filepath.Join(dir, "image")}); !errors.Is(err, test.want) {
				t.Errorf("%v, want %v", err, test.want)
			}
			nothingIn(t, dir)
		})
	}
}

// A person who interrupts it finds nothing left, whether it fetched or installed; the
// installer is let finish its cancelling, for stopping its machine earlier is forbidden.
func TestInstallIsInterrupted(t *testing.T) {
	begun, release := make(chan struct{}, 1), make(chan struct{})
	const endless = "a download that does not end"
	for what, hooks := range map[string]framework.Hooks{
		"fetching": {Fetch: func(ctx context.Context) (string, error) {
			begun <- struct{}{}
			<-ctx.Done()
			return "", ctx.Err()
		}},
		endless: {Fetch: func(context.Context) (string, error) {
			begun <- struct{}{}
			<-release
			return "", errors.New("too late")
		}},
		"installing": {Install: func(g *framework.Guest, _ func(float64), cancelled <-chan struct{}) error {
			begun <- struct{}{}
			<-cancelled
			time.Sleep(50 * time.Millisecond) // it lets go when it likes
			if _, err := os.Stat(g.Disk()); err != nil {
				t.Errorf("the disk went away under the installer: %v", err)
			}
			return errors.New("cancelled")
		}},
	} {
		t.Run(what, func(t *testing.T) {
			(&house{Hooks: hooks}).enter(t)
			dir := t.TempDir()
			ctx, cancel := context.WithCancel(bounded(t))
			go func() {
				<-begun
				cancel()
			}()
			if err := vz.Install(ctx, vz.InstallConfig{Dir: filepath.Join(dir, "image")}); !errors.Is(err, context.Canceled) {
				t.Errorf("%v", err)
			}
			nothingIn(t, dir)
			if what == endless {
				close(release)
			}
		})
	}
}
