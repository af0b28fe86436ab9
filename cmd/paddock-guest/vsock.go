package main

import (
	"context"
	"fmt"
	"io"
	"runtime"

	"github.com/mdlayher/socket"
	"golang.org/x/sys/unix"

	"github.com/paddock-ci/paddock/runner/guest"
)

// hostCID is the host's address, the only one whose connections are taken on Linux, where
// a process in the guest can connect to the guest's own. macOS has no such loopback.
const hostCID = 2

// overVsock listens on the agent's vsock port.
func overVsock() (transport, error) {
	l, err := socket.Socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0, "vsock", nil)
	if err != nil {
		return transport{}, fmt.Errorf("opening vsock: %w", err)
	}
	err = l.Bind(&unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: guest.VsockPort})
	if err == nil {
		err = l.Listen(maxLines)
	}
	if err != nil {
		_ = l.Close()
		return transport{}, fmt.Errorf("listening on vsock port %d: %w; does another agent serve there?", guest.VsockPort, err)
	}
	return overListener(fmt.Sprintf("vsock port %d", guest.VsockPort), l.Close, func(ctx context.Context) (io.ReadWriteCloser, error) {
		conn, from, err := l.Accept(ctx, 0)
		if err != nil {
			return nil, err
		}
		if vm, ok := from.(*unix.SockaddrVM); runtime.GOOS == "linux" && (!ok || vm.CID != hostCID) {
			_ = conn.Close()
			return nil, fmt.Errorf("a connection that is not the host's: %v", from)
		}
		return conn, nil
	}), nil
}
