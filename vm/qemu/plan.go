package qemu

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net"
	"path/filepath"
	"runtime"

	"github.com/paddock-ci/paddock/image/tart"
	"github.com/paddock-ci/paddock/vm"
)

// What a machine has where neither spec nor image say it.
const (
	defaultCPU    = 2
	defaultMemory = 1 << 30
	minMemory     = 32 << 20 // no kernel of today unpacks itself in less
)

// Values of Config.Network.
const (
	networkUser  = "user"
	networkPasst = "passt"
	networkNone  = "none"
)

// plan is all that a machine is started with.
type plan struct {
	spec           vm.Spec
	config         *tart.Config
	program        program
	accel          string // tcg or kvm
	network        string
	passt          string // the program, where that is the network
	cpu            int
	memory         int64 // bytes
	mac            string
	shares         string   // the program that serves the mounts; "": there are none
	kernel, initrd string   // files; "": firmware boots the disk
	firmware       firmware // where there is no kernel
	state          *state   // to start from; nil: cold
}

// plan reads the clone and checks what can be checked before anything starts.
func (d *Driver) plan(ctx context.Context, spec vm.Spec) (*plan, error) {
	p := &plan{spec: spec, network: d.config.Network}
	if err := vm.CheckDisk(spec.Dir); err != nil {
		return nil, &vm.BootError{Err: err}
	}
	var err error
	if p.config, err = vm.ReadConfig(spec.Dir); err != nil {
		return nil, &vm.BootError{Err: err}
	}
	if p.config.OS != "linux" {
		return nil, &vm.BootError{Err: fmt.Errorf("a %s guest: QEMU's machines run linux guests only", p.config.OS)}
	}
	if err := p.size(); err != nil {
		return nil, &vm.BootError{Err: err}
	}
	if p.shares, err = checkMounts(spec.Mounts); err != nil {
		return nil, err
	}
	if p.network == networkPasst {
		if p.passt, err = findPasst(); err != nil {
			return nil, err
		}
	}
	if p.program, err = d.program(ctx, p.config.Arch); err != nil {
		return nil, err
	}
	if p.accel, err = d.accel(ctx, p.program); err != nil {
		return nil, err
	}
	if err := p.bootable(ctx); err != nil {
		return nil, err
	}
	if spec.State != "" {
		return p, p.resume()
	}
	p.mac, err = randomMAC()
	return p, err
}

// size decides on CPUs and memory, within the host's.
func (p *plan) size() error {
	p.cpu, p.memory = p.spec.CPU, p.spec.Memory
	if p.cpu == 0 {
		p.cpu = p.config.CPUCount
	}
	if p.cpu == 0 {
		p.cpu = max(1, min(defaultCPU, runtime.NumCPU()))
	}
	if p.memory == 0 {
		p.memory = p.config.MemorySize
	}
	if p.memory == 0 {
		p.memory = defaultMemory
	}
	p.memory &^= 1<<20 - 1 // QEMU takes MiB
	host, err := hostMemory()
	if err != nil {
		return fmt.Errorf("asking the host for its memory: %w", err)
	}
	switch {
	case p.cpu < 1 || p.cpu > runtime.NumCPU():
		return fmt.Errorf("the machine is to have %d CPUs, this host has %d", p.cpu, runtime.NumCPU())
	case p.memory < minMemory:
		return fmt.Errorf("the machine is to have %d bytes of memory, at least %d are needed", p.memory, minMemory)
	case p.memory > host:
		return fmt.Errorf("the machine is to have %d bytes of memory, this host has %d", p.memory, host)
	}
	return nil
}

// bootable finds the kernel on the disk or firmware for its boot loader.
func (p *plan) bootable(ctx context.Context) (err error) {
	dir := p.spec.Dir
	if p.config.Boot == nil {
		if err := hasBootLoader(filepath.Join(dir, vm.DiskFile)); err != nil {
			return &vm.BootError{Err: err}
		}
		p.firmware, err = findFirmware(ctx, p.config.Arch, dir)
		return err
	}
	if p.kernel, p.initrd, err = vm.BootFiles(dir, p.config.Boot); err != nil {
		return &vm.BootError{Err: err}
	}
	if err := isKernel(p.kernel, p.config.Arch); err != nil {
		return &vm.BootError{Err: err}
	}
	return nil
}

// identity is what IdentityFile holds.
type identity struct {
	MAC string `json:"mac"`
}

// randomMAC makes a locally administered unicast address.
func randomMAC() (string, error) {
	mac := make(net.HardwareAddr, 6)
	if _, err := rand.Read(mac); err != nil {
		return "", fmt.Errorf("making a MAC address: %w", err)
	}
	mac[0] = mac[0]&^1 | 2
	return mac.String(), nil
}

// args is QEMU's command line. The numbers are those under which it inherits its ends
// of the sockets; those of the shares follow, and then the network's.
func (p *plan) args(monitorFD, consoleFD, portFD int) ([]string, error) {
	disk, err := json.Marshal(map[string]any{
		"driver": "raw", "node-name": "disk",
		"file": map[string]any{
			"driver": "file", "filename": filepath.Join(p.spec.Dir, vm.DiskFile), "aio": "threads",
			// The disk is thrown away with the machine: nothing is ever forced out.
			"cache": map[string]bool{"direct": false, "no-flush": true},
		},
	})
	if err != nil {
		return nil, err
	}
	socket := func(id string, fd int) string { return fmt.Sprintf("socket,id=%s,fd=%d", id, fd) }
	args := []string{
		"-M", p.machine() + p.sharedMemory(), "-accel", p.accel, "-cpu", p.processor(),
		"-smp", fmt.Sprint(p.cpu), "-m", fmt.Sprintf("%dM", p.memory>>20),
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-chardev", socket("monitor", monitorFD), "-mon", "chardev=monitor,mode=control",
		"-chardev", socket("console", consoleFD), "-serial", "chardev:console",
		"-chardev", socket(portID, portFD),
		"-device", "virtio-serial-pci", "-device", fmt.Sprintf("virtserialport,chardev=%s,id=%s,name=%s", portID, portID, portName),
		"-blockdev", string(disk), "-device", "virtio-blk-pci,drive=disk,bootindex=1",
		"-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng",
	}
	args = append(append(args, sandbox...), p.shareArgs(portFD+1)...)
	args = append(args, p.networkArgs(portFD+1+len(p.spec.Mounts))...)
	if p.kernel != "" {
		args = append(args, "-kernel", p.kernel, "-append", p.commandLine())
		if p.initrd != "" {
			args = append(args, "-initrd", p.initrd)
		}
	} else {
		args = append(args, p.firmware.args()...)
	}
	if p.state != nil {
		args = append(args, "-S", "-incoming", "defer")
	}
	return args, nil
}

// maxGICv2 is how many CPUs the interrupt controller serves that is there by default.
const maxGICv2 = 8

func (p *plan) machine() string {
	m := p.program.typ
	switch {
	case p.config.Arch != "arm64":
	case p.accel == accelKVM:
		m += ",gic-version=host"
	case p.cpu > maxGICv2:
		m += ",gic-version=3"
	}
	return m
}

// sharedMemory is the option for memory that shareArgs makes.
func (p *plan) sharedMemory() string {
	if len(p.spec.Mounts) == 0 {
		return ""
	}
	return ",memory-backend=ram"
}

func (p *plan) processor() string {
	if p.accel == accelKVM {
		return "host"
	}
	return p.program.cpu
}

// commandLine adds to the image's what this machine needs: its serial port as the
// console, and a panic that ends the machine instead of standing still.
func (p *plan) commandLine() string {
	line, init, found := cutInit(p.config.Boot.CommandLine)
	line += " console=" + p.program.console + " panic=-1"
	if found {
		line += " -- " + init
	}
	return line
}
