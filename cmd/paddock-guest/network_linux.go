package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"
	"golang.org/x/sys/unix"

	"github.com/paddock-ci/paddock/runner/guest"
)

// Timing of DHCP with a server that is on the same host.
const (
	askTimeout  = time.Second // until a question is repeated
	askRetries  = 15
	soonest     = 30 * time.Second       // between two renewals
	addressTick = 100 * time.Millisecond // between two looks for an address that another brings
)

// system is the machine as the agent changes it.
type system struct {
	log    *slog.Logger
	leases chan lease // to be renewed
}

// lease is an address that is ours for a time.
type lease struct {
	*nclient4.Lease
	on string // the interface
}

var _ guest.System = (*system)(nil)

func newSystem(log *slog.Logger) *system { return &system{log: log, leases: make(chan lease, 1)} }

// NetworkUp does nothing where there is an address. Where another brings the network up
// it waits for that; where nobody does, it asks by DHCP.
func (s *system) NetworkUp(ctx context.Context) error {
	for {
		up, down, err := interfaces()
		switch {
		case err != nil:
			return err
		case hasAddress(up):
			return nil
		case len(up)+len(down) == 0:
			return errors.New("the machine has no network interface; is its driver (virtio_net) loaded?")
		case len(up) == 0:
			return s.ask(ctx, down[0].Name)
		case isInit():
			return s.ask(ctx, up[0].Name)
		}
		select {
		case <-time.After(addressTick):
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s to get an address: %w", up[0].Name, ctx.Err())
		}
	}
}

// interfaces are those that lead out, by whether they are up.
func interfaces() (up, down []net.Interface, err error) {
	all, err := net.Interfaces()
	if err != nil {
		return nil, nil, fmt.Errorf("listing the network's interfaces: %w", err)
	}
	for _, i := range all {
		_, err := os.Stat(filepath.Join("/sys/class/net", i.Name, "device"))
		switch {
		case i.Flags&net.FlagLoopback != 0 || err != nil: // a bridge or a tunnel
		case i.Flags&net.FlagUp != 0:
			up = append(up, i)
		default:
			down = append(down, i)
		}
	}
	return up, down, nil
}

func hasAddress(up []net.Interface) bool {
	for _, i := range up {
		addresses, err := i.Addrs()
		if err != nil {
			continue
		}
		for _, address := range addresses {
			if ip, _, err := net.ParseCIDR(address.String()); err == nil && ip.To4() != nil && ip.IsGlobalUnicast() {
				return true
			}
		}
	}
	return false
}

// ask gets an address by DHCP, and sets it, the route and the name servers.
func (s *system) ask(ctx context.Context, name string) error {
	if err := linkUp(name); err != nil {
		return err
	}
	client, err := nclient4.New(name, nclient4.WithTimeout(askTimeout), nclient4.WithRetry(askRetries))
	if err != nil {
		return fmt.Errorf("asking for an address on %s: %w", name, err)
	}
	defer func() { _ = client.Close() }()
	got, err := client.Request(ctx)
	if err != nil {
		return fmt.Errorf("asking for an address on %s: %w", name, err)
	}
	if err := configure(name, got.ACK); err != nil {
		return err
	}
	s.log.Info("network is up", "interface", name, "address", got.ACK.YourIPAddr.String())
	select {
	case s.leases <- lease{got, name}:
	default: // one is being renewed already
	}
	return nil
}

// configure sets what a server has granted.
func configure(name string, ack *dhcpv4.DHCPv4) error {
	address, mask := ack.YourIPAddr.To4(), ack.SubnetMask()
	if address == nil {
		return fmt.Errorf("the DHCP server's address %v is none", ack.YourIPAddr)
	}
	if len(mask) != net.IPv4len {
		mask = address.DefaultMask()
	}
	if err := setAddress(name, unix.SIOCSIFADDR, address); err != nil {
		return fmt.Errorf("setting the address of %s: %w", name, err)
	}
	if err := setAddress(name, unix.SIOCSIFNETMASK, net.IP(mask)); err != nil {
		return fmt.Errorf("setting the mask of %s: %w", name, err)
	}
	if routers := ack.Router(); len(routers) > 0 {
		if err := routeVia(name, routers[0]); err != nil {
			return fmt.Errorf("setting the route by %v: %w", routers[0], err)
		}
	}
	if servers := ack.DNS(); len(servers) > 0 {
		return writeResolv(servers)
	}
	return nil
}

// writeResolv replaces /etc/resolv.conf, which may lead to a service that does not run.
func writeResolv(servers []net.IP) error {
	var text strings.Builder
	for _, server := range servers[:min(len(servers), 3)] { // what resolvers read
		fmt.Fprintf(&text, "nameserver %v\n", server)
	}
	if err := os.MkdirAll("/etc", 0o755); err != nil {
		return err
	}
	const path = "/etc/resolv.conf"
	if info, err := os.Lstat(path); err == nil && info.Mode()&os.ModeSymlink != 0 {
		_ = os.Remove(path) // if it stays, writing fails
	}
	if err := os.WriteFile(path, []byte(text.String()), 0o644); err != nil {
		return fmt.Errorf("writing the name servers: %w", err)
	}
	return nil
}

// run renews the lease, so that the address is nobody else's, until ctx ends.
func (s *system) run(ctx context.Context) {
	var l lease
	select {
	case l = <-s.leases:
	case <-ctx.Done():
		return
	}
	for ctx.Err() == nil {
		// Half of what is left, as DHCP has it.
		left := l.ACK.IPAddressLeaseTime(24*time.Hour) - time.Since(l.CreationTime)
		pause(ctx, max(soonest, left/2))
		renewed, err := renew(ctx, l)
		if err != nil {
			s.log.Warn("lease not renewed", "interface", l.on, "error", err)
			continue
		}
		l.Lease = renewed
	}
}

func renew(ctx context.Context, l lease) (*nclient4.Lease, error) {
	client, err := nclient4.New(l.on, nclient4.WithTimeout(askTimeout))
	if err != nil {
		return nil, err
	}
	defer func() { _ = client.Close() }()
	return client.Renew(ctx, l.Lease)
}

// control is a socket for changing interfaces.
func control(change func(fd int) error) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	return change(fd)
}

// linkUp brings an interface up; the loopback gets its address by that, too.
func linkUp(name string) error {
	err := control(func(fd int) error {
		request, err := unix.NewIfreq(name)
		if err != nil {
			return err
		}
		if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, request); err != nil {
			return err
		}
		request.SetUint16(request.Uint16() | unix.IFF_UP)
		return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, request)
	})
	if err != nil {
		return fmt.Errorf("bringing %s up: %w", name, err)
	}
	return nil
}

func setAddress(name string, what uint, address net.IP) error {
	return control(func(fd int) error {
		request, err := unix.NewIfreq(name)
		if err != nil {
			return err
		}
		if err := request.SetInet4Addr(address.To4()); err != nil {
			return err
		}
		return unix.IoctlIfreq(fd, what, request)
	})
}

// routeVia makes router the way to everywhere, by one message of rtnetlink(7).
func routeVia(name string, router net.IP) error {
	i, err := net.InterfaceByName(name)
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	order := binary.NativeEndian
	// struct rtmsg: family, lengths of destination and source, tos, table, protocol,
	// scope, type; then flags.
	body := []byte{unix.AF_INET, 0, 0, 0, unix.RT_TABLE_MAIN, unix.RTPROT_DHCP, unix.RT_SCOPE_UNIVERSE, unix.RTN_UNICAST, 0, 0, 0, 0}
	attribute := func(kind uint16, value []byte) {
		body = order.AppendUint16(body, uint16(4+len(value)))
		body = append(order.AppendUint16(body, kind), value...)
	}
	attribute(unix.RTA_GATEWAY, router.To4())
	attribute(unix.RTA_OIF, order.AppendUint32(nil, uint32(i.Index)))
	message := order.AppendUint32(nil, uint32(unix.NLMSG_HDRLEN+len(body)))
	message = order.AppendUint16(message, unix.RTM_NEWROUTE)
	message = order.AppendUint16(message, unix.NLM_F_REQUEST|unix.NLM_F_ACK|unix.NLM_F_CREATE|unix.NLM_F_REPLACE)
	message = order.AppendUint32(message, 1)
	message = append(order.AppendUint32(message, 0), body...)
	if err := unix.Sendto(fd, message, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	answer := make([]byte, 4096)
	n, _, err := unix.Recvfrom(fd, answer, 0)
	if err != nil {
		return err
	}
	if n < unix.NLMSG_HDRLEN+4 || order.Uint16(answer[4:]) != unix.NLMSG_ERROR {
		return errors.New("the kernel's answer is none")
	}
	if errno := int32(order.Uint32(answer[unix.NLMSG_HDRLEN:])); errno != 0 {
		return unix.Errno(-errno)
	}
	return nil
}
