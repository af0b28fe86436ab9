//go:build vzstandin

package vz_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	framework "github.com/Code-Hex/vz/v3"

	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/vm"
	"github.com/paddock-ci/paddock/vm/vz"
)

// A connect that is never answered is given up and tried again; its late answer is
// closed (the files are counted).
func TestConnectHangs(t *testing.T) {
	release := make(chan struct{})
	var tries atomic.Int64
	(&house{Hooks: framework.Hooks{Connect: func(uint32) (bool, *framework.VirtioSocketConnection, error) {
		if tries.Add(1) > 1 {
			return false, nil, nil
		}
		<-release
		return false, nil, nil // as any other, but late
	}}}).enter(t)
	m := boot(t, driver(t, vz.Config{}), mac(t, diskGood))
	if n := tries.Load(); n != 2 {
		t.Errorf("%d connects for one that hangs and one that works", n)
	}
	close(release)
	hello(t, m)
}

// However long a framework does not answer, it costs no more than a few goroutines, and
// Boot and Destroy mind their contexts.
func TestConnectNeverAnswers(t *testing.T) {
	release := make(chan struct{})
	var open atomic.Int64
	(&house{Hooks: framework.Hooks{Connect: func(uint32) (bool, *framework.VirtioSocketConnection, error) {
		open.Add(1)
		defer open.Add(-1)
		<-release
		return true, nil, errors.New("too late")
	}}}).enter(t)
	before := runtime.NumGoroutine()
	spec := mac(t, diskGood)
	spec.Agent = false
	m := boot(t, driver(t, vz.Config{}), spec)
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(bounded(t), 300*time.Millisecond)
			defer cancel()
			if _, err := m.Dial(ctx); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("dialling: %v", err)
			}
		})
	}
	wg.Wait()
	if n := open.Load(); n < 1 || n > 8 {
		t.Errorf("%d connects outstanding, want 1 to 8", n)
	}
	if err := m.Destroy(bounded(t)); err != nil {
		t.Error(err)
	}
	if now := runtime.NumGoroutine(); now > before+8+1 { // one for each, and one of the guest's that ends
		t.Errorf("%d goroutines, before %d", now, before)
	}
	close(release)
}

// The bindings answer with nothing at all: that is no connection.
func TestConnectTypedNil(t *testing.T) {
	var tries atomic.Int64
	(&house{Hooks: framework.Hooks{Connect: func(uint32) (bool, *framework.VirtioSocketConnection, error) {
		return tries.Add(1) <= 3, nil, nil
	}}}).enter(t)
	hello(t, boot(t, driver(t, vz.Config{}), mac(t, diskGood)))
	if n := tries.Load(); n != 4 {
		t.Errorf("%d connects, want 4", n)
	}
}

// Connects that fail because nobody listens yet are the ordinary start of each guest.
func TestConnectRefused(t *testing.T) {
	var tries atomic.Int64
	(&house{Hooks: framework.Hooks{Connect: func(uint32) (bool, *framework.VirtioSocketConnection, error) {
		return tries.Add(1) <= 12, nil, errors.New("connection reset by peer") // more than may be outstanding
	}}}).enter(t)
	hello(t, boot(t, driver(t, vz.Config{}), mac(t, diskGood)))
}

// hello asks a machine's agent how it is.
func hello(t *testing.T, m vm.Machine) guest.Hello {
	t.Helper()
	conn, err := m.Dial(bounded(t))
	if err != nil {
		t.Fatalf("dialling: %v", err)
	}
	c := guest.New(conn)
	defer c.Close()
	h, err := c.Hello(bounded(t))
	if err != nil {
		t.Fatalf("hello: %v", err)
	}
	return h
}

// The address is the one that the host's DHCP server leased to the machine, once it has.
func TestAddressAndPort(t *testing.T) {
	h := (&house{}).enter(t)
	leases := filepath.Join(t.TempDir(), "dhcpd_leases")
	spec := mac(t, diskGood)
	m := boot(t, driver(t, vz.Config{Leases: leases}), spec)
	if a, err := m.(vm.Addresser).Address(bounded(t)); a != "" || err != nil {
		t.Errorf("without leases: %q, %v", a, err)
	}
	l, err := (&net.ListenConfig{}).Listen(bounded(t), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, number, _ := net.SplitHostPort(l.Addr().String())
	port, _ := strconv.Atoi(number)
	short, cancel := context.WithTimeout(bounded(t), 100*time.Millisecond)
	defer cancel()
	if _, err := m.(vm.PortDialer).DialPort(short, port); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("dialling a guest without an address: %v", err)
	}
	put(t, filepath.Dir(leases), filepath.Base(leases), lease(t, h.of(t, spec).MAC()))
	if a, err := m.(vm.Addresser).Address(bounded(t)); a != "127.0.0.1" || err != nil {
		t.Errorf("with a lease: %q, %v", a, err)
	}
	conn, err := m.(vm.PortDialer).DialPort(bounded(t), port)
	if err != nil {
		t.Fatal(err)
	}
	accepted, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	_, _ = accepted.Write([]byte("ssh"))
	_ = accepted.Close()
	if said, err := io.ReadAll(conn); string(said) != "ssh" || err != nil {
		t.Errorf("%q, %v", said, err)
	}
	_ = conn.Close()
	if err := m.Destroy(bounded(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := m.(vm.PortDialer).DialPort(bounded(t), port); !errors.Is(err, vm.ErrEnded) {
		t.Errorf("after the end: %v", err)
	}
	if _, err := m.(vm.PortDialer).DialPort(bounded(t), 0); err == nil {
		t.Error("port 0 was dialled")
	}
}

// lease is macOS's entry for a machine at 127.0.0.1.
func lease(t *testing.T, mac string) string {
	t.Helper()
	var parts []string
	for part := range strings.SplitSeq(mac, ":") {
		n, err := strconv.ParseUint(part, 16, 8)
		if err != nil {
			t.Fatal(err)
		}
		parts = append(parts, strconv.FormatUint(n, 16)) // without leading zeros
	}
	return fmt.Sprintf("{\n\tname=runner\n\tip_address=127.0.0.1\n\thw_address=1,%s\n\tidentifier=1,%s\n\tlease=0x%x\n}\n",
		strings.Join(parts, ":"), strings.Join(parts, ":"), time.Now().Add(time.Hour).Unix())
}
