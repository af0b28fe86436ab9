package qemu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/vm"
)

// A machine's network: its name in QEMU, and the address that it gives the one guest.
const (
	netID        = "net"
	guestAddress = "10.0.2.15"
)

// connectLimit is how long one try waits for the guest's answer: a guest whose network is
// not up answers nothing, and a try made later finds it sooner than one made before.
const connectLimit = time.Second

// networkArgs are QEMU's arguments for the network, whose stream it inherits as fd.
func (p *plan) networkArgs(fd int) []string {
	var netdev string
	switch p.network {
	case networkNone:
		return nil
	case networkUser:
		netdev = "user,id=" + netID
	case networkPasst:
		netdev = fmt.Sprintf("stream,id=%s,server=off,addr.type=fd,addr.str=%d", netID, fd)
	}
	// romfile: no network boot, and no need of the ROM's package.
	return []string{"-netdev", netdev, "-device", "virtio-net-pci,romfile=,netdev=" + netID + ",mac=" + p.mac}
}

// Address is the guest's address in its own network, once it was seen there.
func (m *machine) Address(ctx context.Context) (string, error) {
	switch {
	case m.plan.network == networkNone:
		return "", fmt.Errorf("the guest's address: %w: it has no network", vm.ErrUnsupported)
	case m.over():
		return "", vm.ErrEnded
	case m.passt != nil:
		if m.passt.wire.seen.Load() {
			m.address.Store(true)
		}
	case !m.address.Load():
		connections, err := m.connections(ctx)
		if err != nil {
			return "", fmt.Errorf("the guest's address: %w", err)
		}
		for _, c := range connections {
			if c.source == guestAddress || c.state == established {
				m.address.Store(true)
			}
		}
	}
	if m.address.Load() {
		return guestAddress, nil
	}
	return "", nil
}

// DialPort connects to a TCP port of the guest. QEMU's own network listens on a port of
// this host's loopback for no longer than it takes. Behind passt the guest's agent makes
// the connection, and without an agent there is SSH's port only.
func (m *machine) DialPort(ctx context.Context, port int) (net.Conn, error) {
	if m.plan.network == networkNone {
		return nil, fmt.Errorf("dialling the guest's port %d: %w: it has no network", port, vm.ErrUnsupported)
	}
	if port < 1 || port > 65535 {
		return nil, fmt.Errorf("dialling the guest: %d is no port", port)
	}
	ctx, cancel := m.whileAlive(ctx)
	defer cancel()
	for pause := 20 * time.Millisecond; ; pause = min(2*pause, 500*time.Millisecond) {
		conn, err := m.dialPort(ctx, port)
		switch {
		case err == nil:
			return conn, nil
		case m.over():
			return nil, vm.ErrEnded
		case errors.Is(err, vm.ErrUnsupported) || errors.Is(err, guest.ErrUnsupported):
			return nil, fmt.Errorf("dialling the guest's port %d: %w", port, err)
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			if m.over() {
				return nil, vm.ErrEnded
			}
			return nil, fmt.Errorf("dialling the guest's port %d: %w", port, errors.Join(ctx.Err(), err))
		}
	}
}

// dialPort tries once, in the network's way.
func (m *machine) dialPort(ctx context.Context, port int) (net.Conn, error) {
	if m.passt != nil {
		return m.passPort(ctx, port)
	}
	conn, err := m.forward(ctx, port)
	if err == nil {
		m.address.Store(true)
	}
	return conn, err
}

// errNobody: the guest refused, or did not answer in time.
var errNobody = errors.New("nobody answers there")

// forward tries once: it has QEMU listen on a free port, connects to it, and stops the
// listening, which the connection outlives.
func (m *machine) forward(ctx context.Context, port int) (_ net.Conn, err error) {
	m.forwards.Lock()
	defer m.forwards.Unlock()
	listening, err := m.listen(ctx, port)
	if err != nil {
		return nil, err
	}
	defer func() {
		limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), commandLimit)
		defer cancel()
		if _, failure := m.monitor.human(limited, fmt.Sprintf("hostfwd_remove %s tcp:127.0.0.1:%d", netID, listening)); failure != nil {
			err = errors.Join(err, failure)
		}
	}()
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(listening)))
	if err != nil {
		return nil, err
	}
	if err := m.answered(ctx, listening); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return conn, nil
}

// listen has QEMU forward a port of its choice, and returns which. The caller holds
// forwards, so the one that is new is ours.
func (m *machine) listen(ctx context.Context, port int) (int, error) {
	before, err := m.connections(ctx)
	if err != nil {
		return 0, err
	}
	said, err := m.monitor.human(ctx, fmt.Sprintf("hostfwd_add %s tcp:127.0.0.1:0-:%d", netID, port))
	if err != nil {
		return 0, err
	}
	after, err := m.connections(ctx)
	if err != nil {
		return 0, err
	}
	known := map[int]bool{}
	for _, c := range before {
		known[c.sourcePort] = known[c.sourcePort] || c.state == forwarded
	}
	for _, c := range after {
		if c.state == forwarded && c.port == port && !known[c.sourcePort] {
			return c.sourcePort, nil
		}
	}
	return 0, fmt.Errorf("QEMU does not forward port %d: %.200s", port, strings.TrimSpace(said))
}

// answered waits until the connection that came in on our port has reached the guest:
// QEMU takes it before it knows whether anybody listens there.
func (m *machine) answered(ctx context.Context, listening int) error {
	deadline := time.Now().Add(connectLimit)
	seen := false
	for time.Now().Before(deadline) {
		connections, err := m.connections(ctx)
		if err != nil {
			return err
		}
		found := false
		for _, c := range connections {
			if c.sourcePort == listening && c.state != forwarded {
				if c.state == established {
					return nil
				}
				found = true
			}
		}
		if seen && !found {
			return errNobody // refused
		}
		seen = seen || found
		select {
		case <-time.After(2 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return errNobody
}

// States of a connection in QEMU's words.
const (
	forwarded   = "HOST_FORWARD" // a port that it listens on
	established = "ESTABLISHED"
)

// connection is one TCP line of what QEMU tells of its user network.
type connection struct {
	state      string
	source     string
	sourcePort int
	dest       string
	port       int
}

func (m *machine) connections(ctx context.Context) ([]connection, error) {
	said, err := m.monitor.human(ctx, "info usernet")
	if err != nil {
		return nil, err
	}
	return parseConnections(said), nil
}

// parseConnections reads the table; lines of another shape are none of ours:
//
//	Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ
//	TCP[HOST_FORWARD]  84       127.0.0.1 40195       10.0.2.15    22     0     0
func parseConnections(said string) []connection {
	var all []connection
	for line := range strings.Lines(said) {
		f := strings.Fields(line)
		if len(f) != 8 || !strings.HasPrefix(f[0], "TCP[") || !strings.HasSuffix(f[0], "]") {
			continue
		}
		c := connection{state: f[0][4 : len(f[0])-1], source: f[2], dest: f[4]}
		var err, err2 error
		c.sourcePort, err = strconv.Atoi(f[3])
		c.port, err2 = strconv.Atoi(f[5])
		if err == nil && err2 == nil {
			all = append(all, c)
		}
	}
	return all
}
