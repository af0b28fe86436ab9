package qemu

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"testing"
)

// ipv4 and ipv6 are frames with no more than their addresses.
func ipv4(from, to string) []byte {
	f := make([]byte, ipv4Header)
	binary.BigEndian.PutUint16(f[etherType:], typeIPv4)
	f[etherHeader] = 0x45
	copy(f[26:], netip.MustParseAddr(from).AsSlice())
	copy(f[30:], netip.MustParseAddr(to).AsSlice())
	return f
}

func ipv6(from, to string) []byte {
	f := make([]byte, ipv6Header)
	binary.BigEndian.PutUint16(f[etherType:], typeIPv6)
	f[etherHeader] = 0x60
	copy(f[22:], netip.MustParseAddr(from).AsSlice())
	copy(f[38:], netip.MustParseAddr(to).AsSlice())
	return f
}

// Every address by which passt, asked by a frame that somebody made by hand, was seen to
// connect to its own host; and what a guest needs.
func TestLeaves(t *testing.T) {
	for name, c := range map[string]struct {
		frame []byte
		want  bool
	}{
		"an address outside":         {ipv4(guestAddress, "192.0.2.1"), true},
		"the gateway":                {ipv4(guestAddress, gatewayAddress), true},
		"a question for an address":  {ipv4("0.0.0.0", "255.255.255.255"), true},
		"127.0.0.1":                  {ipv4(guestAddress, "127.0.0.1"), false},
		"another of the loopback":    {ipv4(guestAddress, "127.0.0.53"), false},
		"0.0.0.0":                    {ipv4(guestAddress, "0.0.0.0"), false},
		"from 127.0.0.1":             {ipv4("127.0.0.1", "192.0.2.1"), false},
		"an IPv6 address outside":    {ipv6("fec0::1", "2001:db8::1"), true},
		"a question for a neighbour": {ipv6("::", "ff02::1:ff00:1"), true},
		"::1":                        {ipv6("fec0::1", "::1"), false},
		"::":                         {ipv6("fec0::1", "::"), false},
		"127.0.0.1 in IPv6":          {ipv6("fec0::1", "::ffff:127.0.0.1"), false},
		"127.0.0.1 in old IPv6":      {ipv6("fec0::1", "::127.0.0.1"), false},
		"from ::1":                   {ipv6("::1", "2001:db8::1"), false},
		"from 127.0.0.1 in IPv6":     {ipv6("::ffff:127.0.0.1", "2001:db8::1"), false},
		"half an IPv4 header":        {ipv4(guestAddress, "192.0.2.1")[:ipv4Header-1], false},
		"half an IPv6 header":        {ipv6("fec0::1", "2001:db8::1")[:ipv6Header-1], false},
		"no header":                  {[]byte{1, 2, 3}, false},
		"ARP":                        {binary.BigEndian.AppendUint16(make([]byte, etherType), typeARP), true},
	} {
		if got := leaves(c.frame); got != c.want {
			t.Errorf("%s: leaves %v, want %v", name, got, c.want)
		}
	}
}

// segment is an IPv4 frame of the guest's with a TCP segment.
func segment(from, to uint16, flags byte) []byte {
	f := append(ipv4(guestAddress, gatewayAddress), make([]byte, 20)...)
	f[etherHeader+9] = protocolTCP
	binary.BigEndian.PutUint16(f[ipv4Header:], from)
	binary.BigEndian.PutUint16(f[ipv4Header+2:], to)
	f[ipv4Header+13] = flags
	return f
}

// framed puts the length before each frame.
func framed(frames ...[]byte) (all []byte) {
	for _, f := range frames {
		all = append(binary.BigEndian.AppendUint32(all, uint32(len(f))), f...)
	}
	return all
}

// testWire is a wire and what QEMU and passt have of it.
func testWire(t testing.TB) (w *wire, qemu, world io.ReadWriteCloser) {
	t.Helper()
	inner, theirs, err := pair("a guest")
	if err != nil {
		t.Fatal(err)
	}
	outer, others, err := pair("a world")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, c := range []io.Closer{inner, outer, theirs, others} {
			_ = c.Close()
		}
	})
	return newWire(inner, outer), theirs, others
}

// Frames go both ways, but for those that may not leave; the guest's answers are told to
// who waits for them.
func TestWire(t *testing.T) {
	w, qemu, world := testWire(t)
	took, refused, never := w.expect(1000), w.expect(1001), w.expect(1002)
	ended := make(chan error, 1)
	go func() { ended <- w.carry() }()
	good := [][]byte{segment(22, 1000, 0x12), segment(22, 1001, 0x14), segment(23, 1002, 0x12), ipv6("fec0::1", "2001:db8::1")}
	sent := slices.Insert(slices.Clone(good), 1, ipv4(guestAddress, "127.0.0.1"), ipv6("fec0::1", "::1"), nil)
	if _, err := qemu.Write(framed(sent...)); err != nil {
		t.Fatal(err)
	}
	want := framed(good...)
	got := make([]byte, len(want))
	if _, err := io.ReadFull(world, got); err != nil || !bytes.Equal(got, want) {
		t.Errorf("outside arrived %x, %v; want %x", got, err, want)
	}
	if !<-took || <-refused || !w.seen.Load() {
		t.Error("the guest's answers were not understood")
	}
	select {
	case <-never:
		t.Error("an answer from another port was taken for sshd's")
	default:
	}
	if _, err := world.Write(want); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(qemu, got); err != nil || !bytes.Equal(got, want) {
		t.Errorf("in the guest arrived %x, %v", got, err)
	}
	_ = qemu.Close()
	if err := <-ended; err != nil {
		t.Errorf("the end of QEMU: %v", err)
	}
	if _, err := io.Copy(io.Discard, world); err != nil {
		t.Errorf("passt was not told: %v", err)
	}
}

// What ends otherwise than by QEMU is told.
func TestWireEnds(t *testing.T) {
	w, qemu, _ := testWire(t)
	if _, err := qemu.Write([]byte{0xff, 0xff, 0xff, 0xff}); err != nil {
		t.Fatal(err)
	}
	if err := w.carry(); !errors.Is(err, errFrame) {
		t.Errorf("a frame of 4 GiB: %v", err)
	}
	w, _, world := testWire(t)
	_ = world.Close()
	if err := w.carry(); !errors.Is(err, errWorldEnded) {
		t.Errorf("the end of passt: %v", err)
	}
}

func FuzzWire(f *testing.F) {
	f.Add(framed(ipv4(guestAddress, "127.0.0.1"), segment(22, 1000, 0x12)))
	f.Add(framed(ipv6("::1", "::"), nil, segment(22, 1000, 4)[:40]))
	f.Fuzz(func(t *testing.T, raw []byte) {
		w := newWire(nil, nil)
		buf, in := make([]byte, 4+maxFrame), bytes.NewReader(raw)
		for {
			n, err := readFrame(in, buf)
			if err != nil {
				return
			}
			frame := buf[4:n]
			w.note(frame)
			if !leaves(frame) || len(frame) < etherHeader {
				continue
			}
			var to net.IP
			switch binary.BigEndian.Uint16(frame[etherType:]) {
			case typeIPv4:
				to = frame[30:34]
			case typeIPv6:
				to = frame[38:54]
			}
			if to.IsLoopback() || to.IsUnspecified() {
				t.Errorf("a frame to %v left: %x", to, frame)
			}
		}
	})
}

func TestParseResolver(t *testing.T) {
	for text, want := range map[string][]string{
		"":                        nil,
		"nameserver 127.0.0.53\n": nil,
		"# nameserver 192.0.2.1\nsearch a.test\nnameserver 192.0.2.2 \nnameserver ::1\nnameserver fd00::1\n": {"192.0.2.2", "fd00::1"},
		"nameserver fe80::1%eth0\nnameserver\nnameserver x\nnameserver 0.0.0.0":                              nil,
	} {
		if got := parseResolver(text); !slices.Equal(got, want) {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}
