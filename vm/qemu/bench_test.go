package qemu_test

import (
	"context"
	"net"
	"os"
	"os/exec"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/vm"
	"github.com/paddock-ci/paddock/vm/qemu"
)

// bare is a QEMU as somebody would start it by hand, with the same kernel, initial RAM
// disk and devices: from its start until the agent answers.
func bare(b *testing.B) time.Duration {
	b.Helper()
	i := image(b, "arm64")
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err != nil {
		b.Fatal(err)
	}
	syscall.CloseOnExec(fds[0]) // macOS has no flag for it
	syscall.CloseOnExec(fds[1])
	ours, theirs := os.NewFile(uintptr(fds[0]), "ours"), os.NewFile(uintptr(fds[1]), "theirs")
	conn, err := net.FileConn(ours)
	if err != nil {
		b.Fatal(err)
	}
	_ = ours.Close()
	start := time.Now()
	cmd := exec.CommandContext(b.Context(), "qemu-system-aarch64", "-M", "virt", "-cpu", "cortex-a72", "-smp", "1", "-m", "96M", "-accel", "tcg",
		"-nodefaults", "-display", "none", "-no-reboot", "-serial", "null",
		"-kernel", i.Kernel, "-initrd", i.Initrd, "-append", i.Config.Boot.CommandLine+" console=ttyAMA0 panic=-1",
		"-chardev", "socket,id=agent,fd=3", "-device", "virtio-serial-pci", "-device", "virtserialport,chardev=agent,name="+guest.Port,
		"-netdev", "user,id=net", "-device", "virtio-net-pci,romfile=,netdev=net",
		"-drive", "if=none,id=disk,format=raw,snapshot=on,file="+i.Dir+"/"+vm.DiskFile, "-device", "virtio-blk-pci,drive=disk")
	cmd.ExtraFiles = []*os.File{theirs}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	_ = theirs.Close()
	line := guest.NewLine(func(context.Context) (net.Conn, error) { return conn, nil })
	stream, err := line.Dial(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	c := guest.New(stream)
	if _, err := c.Hello(b.Context()); err != nil {
		b.Fatal(err)
	}
	took := time.Since(start)
	_ = c.Close()
	_ = unix.Kill(cmd.Process.Pid, unix.SIGKILL)
	_ = cmd.Wait()
	_ = line.Close()
	return took
}

// seconds reports the median under a name: on a host that does other things as well, the
// mean says more of those.
func seconds(b *testing.B, took []time.Duration, unit string) {
	slices.Sort(took)
	b.ReportMetric(took[len(took)/2].Seconds(), unit)
}

// Cold boot until the guest answers, beside a bare QEMU; and the end.
func BenchmarkColdBoot(b *testing.B) {
	d := newDriver(b, qemu.Config{})
	image(b, "arm64")
	var ours, byHand, overhead, teardown []time.Duration
	for b.Loop() {
		hand := bare(b)
		s := spec(b, "arm64", "")
		start := time.Now()
		m, err := d.Boot(b.Context(), s)
		if err != nil {
			b.Fatal(err)
		}
		_ = dial(b, m).Close()
		up := time.Now()
		if err := m.Destroy(b.Context()); err != nil {
			b.Fatal(err)
		}
		byHand, ours = append(byHand, hand), append(ours, up.Sub(start))
		overhead, teardown = append(overhead, up.Sub(start)-hand), append(teardown, time.Since(up))
	}
	seconds(b, byHand, "s-bare-QEMU")
	seconds(b, ours, "s-boot-to-hello")
	seconds(b, overhead, "s-overhead")
	seconds(b, teardown, "s-teardown")
}

// Start from a saved state until the guest answers.
func BenchmarkResume(b *testing.B) {
	d := newDriver(b, qemu.Config{})
	s, _, state := saved(b, d)
	var running, answering []time.Duration
	for b.Loop() {
		restored := from(b, s, state)
		start := time.Now()
		m, err := d.Boot(b.Context(), restored)
		if err != nil {
			b.Fatal(err)
		}
		up := time.Since(start)
		_ = dial(b, m).Close()
		running, answering = append(running, up), append(answering, time.Since(start))
		if err := m.Destroy(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
	seconds(b, running, "s-resume-to-running")
	seconds(b, answering, "s-resume-to-hello")
}

// A question to the agent and its answer, on an open stream.
func BenchmarkRoundTrip(b *testing.B) {
	c := dial(b, boot(b, newDriver(b, qemu.Config{}), spec(b, "arm64", "")))
	for b.Loop() {
		if _, err := c.Hello(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}
