package qemu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/vm"
)

// portName is what the guest knows the port by.
const portName = guest.Port

// portID is QEMU's own name for the port and what is behind it, and of the file that is
// passed to it for a new stream.
const portID = "agent"

// port is the host's side of the one stream to the guest's agent. It is a stream at a
// time: a new one cuts the one before, which the guest sees.
type port struct {
	monitor *monitor
	turn    chan struct{} // holds one token: whoever has it may change what follows
	first   *net.UnixConn // the stream that QEMU was started with, until it is used
	current net.Conn      // the one in use; nil: none yet
}

func newPort(q *monitor, first *net.UnixConn) *port {
	p := &port{monitor: q, turn: make(chan struct{}, 1), first: first}
	p.turn <- struct{}{}
	return p
}

// open makes a new stream. QEMU takes one only while the guest's driver is there, so this
// waits for a guest that is starting.
func (p *port) open(ctx context.Context) (net.Conn, error) {
	for pause := 5 * time.Millisecond; ; pause = min(2*pause, 200*time.Millisecond) {
		conn, err := p.try(ctx)
		switch {
		case err == nil:
			return conn, nil
		case errors.Is(err, errMonitorGone):
			return nil, vm.ErrEnded
		}
		select {
		case <-time.After(pause):
		case <-p.monitor.done:
			return nil, vm.ErrEnded
		case <-ctx.Done():
			return nil, fmt.Errorf("opening the guest's port anew: %w", errors.Join(ctx.Err(), err))
		}
	}
}

// try makes a new stream in place of the one before.
func (p *port) try(ctx context.Context) (net.Conn, error) {
	release, err := p.hold(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	if p.first != nil {
		p.current, p.first = p.first, nil
		return p.current, nil
	}
	p.cut()
	ours, theirs, err := pair("the guest's port")
	if err != nil {
		return nil, err
	}
	defer func() { _ = theirs.Close() }() // QEMU has its own
	if err := p.replace(ctx, theirs); err != nil {
		_ = ours.Close()
		return nil, err
	}
	p.current = ours
	return ours, nil
}

// replace puts another stream behind the guest's port.
func (p *port) replace(ctx context.Context, f *os.File) error {
	if err := p.monitor.pass(ctx, portID, f); err != nil {
		return err
	}
	address := map[string]any{"type": "fd", "data": map[string]string{"str": portID}}
	return p.monitor.run(ctx, "chardev-change", map[string]any{
		"id":      portID,
		"backend": map[string]any{"type": "socket", "data": map[string]any{"addr": address, "server": false}},
	})
}

// hold keeps new streams from being made until release is called.
func (p *port) hold(ctx context.Context) (release func(), err error) {
	select {
	case <-p.turn:
		return func() { p.turn <- struct{}{} }, nil
	case <-p.monitor.done:
		return nil, vm.ErrEnded
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// cut closes the stream, so that the guest sees its port disconnected. The caller holds
// the port.
func (p *port) cut() {
	if p.first != nil {
		p.current, p.first = p.first, nil
	}
	if p.current != nil {
		_ = p.current.Close()
	}
}

// end cuts the stream for good; the monitor has ended.
func (p *port) end() {
	<-p.turn // whoever has it is about to find the monitor gone
	p.cut()
}
