package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"runtime"
	"strconv"

	"github.com/paddock-ci/paddock/vm"
)

// arch is what differs between the guests' architectures.
type arch struct {
	binary  string
	debian  string // the package that has it
	machine string // versioned: what "-M" takes, but for the version
	cpu     string // what TCG emulates
	console string // the kernel's name of the serial port
	goarch  string
}

// A versioned machine type does not change under a saved state when QEMU is updated.
// The CPUs are the fastest to emulate that still have what guests are built for: with
// "max" a boot takes half as long again.
var arches = map[string]arch{
	"arm64": {
		binary: "qemu-system-aarch64", debian: "qemu-system-arm", machine: "virt-",
		cpu: "cortex-a72", console: "ttyAMA0", goarch: "arm64",
	},
	"amd64": {
		binary: "qemu-system-x86_64", debian: "qemu-system-x86", machine: "pc-q35-",
		cpu: "Nehalem", console: "ttyS0", goarch: "amd64",
	},
}

// program is an installed QEMU.
type program struct {
	arch
	path    string
	version string // the whole line, "QEMU emulator version 7.2.22 (Debian …)"
	typ     string // of machine, versioned
}

var versionNumber = regexp.MustCompile(`version (\d+)\.(\d+)\.(\d+)`)

// program finds the QEMU for guests of an architecture, and asks it once for its version.
func (d *Driver) program(ctx context.Context, guestArch string) (program, error) {
	a, known := arches[guestArch]
	if !known {
		return program{}, fmt.Errorf("no machine for guests of architecture %q: arm64 and amd64 are known", guestArch)
	}
	path, err := exec.LookPath(a.binary)
	if err != nil {
		return program{}, fmt.Errorf("%s is not installed (Debian, Ubuntu: apt-get install %s; macOS: brew install qemu): %w", a.binary, a.debian, err)
	}
	d.mu.Lock()
	p, known := d.programs[path]
	d.mu.Unlock()
	if known {
		return p, nil
	}
	cmd := exec.CommandContext(ctx, path, "--version")
	cmd.Env = vm.ChildEnv()
	out, err := cmd.Output()
	if err != nil {
		return program{}, errors.Join(fmt.Errorf("asking %s for its version: %w", path, err), ctx.Err())
	}
	line, _, _ := bytes.Cut(out, []byte("\n"))
	p = program{arch: a, path: path, version: string(line)}
	if p.typ, err = machineType(a.machine, p.version); err != nil {
		return program{}, fmt.Errorf("%s: %w", path, err)
	}
	d.mu.Lock()
	d.programs[path] = p
	d.mu.Unlock()
	return p, nil
}

// machineType is the newest type of a version: each minor release has one. Before a
// release the third number counts from 50 and the coming one's type is there already.
func machineType(prefix, version string) (string, error) {
	m := versionNumber.FindStringSubmatch(version)
	if m == nil {
		return "", fmt.Errorf("this is no QEMU that is known: it says %.100q", version)
	}
	var n [3]int
	for i := range n {
		var err error
		if n[i], err = strconv.Atoi(m[i+1]); err != nil {
			return "", fmt.Errorf("version: %w", err)
		}
	}
	if n[2] >= 50 {
		n[1]++
	}
	return fmt.Sprintf("%s%d.%d", prefix, n[0], n[1]), nil
}

// native tells whether guests run on this host's own CPU.
func (a arch) native() bool { return a.goarch == runtime.GOARCH }
