//go:build (darwin && arm64 && cgo) || vzstandin

package vz

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strconv"
	"time"

	"github.com/Code-Hex/vz/v3"

	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/vm"
)

// maxConnects is how many connects may be outstanding at one machine: each that is never
// answered costs a goroutine for as long as the process lives.
const maxConnects = 8

// Patience with one connect: at first short, since most answer at once or never, and
// doubled, so that maxConnects of them outlast any boot (2 s · 2⁸ is above 8 minutes).
const (
	firstPatience = 2 * time.Second
	connectPause  = 100 * time.Millisecond // after a refusal: nobody listens yet
)

// Dial opens a stream to the guest's agent.
func (m *machine) Dial(ctx context.Context) (net.Conn, error) {
	if m.gone() {
		return nil, vm.ErrEnded
	}
	alive, cancel := m.whileAlive(ctx)
	defer cancel()
	conn, err := m.line.Dial(alive)
	if m.gone() { // whatever became of it: the end is the better reason
		if err == nil {
			_ = conn.Close()
		}
		return nil, vm.ErrEnded
	}
	if err != nil {
		return nil, fmt.Errorf("dialling the guest: %w", err)
	}
	return conn, nil
}

// open makes the raw stream to the guest's agent; it tries until ctx ends.
func (m *machine) open(ctx context.Context) (net.Conn, error) {
	alive, cancel := m.whileAlive(ctx)
	defer cancel()
	patience := firstPatience
	for {
		if err := m.allowed(alive); err != nil {
			return nil, fmt.Errorf("connecting to the guest, which is being saved: %w", err)
		}
		conn, err := m.connect(alive, patience)
		switch {
		case err == nil:
			return conn, nil
		case m.gone():
			return nil, vm.ErrEnded
		case alive.Err() != nil:
			return nil, fmt.Errorf("connecting to vsock port %d of the guest: %w", guest.VsockPort, alive.Err())
		case errors.Is(err, errNoAnswer):
			patience *= 2
		}
		select {
		case <-alive.Done():
		case <-time.After(connectPause):
		}
	}
}

// connect tries once. A connect that answers too late is closed when it does.
func (m *machine) connect(ctx context.Context, patience time.Duration) (net.Conn, error) {
	device := m.device()
	if device == nil {
		return nil, errors.New("the machine has no vsock device")
	}
	select {
	case m.connects <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	type answer struct {
		conn net.Conn
		err  error
	}
	// Without room: an answer is either taken or known not to be, and then closed.
	answers := make(chan answer)
	given := make(chan struct{})
	defer close(given)
	go func() {
		conn, err := stream(device.Connect(guest.VsockPort))
		if err == nil {
			err = m.admit(conn)
		}
		select {
		case answers <- answer{conn, err}:
		case <-given:
			if err == nil {
				_ = conn.Close()
			}
		}
		<-m.connects
	}()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case a := <-answers:
		return a.conn, a.err
	case <-timer.C:
		return nil, errNoAnswer
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// errSaving: a stream came too late, the machine is about to stand still.
var errSaving = errors.New("the machine is being saved")

// admit takes a new stream for the line's, or closes it if none may be made.
func (m *machine) admit(conn net.Conn) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.shut != nil {
		return errors.Join(errSaving, conn.Close())
	}
	m.stream = conn
	return nil
}

// allowed waits until streams may be made.
func (m *machine) allowed(ctx context.Context) error {
	m.mu.Lock()
	shut := m.shut
	m.mu.Unlock()
	if shut == nil {
		return nil
	}
	select {
	case <-shut:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// hold cuts the stream to the guest and keeps new ones from being made until release is
// called. It waits for the connects that are under way, of which some may never answer.
func (m *machine) hold(ctx context.Context) (release func(), err error) {
	shut := make(chan struct{})
	m.mu.Lock()
	stream := m.stream
	m.shut, m.stream = shut, nil
	m.mu.Unlock()
	release = func() {
		m.mu.Lock()
		m.shut = nil
		m.mu.Unlock()
		close(shut)
	}
	if stream != nil {
		_ = stream.Close()
	}
	_ = m.line.Close() // and with it what it has carried
	limit := time.NewTimer(firstPatience)
	defer limit.Stop()
	for held := range maxConnects {
		select {
		case m.connects <- struct{}{}:
			defer func() { <-m.connects }()
		case <-limit.C:
			m.log.Debug("the framework has not answered all connects", "count", maxConnects-held)
			return release, nil
		case <-ctx.Done():
			release()
			return nil, ctx.Err()
		}
	}
	return release, nil
}

// stream is a connection as an interface: one that is nil without an error, as the
// bindings give it, would not be nil any more.
func stream(conn *vz.VirtioSocketConnection, err error) (net.Conn, error) {
	if err != nil {
		return nil, err
	}
	if conn == nil {
		return nil, errors.New("the framework gave neither a connection nor an error")
	}
	return conn, nil
}

// Address is what the host's DHCP server leased to the machine's MAC address.
func (m *machine) Address(ctx context.Context) (string, error) {
	if err := ctx.Err(); err != nil {
		return "", err
	}
	mac, err := net.ParseMAC(m.hardware.identity.MAC)
	if err != nil {
		return "", fmt.Errorf("the machine's MAC address: %w", err)
	}
	f, err := os.Open(m.leases)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil // no guest has asked for an address yet
	}
	if err != nil {
		return "", fmt.Errorf("reading the host's DHCP leases: %w", err)
	}
	defer func() { _ = f.Close() }()
	address, ok, err := vm.FindLease(f, mac, time.Now())
	if err != nil {
		return "", fmt.Errorf("reading the host's DHCP leases: %w", err)
	}
	if !ok {
		return "", nil
	}
	return address.String(), nil
}

// DialPort connects to a TCP port of the guest, over the host's network.
func (m *machine) DialPort(ctx context.Context, port int) (net.Conn, error) {
	const patience, pause = 5 * time.Second, 250 * time.Millisecond
	if port < 1 || port > 65535 {
		return nil, fmt.Errorf("there is no TCP port %d", port)
	}
	alive, cancel := m.whileAlive(ctx)
	defer cancel()
	last := errors.New("it has no address yet")
	for { // the lease comes seconds after the boot, and the listener after the lease
		if m.gone() {
			return nil, vm.ErrEnded
		}
		if alive.Err() != nil {
			return nil, fmt.Errorf("connecting to port %d of the guest: %w; last: %w (macOS 15 and newer ask whether a program may use the local network: see paddock node doctor)", port, alive.Err(), last)
		}
		address, err := m.Address(alive)
		if err != nil {
			last = err
		} else if address != "" {
			conn, err := (&net.Dialer{Timeout: patience}).DialContext(alive, "tcp", net.JoinHostPort(address, strconv.Itoa(port)))
			if err == nil {
				return conn, nil
			}
			last = err
		}
		select {
		case <-alive.Done():
		case <-time.After(pause):
		}
	}
}
