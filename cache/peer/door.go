package peer

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/paddock-ci/paddock/fleet"
)

// Limits on who may stand at the port. A stranger is a connection that has brought no valid
// token yet: anyone can shake hands with a certificate made a moment ago, so that counts for
// nothing. Strangers have few places of their own, and those whom the controller names have
// the others, so that no number of addresses keeps a node out that is in already.
const (
	// strangeTime is how long a connection may be a stranger's: on the network of a site a
	// handshake and a request take milliseconds.
	strangeTime         = 2 * time.Second
	maxStrangers        = 64 // connections, some 64 KiB of memory each
	maxStrangersAddress = 16 // from one address; as many as a pull has streams

	maxKnown         = 256 // connections that brought a token
	maxKnownReceiver = 64  // of one node; a pull has at most 16 streams

	maxNewAddress   = 25 // connections a second from one address, of which each may cost a handshake
	maxBurstAddress = 64 // and that many at once
	maxVisitors     = 1024
	// welcomeTime is how long an address that a token came from is not the first to make
	// room: a node that pulls dials again within seconds.
	welcomeTime = 10 * time.Minute
)

// door is a listener that lets in so many and no more. Those beyond are closed without a
// byte: they may try again, and a peer that is refused fetches elsewhere.
type door struct {
	net.Listener
	now     func() time.Time
	strange time.Duration // strangeTime

	mu        sync.Mutex
	strangers []*visit // the longest here first
	known     int
	receivers map[fleet.NodeID]int // known connections of each
	visitors  map[netip.Addr]*visitor
}

// visitor is one address.
type visitor struct {
	open      int
	strangers int // of open
	pace      *rate.Limiter
	welcome   time.Time // the last valid token; zero: none came
}

// visit is a connection that was let in.
type visit struct {
	net.Conn
	door *door
	from netip.Addr
	// These are of door.mu.
	place    place
	receiver fleet.NodeID // when known
	late     *time.Timer  // ends a stranger's time
}

// place is what a visit counts as.
type place int

const (
	gone place = iota
	stranger
	known
)

// newDoor makes a door; who opens it sets its Listener.
func newDoor(now func() time.Time, strange time.Duration) *door {
	return &door{now: now, strange: strange, receivers: map[fleet.NodeID]int{}, visitors: map[netip.Addr]*visitor{}}
}

// Accept returns the next connection that may come in.
func (d *door) Accept() (net.Conn, error) {
	for {
		c, err := d.Listener.Accept()
		if err != nil {
			return nil, err
		}
		v, out := d.enter(c, addressOf(c.RemoteAddr()))
		if out != nil {
			drop(out.Conn)
		}
		if v != nil {
			return v, nil
		}
		drop(c)
	}
}

// drop closes a connection so that nothing of it stays, not even in the kernel.
func drop(c net.Conn) {
	if tcp, ok := c.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = c.Close()
}

// enter lets a stranger in; nil: there is no place. Another that had to make room is out,
// and its connection the caller's to close: who is honest is a stranger for so short a time
// that its place is seldom the oldest.
func (d *door) enter(c net.Conn, from netip.Addr) (v, out *visit) {
	d.mu.Lock()
	defer d.mu.Unlock()
	at := d.visitors[from]
	if at == nil {
		if len(d.visitors) >= maxVisitors {
			d.sweep()
		}
		at = &visitor{pace: rate.NewLimiter(maxNewAddress, maxBurstAddress)}
		d.visitors[from] = at
	}
	if !at.pace.AllowN(d.now(), 1) {
		return nil, nil
	}
	switch {
	case at.strangers >= maxStrangersAddress:
		out = d.strangers[slices.IndexFunc(d.strangers, func(o *visit) bool { return o.from == from })]
	case len(d.strangers) >= maxStrangers:
		if out = d.weakest(); d.welcome(out.from) && !d.welcome(from) {
			return nil, nil
		}
	}
	if out != nil {
		d.remove(out)
	}
	v = &visit{Conn: c, door: d, from: from, place: stranger}
	v.late = time.AfterFunc(d.strange, v.expire)
	at.open++
	at.strangers++
	d.strangers = append(d.strangers, v)
	return v, out
}

// weakest is who makes room for another: of an address that no token came from if there is
// one, of those that with the most strangers, of these the oldest; d.mu is held.
func (d *door) weakest() *visit {
	return slices.MaxFunc(d.strangers, func(a, b *visit) int {
		if w := d.welcome(b.from); w != d.welcome(a.from) {
			if w {
				return 1
			}
			return -1
		}
		return d.visitors[a.from].strangers - d.visitors[b.from].strangers
	})
}

// welcome reports whether a token came from an address lately; d.mu is held.
func (d *door) welcome(from netip.Addr) bool {
	return d.visitors[from].welcomeAt(d.now())
}

func (v *visitor) welcomeAt(now time.Time) bool {
	return !v.welcome.IsZero() && now.Sub(v.welcome) < welcomeTime
}

// sweep forgets addresses that have nothing open and brought no token; d.mu is held. Those
// that stay are as many as there are places, and nodes.
func (d *door) sweep() {
	now := d.now()
	for from, v := range d.visitors {
		if v.open == 0 && !v.welcomeAt(now) {
			delete(d.visitors, from)
		}
	}
}

// remove takes a visit out of all counts, once; d.mu is held.
func (d *door) remove(v *visit) {
	at := d.visitors[v.from] // it is there: only those with nothing open are forgotten
	switch v.place {
	case gone:
		return
	case stranger:
		d.noStranger(v)
	case known:
		d.known--
		if d.receivers[v.receiver]--; d.receivers[v.receiver] == 0 {
			delete(d.receivers, v.receiver)
		}
	}
	at.open--
	v.place = gone
}

// noStranger frees a stranger's place; d.mu is held.
func (d *door) noStranger(v *visit) {
	v.late.Stop()
	d.visitors[v.from].strangers--
	d.strangers = slices.DeleteFunc(d.strangers, func(o *visit) bool { return o == v })
}

// admit makes a stranger known, now that it has brought a valid token of receiver; false:
// its time was over, or the places for known ones are taken, in all or that receiver's.
func (v *visit) admit(receiver fleet.NodeID) bool {
	d := v.door
	d.mu.Lock()
	defer d.mu.Unlock()
	at := d.visitors[v.from]
	switch {
	case v.place == gone:
		return false
	case v.place == known:
		at.welcome = d.now()
		return true
	case d.known >= maxKnown || d.receivers[receiver] >= maxKnownReceiver:
		return false
	}
	d.noStranger(v)
	at.welcome = d.now()
	v.place, v.receiver = known, receiver
	d.known++
	d.receivers[receiver]++
	return true
}

// expire ends a visit whose time as a stranger is over.
func (v *visit) expire() {
	v.door.mu.Lock()
	late := v.place == stranger
	if late {
		v.door.remove(v)
	}
	v.door.mu.Unlock()
	if late {
		drop(v.Conn)
	}
}

// Close ends the connection, and makes room for another.
func (v *visit) Close() error {
	v.door.mu.Lock()
	v.door.remove(v)
	v.door.mu.Unlock()
	return v.Conn.Close()
}

// visitKey finds a request's visit in its context.
type visitKey struct{}

// withVisit notes a connection's visit; http.Server's ConnContext.
func withVisit(ctx context.Context, c net.Conn) context.Context {
	if secure, ok := c.(interface{ NetConn() net.Conn }); ok {
		c = secure.NetConn()
	}
	return context.WithValue(ctx, visitKey{}, c)
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
