package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// rootLimit is how long a root file system's device may take to appear.
const rootLimit = 15 * time.Second

// beInit is process 1: it makes the machine ready, runs the agent and reaps, and powers
// the machine off at the end. What goes wrong is on the console.
func beInit(log *slog.Logger) {
	err := makeReady(log)
	if err == nil {
		err = runAgent()
	}
	log.Error("powering off", "error", err)
	powerOff()
	select {} // process 1 must not end: the kernel would panic
}

// mount is a file system that every machine has.
type mount struct {
	kind, at string
	flags    uintptr
	data     string
}

var mounts = []mount{
	{"proc", "/proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	{"sysfs", "/sys", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	{"devtmpfs", "/dev", unix.MS_NOSUID, "mode=0755"},
	{"devpts", "/dev/pts", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=0620,ptmxmode=0666"},
	{"tmpfs", "/dev/shm", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
}

// scratch are in memory; a root file system of its own has /tmp on its disk.
var scratch = []mount{
	{"tmpfs", "/run", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755"},
	{"tmpfs", "/tmp", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
}

// makeReady does what an init does for one service.
func makeReady(log *slog.Logger) error {
	for name, value := range map[string]string{
		"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "TERM": "linux",
	} {
		if err := os.Setenv(name, value); err != nil {
			return err
		}
	}
	if err := mountAll(mounts); err != nil {
		return err
	}
	for name, to := range map[string]string{"fd": "fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"} {
		_ = os.Symlink("/proc/self/"+to, "/dev/"+name) // shells like them; some images have them
	}
	loadModules(log)
	if root := rootDevice(); root != "" {
		if err := enterRoot(root); err != nil {
			return fmt.Errorf("the root file system %s: %w", root, err)
		}
		if err := mountAll(scratch[:1]); err != nil {
			return err
		}
	} else if err := mountAll(scratch); err != nil {
		return err
	}
	if err := linkUp("lo"); err != nil {
		log.Warn("no loopback", "error", err)
	}
	return os.MkdirAll("/root", 0o700)
}

func mountAll(all []mount) error {
	for _, m := range all {
		if err := os.MkdirAll(m.at, 0o755); err != nil {
			return fmt.Errorf("mounting %s: %w", m.at, err)
		}
		if err := unix.Mount(m.kind, m.at, m.kind, m.flags, m.data); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mounting %s: %w", m.at, err)
		}
	}
	return nil
}

// loadModules loads what /modules/order lists, in its order. One that does not load is
// said on the console, and may not be needed.
func loadModules(log *slog.Logger) {
	order, err := os.ReadFile("/modules/order")
	if err != nil {
		return // all that is needed is in the kernel
	}
	lines := bufio.NewScanner(bytes.NewReader(order))
	for lines.Scan() {
		name := strings.TrimSpace(lines.Text())
		if name == "" || strings.HasPrefix(name, "#") {
			continue
		}
		if err := loadModule(filepath.Join("/modules", name)); err != nil && !errors.Is(err, unix.EEXIST) {
			log.Warn("module not loaded", "module", name, "error", err)
		}
	}
}

func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	flags := 0
	if ext := filepath.Ext(path); ext == ".xz" || ext == ".zst" || ext == ".gz" {
		flags = unix.MODULE_INIT_COMPRESSED_FILE
	}
	return unix.FinitModule(int(f.Fd()), "", flags)
}

// rootDevice is what the kernel's command line says.
func rootDevice() string {
	b, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return ""
	}
	for _, word := range strings.Fields(string(b)) {
		if device, ok := strings.CutPrefix(word, "paddock.root="); ok {
			return device
		}
	}
	return ""
}

// enterRoot makes a device's file system the root, with /proc, /sys and /dev in it.
func enterRoot(device string) error {
	const at = "/newroot"
	for deadline := time.Now().Add(rootLimit); ; time.Sleep(findPause) {
		if _, err := os.Stat(device); err == nil {
			break
		} else if time.Now().After(deadline) {
			return fmt.Errorf("the device did not appear: %w", err)
		}
	}
	if err := os.MkdirAll(at, 0o755); err != nil {
		return err
	}
	if err := mountAny(device, at); err != nil {
		return err
	}
	for _, dir := range []string{"/proc", "/sys", "/dev"} {
		if err := os.MkdirAll(at+dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(dir, at+dir, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("moving %s there: %w", dir, err)
		}
	}
	if err := os.Chdir(at); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("moving it to /: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	return os.Chdir("/")
}

// mountAny mounts a device by the file system that the kernel finds on it.
func mountAny(device, at string) error {
	kinds, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		return err
	}
	last := errors.New("the kernel knows no file system for a disk; load its module")
	for line := range strings.Lines(string(kinds)) {
		if strings.HasPrefix(line, "nodev") {
			continue
		}
		kind := strings.TrimSpace(line)
		err := unix.Mount(device, at, kind, unix.MS_NOATIME, "")
		if err == nil {
			return nil
		}
		last = fmt.Errorf("mounting it as %s: %w", kind, err)
	}
	return last
}

// runAgent starts this program again and reaps until that ends. Process 1 reaps every
// orphan; in a process of its own the agent's children are safe from that.
func runAgent() error {
	agent, err := os.StartProcess("/proc/self/exe", append([]string{"paddock-guest"}, os.Args[1:]...), &os.ProcAttr{
		Env: os.Environ(), Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
	})
	if err != nil {
		return fmt.Errorf("starting the agent: %w", err)
	}
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return fmt.Errorf("waiting for the agent: %w", err)
		case pid == agent.Pid:
			return fmt.Errorf("the agent ended: exit status %d, signal %d", status.ExitStatus(), status.Signal())
		}
	}
}

// powerOff is the end of the machine.
func powerOff() {
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}
