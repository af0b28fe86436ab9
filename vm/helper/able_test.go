package helper_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/vm"
	"github.com/paddock-ci/paddock/vm/process/processtest"
)

// able is a driver whose machines can do all that is optional: their address is fixed,
// their ports are this host's, their state is a word in a file.
type able struct{ vm.Driver }

func (a able) Boot(ctx context.Context, spec vm.Spec) (vm.Machine, error) {
	if spec.State != "" {
		if word, err := os.ReadFile(filepath.Join(spec.State, "word")); err != nil || string(word) != "as I was" {
			return nil, fmt.Errorf("a state that says %q: %w", word, vm.ErrState)
		}
	}
	m, err := a.Driver.Boot(ctx, spec)
	if err != nil {
		return nil, err
	}
	return ableMachine{m}, nil
}

type ableMachine struct{ vm.Machine }

func (ableMachine) Save(_ context.Context, dir string) error {
	return os.WriteFile(filepath.Join(dir, "word"), []byte("as I was"), 0o600)
}

func (ableMachine) Address(context.Context) (string, error) { return "192.0.2.7", nil }

func (ableMachine) DialPort(ctx context.Context, port int) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, "tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
}

func withTimeout(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// What a driver can do beyond the contract, its machines can do through the helper.
func TestOptionalAbilities(t *testing.T) {
	f := newFixture(t, "able", 0)
	ctx := withTimeout(t)
	spec := processtest.Spec(t)
	m, err := f.driver.Boot(ctx, spec)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = m.Destroy(context.WithoutCancel(ctx)) }()
	if got, err := m.(vm.Addresser).Address(ctx); got != "192.0.2.7" || err != nil {
		t.Errorf("address %q, %v", got, err)
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	go func() {
		if conn, err := l.Accept(); err == nil {
			_, _ = io.Copy(conn, conn)
			_ = conn.Close()
		}
	}()
	conn, err := m.(vm.PortDialer).DialPort(ctx, l.Addr().(*net.TCPAddr).Port)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write([]byte("echo")); err != nil {
		t.Error(err)
	}
	back := make([]byte, 4)
	if _, err := io.ReadFull(conn, back); err != nil || string(back) != "echo" {
		t.Errorf("the port said %q, %v", back, err)
	}
	_ = conn.Close()

	state := t.TempDir()
	if err := m.(vm.Saver).Save(ctx, state); err != nil {
		t.Fatal(err)
	}
	again := processtest.Spec(t)
	again.State = state
	second, err := f.driver.Boot(ctx, again)
	if err != nil {
		t.Fatalf("starting from the state: %v", err)
	}
	if err := second.Destroy(ctx); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(filepath.Join(state, "word"), []byte("otherwise"), 0o600); err != nil {
		t.Fatal(err)
	}
	broken := processtest.Spec(t)
	broken.State = state
	if _, err := f.driver.Boot(ctx, broken); !errors.Is(err, vm.ErrState) {
		t.Errorf("starting from a broken state: %v, want ErrState", err)
	}

	if err := m.Destroy(ctx); err != nil {
		t.Fatal(err)
	}
	if err := m.(vm.Saver).Save(ctx, t.TempDir()); !errors.Is(err, vm.ErrEnded) {
		t.Errorf("saving an ended machine: %v, want ErrEnded", err)
	}
	if _, err := m.(vm.PortDialer).DialPort(ctx, 22); !errors.Is(err, vm.ErrEnded) {
		t.Errorf("a port of an ended machine: %v, want ErrEnded", err)
	}
}

// What the driver cannot do is refused as such, and harms nothing.
func TestAbilitiesThatAreNotThere(t *testing.T) {
	f := newFixture(t, "good", 0)
	ctx := withTimeout(t)
	m, err := f.driver.Boot(ctx, processtest.Spec(t))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = m.Destroy(context.WithoutCancel(ctx)) }()
	_, address := m.(vm.Addresser).Address(ctx)
	_, port := m.(vm.PortDialer).DialPort(ctx, 22)
	for what, err := range map[string]error{"save": m.(vm.Saver).Save(ctx, t.TempDir()), "address": address, "port": port} {
		if !errors.Is(err, vm.ErrUnsupported) {
			t.Errorf("%s: %v, want ErrUnsupported", what, err)
		}
	}
	if _, err := m.Dial(ctx); err != nil {
		t.Errorf("dialling afterwards: %v", err)
	}
}
