//go:build linux

package qemu_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/vm"
	"github.com/paddock-ci/paddock/vm/qemu"
)

// The cast: a host with a loopback, a LAN (10.77.0.0/24) and a network of its own like a
// bridge for containers (10.78.0.0/24); a neighbour in the LAN, which is the router, too.
// On each of their addresses somebody listens on one and the same port and says where he
// is. The host's first name server is on its loopback, its second one is the neighbour.

// row is one thing that a guest may try, as the documentation words it. Its script
// prints what was reached, or nothing.
type row struct {
	what    string
	script  string
	want    string // in what the script prints, if it is reached; of forged frames: who saw them
	reached map[string]bool
}

// networks are the values of Config.Network, in the table's order.
var networks = []string{"user", "passt", "none"}

func by(networks ...string) map[string]bool {
	reached := map[string]bool{}
	for _, n := range networks {
		reached[n] = true
	}
	return reached
}

// ask is a script that asks the listener on an address, or several, who he is. Behind
// passt 2023-03 nc sometimes waits for ever when both ends close at once.
func ask(addresses ...string) string {
	return fmt.Sprintf("for a in %s; do timeout 4 nc -w 2 $a 7777 </dev/null; done", strings.Join(addresses, " "))
}

// lookUp is a script that asks name servers for a name.
func lookUp(servers string) string {
	return "for s in " + servers + "; do timeout 3 nslookup -type=a who.test $s; done"
}

// The guest's router has a link-local address, and passt's gateway one, too.
const routers = "$(ip -6 route show default | sed -n 's/.* via \\([^ ]*\\) .*/\\1%eth0/p')"

// table is what a guest can reach. The last rows are a guest's whose root has given up
// its own loopback in order to put such addresses on the wire. It may well not
// understand the answers, so it is counted who was connected to.
var table = []row{
	{"the host's 127.0.0.1, by the gateway's address", ask("10.0.2.2"), "host 127.0.0.1", by("user")},
	{"the host's 127.0.0.1 by UDP", lookUp("10.0.2.2"), "192.0.2.127", by("user")},
	{"the host's ::1, by the gateway's addresses", ask("fec0::2", routers), "host ::1", by("user")},
	{"a name server on the host's loopback", lookUp("10.0.2.3 $(sed -n 's/^nameserver //p' /etc/resolv.conf)"), "192.0.2.127", by("user")},
	{"names, by a name server of the host", "nslookup -type=a who.test", "192.0.2.", by("user", "passt")},
	{"the host's own address in its network", ask("10.77.0.1"), "host 10.77.0.1", by("user", "passt")},
	{"the host's own IPv6 address in its network", ask("fd77::1"), "host fd77::1", by("user", "passt")},
	{"the host's link-local IPv6 address", ask(hostLinkLocal + "%eth0"), "host " + hostLinkLocal, by("passt")},
	{"the host's address in another network, a bridge for containers for instance", ask("10.78.0.1"), "host 10.78.0.1", by("user", "passt")},
	{"other machines of the network that the host is in", ask("10.77.0.2"), "LAN 10.77.0.2", by("user", "passt")},
	{"the same by IPv6", ask("fd77::2"), "LAN fd77::2", by("user", "passt")},
	{"169.254.169.254, a cloud's metadata service", ask("169.254.169.254"), "LAN 169.254.169.254", by("user", "passt")},
	{"the host's 127.0.0.1, by frames with that address", forge4, "127.0.0.1", by("user")},
	{"the host's ::1, by frames with that address", forge6, "::1", by("user")},
}

// forged is the first of the rows with forged frames.
var forged = len(table) - 2

const (
	forge4 = `for i in all default eth0; do echo 1 >/proc/sys/net/ipv4/conf/$i/route_localnet; done
ip route del local 127.0.0.0/8 dev lo table local; ip route del local 127.0.0.1 dev lo table local
ip route add 127.0.0.1/32 via 10.0.2.2 dev eth0 src 10.0.2.15; ` + "nc -w 2 127.0.0.1 7778 </dev/null"
	forge6 = `via=$(ip -6 route show default | sed -n 's/.* via \([^ ]*\) .*/\1/p')
ip -6 route del local ::1 dev lo table local; ip -6 addr del ::1/128 dev lo
ip -6 route add ::1/128 via $via dev eth0; ` + "nc -w 2 ::1 7778 </dev/null"
)

// What a guest can reach is what is documented, and nobody can reach the guest.
func TestWhatAGuestCanReach(t *testing.T) {
	if network := os.Getenv(networkEnv); network != "" {
		inside(t, network)
		return
	}
	if os.Geteuid() != 0 {
		t.Fatal("this test makes network namespaces: it needs root (sudo go test ./vm/qemu -run TestWhatAGuestCanReach)")
	}
	image(t, "arm64") // in here is nothing to build it from
	t.Parallel()
	for _, network := range networks {
		t.Run(network, func(t *testing.T) {
			t.Parallel()
			newHost(t).run(t, "-test.run=^TestWhatAGuestCanReach$", networkEnv+"="+network)
		})
	}
}

// inside runs in the host's namespace.
func inside(t *testing.T, network string) {
	connections := map[string]func() int{"127.0.0.1": count(t, "127.0.0.1"), "::1": count(t, "::1")}
	before := listening(t)
	m := boot(t, newDriver(t, qemu.Config{Network: network}), good(t))
	c := dial(t, m)
	if network != "none" {
		up(t, c)
	}
	while(t, m, network, func() {
		var asking sync.WaitGroup
		for _, r := range table[:forged] {
			asking.Go(func() {
				said := run(t, c, r.script)
				r.compare(t, network, strings.Contains(said, r.want), said)
			})
		}
		asking.Wait()
		for _, r := range table[forged:] {
			said := run(t, c, r.script)
			r.compare(t, network, connections[r.want]() > 0, said)
		}
	})
	if now := listening(t); !slices.Equal(now, before) {
		t.Errorf("ports that somebody listens on: %q before the machine, %q while it runs", before, now)
	}
}

// up brings the guest's network up, and waits for an IPv6 address as well.
func up(t *testing.T, c *guest.Client) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	sh(t, c, "for i in all default eth0; do echo 0 >/proc/sys/net/ipv6/conf/$i/accept_dad; done")
	n, err := c.NetworkUp(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("the guest's network: %v", n)
	sh(t, c, "for i in $(seq 100); do ip -6 addr show dev eth0 scope site | grep -q inet6 && ip -6 route show default | grep -q via && exit 0; sleep 0.1; done; ip -6 addr; ip -6 route; exit 1")
}

// run runs a script in the guest and returns what it printed.
func run(t *testing.T, c *guest.Client, script string) string {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var mu sync.Mutex
	var said strings.Builder
	start := time.Now()
	defer func() { t.Logf("%v: %s", time.Since(start).Round(time.Millisecond), script) }()
	_, err := c.Exec(ctx, guest.Command{Argv: []string{"/bin/timeout", "20", "/bin/sh", "-c", script}}, func(_ guest.Stream, p []byte) {
		mu.Lock()
		defer mu.Unlock()
		said.Write(p)
	})
	if err != nil {
		t.Errorf("%s: %v", script, err)
	}
	return said.String()
}

// compare compares what was reached with the table.
func (r row) compare(t *testing.T, network string, reached bool, said string) {
	if reached != r.reached[network] {
		t.Errorf("network %s: %s: reached %v, the table says %v; the guest saw %q", network, r.what, reached, r.reached[network], said)
	}
}

// while does something while the guest is dialled, and looks at every port that is open
// meanwhile: the machine may open one of the loopback for that, if its network is QEMU's
// own.
func while(t *testing.T, m vm.Machine, network string, do func()) {
	t.Helper()
	before := listening(t)
	ctx, cancel := context.WithCancel(t.Context())
	dialled := make(chan struct{})
	go func() {
		defer close(dialled)
		_, _ = m.(vm.PortDialer).DialPort(ctx, 9) // nobody is there
	}()
	done := make(chan struct{})
	go func() {
		defer close(done)
		do()
	}()
	for running := true; running; {
		select {
		case <-done:
			running = false
		case <-time.After(20 * time.Millisecond):
		}
		for _, l := range listening(t) {
			if !slices.Contains(before, l) && (network != "user" || !strings.HasPrefix(l, "127.0.0.1:")) {
				t.Errorf("network %s: while the guest is dialled somebody listens on %s", network, l)
				running = false
			}
		}
	}
	<-done
	cancel()
	<-dialled
}

// The documentation's table is this file's.
func TestReachIsDocumented(t *testing.T) {
	var b strings.Builder
	b.WriteString("| from a guest, with `node.qemu.network` |")
	for _, n := range networks {
		fmt.Fprintf(&b, " `%s` |", n)
	}
	b.WriteString("\n|---|" + strings.Repeat("---|", len(networks)) + "\n")
	for _, r := range table {
		fmt.Fprintf(&b, "| %s |", r.what)
		for _, n := range networks {
			fmt.Fprintf(&b, " %s |", map[bool]string{true: "reached", false: "no"}[r.reached[n]])
		}
		b.WriteString("\n")
	}
	raw, err := os.ReadFile("../../docs/machines.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, begins := strings.Cut(string(raw), "<!-- reach -->\n")
	section, _, ends := strings.Cut(section, "<!-- /reach -->\n")
	if !begins || !ends || !strings.Contains(section, "\n\n"+b.String()+"\n") {
		t.Errorf("between its reach marks docs/machines.md should have:\n%s", b.String())
	}
}

// run runs this test binary inside the host's namespace.
func (h *host) run(t *testing.T, args ...string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	resolv := t.TempDir() + "/resolv.conf"
	if err := os.WriteFile(resolv, []byte("nameserver 127.0.0.1\nnameserver 10.77.0.2\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "sh", "-c", `mount --bind "$0" /etc/resolv.conf && exec "$@"`,
		resolv, self, args[0], "-test.v", "-test.timeout=5m")
	cmd.Env = append(os.Environ(), args[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	var out []byte
	h.host.in(t, func() { out, err = cmd.CombinedOutput() })
	t.Logf("%s", out)
	if err != nil {
		t.Errorf("in the host's namespace: %v", err)
	}
}
