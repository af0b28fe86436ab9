package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"

	"github.com/paddock-ci/paddock/vm"
)

// Values of Config.Accel.
const (
	accelTCG  = "tcg"
	accelKVM  = "kvm"
	accelAuto = "auto"
	// accelNative is KVM for guests of this host's own architecture, for which it is known
	// to work, and emulation for others.
	accelNative = "native"
)

// trialLimit is how long a virtual CPU may take for its first few instructions: with a
// KVM that works it is some 100 ms, most of it QEMU's own start.
const trialLimit = 5 * time.Second

// accel is what a machine of p runs by. KVM needs the guest's architecture to be the
// host's; whether it works is found out once, by trying: on hosts that are machines
// themselves /dev/kvm may be there, be opened, and then run nothing.
func (d *Driver) accel(ctx context.Context, p program) (string, error) {
	switch {
	case d.config.Accel == accelTCG:
		return accelTCG, nil
	case d.config.Accel == accelKVM && !p.native():
		return "", fmt.Errorf("KVM runs guests of this host's own architecture only, not %s: use tcg", p.goarch)
	case d.config.Accel == accelKVM:
		return accelKVM, nil // as asked for: if it does not work, QEMU says why
	case !p.native():
		return accelTCG, nil
	case d.config.Accel == accelNative:
		return accelKVM, nil
	}
	d.mu.Lock()
	answer, asked := d.trials[p.path]
	if !asked {
		answer = make(chan bool, 1)
		d.trials[p.path] = answer
	}
	d.mu.Unlock()
	if !asked {
		err := trial(ctx, p, accelKVM)
		if ctx.Err() != nil {
			d.mu.Lock()
			delete(d.trials, p.path) // nothing was found out: the next one tries again
			d.mu.Unlock()
			answer <- false // to those who waited for us
			return "", ctx.Err()
		}
		if err != nil {
			d.log.Info("guests are emulated", "reason", err)
		}
		answer <- err == nil
	}
	select {
	case works := <-answer:
		answer <- works // to the next one
		if works {
			return accelKVM, nil
		}
		return accelTCG, nil
	case <-ctx.Done():
		return "", ctx.Err()
	}
}

// Accel is what Config.Accel comes to on this host, to be given to drivers that boot one
// machine each: for them "auto" would mean a trial at every boot, which takes seconds
// where /dev/kvm is of no use. Where no QEMU for this host's own guests is installed
// nothing was found out, and it stays "auto".
func (d *Driver) Accel(ctx context.Context) (string, error) {
	if d.config.Accel != accelAuto {
		return d.config.Accel, nil
	}
	p, err := d.program(ctx, runtime.GOARCH)
	if err != nil {
		return accelAuto, ctx.Err()
	}
	found, err := d.accel(ctx, p)
	if found == accelKVM {
		found = accelNative
	}
	return found, err
}

// armGreeting is a guest of four instructions: it writes a K to the serial port of the
// virt machine and stands still.
//
//	movz x0, #0x0900, lsl 16
//	movz w1, #'K'
//	str  w1, [x0]
//	b    .
var armGreeting = []byte{
	0x00, 0x20, 0xa1, 0xd2, 0x61, 0x09, 0x80, 0x52, 0x01, 0x00, 0x00, 0xb9, 0x00, 0x00, 0x00, 0x14,
}

// trial starts a machine whose virtual CPU says something as soon as it runs: on arm64 a
// few instructions of ours, on amd64 the BIOS on its debug port.
func trial(ctx context.Context, p program, accel string) (err error) {
	ctx, cancel := context.WithTimeout(ctx, trialLimit)
	defer cancel()
	dir, err := os.MkdirTemp("", "paddock-kvm-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	ours, theirs, err := pair("the trial's output")
	if err != nil {
		return err
	}
	defer func() { _ = ours.Close() }()
	defer func() { _ = theirs.Close() }()
	cpu := "host"
	if accel == accelTCG {
		cpu = p.cpu
	}
	args := []string{
		"-M", p.typ, "-accel", accel, "-cpu", cpu, "-m", "64M", "-nodefaults", "-no-user-config", "-display", "none",
		"-chardev", "socket,id=out,fd=3", // where ExtraFiles begin
	}
	if p.goarch == "arm64" {
		kernel := filepath.Join(dir, "kernel")
		if err := os.WriteFile(kernel, armGreeting, 0o600); err != nil {
			return err
		}
		args = append(args, "-serial", "chardev:out", "-kernel", kernel)
	} else {
		args = append(args, "-device", "isa-debugcon,iobase=0x402,chardev=out")
	}
	cmd := exec.CommandContext(context.WithoutCancel(ctx), p.path, args...)
	cmd.Env = vm.ChildEnv()
	cmd.ExtraFiles = []*os.File{theirs}
	o, err := own(cmd)
	if err != nil {
		return err
	}
	_ = theirs.Close() // so that the end of QEMU is the end of the stream
	stop := context.AfterFunc(ctx, func() { _ = ours.Close() })
	defer stop()
	_, said := ours.Read(make([]byte, 1))
	_ = cmd.Process.Kill()
	<-o.exited
	if said != nil {
		return fmt.Errorf("no virtual CPU ran by %s: %w: %s", accel, said, o.said)
	}
	return nil
}
