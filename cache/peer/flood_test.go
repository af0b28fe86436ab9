package peer

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/fleet"
)

// A guest dials a thousand times and says nothing, or noise: few of its connections are
// let in, others are served all the while, and when it is gone nothing of it is left.
func TestFlood(t *testing.T) {
	h := newHome(t, "a")
	two := h.full(t, "mac-2", func(c *Config) { c.Listen = "127.0.0.1:0" })
	one := h.newStation(t, "mac-1", cache.Config{}, nil)
	before := runtime.NumGoroutine()

	// The guest has an address of its own, which loopback has many of on Linux only.
	guest := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 77)}}
	probe, err := guest.DialContext(t.Context(), "tcp", two.server.Where().Address)
	if err != nil {
		guest.LocalAddr = nil
	} else {
		probe.Close()
	}
	var conns []net.Conn
	for i := range 1000 {
		c, err := guest.DialContext(t.Context(), "tcp", two.server.Where().Address)
		if err != nil {
			continue // turned away while it dialled
		}
		conns = append(conns, c)
		if i%2 == 0 {
			_, _ = io.WriteString(c, "GET / HTTP/1.1\r\n\r\n")
		}
	}
	if n := runtime.NumGoroutine() - before; n > 8*maxStrangersAddress {
		t.Errorf("%d goroutines more than before", n)
	}
	if guest.LocalAddr != nil {
		if _, err := read(t.Context(), h.source(t, one, two), h.want(h.manifest.Chunks[0]), 0); err != nil {
			t.Errorf("a peer is not served meanwhile: %v", err)
		}
	}
	for _, c := range conns {
		c.Close()
	}
	two.stop()
	one.client.Close()
	eventually(t, "no goroutine is left of it", func() bool { return runtime.NumGoroutine() <= before })
}

// Who is let in and says nothing is out soon: as a stranger in mid-handshake and after it,
// and as a known node in mid-head.
func TestSilentConnection(t *testing.T) {
	const bound = 500 * time.Millisecond
	h := newHome(t, "a")
	two := h.newStation(t, "mac-2", cache.Config{}, nil)
	two.head, two.strange = time.Hour, bound
	two.listen(t, h, plain)
	var dialer net.Dialer
	silent, err := dialer.DialContext(t.Context(), "tcp", two.server.Where().Address)
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	begun := time.Now()
	for name, c := range map[string]net.Conn{"silent": silent, "slow": h.pinned(t, two, two)} {
		dribbled := make(chan struct{})
		if name == "slow" {
			go dribble(c, dribbled)
		} else {
			close(dribbled)
		}
		closedByServer(t, name, c)
		<-dribbled
	}
	if took := time.Since(begun); took < bound/2 {
		t.Errorf("closed after %s already", took)
	}
}

// A known node's connection outlives a stranger's time, and its next head has its own bound.
func TestKnownConnection(t *testing.T) {
	h := newHome(t, "a")
	two := h.newStation(t, "mac-2", cache.Config{}, nil)
	one := h.newStation(t, "mac-1", cache.Config{}, nil)
	two.head, two.strange = 3*time.Second, 2*time.Second
	two.listen(t, h, plain)
	c := h.pinned(t, one, two)
	ask := func() {
		t.Helper()
		piece := target{h.manifest.Digest, another}
		if _, err := io.WriteString(c, "GET "+piece.path()+" HTTP/1.1\r\nHost: x\r\nAuthorization: "+bearer+string(h.token(t, one, two))+"\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		if resp.Body.Close(); resp.StatusCode != http.StatusNotFound {
			t.Errorf("answered %s, want 404", resp.Status)
		}
	}
	ask()
	var dialer net.Dialer
	silent, err := dialer.DialContext(t.Context(), "tcp", two.server.Where().Address)
	if err != nil {
		t.Fatal(err)
	}
	closedByServer(t, "silent", silent) // it came later, so the other's time is over too
	ask()
	dribbled := make(chan struct{})
	go dribble(c, dribbled)
	closedByServer(t, "known", c)
	<-dribbled
}

// dribble sends a head byte by byte until the other side has had enough.
func dribble(c net.Conn, done chan<- struct{}) {
	defer close(done)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for range tick.C {
		if _, err := io.WriteString(c, "G"); err != nil {
			return
		}
	}
}

// closedByServer waits until the other side closes a connection.
func closedByServer(t *testing.T, name string, c net.Conn) {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	_, err := io.Copy(io.Discard, c)
	if late := net.Error(nil); errors.As(err, &late) && late.Timeout() {
		t.Errorf("%s: not closed by the server", name)
	}
	c.Close() // for who writes
}

// A guest with five addresses takes all it can get, with connections that say nothing,
// that show a certificate of its own, and that ask with a token it made up; and dials again
// whenever one is closed. A node that comes for the first time is served all the while.
func TestFiveAddresses(t *testing.T) {
	h := newHome(t, "a")
	two := h.newStation(t, "mac-2", cache.Config{Sources: []cache.Source{h.client(t)}}, nil)
	two.strange = strangeTime
	two.listen(t, h, plain)
	if err := two.store.Pull(t.Context(), h.hold()); err != nil {
		t.Fatal(err)
	}
	guest := h.newStation(t, "mac-3", cache.Config{}, nil)
	ctx, cancel := context.WithCancel(t.Context())
	var floods sync.WaitGroup
	defer floods.Wait()
	defer cancel()
	for i := range 5 {
		local := &net.TCPAddr{IP: net.IPv4(127, 0, 0, byte(80+i))}
		probe, err := (&net.Dialer{LocalAddr: local}).DialContext(ctx, "tcp", two.server.Where().Address)
		if err != nil {
			t.Fatalf("this test needs all of 127.0.0.0/8 on loopback: %v", err)
		}
		probe.Close()
		for range maxStrangersAddress + 4 {
			floods.Go(func() { hold(ctx, guest, local, two.server.Where().Address, i) })
		}
	}
	full := func() bool {
		two.server.door.mu.Lock()
		defer two.server.door.mu.Unlock()
		return len(two.server.door.strangers) == maxStrangers
	}
	for i := range 10 {
		eventually(t, "the strangers' places are taken", full)
		one := h.newStation(t, "mac-1", cache.Config{}, nil) // with no connection yet
		if _, err := read(t.Context(), h.source(t, one, two), h.want(h.manifest.Chunks[0]), 0); err != nil {
			t.Errorf("try %d: a node is not served meanwhile: %v", i, err)
		}
		one.client.Close()
	}
}

// hold keeps one connection open, and makes another when it is closed.
func hold(ctx context.Context, guest *station, from *net.TCPAddr, address string, kind int) {
	dialer := net.Dialer{LocalAddr: from}
	again := time.NewTicker(500 * time.Millisecond) // 20 of these knock more than maxNewAddress
	defer again.Stop()
	for ; ctx.Err() == nil; <-again.C {
		c, err := dialer.DialContext(ctx, "tcp", address)
		if err != nil {
			continue
		}
		stop := context.AfterFunc(ctx, func() { c.Close() })
		if kind > 2 { // the first three say nothing
			secure := tls.Client(c, &tls.Config{
				InsecureSkipVerify:   true,
				GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return guest.identity.show() },
			})
			if err := secure.HandshakeContext(ctx); err == nil && kind > 3 {
				_, _ = io.WriteString(secure, "GET / HTTP/1.1\r\nHost: x\r\nAuthorization: "+bearer+"pdkpeer_x.y.z\r\n\r\n")
			}
		}
		_, _ = io.Copy(io.Discard, c)
		stop()
		c.Close()
	}
}

// front is a door for tests of its counts, without a listener.
type front struct {
	*door
	clock time.Time
}

func newFront() *front {
	f := &front{clock: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)}
	f.door = newDoor(func() time.Time { return f.clock }, time.Hour)
	return f
}

// dial is a connection from an address; nil: not let in.
func (f *front) dial(ip string) *visit {
	c, _ := net.Pipe()
	v, out := f.enter(c, addressOf(&net.TCPAddr{IP: net.ParseIP(ip)}))
	if out != nil {
		drop(out.Conn)
	}
	return v
}

// The door's counts of strangers: per address, in all, and over time.
func TestDoorStrangers(t *testing.T) {
	f := newFront()
	in := 0
	var last *visit
	for range 100 {
		if v := f.dial("10.0.0.1"); v != nil {
			last = v
			in++
		}
	}
	if in != maxBurstAddress || len(f.strangers) != maxStrangersAddress || f.strangers[maxStrangersAddress-1] != last {
		t.Errorf("%d of one address came in and %d are, want %d and the last %d", in, len(f.strangers), maxBurstAddress, maxStrangersAddress)
	}
	last.Close()
	if f.dial("10.0.0.1") != nil {
		t.Error("as many again in the same moment")
	}
	f.clock = f.clock.Add(time.Second / maxNewAddress)
	if f.dial("10.0.0.1") == nil || f.dial("10.0.0.1") != nil {
		t.Error("a moment later, there is one place, and one only")
	}
	for _, ip := range []string{"fd00::1", "fd00::2", "fd00::3:0:0:1"} {
		f.dial(ip)
	}
	if v := f.visitors[addressOf(&net.TCPAddr{IP: net.ParseIP("fd00::9")})]; v == nil || v.open != 3 {
		t.Errorf("one host's IPv6 addresses are %+v", v)
	}
	for i := range 3 * maxVisitors {
		if v := f.dial(net.IPv4(10, 1, byte(i>>8), byte(i)).String()); v == nil {
			t.Fatalf("address %d finds no place", i)
		} else if i%8 != 7 {
			v.Close()
		}
	}
	if len(f.strangers) != maxStrangers || len(f.visitors) > maxVisitors+1 {
		t.Errorf("%d strangers of %d addresses, want at most %d of %d", len(f.strangers), len(f.visitors), maxStrangers, maxVisitors)
	}
	for _, v := range slices.Clone(f.strangers) {
		v.Close()
		v.Close()
	}
	for from, v := range f.visitors {
		if v.open != 0 || v.strangers != 0 {
			t.Errorf("%s has %+v after all are gone", from, v)
		}
	}
}

// Known nodes have places that no stranger can take, and each of them a share.
func TestDoorKnown(t *testing.T) {
	f := newFront()
	enter := func(ip string, id fleet.NodeID) *visit {
		f.clock = f.clock.Add(time.Second / maxNewAddress)
		v := f.dial(ip)
		if v == nil {
			t.Fatalf("%s is not let in", ip)
		}
		if !v.admit(id) {
			v.Close()
			return nil
		}
		return v
	}
	first := enter("10.0.0.1", "mac-1")
	if !first.admit("mac-1") || f.known != 1 {
		t.Errorf("with a second token: %d known", f.known)
	}
	for f.receivers["mac-1"] < maxKnownReceiver {
		enter("10.0.0.1", "mac-1")
	}
	if enter("10.0.0.2", "mac-1") != nil {
		t.Error("one node has more than its share, from another address")
	}
	var keep *visit
	for i := 2; f.known < maxKnown; i++ {
		keep = enter("10.0.0.9", fleet.NodeID(fmt.Sprintf("mac-%d", i)))
	}
	if enter("10.0.0.9", "mac-1000") != nil {
		t.Error("more are known than there are places")
	}
	first.Close()
	if enter("10.0.0.9", "mac-1000") == nil {
		t.Error("a place that is free again is not had")
	}
	keep.Close()
	if keep.admit("mac-2") || f.known != maxKnown-1 || len(f.strangers) != 0 {
		t.Errorf("after the end: %d known, %d strangers", f.known, len(f.strangers))
	}
}

// Strangers from where a token came lately make room last, and time ends their stay.
func TestDoorWelcome(t *testing.T) {
	f := newFront()
	f.dial("10.0.0.1").admit("mac-1")
	node := f.dial("10.0.0.1")
	for i := range 2 * maxStrangers {
		f.dial(net.IPv4(10, 2, 0, byte(i)).String())
	}
	if node.place != stranger {
		t.Error("other addresses put a node's new connection out")
	}
	for i := range maxStrangers {
		ip := net.IPv4(10, 3, 0, byte(i)).String()
		if v := f.dial(ip); v != nil {
			v.admit("mac-2")
			f.dial(ip)
		}
	}
	if f.dial("10.2.0.200") != nil {
		t.Error("an unknown address takes the place of a node's connection")
	}
	f.clock = f.clock.Add(welcomeTime)
	if f.dial("10.2.0.200") == nil || node.place != gone {
		t.Error("a welcome lasts for ever")
	}
}

// A port that is taken is had as soon as it is free; the node waits for it in peace.
func TestPortTaken(t *testing.T) {
	h := newHome(t, "a")
	var config net.ListenConfig
	taken, err := config.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	one := h.newStation(t, "mac-1", cache.Config{}, nil)
	server, err := NewServer(Config{Node: "mac-1", Identity: one.identity, Pieces: one, Listen: taken.Addr().String(), Address: "mac-1.example:7600"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); server.Run(ctx) }()
	if at := server.Where(); at.Address != "" || at.Certificate != one.identity.Hash() {
		t.Errorf("without a port it is at %+v", at)
	}
	taken.Close()
	eventually(t, "the port is had", func() bool { return server.Where().Address == "mac-1.example:7600" })
	cancel()
	<-ended
	if at := server.Where(); at.Address != "" {
		t.Errorf("after the end it is at %+v", at)
	}
}
