package node

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/vm"
)

// Durations of asking for a guest's address.
const (
	// addressTime bounds one try; a guest may have to ask its DHCP server first.
	addressTime = time.Minute
	// addressPause and addressMost bound the pause between tries.
	addressPause = time.Second
	addressMost  = time.Minute
	// networkTime is how long a runner waits for the first try: before its network is up
	// it could only fail.
	networkTime = 10 * time.Second
)

// askAddress learns the guest's address beside the VM's own goroutine, which joins it at
// the end. What has no network, or nobody who could tell, is not asked again.
func (a *Agent) askAddress(ctx context.Context, l *life) {
	asked := make(chan struct{})
	l.asked = asked
	if a.addressOf(l) != "" {
		close(asked)
		return // an agent before this one knew it
	}
	c := contact{order: l.order, machine: l.machine}
	l.watching.Go(func() {
		first := sync.OnceFunc(func() { close(asked) })
		defer first()
		for n := 1; ctx.Err() == nil; n++ {
			address, err := askOnce(ctx, c)
			first()
			switch {
			case address != "":
				a.setAddress(l, address)
				return
			case errors.Is(err, vm.ErrUnsupported), errors.Is(err, vm.ErrEnded):
				return
			}
			a.log.Debug("the guest's address is not known yet", "vm", l.order.ID, "tries", n, "error", err)
			pause(ctx, backoff(n, addressPause, addressMost))
		}
	})
}

// askOnce asks the guest's agent, if it has one, and then the driver. "" without an error
// means: not yet; vm.ErrUnsupported: nobody can ever tell.
func askOnce(ctx context.Context, c contact) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, addressTime)
	defer cancel()
	mute := vm.ErrUnsupported
	if bootstrapOf(c.order) == fleet.BootstrapAgent {
		address, err := askAgent(ctx, c.machine)
		if address != "" {
			return address, nil
		}
		if !errors.Is(err, guest.ErrUnsupported) {
			mute = err // it may tell later
		}
	}
	addresser, ok := c.machine.(vm.Addresser)
	if !ok {
		return "", mute
	}
	address, err := addresser.Address(ctx)
	if errors.Is(err, vm.ErrUnsupported) {
		return "", mute
	}
	return checkAddress(address), err
}

func askAgent(ctx context.Context, m vm.Machine) (string, error) {
	client, err := dialAgent(ctx, m)
	if err != nil {
		return "", err
	}
	defer func() { _ = client.Close() }()
	network, err := client.NetworkUp(ctx)
	if err != nil {
		return "", err
	}
	for _, address := range network.Addresses {
		if address = checkAddress(address); address != "" {
			return address, nil
		}
	}
	return "", nil
}

// checkAddress is the address if it is one: a guest may say anything.
func checkAddress(s string) string {
	address, err := netip.ParseAddr(s)
	if err != nil || address.Zone() != "" {
		return ""
	}
	return address.String()
}

// awaitNetwork waits until the guest was asked for its address once, which also brings
// its network up.
func awaitNetwork(ctx context.Context, l *life) {
	ctx, cancel := context.WithTimeout(ctx, networkTime)
	defer cancel()
	select {
	case <-l.asked:
	case <-ctx.Done():
	}
}

func (a *Agent) addressOf(l *life) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return l.address
}

// setAddress has the address reported; the journal has it with the next change.
func (a *Agent) setAddress(l *life, address string) {
	a.mu.Lock()
	l.address = address
	l.record.Report.Address = address
	a.mu.Unlock()
	a.tell()
}
