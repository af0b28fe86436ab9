package peer

import (
	"context"
	"errors"
	"io"
	"net"
	"runtime"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/cache"
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
	if n := runtime.NumGoroutine() - before; n > 4*maxOpenAddress {
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

// Who is let in and says nothing is out soon, also in mid-handshake.
func TestSilentConnection(t *testing.T) {
	h := newHome(t, "a")
	two := h.newStation(t, "mac-2", cache.Config{}, nil)
	two.head = 500 * time.Millisecond
	two.listen(t, h, plain)
	var dialer net.Dialer
	silent, err := dialer.DialContext(t.Context(), "tcp", two.server.Where().Address)
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	// Another shakes hands, and then sends its head byte by byte.
	slow := h.pinned(t, two, two)
	go func() {
		for range 10000 {
			if _, err := io.WriteString(slow, "G"); err != nil {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
	}()
	begun := time.Now()
	for name, c := range map[string]net.Conn{"silent": silent, "slow": slow} {
		if err := c.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		_, err := io.Copy(io.Discard, c)
		if late := net.Error(nil); errors.As(err, &late) && late.Timeout() {
			t.Errorf("%s: not closed by the server", name)
		}
	}
	if took := time.Since(begun); took < two.head/2 {
		t.Errorf("closed after %s already", took)
	}
}

// The door's counts by themselves: per address, in all, and over time.
func TestDoor(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	d := newDoor(nil, func() time.Time { return now })
	at := func(ip string) bool { return d.enter(addressOf(&net.TCPAddr{IP: net.ParseIP(ip)})) }
	leave := func(ip string) { d.left(addressOf(&net.TCPAddr{IP: net.ParseIP(ip)})) }
	in := 0
	for range 100 {
		if at("10.0.0.1") {
			in++
		}
	}
	if in != maxOpenAddress {
		t.Errorf("%d of one address are in, want %d", in, maxOpenAddress)
	}
	leave("10.0.0.1")
	if at("10.0.0.1") {
		t.Error("as many again in the same moment")
	}
	now = now.Add(time.Second)
	if !at("10.0.0.1") || at("10.0.0.1") {
		t.Error("a second later, there is one place, and one only")
	}
	for _, ip := range []string{"fd00::1", "fd00::2", "fd00::3:0:0:1"} {
		at(ip)
	}
	if v := d.visitors[addressOf(&net.TCPAddr{IP: net.ParseIP("fd00::9")})]; v == nil || v.open != 3 {
		t.Errorf("one host's IPv6 addresses are %+v", v)
	}
	for i := range 3 * maxVisitors {
		if ip := net.IPv4(10, 1, byte(i>>8), byte(i)); d.enter(addressOf(&net.TCPAddr{IP: ip})) && i%8 != 0 {
			d.left(addressOf(&net.TCPAddr{IP: ip}))
		}
	}
	if d.open != maxOpen || len(d.visitors) > maxVisitors+1 {
		t.Errorf("%d connections of %d addresses, want at most %d of %d", d.open, len(d.visitors), maxOpen, maxVisitors)
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
