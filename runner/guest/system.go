package guest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"
)

// System is what the agent does to the machine in which it runs. The product's agent
// brings one for each operating system.
type System interface {
	// NetworkUp brings the network up where nothing else does; called one at a time.
	NetworkUp(ctx context.Context) error
	// Wake sets the clock and stirs the random pool.
	Wake(ctx context.Context, w Wake) error
	// Shutdown powers the machine off. It may return before that has happened.
	Shutdown(ctx context.Context) error
}

// Limits of the requests about the machine.
const (
	networkLimit = 60 * time.Second       // for DHCP
	goodbyeLimit = 500 * time.Millisecond // for the answer to a shutdown to reach the host
	maxEntropy   = 4 << 10                // bytes; the kernels' pools hold less
	maxAddresses = 16                     // of a guest
)

// errForeign: the agent must leave the machine as it is.
var errForeign = fmt.Errorf("%w: it does not own the machine in which it runs", ErrUnsupported)

// networkUp answers with the addresses that the guest has, after bringing them about.
func (s *session) networkUp(ctx context.Context, f frame) error {
	ctx, cancel := context.WithTimeout(ctx, networkLimit)
	defer cancel()
	select {
	case s.agent.network <- struct{}{}:
		defer func() { <-s.agent.network }()
	case <-ctx.Done():
		return ctx.Err()
	}
	if system := s.agent.config.System; system != nil {
		if err := system.NetworkUp(ctx); err != nil {
			return fmt.Errorf("bringing the network up: %w", err)
		}
	}
	n, err := currentNetwork()
	if err != nil {
		return err
	}
	s.send(kindNetworkAnswer, f.id, n)
	return nil
}

func (s *session) wake(ctx context.Context, f frame) error {
	var b wakeBody
	err := f.decode(&b)
	clear(f.body) // the entropy is a secret
	if err != nil {
		return err
	}
	defer clear(b.Entropy)
	if len(b.Entropy) > maxEntropy || sane(b.Now).IsZero() {
		return errors.New("that is no time, or too much entropy")
	}
	if s.agent.config.System == nil {
		return errForeign
	}
	if err := s.agent.config.System.Wake(ctx, Wake(b)); err != nil {
		return fmt.Errorf("waking up: %w", err)
	}
	s.send(kindDone, f.id, nil)
	return nil
}

// shutdown answers first: afterwards nobody can.
func (s *session) shutdown(ctx context.Context, f frame) error {
	if s.agent.config.System == nil {
		return errForeign
	}
	s.send(kindDone, f.id, nil)
	select {
	case <-ctx.Done(): // the host has hung up, so it has the answer
	case <-time.After(goodbyeLimit):
	}
	if err := s.agent.config.System.Shutdown(context.WithoutCancel(ctx)); err != nil {
		s.agent.log.Error("the machine does not power off", "error", err)
	}
	return nil
}

// currentNetwork lists the addresses by which others reach this machine.
func currentNetwork() (Network, error) {
	interfaces, err := net.Interfaces()
	if err != nil {
		return Network{}, fmt.Errorf("listing the network's interfaces: %w", err)
	}
	slices.SortFunc(interfaces, func(a, b net.Interface) int { return cmp.Compare(a.Index, b.Index) })
	type found struct {
		by string
		at netip.Addr
	}
	var all []found
	for _, i := range interfaces {
		addresses, err := i.Addrs()
		if err != nil || i.Flags&net.FlagUp == 0 || i.Flags&net.FlagLoopback != 0 {
			continue // gone meanwhile, or not the network's
		}
		for _, address := range addresses {
			p, err := netip.ParsePrefix(address.String())
			if err == nil && p.Addr().IsGlobalUnicast() {
				all = append(all, found{i.Name, p.Addr()})
			}
		}
	}
	slices.SortStableFunc(all, func(a, b found) int { return cmp.Compare(a.at.BitLen(), b.at.BitLen()) })
	n := Network{Addresses: []string{}}
	for _, f := range all[:min(len(all), maxAddresses)] {
		n.Addresses = append(n.Addresses, f.at.String())
		n.Interface = cmp.Or(n.Interface, f.by)
	}
	return n, nil
}

// checked is a network as a guest said it, within its bounds.
func (n Network) checked() Network {
	good := Network{Interface: Plain(n.Interface, 64), Addresses: []string{}}
	for _, text := range n.Addresses[:min(len(n.Addresses), maxAddresses)] {
		if at, err := netip.ParseAddr(text); err == nil && at.Zone() == "" {
			good.Addresses = append(good.Addresses, at.String())
		}
	}
	return good
}
