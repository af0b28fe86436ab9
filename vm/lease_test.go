package vm_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/paddock-ci/paddock/vm"
)

// The guest of these tests is called 02:00:0a:0b:0c:0d, and it is 0x5f000000.
var (
	guest = net.HardwareAddr{0x02, 0x00, 0x0a, 0x0b, 0x0c, 0x0d}
	today = time.Unix(0x5f000000, 0)
)

func lease(name, ip, hw, ends string) string {
	return fmt.Sprintf("{\n\tname=%s\n\tip_address=%s\n\thw_address=%s\n\tidentifier=%s\n\tlease=%s\n}\n", name, ip, hw, hw, ends)
}

func TestFindLease(t *testing.T) {
	const mac = "1,2:0:a:b:c:d"
	good := lease("runner", "192.168.64.5", mac, "0x5f000100")
	for name, c := range map[string]struct{ file, want string }{
		"no file's content":                  {"", ""},
		"bytes without leading zeros":        {good, "192.168.64.5"},
		"bytes with them, in capitals":       {lease("runner", "192.168.64.5", "1,02:00:0A:0B:0C:0D", "0X5F000100"), "192.168.64.5"},
		"another guest's":                    {lease("runner", "192.168.64.5", "1,2:0:a:b:c:e", "0x5f000100"), ""},
		"the same digits, other bytes":       {lease("runner", "192.168.64.5", "1,20:0:a:b:c:d", "0x5f000100"), ""},
		"expired":                            {lease("runner", "192.168.64.5", mac, "0x5effffff"), ""},
		"ends this second":                   {lease("runner", "192.168.64.5", mac, "0x5f000000"), ""},
		"twice, the latest first":            {lease("a", "192.168.64.7", mac, "0x5f000200") + good, "192.168.64.7"},
		"twice, the latest last":             {good + lease("a", "192.168.64.7", mac, "0x5f000200"), "192.168.64.7"},
		"twice, of the same second":          {good + lease("a", "192.168.64.7", mac, "0x5f000100"), "192.168.64.5"},
		"twice, the latest is expired too":   {lease("a", "192.168.64.7", mac, "0x5e000000") + lease("a", "192.168.64.8", mac, "0x5effff00"), ""},
		"never ends":                         {lease("a", "192.168.64.7", mac, "0xffffffff"), "192.168.64.7"},
		"odd spacing":                        {"  {\r\n\r\n ip_address = 192.168.64.5 \r\n\thw_address=\t1,2:0:a:b:c:d\r\n  lease=0x5f000100\r\n }\r\n", "192.168.64.5"},
		"unknown keys and words":             {strings.Replace(good, "\tname", "\tshoe=42\n\tword\n\t=\n\tname", 1), "192.168.64.5"},
		"not closed":                         {strings.TrimSuffix(good, "}\n"), ""},
		"cut off in the middle":              {good + good[:len(good)/2], "192.168.64.5"},
		"never opened":                       {strings.TrimPrefix(good, "{\n"), ""},
		"opened twice":                       {"{\n\tip_address=192.168.64.9\n" + good, "192.168.64.5"},
		"no address":                         {strings.Replace(good, "ip_address", "ip", 1), ""},
		"an address that is none":            {strings.Replace(good, "64.5", "64.555", 1), ""},
		"an address with a zone":             {strings.Replace(good, "192.168.64.5", "fe80::1%en0", 1), ""},
		"an IPv6 address":                    {strings.Replace(good, "192.168.64.5", "fd00::5", 1), "fd00::5"},
		"no end":                             {strings.Replace(good, "lease", "rent", 1), ""},
		"an end that is not in hex":          {strings.Replace(good, "0x5f", "5f", 1), ""},
		"an end beyond all time":             {strings.Replace(good, "0x5f", "0xffffffff5f", 1), ""},
		"another kind of hardware":           {lease("runner", "192.168.64.5", "ff,2:0:a:b:c:d", "0x5f000100"), ""},
		"an address too long":                {lease("runner", "192.168.64.5", "1,2:0:a:b:c:d:e", "0x5f000100"), ""},
		"a byte too long":                    {lease("runner", "192.168.64.5", "1,002:0:a:b:c:d", "0x5f000100"), ""},
		"a name that looks like a key":       {lease("ip_address=192.168.64.9", "192.168.64.5", mac, "0x5f000100"), "192.168.64.5"},
		"a name that brings keys of its own": {lease("x\n\tip_address=192.168.64.9", "192.168.64.5", mac, "0x5f000100"), ""},
		"an empty entry":                     {"{\n}\n" + good, "192.168.64.5"},
		"closed twice":                       {good + "}\n", "192.168.64.5"},
	} {
		t.Run(name, func(t *testing.T) {
			addr, ok, err := vm.FindLease(strings.NewReader(c.file), guest, today)
			if err != nil {
				t.Fatal(err)
			}
			if got := addr; ok != (c.want != "") || ok && got != netip.MustParseAddr(c.want) {
				t.Fatalf("found %v %v, want %q", got, ok, c.want)
			}
		})
	}
}

// A file without an end, a line without one and a broken disk are errors, not "no lease".
func TestLeasesAreBounded(t *testing.T) {
	endless := io.MultiReader(strings.NewReader(lease("a", "192.168.64.5", "1,2:0:a:b:c:d", "0x5f000100")), forever("{\n}\n"))
	if _, _, err := vm.FindLease(endless, guest, today); err == nil {
		t.Error("an endless file is read to its end")
	}
	if _, _, err := vm.FindLease(forever("x"), guest, today); err == nil {
		t.Error("an endless line is read to its end")
	}
	broken := errors.New("broken disk")
	if _, _, err := vm.FindLease(iotest.ErrReader(broken), guest, today); !errors.Is(err, broken) {
		t.Errorf("a read that failed gave %v", err)
	}
}

// forever is a text repeated without end.
func forever(text string) io.Reader { return &repeated{text: text} }

type repeated struct {
	text string
	at   int
}

func (r *repeated) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = r.text[r.at%len(r.text)]
		r.at++
	}
	return len(p), nil
}

// FuzzLeases holds that whatever is in the file, what comes of it is an address of this
// very machine that has not ended.
func FuzzLeases(f *testing.F) {
	f.Add(lease("runner", "192.168.64.5", "1,2:0:a:b:c:d", "0x5f000100"))
	f.Add(lease("runner", "192.168.64.5", "1,2:0:a:b:c:d", "0x5f000100") + lease("b", "192.168.64.6", "ff,1:2:3", "0x1"))
	f.Add("{\r\n ip_address=1.2.3.4\r\n}\n{{}}\n=\n\x00")
	f.Fuzz(func(t *testing.T, file string) {
		leases, err := vm.ReadLeases(strings.NewReader(file))
		if err != nil {
			return
		}
		for _, l := range leases {
			if len(l.MAC) != 6 || !l.Addr.IsValid() || l.Addr.Zone() != "" || l.Ends.Year() < 1970 || l.Ends.Year() > 40000 {
				t.Fatalf("impossible lease %+v", l)
			}
		}
		addr, ok, err := vm.FindLease(strings.NewReader(file), guest, today)
		if err != nil || ok != addr.IsValid() {
			t.Fatalf("found %v %v %v", addr, ok, err)
		}
		backed := !ok
		for _, l := range leases {
			backed = backed || l.Addr == addr && l.MAC.String() == guest.String() && l.Ends.After(today)
		}
		if !backed {
			t.Fatalf("no lease gives %v to the guest", addr)
		}
	})
}
