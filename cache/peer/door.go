package peer

import (
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Limits on who may stand at the port before anything is known of them. A pull has at
// most 16 streams, and the guests behind a node's address are taken for that node.
const (
	maxOpen        = 256 // connections in all; some 64 KiB of memory each
	maxOpenAddress = 64  // from one address
	maxNewAddress  = 25  // connections a second from one address, of which each may cost a handshake
	maxVisitors    = 1024
)

// door is a listener that lets in so many and no more. Those beyond are closed without a
// byte: they may try again, and a peer that is refused fetches elsewhere.
type door struct {
	net.Listener
	now func() time.Time

	mu       sync.Mutex
	open     int
	visitors map[netip.Addr]*visitor
}

// visitor is one address.
type visitor struct {
	open int
	pace *rate.Limiter
}

func newDoor(l net.Listener, now func() time.Time) *door {
	return &door{Listener: l, now: now, visitors: map[netip.Addr]*visitor{}}
}

// Accept returns the next connection that may come in.
func (d *door) Accept() (net.Conn, error) {
	for {
		c, err := d.Listener.Accept()
		if err != nil {
			return nil, err
		}
		from := addressOf(c.RemoteAddr())
		if d.enter(from) {
			return &visit{Conn: c, leave: sync.OnceFunc(func() { d.left(from) })}, nil
		}
		if tcp, ok := c.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0) // nothing of it stays, not even in the kernel
		}
		_ = c.Close()
	}
}

func (d *door) enter(from netip.Addr) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	v := d.visitors[from]
	if v == nil {
		if len(d.visitors) >= maxVisitors {
			d.sweep()
		}
		v = &visitor{pace: rate.NewLimiter(maxNewAddress, maxOpenAddress)}
		d.visitors[from] = v
	}
	if d.open >= maxOpen || v.open >= maxOpenAddress || !v.pace.AllowN(d.now(), 1) {
		return false
	}
	d.open++
	v.open++
	return true
}

// sweep forgets addresses that have nothing open; d.mu is held. At most maxOpen stay.
func (d *door) sweep() {
	for from, v := range d.visitors {
		if v.open == 0 {
			delete(d.visitors, from)
		}
	}
}

func (d *door) left(from netip.Addr) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.open--
	d.visitors[from].open-- // it is there: only those with nothing open are forgotten
}

// visit is a connection that was let in.
type visit struct {
	net.Conn
	leave func()
}

// Close ends the connection, and makes room for another.
func (v *visit) Close() error {
	defer v.leave()
	return v.Conn.Close()
}

// addressOf is what counts as one address: for IPv6 its /64, which any host has whole.
func addressOf(a net.Addr) netip.Addr {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.Addr{}
	}
	ip := tcp.AddrPort().Addr().Unmap().WithZone("")
	if ip.Is6() {
		if network, err := ip.Prefix(64); err == nil {
			return network.Addr()
		}
	}
	return ip
}
