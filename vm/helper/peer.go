package helper

import (
	"fmt"
	"net"
	"os"
)

// checkPeer refuses a peer of another user. The folder's mode keeps others out already;
// this holds also if someone opens it.
func checkPeer(conn net.Conn) error {
	unix, ok := conn.(*net.UnixConn)
	if !ok {
		return fmt.Errorf("peer of a %T cannot be checked", conn)
	}
	raw, err := unix.SyscallConn()
	if err != nil {
		return fmt.Errorf("checking the peer: %w", err)
	}
	var uid int
	var peerErr error
	if err := raw.Control(func(fd uintptr) { uid, peerErr = peerUID(int(fd)) }); err != nil {
		return fmt.Errorf("checking the peer: %w", err)
	}
	if peerErr != nil {
		return fmt.Errorf("checking the peer: %w", peerErr)
	}
	return allow(uid, os.Geteuid())
}

// allow is the rule: our own user, nobody else, not even root.
func allow(peer, own int) error {
	if peer != own {
		return fmt.Errorf("peer is user %d, not %d", peer, own)
	}
	return nil
}
