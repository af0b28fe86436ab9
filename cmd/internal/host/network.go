package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/vm"
)

const (
	// sharing configures the DHCP server of the machines' shared network.
	sharing = "/Library/Preferences/SystemConfiguration/com.apple.InternetSharing.default.plist"
	// usualLease is its lease time unless told otherwise, and goodLease what lets a day of
	// VMs, each with a fresh address, go by without using all up; in seconds.
	usualLease, goodLease = 86_400, 600
	// addresses are those of the shared network, a /24, and fewLeft is when it is late.
	addresses, fewLeft = 253, 25
	// maxSkew is how wrong the clock may be: tokens and leases are checked by time.
	maxSkew = 30 * time.Second
	// renewLate: a credential is renewed a month before its end, so that one that ends in
	// a week was not.
	renewLate = 7 * 24 * time.Hour
)

const leaseFix = "sudo defaults write " + sharing + " bootpd -dict DHCPLeaseTimeSecs -int 600, and restart the Mac"

func checkLeaseTime(ctx context.Context, s *Subject) Finding {
	if f, mac := onMac(s); !mac {
		return f
	}
	if _, err := s.Machine.ReadFile(sharing); errors.Is(err, fs.ErrNotExist) {
		return warn(leaseFix, "addresses are leased for a day: 253 VMs within one use all up")
	} else if err != nil {
		return skip("it cannot be read: %v", err)
	}
	out, err := s.Machine.Run(ctx, "plutil", "-extract", "bootpd.DHCPLeaseTimeSecs", "raw", "-o", "-", sharing)
	if err != nil {
		if strings.Contains(out, "No value at that key path") {
			return warn(leaseFix, "addresses are leased for a day: 253 VMs within one use all up")
		}
		return skip("it cannot be read: %s", said(out, err))
	}
	seconds, err := strconv.Atoi(strings.TrimSpace(out))
	switch {
	case err != nil || seconds <= 0:
		return skip("it is no number of seconds: %.40q", strings.TrimSpace(out))
	case seconds > 6*goodLease:
		return warn(leaseFix, "addresses are leased for %s: many VMs in that time use all up", time.Duration(seconds)*time.Second)
	}
	return found("addresses are leased for %s", time.Duration(seconds)*time.Second)
}

func checkLeases(_ context.Context, s *Subject) Finding {
	if f, mac := onMac(s); !mac {
		return f
	}
	text, err := s.Machine.ReadFile(vm.LeasesFile)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return found("no address is leased yet")
	case err != nil:
		return skip("the leases cannot be read: %v", err)
	}
	leases, err := vm.ReadLeases(bytes.NewReader(text))
	if err != nil {
		return skip("%v", err)
	}
	used := map[netip.Addr]bool{}
	for _, l := range leases {
		if l.Ends.After(s.Now()) {
			used[l.Addr] = true
		}
	}
	if n := len(used); n > addresses-fewLeft {
		return fail("end what uses them, or: sudo rm "+vm.LeasesFile+" and restart the Mac; shorten the lease time", "%d of %d addresses are leased", n, addresses)
	}
	return found("%d of %d addresses are leased", len(used), addresses)
}

func checkLocalNetwork(ctx context.Context, s *Subject) Finding {
	if f, needed := sinceKeychain(ctx, s); !needed {
		return f
	}
	f := skip("macOS does not tell whether it lets this program reach the local network")
	f.Fix = "if guests of pools with bootstrap ssh cannot be reached: System Settings, Privacy & Security, Local Network, paddock"
	return f
}

// credential is what the node joined with; false: with the finding that it has not.
func credential(s *Subject) (Controller, Finding, bool) {
	e, err := s.Joined()
	join := fmt.Sprintf("on the controller: paddock token create --node %s; here: paddock node join TOKEN", s.Node.Name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return e, fail(join, "node %s has not joined a controller", s.Node.Name), false
	case err != nil:
		return e, fail(join, "the credential cannot be read: %v", err), false
	}
	return e, Finding{}, true
}

func checkCredential(_ context.Context, s *Subject) Finding {
	e, f, joined := credential(s)
	if !joined {
		return f
	}
	path := s.Credential
	if info, err := os.Stat(path); err != nil || info.Mode().Perm()&0o077 != 0 {
		return fail(fmt.Sprintf("chmod 600 '%s'", path), "the credential is open to other users")
	}
	again := fmt.Sprintf("join again: paddock token create --node %s on the controller, paddock node join TOKEN here", s.Node.Name)
	id, err := access.ReadToken(e.Token)
	if err != nil {
		return fail(again, "the credential is no token")
	}
	left := id.ExpiresAt.Sub(s.Now())
	switch {
	case id.Role != access.Node || id.Subject != s.Node.Name:
		return fail(again+"; or set node.name to what it joined under", "the credential is for %s, this is node %s", id.Actor(), s.Node.Name)
	case left <= 0:
		return fail(again, "the credential ended on %s", id.ExpiresAt.Format(time.DateOnly))
	case left < renewLate:
		return warn("start the agent: it renews the credential whenever it reaches the controller",
			"the credential ends on %s and was not renewed", id.ExpiresAt.Format(time.DateOnly))
	}
	return found("the credential is good until %s", id.ExpiresAt.Format(time.DateOnly))
}

// ask asks the controller for its time; false: with the finding why not.
func ask(ctx context.Context, s *Subject) (e Controller, off time.Duration, f Finding, answered bool) {
	e, _, joined := credential(s)
	if !joined {
		return e, 0, skip("the node has not joined a controller"), false
	}
	client, err := api.New(api.Config{URL: e.URL, Token: e.Token, CertificateHash: e.Certificate})
	if err != nil {
		return e, 0, fail("join again", "%v", err), false
	}
	at, took, err := client.Clock(ctx)
	if err != nil {
		return e, 0, fail("is it running, is its port open to this host, and is a proxy in between? paddock node join --controller URL names another way", "%s: %v", e.URL, err), false
	}
	// The header has whole seconds: on the mean half of one is cut off.
	return e, s.Now().Sub(at.Add(time.Second/2 + took/2)), Finding{}, true
}

func checkController(ctx context.Context, s *Subject) Finding {
	e, _, f, answered := ask(ctx, s)
	switch {
	case !answered:
		return f
	case e.Certificate != "":
		return found("%s answers, with the certificate that was pinned", e.URL)
	}
	return found("%s answers, with a certificate that this system trusts", e.URL)
}

func checkClock(ctx context.Context, s *Subject) Finding {
	_, off, f, answered := ask(ctx, s)
	if !answered {
		if f.Result == Fail {
			f = skip("the controller did not answer")
		}
		return f
	}
	text := fmt.Sprintf("%s off the controller's", off.Abs().Round(time.Second))
	if off.Abs() > maxSkew {
		return fail("set the clock by the network: sudo sntp -sS time.apple.com (macOS), timedatectl set-ntp true (Linux); on both hosts", "the clock is %s", text)
	}
	return found("the clock is %s", text)
}
