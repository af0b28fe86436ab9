package smoke

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/vm"
)

// Names of machines, by their part.
const (
	first   = "smoke-first"
	beside  = "smoke-beside-"
	surplus = "smoke-surplus"
	resumed = "smoke-resumed"
	again   = "smoke-again"
)

// steps are tried in this order.
var steps = []step{
	{"clone", nil, copies, "the image's directory must be readable and its volume have room; on APFS a clone takes no time and no room",
		func(ctx context.Context, t *trial) (string, error) { return t.clone(ctx, first, t.Image) }},
	{"boot", []string{"clone"}, 0, "is this program signed with the virtualization entitlement (make sign), and the login keychain unlocked?",
		func(ctx context.Context, t *trial) (string, error) { return "", t.boot(ctx, first, "") }},
	{"answer", []string{"boot"}, 0, "if there is a console, its end is above: does the guest boot, and does what answers (agent or SSH) start by itself, as the right user?",
		answer(first)},
	{"command", []string{"answer"}, quick, "log in by hand and run the same command", command},
	{"clock", []string{"command"}, quick, "the guest has no time service yet: the agent's wake sets its clock", clock(first)},
	{"guest's address", []string{"answer"}, quick, "does the guest's network come up by DHCP?", guestAddress},
	{"host's address", []string{"boot"}, time.Minute, "no lease for this machine's MAC address: is the lease file readable, and the network's range not used up? (leases last a day unless told otherwise)", hostAddress},
	{"port 22", []string{"boot"}, time.Minute, "macOS asks once whether this program may use the local network: System Settings, Privacy & Security, Local Network", port},
	{"fill the host", []string{"boot"}, 0, "the host runs fewer machines than it should: stop others, or reboot it if there are none", fill},
	{"one too many", []string{"fill the host"}, 0, "the limit is not seen as one: a node would take such a failure for a broken image", oneTooMany},
	{"destroy the others", []string{"fill the host"}, time.Minute, "machines that cannot be destroyed hold slots: reboot the host", destroyOthers},
	{"save", []string{"answer"}, copies, "saving needs macOS 14 and a configuration that allows it; without it machines start cold, and nothing else is lost", save},
	{"answer after saving", []string{"save"}, 0, "the machine should run on after it was saved: saved states are made while nobody needs the machine, so this is no loss at once", answer(first)},
	{"destroy", []string{"boot"}, time.Minute, "a machine that cannot be destroyed holds its slot: reboot the host", func(ctx context.Context, t *trial) (string, error) { return t.destroy(ctx, first) }},
	{"resume", []string{"save", "destroy"}, 0, "states are bound to one Mac, one user and one version of macOS; machines fall back to cold boots", resume},
	{"wake", []string{"resume"}, quick, "the guest runs with the clock of when it was saved", wake},
	{"clock after waking", []string{"wake"}, quick, "the guest's clock was not set: is its agent running as root?", clock(resumed)},
	{"destroy the resumed", []string{"resume"}, time.Minute, "reboot the host", func(ctx context.Context, t *trial) (string, error) { return t.destroy(ctx, resumed) }},
	{"boot again", []string{"destroy"}, 0, "the slot was not given back by the framework: it is leaked until the host reboots", bootAgain},
	{"leftovers", []string{"clone"}, 10 * time.Second, "these should have ended with their machines: please send this report", leftovers},
}

// answer waits until the guest of a machine answers.
func answer(name string) func(context.Context, *trial) (string, error) {
	return func(ctx context.Context, t *trial) (detail string, err error) {
		err = t.with(ctx, name, func(g Guest) error {
			hello, err := g.Hello(ctx)
			detail = "version " + hello.Version
			return err
		})
		if errors.Is(err, vm.ErrUnsupported) { // no reason to skip what all the rest stands on
			err = fmt.Errorf("these machines cannot be reached so: %s", oneLine(err))
		}
		if console := t.console(name); err != nil && console != "" {
			err = fmt.Errorf("%w; its console ends: %s", err, console)
		}
		return detail, err
	}
}

// script asks for what a report needs, and for the guest's clock in seconds at its end.
// It is the same on macOS and Linux.
const script = "uname -srm && date -u +%s"

func command(ctx context.Context, t *trial) (string, error) {
	asked := time.Now()
	err := t.with(ctx, first, func(g Guest) (err error) {
		t.said, err = execute(ctx, g, "/bin/sh", "-c", script)
		return err
	})
	if err != nil {
		return "", err
	}
	lines := strings.Fields(t.said)
	if len(lines) < 2 {
		return "", fmt.Errorf("%q was answered by %q", script, t.said)
	}
	t.skew, err = skew(lines[len(lines)-1], asked, time.Now())
	return strings.Join(lines[:len(lines)-1], " "), err
}

// execute runs a command and returns what it prints.
func execute(ctx context.Context, g Guest, argv ...string) (string, error) {
	const most = 4 << 10 // bytes kept; a guest may print without end
	var out strings.Builder
	exit, err := g.Exec(ctx, guest.Command{Argv: argv}, func(_ guest.Stream, p []byte) {
		out.Write(p[:min(len(p), most-out.Len())])
	})
	if err != nil {
		return "", err
	}
	if exit != 0 {
		return "", fmt.Errorf("%q ended with status %d: %q", strings.Join(argv, " "), exit, out.String())
	}
	return out.String(), nil
}

// clock compares the guest's clock with the host's.
func clock(name string) func(context.Context, *trial) (string, error) {
	const most = 10 * time.Second // a certificate's or a token's usual tolerance is above that
	return func(ctx context.Context, t *trial) (string, error) {
		off := t.skew
		if name != first { // the first one's was told by its command
			err := t.with(ctx, name, func(g Guest) error {
				asked := time.Now()
				said, err := execute(ctx, g, "date", "-u", "+%s")
				if err == nil {
					off, err = skew(strings.TrimSpace(said), asked, time.Now())
				}
				return err
			})
			if err != nil {
				return "", err
			}
		}
		if off.Abs() > most {
			return "", fmt.Errorf("the guest's clock is %s off the host's", off)
		}
		return fmt.Sprintf("%s off the host's", off), nil
	}
}

// networker is a guest that knows its addresses.
type networker interface {
	NetworkUp(ctx context.Context) (guest.Network, error)
}

func guestAddress(ctx context.Context, t *trial) (string, error) {
	err := t.with(ctx, first, func(g Guest) error {
		n, ok := g.(networker)
		if !ok {
			return skip{"only Paddock's agent tells its addresses"}
		}
		network, err := n.NetworkUp(ctx)
		if err == nil && len(network.Addresses) == 0 {
			err = errors.New("the guest has no address")
		}
		t.addresses = network.Addresses
		return err
	})
	return strings.Join(t.addresses, " "), err
}

// hostAddress asks until the host knows an address: a lease comes some seconds after the
// boot.
func hostAddress(ctx context.Context, t *trial) (string, error) {
	m, ok := t.machines[first].(vm.Addresser)
	if !ok {
		return "", skip{"this driver's machines have no address"}
	}
	for {
		address, err := m.Address(ctx)
		switch {
		case err != nil:
			return "", err
		case address != "" && len(t.addresses) > 0 && !slices.Contains(t.addresses, address):
			return "", fmt.Errorf("the host says %s, the guest %s: a stale lease gives one machine's address to another", address, strings.Join(t.addresses, " "))
		case address != "":
			return address, nil
		}
		if err := pause(ctx); err != nil {
			return "", fmt.Errorf("the host knows no address of the guest: %w", err)
		}
	}
}

// port connects to the guest's SSH port, from which the server speaks first. Nothing need
// listen there in a guest that has the agent.
func port(ctx context.Context, t *trial) (string, error) {
	m, ok := t.machines[first].(vm.PortDialer)
	if !ok {
		return "", skip{"this driver's machines have no ports"}
	}
	limit := 20 * time.Second
	if t.Agent {
		limit = 5 * time.Second
	}
	within, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	conn, err := m.DialPort(within, 22)
	if err != nil && t.Agent && within.Err() != nil {
		return "", skip{fmt.Sprintf("nobody listened within %s; a guest with the agent needs no SSH server", limit)}
	}
	if err != nil {
		return "", err
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetReadDeadline(time.Now().Add(limit)) // without one the step's own limit holds: the machine is destroyed after it
	line := make([]byte, 64)
	n, err := conn.Read(line)
	if err != nil {
		return "", fmt.Errorf("reading what the port says first: %w", err)
	}
	said, _, _ := strings.Cut(string(line[:n]), "\n")
	return fmt.Sprintf("%q", strings.TrimSpace(said)), nil
}

func fill(ctx context.Context, t *trial) (string, error) {
	if t.Slots == 0 {
		return "", skip{"these machines have no limit of their own"}
	}
	for i := 1; i < t.Slots; i++ {
		name := fmt.Sprint(beside, i)
		if _, err := t.clone(ctx, name, t.Image); err != nil {
			return "", err
		}
		if err := t.boot(ctx, name, ""); err != nil {
			return "", fmt.Errorf("machine %d of %d: %w", i+1, t.Slots, err)
		}
	}
	return fmt.Sprintf("%d machines run", t.Slots), nil
}

func oneTooMany(ctx context.Context, t *trial) (string, error) {
	if _, err := t.clone(ctx, surplus, t.Image); err != nil {
		return "", err
	}
	err := t.boot(ctx, surplus, "")
	switch {
	case err == nil:
		_, err := t.destroy(ctx, surplus)
		return "", errors.Join(fmt.Errorf("machine %d of %d boots", t.Slots+1, t.Slots), err)
	case !errors.Is(err, vm.ErrAtCapacity):
		return "", fmt.Errorf("it fails, but not for want of a slot: %w", err)
	}
	return "refused: " + oneLine(err), t.remove(surplus)
}

func destroyOthers(ctx context.Context, t *trial) (string, error) {
	var slowest time.Duration
	for i := 1; i < t.Slots; i++ {
		start := time.Now()
		if _, err := t.destroy(ctx, fmt.Sprint(beside, i)); err != nil {
			return "", err
		}
		slowest = max(slowest, time.Since(start))
	}
	return fmt.Sprintf("the slowest took %s", slowest.Round(time.Millisecond)), nil
}

func bootAgain(ctx context.Context, t *trial) (string, error) {
	if _, err := t.clone(ctx, again, t.Image); err != nil {
		return "", err
	}
	if err := t.boot(ctx, again, ""); err != nil {
		return "", err
	}
	return t.destroy(ctx, again)
}

// leftovers looks for what the machines left, and gives what is just ending some time.
func leftovers(ctx context.Context, t *trial) (string, error) {
	for name := range t.machines { // those of steps that failed
		if _, err := t.destroy(ctx, name); err != nil {
			return "", err
		}
	}
	if t.Left == nil {
		return "", skip{"nobody looks for processes here"}
	}
	for {
		now, err := t.left(ctx)
		if err != nil {
			return "", err
		}
		now = slices.DeleteFunc(now, func(s string) bool { return slices.Contains(t.before, s) })
		if len(now) == 0 {
			return fmt.Sprintf("none; %d were there before", len(t.before)), nil
		}
		if err := pause(ctx); err != nil {
			return "", fmt.Errorf("left over: %s", strings.Join(now, ", "))
		}
	}
}

// sockets lists what a machine left in its directory that is no plain file.
func sockets(dir string) (odd []string, err error) {
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && !d.Type().IsRegular() && d.Type()&fs.ModeSymlink == 0 {
			odd = append(odd, d.Name())
		}
		return err
	})
	return odd, err
}

// pause waits half a second, for what is asked again and again.
func pause(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(500 * time.Millisecond):
		return nil
	}
}
