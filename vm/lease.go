package vm

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// LeasesFile is where macOS keeps the DHCP leases of its machines' shared network.
const LeasesFile = "/var/db/dhcpd_leases"

// Limits on the file, which grows by one entry of about 150 bytes for each fresh MAC
// address and holds names that guests choose.
const (
	maxLeases    = 4 << 20 // bytes
	maxLeaseLine = 4 << 10 // bytes
)

// ethernet is the hardware type before an address of six bytes.
const ethernet = "1"

// Lease is one entry of the host's DHCP server.
type Lease struct {
	Addr netip.Addr
	MAC  net.HardwareAddr
	Ends time.Time
}

// FindLease is the address that the host's DHCP server leased to mac; ok is false if it
// has none, or none any more. An address may be there several times: the lease that ends
// last is the one in use.
func FindLease(r io.Reader, mac net.HardwareAddr, now time.Time) (addr netip.Addr, ok bool, err error) {
	leases, err := ReadLeases(r)
	if err != nil {
		return netip.Addr{}, false, err
	}
	var last time.Time
	for _, l := range leases {
		// Of two that end at the same second the first counts: the server writes the
		// newest first.
		if bytes.Equal(l.MAC, mac) && l.Ends.After(now) && l.Ends.After(last) {
			addr, ok, last = l.Addr, true, l.Ends
		}
	}
	return addr, ok, nil
}

// ReadLeases reads macOS's file of leases. Each entry has one key=value a line:
//
//	{
//		name=runner
//		ip_address=192.168.64.5
//		hw_address=1,2:0:a:b:c:d
//		identifier=1,2:0:a:b:c:d
//		lease=0x5f3b1c2d
//	}
//
// The bytes of an address have no leading zeros, and the lease is when it ends, in
// seconds since 1970. Keys that are not known and entries without an Ethernet address,
// an IP address and an end are passed over, as is one that is cut off: the server may be
// writing. So is an entry with a key twice: the name is the guest's own word, and must
// not get it another's address.
func ReadLeases(r io.Reader) ([]Lease, error) {
	limited := &io.LimitedReader{R: r, N: maxLeases + 1}
	lines := bufio.NewScanner(limited)
	lines.Buffer(nil, maxLeaseLine)
	var leases []Lease
	var entry map[string]string // nil: between two
	for lines.Scan() {
		switch line := strings.TrimSpace(lines.Text()); line {
		case "{":
			entry = map[string]string{}
		case "}":
			if l, ok := parseLease(entry); ok {
				leases = append(leases, l)
			}
			entry = nil
		default:
			key, value, found := strings.Cut(line, "=")
			if entry == nil || !found {
				continue
			}
			key = strings.TrimSpace(key)
			if _, twice := entry[key]; twice {
				entry = nil
				continue
			}
			entry[key] = strings.TrimSpace(value)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("read the leases: %w", err)
	}
	if limited.N <= 0 {
		return nil, errors.New("read the leases: there are more than 4 MiB of them")
	}
	return leases, nil
}

func parseLease(entry map[string]string) (Lease, bool) {
	addr, err := netip.ParseAddr(entry["ip_address"])
	if err != nil || addr.Zone() != "" {
		return Lease{}, false
	}
	kind, text, _ := strings.Cut(entry["hw_address"], ",")
	mac, ok := parseMAC(text)
	if !ok || kind != ethernet {
		return Lease{}, false
	}
	digits, hex := strings.CutPrefix(strings.ToLower(entry["lease"]), "0x")
	ends, err := strconv.ParseUint(digits, 16, 40)
	if !hex || err != nil {
		return Lease{}, false
	}
	return Lease{Addr: addr, MAC: mac, Ends: time.Unix(int64(ends), 0)}, true
}

// parseMAC reads six bytes in hex, each of one digit or two.
func parseMAC(text string) (net.HardwareAddr, bool) {
	parts := strings.Split(text, ":")
	if len(parts) != 6 {
		return nil, false
	}
	mac := make(net.HardwareAddr, 0, len(parts))
	for _, part := range parts {
		b, err := strconv.ParseUint(part, 16, 8)
		if err != nil || len(part) > 2 {
			return nil, false
		}
		mac = append(mac, byte(b))
	}
	return mac, true
}
