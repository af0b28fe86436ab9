package vz

import (
	"net"
	"os"
	"syscall"
	"time"
)

// SocketDevices are the machine's vsock devices.
func (v *VirtualMachine) SocketDevices() []*VirtioSocketDevice {
	var devices []*VirtioSocketDevice
	for range v.config.sockets {
		devices = append(devices, &VirtioSocketDevice{pointer: &pointer{}, machine: v})
	}
	return devices
}

// VirtioSocketDevice is a machine's vsock.
type VirtioSocketDevice struct {
	*pointer
	machine *VirtualMachine
}

// Connect opens a stream to a port of the guest. A machine that stands still does not
// answer, and a hook may do worse.
func (v *VirtioSocketDevice) Connect(port uint32) (*VirtioSocketConnection, error) {
	if hook := hooks().Connect; hook != nil {
		if handled, conn, err := hook(port); handled {
			return conn, err
		}
	}
	m := v.machine
	m.mu.Lock()
	for m.state == VirtualMachineStatePaused || m.state == VirtualMachineStateSaving {
		m.changed.Wait()
	}
	defer m.mu.Unlock() // until it is made: the machine either runs or has no new stream
	if m.state != VirtualMachineStateRunning {
		return nil, failure(ErrorInvalidVirtualMachineState, "the machine does not run")
	}
	return m.guest.accept(port)
}

// VirtioSocketConnection is a stream to a guest.
type VirtioSocketConnection struct {
	raw    net.Conn
	closed func() // told to the machine; nil: nobody counts
}

// pair makes the two ends of a stream, as sockets with deadlines.
func pair() (host *VirtioSocketConnection, guest net.Conn, err error) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err != nil {
		return nil, nil, err
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "vsock")
		ends[i], err = net.FileConn(f) // a duplicate
		_ = f.Close()
		if err != nil {
			return nil, nil, err
		}
	}
	return &VirtioSocketConnection{raw: ends[0]}, ends[1], nil
}

// Read reads.
func (v *VirtioSocketConnection) Read(b []byte) (n int, err error) { return v.raw.Read(b) }

// Write writes.
func (v *VirtioSocketConnection) Write(b []byte) (n int, err error) { return v.raw.Write(b) }

// Close closes the host's end.
func (v *VirtioSocketConnection) Close() error {
	if v.closed != nil {
		v.closed()
	}
	return v.raw.Close()
}

// LocalAddr is of no use.
func (v *VirtioSocketConnection) LocalAddr() net.Addr { return v.raw.LocalAddr() }

// RemoteAddr is of no use.
func (v *VirtioSocketConnection) RemoteAddr() net.Addr { return v.raw.RemoteAddr() }

// SetDeadline bounds reading and writing.
func (v *VirtioSocketConnection) SetDeadline(t time.Time) error { return v.raw.SetDeadline(t) }

// SetReadDeadline bounds reading.
func (v *VirtioSocketConnection) SetReadDeadline(t time.Time) error { return v.raw.SetReadDeadline(t) }

// SetWriteDeadline bounds writing.
func (v *VirtioSocketConnection) SetWriteDeadline(t time.Time) error {
	return v.raw.SetWriteDeadline(t)
}
