package qemu

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/vm"
)

func TestMachineType(t *testing.T) {
	for version, want := range map[string]string{
		"QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)": "virt-7.2",
		"QEMU emulator version 9.0.50 (v9.0.0-rc3)":                      "virt-9.1",
		"QEMU emulator version 10.1.0":                                   "virt-10.1",
		"":                                                               "",
		"version 99999999999999999999.1.1":                               "",
	} {
		got, err := machineType("virt-", version)
		if got != want || (err != nil) != (want == "") {
			t.Errorf("%q: %q, %v; want %q", version, got, err, want)
		}
	}
}

// What tells a KVM that works from one that is only there is tried with emulation,
// which works everywhere, and with an accelerator that does not exist.
func TestTrial(t *testing.T) {
	d, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	for _, guestArch := range []string{"arm64", "amd64"} {
		p, err := d.program(t.Context(), guestArch)
		if err != nil {
			t.Fatal(err)
		}
		if err := trial(t.Context(), p, accelTCG); err != nil {
			t.Errorf("%s: %v", guestArch, err)
		}
		if err := trial(t.Context(), p, "hax"); err == nil || !strings.Contains(err.Error(), "hax") {
			t.Errorf("%s by what does not exist: %v", guestArch, err)
		}
	}
}

// Whatever this host's /dev/kvm is worth, "auto" decides within the trial's time, once,
// and for another architecture's guests at once.
func TestAuto(t *testing.T) {
	d, err := New(Config{Accel: accelAuto})
	if err != nil {
		t.Fatal(err)
	}
	for _, guestArch := range []string{"arm64", "amd64"} {
		p, err := d.program(t.Context(), guestArch)
		if err != nil {
			t.Fatal(err)
		}
		first, err := d.accel(t.Context(), p)
		if err != nil || first == accelKVM && !p.native() {
			t.Errorf("%s: %q, %v", guestArch, first, err)
		}
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		if !p.native() {
			ended = t.Context()
		}
		if again, err := d.accel(ended, p); again != first && !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %q the second time, %v", guestArch, again, err)
		}
		t.Logf("%s: %s", guestArch, first)
	}
}

// A KVM that is known to work is used without another trial, by guests that it can run.
func TestNative(t *testing.T) {
	d, err := New(Config{Accel: accelNative})
	if err != nil {
		t.Fatal(err)
	}
	for name, a := range arches {
		want := accelTCG
		if a.native() {
			want = accelKVM
		}
		if got, err := d.accel(t.Context(), program{arch: a}); got != want || err != nil {
			t.Errorf("guests of %s: %q, %v; want %s", name, got, err, want)
		}
	}
}

func TestKVMForAnother(t *testing.T) {
	d, err := New(Config{Accel: accelKVM})
	if err != nil {
		t.Fatal(err)
	}
	for name, a := range arches {
		if a.native() {
			continue
		}
		if _, err := d.accel(t.Context(), program{arch: a}); err == nil {
			t.Errorf("KVM for guests of %s", name)
		}
	}
}

// Firmware of two sizes of variables: the machine's own must have the size of the
// template's, and are made from it where there are none.
func TestFirmware(t *testing.T) {
	share, own := t.TempDir(), t.TempDir()
	write := func(path string, size int) {
		if err := os.WriteFile(path, bytes.Repeat([]byte{0xff}, size), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	all := firmwares
	t.Cleanup(func() { firmwares = all })
	f := firmware{code: filepath.Join(share, "code,1.fd"), vars: filepath.Join(share, "vars.fd")}
	firmwares = map[string][]firmware{"arm64": {f}}

	if _, err := findFirmware(t.Context(), "arm64", own); err == nil || !strings.Contains(err.Error(), "apt-get install qemu-efi-aarch64") {
		t.Errorf("without firmware: %v, want a hint", err)
	}
	write(f.code, 10)
	write(f.vars, 4096)
	found, err := findFirmware(t.Context(), "arm64", own)
	if err != nil {
		t.Fatal(err)
	}
	if made, err := os.Stat(filepath.Join(own, vm.NVRAMFile)); err != nil || made.Size() != 4096 {
		t.Errorf("variables that were made: %v, %v", made, err)
	}
	if args := strings.Join(found.args(), " "); !strings.Contains(args, "code,,1.fd,readonly=on") {
		t.Errorf("arguments: %s", args)
	}
	write(filepath.Join(own, vm.NVRAMFile), 100)
	_, err = findFirmware(t.Context(), "arm64", own)
	var failure *vm.BootError
	if !errors.As(err, &failure) || !strings.Contains(err.Error(), "an NVRAM that does not fit") {
		t.Errorf("variables of 100 bytes: %v", err)
	}
}

// A console whose file cannot be written does not stop the guest: it is read on.
func TestConsoleCannotBeWritten(t *testing.T) {
	c, err := openConsole(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := c.file.Close(); err != nil {
		t.Fatal(err)
	}
	said := strings.NewReader(strings.Repeat("x", 100_000))
	if err := c.copy(readCloser{said}); err == nil || said.Len() > 0 {
		t.Errorf("%v, %d bytes unread", err, said.Len())
	}
}

type readCloser struct{ *strings.Reader }

func (readCloser) Close() error { return nil }

func FuzzConsole(f *testing.F) {
	f.Add([]byte("boot\n"), uint16(1000))
	f.Add(bytes.Repeat([]byte("0123456789"), 5000), uint16(100))
	f.Fuzz(func(t *testing.T, block []byte, times uint16) {
		dir := t.TempDir()
		c, err := openConsole(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer c.file.Close()
		block = block[:min(len(block), 32<<10)] // what io.Copy hands over
		if len(block) == 0 {
			return
		}
		for n := 0; n < int(times) && n*len(block) < 3*maxConsole; n++ {
			if _, err := c.Write(block); err != nil {
				t.Fatal(err)
			}
		}
		raw, err := os.ReadFile(filepath.Join(dir, vm.ConsoleFile))
		if err != nil || len(raw) > maxConsole || int64(len(raw)) != c.size {
			t.Fatalf("%d bytes, size %d, %v", len(raw), c.size, err)
		}
		if times > 0 && !bytes.HasSuffix(raw, block) {
			t.Fatal("the end is not what was printed last")
		}
	})
}

func FuzzMonitor(f *testing.F) {
	f.Add([]byte(`{"QMP": {"version": {}, "capabilities": ["oob"]}}` + "\r\n" + `{"return": {}, "id": 1}` + "\r\n"))
	f.Add([]byte(`{"event": "VSERPORT_CHANGE", "data": {"open": true, "id": "agent"}, "timestamp": {}}` + "\n"))
	f.Add([]byte(`{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}}` + "\n" + `{"error": {"class": "x", "desc": "y"}}`))
	f.Add([]byte(`{"event": "X", "data": []}` + "\n[]\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		lines := bytes.Count(raw, []byte("\n")) + 1
		err := readMessages(iotest.OneByteReader(bytes.NewReader(raw)), func(m message) {
			lines--
			_ = m.data()
		})
		if err == nil || lines < 0 {
			t.Errorf("ended with %v, %d lines too many", err, -lines)
		}
	})
}

// A line without an end is not kept for ever.
func TestMonitorFlood(t *testing.T) {
	flood := &endless{}
	if err := readMessages(flood, func(message) {}); !errors.Is(err, errMonitorGone) {
		t.Errorf("an endless line: %v", err)
	}
	if flood.read > 4*maxMessage {
		t.Errorf("%d bytes were read", flood.read)
	}
}

type endless struct{ read int }

func (e *endless) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = '{'
	}
	e.read += len(p)
	return len(p), nil
}

// A command that is given up leaves the monitor in step: its late answer is not taken
// for the next one's.
func TestMonitorGivenUp(t *testing.T) {
	ours, theirs, err := pair("a monitor")
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	q := newMonitor(ours, func(message) {})
	defer q.close()
	short, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := q.run(short, "stop", nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a command without an answer: %v", err)
	}
	go func() { // answers the first command when it has got the second
		in := json.NewDecoder(theirs)
		for range 2 {
			var command struct{ ID uint64 }
			if in.Decode(&command) != nil {
				return
			}
		}
		_, _ = theirs.WriteString(`{"return": "late", "id": 1}` + "\n" + `{"return": "due", "id": 2}` + "\n")
	}()
	var said string
	if err := q.query(t.Context(), "cont", nil, nil, &said); err != nil || said != "due" {
		t.Errorf("the next command: %q, %v", said, err)
	}
}

// Commands whose context ends at the very moment at which they are written once left a
// deadline behind, and the monitor was dead for good.
func TestMonitorAfterCancelledWrites(t *testing.T) {
	ours, theirs, err := pair("a monitor")
	if err != nil {
		t.Fatal(err)
	}
	q := newMonitor(ours, func(message) {})
	defer q.close()
	answering := make(chan struct{})
	go func() { // a QEMU that says yes to everything
		defer close(answering)
		defer theirs.Close()
		in := json.NewDecoder(theirs)
		for {
			var command struct{ ID uint64 }
			if in.Decode(&command) != nil {
				return
			}
			_, _ = fmt.Fprintf(theirs, "{\"return\": {}, \"id\": %d}\n", command.ID)
		}
	}()
	for n := range 2000 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(n)*100*time.Nanosecond)
		if err := q.run(ctx, "stop", nil); err != nil && !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("after %d commands: %v", n, err)
		}
		cancel()
	}
	if err := q.run(t.Context(), "cont", nil); err != nil {
		t.Errorf("the next command: %v", err)
	}
	_ = ours.Close()
	<-answering
}

// Whatever a state is bound to is compared, and named when it differs.
func TestStateDiffers(t *testing.T) {
	saved := state{QEMU: "7.2", Machine: "virt-7.2", Arch: "arm64", Accel: "tcg", Network: "user", CPU: 1, Memory: 1 << 27, MAC: "02:00:00:00:00:01"}
	for want, change := range map[string]func(*state){
		"the QEMU":        func(s *state) { s.QEMU = "8.0" },
		"machine type":    func(s *state) { s.Machine = "virt-8.0" },
		"architecture":    func(s *state) { s.Arch = "amd64" },
		"accelerator":     func(s *state) { s.Accel = "kvm" },
		"network":         func(s *state) { s.Network = "none" },
		"number of CPUs":  func(s *state) { s.CPU = 2 },
		"memory in bytes": func(s *state) { s.Memory = 1 << 28 },
		"MAC address":     func(s *state) { s.MAC = "02:00:00:00:00:02" },
		"other mounts":    func(s *state) { s.Mounts = []fleet.Mount{{Name: "work", Path: "/work"}} },
	} {
		have := saved
		change(&have)
		if got := saved.differs(have); !strings.Contains(got, want) {
			t.Errorf("a difference in %s: %q", want, got)
		}
	}
	if got := saved.differs(saved); got != "" {
		t.Errorf("the same: %q", got)
	}
}

func FuzzState(f *testing.F) {
	f.Add([]byte(`{"qemu":"v","cpu":1,"memory":2,"memory_size":3,"disk_size":4}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		s, err := parseState(raw)
		if err == nil && s.differs(s) != "" {
			t.Errorf("%+v differs from itself: %s", s, s.differs(s))
		}
	})
}

func FuzzConnections(f *testing.F) {
	f.Add("  TCP[HOST_FORWARD]  84       127.0.0.1 40195       10.0.2.15    22     0     0\n")
	f.Fuzz(func(t *testing.T, said string) {
		for _, c := range parseConnections(said) {
			if c.state == "" && !strings.Contains(said, "TCP[]") {
				t.Errorf("%+v", c)
			}
		}
	})
}
