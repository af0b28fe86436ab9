package qemu

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/vm"
)

// What a guest sees behind passt is what it sees in QEMU's own network, so that a state
// fits whatever the host's addresses have become: passt would hand out the host's.
const (
	gatewayAddress  = "10.0.2.2"
	guestAddress6   = "fec0::15"          // its network is what counts: the guest makes an address of its own there
	gatewayMAC      = "52:55:0a:00:02:02" // of all that is outside; the host's own may change
	sshPort         = 22
	passtReadyLimit = 10 * time.Second // it takes 20 ms
)

var guestIP = netip.MustParseAddr(guestAddress)

// passt is one machine's network: a program of that name, which makes the guest's
// connections in the host's name, and the wire to it.
type passt struct {
	owner   *owner
	wire    *wire
	qemu    *os.File // QEMU's end
	port    int      // of this host's loopback, which leads to the guest's sshd; 0: there is none
	carried chan struct{}
}

// findPasst finds the program.
func findPasst() (string, error) {
	if runtime.GOOS != "linux" {
		return "", fmt.Errorf("the network passt: %w: it is there on Linux only", vm.ErrUnsupported)
	}
	path, err := exec.LookPath("passt")
	if err != nil {
		return "", fmt.Errorf("the network passt: it is not installed (Debian, Ubuntu: apt-get install passt): %w", err)
	}
	return path, nil
}

// openPasst starts it and waits until it answers. A guest without our agent has one port
// forwarded, for SSH: passt cannot do that later.
func openPasst(ctx context.Context, p *plan, log *slog.Logger) (n *passt, err error) {
	for range 3 { // somebody else may take the port first
		n, err = startPasst(ctx, p)
		if err == nil || p.spec.Agent || ctx.Err() != nil {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("the network passt: %w", err)
	}
	n.carried = make(chan struct{})
	go func() {
		defer close(n.carried)
		if err := n.wire.carry(); err != nil {
			log.Warn("the machine's network was cut", "vm", p.spec.ID, "error", err)
		}
	}()
	return n, nil
}

func startPasst(ctx context.Context, p *plan) (_ *passt, err error) {
	n := &passt{}
	if !p.spec.Agent {
		if n.port, err = freePort(ctx); err != nil {
			return nil, err
		}
	}
	inner, qemu, err := pair("QEMU's network")
	if err != nil {
		return nil, err
	}
	outer, theirs, err := pair("passt")
	if err != nil {
		return nil, errors.Join(err, inner.Close(), qemu.Close())
	}
	defer func() { _ = theirs.Close() }() // the child has its own
	n.wire, n.qemu = newWire(inner, outer), qemu
	cmd := exec.CommandContext(context.WithoutCancel(ctx), p.passt, passtArgs(n.port, nameServers())...)
	cmd.Dir = p.spec.Dir
	cmd.Env = append(vm.ChildEnv(), markEnv+"="+p.spec.Dir)
	cmd.ExtraFiles = []*os.File{theirs}
	if n.owner, err = own(cmd); err != nil {
		n.wire.close()
		return nil, errors.Join(err, qemu.Close())
	}
	_ = theirs.Close() // so that its end is the stream's
	if err := n.ready(ctx, p.mac); err != nil {
		n.end()
		if said := n.complaint(); said != "" {
			err = fmt.Errorf("%w: it says: %s", err, said)
		}
		return nil, err
	}
	return n, nil
}

// passtArgs is its command line; 3 is where ExtraFiles begin.
func passtArgs(port int, servers []string) []string {
	args := []string{
		"--foreground", "--quiet", "--stderr", "--one-off", "--fd", "3",
		"--no-map-gw", "-a", guestAddress, "-n", "24", "-g", gatewayAddress, "-a", guestAddress6, "-M", gatewayMAC,
	}
	for _, s := range servers {
		args = append(args, "-D", s)
	}
	if port != 0 {
		args = append(args, "-t", fmt.Sprintf("127.0.0.1/%d:%d", port, sshPort))
	}
	return args
}

// Where a host keeps its name servers' addresses, and where systemd-resolved keeps the
// real ones if it is itself the only one, on the loopback.
var resolvers = []string{"/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"}

// nameServers are those for the guest if passt would find none for it: none of the
// loopback's can be reached from there. Nil: passt finds them.
func nameServers() []string {
	for i, path := range resolvers {
		raw, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		if found := parseResolver(string(raw)); len(found) > 0 {
			if i == 0 {
				return nil
			}
			return found
		}
	}
	return nil
}

// parseResolver lists a resolv.conf's name servers that are not on the loopback.
func parseResolver(text string) (servers []string) {
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 2 || f[0] != "nameserver" {
			continue
		}
		if a, err := netip.ParseAddr(f[1]); err == nil && a.Zone() == "" && !a.IsLoopback() && !a.IsUnspecified() {
			servers = append(servers, a.String())
		}
	}
	return servers
}

// freePort finds a port of the loopback that nobody has.
func freePort(ctx context.Context) (int, error) {
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return 0, fmt.Errorf("looking for a free port: %w", err)
	}
	return l.Addr().(*net.TCPAddr).Port, l.Close()
}

// ready asks passt for its gateway's MAC address until it answers: it says nothing by
// itself when it has come up.
func (n *passt) ready(ctx context.Context, mac string) error {
	ctx, cancel := context.WithTimeout(ctx, passtReadyLimit)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = n.wire.world.SetDeadline(time.Unix(1, 0)) })
	err := n.askForGateway(mac)
	if !stop() {
		return fmt.Errorf("waiting for passt to come up: %w", ctx.Err())
	}
	if err != nil {
		return fmt.Errorf("passt does not come up: %w", err)
	}
	return nil
}

func (n *passt) askForGateway(mac string) error {
	question, err := whoHas(mac, gatewayAddress)
	if err != nil {
		return err
	}
	if _, err := n.wire.world.Write(question); err != nil {
		return err
	}
	in, frame := bufio.NewReader(n.wire.world), make([]byte, 4+maxFrame)
	for {
		size, err := readFrame(in, frame)
		if err != nil {
			return err
		}
		// What else is said before QEMU is there is for nobody. An answer's kind is 2.
		if f := frame[4:size]; len(f) >= etherHeader+8 && binary.BigEndian.Uint16(f[etherType:]) == typeARP && f[etherHeader+7] == 2 {
			return nil
		}
	}
}

// whoHas is an ARP question for an IPv4 address, with its length before it, from somebody
// who has none yet.
func whoHas(mac, address string) ([]byte, error) {
	from, err := net.ParseMAC(mac)
	if err != nil {
		return nil, err
	}
	to, err := netip.ParseAddr(address)
	if err != nil {
		return nil, err
	}
	body := append([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, from...)
	body = binary.BigEndian.AppendUint16(body, typeARP)
	body = append(body, 0, 1, 8, 0, 6, 4, 0, 1) // Ethernet, IPv4, their lengths, a question
	body = append(append(body, from...), 0, 0, 0, 0)
	body = append(append(body, make([]byte, 6)...), to.AsSlice()...)
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...), nil
}

// complaint is what passt said, but not that it could not say it to a syslog as well, and
// that it has given up root's rights.
func (n *passt) complaint() string {
	var kept []string
	for line := range strings.Lines(n.owner.said.String()) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasSuffix(line, "to syslog") && !strings.HasPrefix(line, "Don't run as root") {
			kept = append(kept, line)
		}
	}
	return strings.Join(kept, "; ")
}

// end ends passt, which does so by itself when QEMU does, and kills it if it does not.
func (n *passt) end() {
	if n == nil {
		return
	}
	n.wire.close()
	_ = n.qemu.Close()
	if n.carried != nil {
		<-n.carried
	}
	select {
	case <-n.owner.exited:
		return
	case <-time.After(quitLimit):
	}
	_ = n.owner.cmd.Process.Kill()
	<-n.owner.exited
}

// passPort tries once to connect to a port of the guest. Where passt forwards SSH's, the
// client must be the first to speak, as SSH's are: passt 2023-03 leaves the guest's half
// of the handshake without an answer until there is something to send.
func (m *machine) passPort(ctx context.Context, port int) (net.Conn, error) {
	switch {
	case m.plan.spec.Agent:
		return m.askAgent(ctx, port)
	case port != sshPort:
		return nil, fmt.Errorf("%w: passt forwards a port that it was told when it was started, and that is %d", vm.ErrUnsupported, sshPort)
	}
	limited, cancel := context.WithTimeout(ctx, connectLimit)
	defer cancel()
	var own uint16
	var answer <-chan bool
	dialer := net.Dialer{Control: func(_, _ string, c syscall.RawConn) (err error) {
		// passt keeps the port that we come from, so the guest's answer has it.
		own, err = bindLoopback(c)
		answer = m.passt.wire.expect(own)
		return err
	}}
	conn, err := dialer.DialContext(limited, "tcp4", fmt.Sprintf("127.0.0.1:%d", m.passt.port))
	defer m.passt.wire.forget(own)
	if err != nil {
		return nil, err
	}
	// passt takes the connection before it asks the guest.
	select {
	case took := <-answer:
		if took {
			return conn, nil
		}
		err = errNobody
	case <-limited.Done():
		err = errors.Join(errNobody, ctx.Err())
	}
	return nil, errors.Join(err, conn.Close())
}

// bindLoopback gives a socket a free port of the loopback, and says which.
func bindLoopback(c syscall.RawConn) (port uint16, err error) {
	outer := c.Control(func(fd uintptr) {
		if err = unix.Bind(int(fd), &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
			return
		}
		var name unix.Sockaddr
		if name, err = unix.Getsockname(int(fd)); err == nil {
			port = uint16(name.(*unix.SockaddrInet4).Port)
		}
	})
	return port, errors.Join(outer, err)
}

// askAgent has the guest's agent connect to a port of its loopback: no port of this
// host's is needed.
func (m *machine) askAgent(ctx context.Context, port int) (net.Conn, error) {
	conn, err := m.line.Dial(ctx)
	if err != nil {
		return nil, err
	}
	if err := guest.Connect(ctx, conn, port); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return conn, nil
}
