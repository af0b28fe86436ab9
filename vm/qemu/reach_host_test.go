//go:build linux

package qemu_test

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

// hostLinkLocal is the host's link-local address in its LAN.
const hostLinkLocal = "fe80::77"

// namespace is a network namespace without a name: it ends with the last who holds it,
// so that nothing is left whatever happens to the test.
type namespace struct{ file *os.File }

// newNamespace makes one, with its loopback up.
func newNamespace(t *testing.T) namespace {
	t.Helper()
	var n namespace
	var err error
	locked(func() {
		if err = unix.Unshare(unix.CLONE_NEWNET); err == nil {
			n.file, err = os.Open("/proc/thread-self/ns/net")
		}
	})
	if err != nil {
		t.Fatalf("making a network namespace: %v", err)
	}
	t.Cleanup(func() { n.file.Close() })
	n.ip(t, "link set lo up")
	return n
}

// locked runs f on a thread that ends with it.
func locked(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked
		f()
	}()
	<-done
}

// in runs f inside the namespace: what it opens or starts belongs there.
func (n namespace) in(t *testing.T, f func()) {
	t.Helper()
	var err error
	locked(func() {
		if err = unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err == nil {
			f()
		}
	})
	if err != nil {
		t.Fatalf("going into a network namespace: %v", err)
	}
}

// ip runs iproute2's command inside.
func (n namespace) ip(t *testing.T, args string) {
	t.Helper()
	var out []byte
	var err error
	n.in(t, func() { out, err = exec.CommandContext(t.Context(), "ip", strings.Fields(args)...).CombinedOutput() })
	if err != nil {
		t.Fatalf("ip %s: %v: %s", args, err, out)
	}
}

// host is the cast: see the table.
type host struct{ host, lan namespace }

func newHost(t *testing.T) *host {
	t.Helper()
	h := &host{newNamespace(t), newNamespace(t)}
	h.host.ip(t, fmt.Sprintf("link add lan type veth peer name eth netns /proc/%d/fd/%d", os.Getpid(), h.lan.file.Fd()))
	h.host.ip(t, "link add bridge type veth peer name container")
	h.lan.ip(t, "link set eth up")
	for _, link := range []string{"lan", "bridge", "container"} {
		h.host.ip(t, "link set "+link+" up")
	}
	for _, a := range []string{"10.77.0.2/24", "fd77::2/64 nodad", "169.254.169.254/32"} {
		h.lan.ip(t, "addr add "+a+" dev eth")
	}
	for _, a := range []string{"10.77.0.1/24", "fd77::1/64 nodad", hostLinkLocal + "/64 nodad"} {
		h.host.ip(t, "addr add "+a+" dev lan")
	}
	h.host.ip(t, "addr add 10.78.0.1/24 dev bridge")
	h.host.ip(t, "route add default via 10.77.0.2")
	h.host.ip(t, "-6 route add default via fd77::2")
	for _, a := range []string{"127.0.0.1", "::1", "10.77.0.1", "fd77::1", hostLinkLocal + "%lan", "10.78.0.1"} {
		listen(t, h.host, "host", a)
	}
	for _, a := range []string{"10.77.0.2", "fd77::2", "169.254.169.254"} {
		listen(t, h.lan, "LAN", a)
	}
	resolve(t, h.host, "127.0.0.1", netip.MustParseAddr("192.0.2.127"))
	resolve(t, h.lan, "10.77.0.2", netip.MustParseAddr("192.0.2.77"))
	return h
}

// listen has somebody say where he is to whoever connects.
func listen(t *testing.T, n namespace, name, address string) {
	t.Helper()
	var l net.Listener
	var err error
	n.in(t, func() {
		l, err = (&net.ListenConfig{}).Listen(context.WithoutCancel(t.Context()), "tcp", net.JoinHostPort(address, "7777"))
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	bare, _, _ := strings.Cut(address, "%")
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = fmt.Fprintf(conn, "%s %s\n", name, bare)
			_ = conn.Close()
		}
	}()
}

// count listens on a second port and returns how often somebody has connected.
func count(t *testing.T, address string) func() int {
	t.Helper()
	l, err := (&net.ListenConfig{}).Listen(context.WithoutCancel(t.Context()), "tcp", net.JoinHostPort(address, "7778"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	var n atomic.Int64
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			n.Add(1)
			_ = conn.Close()
		}
	}()
	return func() int { return int(n.Load()) }
}

// resolve is a name server that knows one address, for every name.
func resolve(t *testing.T, n namespace, address string, answer netip.Addr) {
	t.Helper()
	var conn net.PacketConn
	var err error
	n.in(t, func() {
		conn, err = (&net.ListenConfig{}).ListenPacket(context.WithoutCancel(t.Context()), "udp", net.JoinHostPort(address, "53"))
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	go func() {
		for {
			b := make([]byte, 512)
			size, from, err := conn.ReadFrom(b)
			if err != nil {
				return
			}
			if size > 12 {
				_, _ = conn.WriteTo(reply(b[:size], answer), from)
			}
		}
	}()
}

// reply makes a question the answer to itself.
func reply(b []byte, answer netip.Addr) []byte {
	binary.BigEndian.PutUint16(b[2:], 0x8180) // an answer without an error
	binary.BigEndian.PutUint16(b[6:], 1)      // of one record
	clear(b[8:12])
	b = append(b, 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 1, 0, 4) // the question's name, A, IN, 1 s, 4 bytes
	return append(b, answer.AsSlice()...)
}

// listening is every TCP port on which somebody listens in this namespace.
func listening(t *testing.T) (all []string) {
	t.Helper()
	const listens = "0A" // the state, in the kernel's number
	for _, path := range []string{"/proc/self/net/tcp", "/proc/self/net/tcp6"} {
		raw, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, line := range strings.Split(string(raw), "\n")[1:] {
			if f := strings.Fields(line); len(f) > 3 && f[3] == listens {
				all = append(all, address(t, f[1]))
			}
		}
	}
	slices.Sort(all)
	return all
}

// address is one of /proc/net's: words of four bytes in the host's order, in hex, and the
// port.
func address(t *testing.T, s string) string {
	t.Helper()
	words, port, _ := strings.Cut(s, ":")
	raw, err := hex.DecodeString(words)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i+4 <= len(raw); i += 4 {
		binary.NativeEndian.PutUint32(raw[i:], binary.BigEndian.Uint32(raw[i:]))
	}
	a, _ := netip.AddrFromSlice(raw)
	n, err := strconv.ParseUint(port, 16, 16)
	if err != nil {
		t.Fatal(err)
	}
	return netip.AddrPortFrom(a, uint16(n)).String()
}
