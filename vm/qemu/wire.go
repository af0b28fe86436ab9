package qemu

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
)

// maxFrame is how long a frame on the wire may be, in bytes: QEMU's own bound. Each has
// its length before it, in four bytes.
const maxFrame = 4096 + 64<<10

// errFrame: what QEMU or passt says is no frame.
var errFrame = errors.New("a frame that is none")

// errWorldEnded: passt has ended before QEMU.
var errWorldEnded = errors.New("passt has ended")

// wire is the cable between a guest's network card and passt, and we hold it in the
// middle: passt keeps the host's loopback off the addresses that it hands out, but a
// guest may write any other address on its frames, 127.0.0.1 too, and passt would connect
// to that. Such frames do not get past us.
type wire struct {
	guest, world *net.UnixConn // to QEMU and to passt
	seen         atomic.Bool   // a frame came from the guest's address

	mu      sync.Mutex
	waiting map[uint16]chan bool // by our port: whether the guest took the connection
}

func newWire(guest, world *net.UnixConn) *wire {
	return &wire{guest: guest, world: world, waiting: map[uint16]chan bool{}}
}

// carry carries frames until either end is closed, and closes the other. It is an error
// if that was not QEMU's.
func (w *wire) carry() error {
	arriving := make(chan error, 1)
	go func() {
		_, err := io.Copy(w.guest, w.world)
		if err == nil {
			err = errWorldEnded // nobody has closed it but passt
		} else {
			err = nil
		}
		w.close()
		arriving <- err
	}()
	err := w.leaving()
	w.close()
	return errors.Join(err, <-arriving)
}

func (w *wire) close() {
	_ = w.guest.Close()
	_ = w.world.Close()
}

// leaving carries the guest's frames. Its error is a guest's, or rather a QEMU's, that
// does not keep to the rules: an end is none.
func (w *wire) leaving() error {
	in, frame := bufio.NewReaderSize(w.guest, 4+maxFrame), make([]byte, 4+maxFrame)
	for {
		n, err := readFrame(in, frame)
		switch {
		case errors.Is(err, errFrame):
			return err
		case err != nil:
			return nil
		}
		w.note(frame[4:n])
		if !leaves(frame[4:n]) {
			continue
		}
		if _, err := w.world.Write(frame[:n]); err != nil {
			return nil
		}
	}
}

// readFrame reads a frame and what is before it into buf, which has room for the longest.
func readFrame(r io.Reader, buf []byte) (int, error) {
	if _, err := io.ReadFull(r, buf[:4]); err != nil {
		return 0, err
	}
	n := binary.BigEndian.Uint32(buf)
	if n > maxFrame {
		return 0, fmt.Errorf("%w: of %d bytes", errFrame, n)
	}
	if _, err := io.ReadFull(r, buf[4:4+n]); err != nil {
		return 0, err
	}
	return 4 + int(n), nil
}

// Where things are in a frame, in bytes from its start.
const (
	etherType   = 12
	etherHeader = 14
	ipv4Header  = etherHeader + 20 // without options
	ipv6Header  = etherHeader + 40
	typeIPv4    = 0x0800
	typeARP     = 0x0806
	typeIPv6    = 0x86dd
	protocolTCP = 6
)

// leaves tells whether a frame of the guest may leave it: whether it does not say that it
// comes from a loopback or goes to one. What is neither IPv4 nor IPv6 has no way out of
// passt.
func leaves(frame []byte) bool {
	if len(frame) < etherHeader {
		return false
	}
	switch binary.BigEndian.Uint16(frame[etherType:]) {
	case typeIPv4:
		if len(frame) < ipv4Header {
			return false
		}
		// To connect to 0.0.0.0 is to connect to oneself; to send from it is how one asks
		// for an address.
		from, to := [4]byte(frame[26:]), [4]byte(frame[30:])
		return from[0] != 127 && to[0] != 127 && to[0] != 0
	case typeIPv6:
		if len(frame) < ipv6Header {
			return false
		}
		from, to := netip.AddrFrom16([16]byte(frame[22:])), netip.AddrFrom16([16]byte(frame[38:]))
		return !hidden.Contains(to) && (from.IsUnspecified() || !hidden.Contains(from)) && !to.Is4In6() && !from.Is4In6()
	}
	return true
}

// hidden are the IPv6 addresses that mean the own host: ::, ::1, and the old way to write
// an IPv4 address into one.
var hidden = netip.MustParsePrefix("::/96")

// note takes note of a frame from the guest's address, and of its answer to a connection
// that somebody waits for.
func (w *wire) note(frame []byte) {
	if len(frame) < ipv4Header || binary.BigEndian.Uint16(frame[etherType:]) != typeIPv4 || netip.AddrFrom4([4]byte(frame[26:])) != guestIP {
		return
	}
	if !w.seen.Load() {
		w.seen.Store(true)
	}
	port, took, answer := answerTo(frame)
	if !answer {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if waiting := w.waiting[port]; waiting != nil {
		delete(w.waiting, port)
		waiting <- took
	}
}

// answerTo tells whether an IPv4 frame is the guest's first answer to a connection to its
// sshd: from which port of ours that comes, and whether the guest took it.
func answerTo(frame []byte) (port uint16, took, answer bool) {
	header := int(frame[etherHeader]&15) * 4
	if frame[etherHeader+9] != protocolTCP || header < 20 || len(frame) < etherHeader+header+14 {
		return 0, false, false
	}
	segment := frame[etherHeader+header:]
	const syn, rst, ack = 2, 4, 16
	flags := segment[13]
	took = flags&(syn|ack|rst) == syn|ack
	return binary.BigEndian.Uint16(segment[2:]), took, binary.BigEndian.Uint16(segment) == sshPort && (took || flags&rst != 0)
}

// expect has the guest's answer to a connection from a port of ours sent; forget after it.
func (w *wire) expect(port uint16) <-chan bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	answer := make(chan bool, 1) // so that nobody waits for who asked
	w.waiting[port] = answer
	return answer
}

func (w *wire) forget(port uint16) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.waiting, port)
}
