package node

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/vm"
)

// What the yard's machines can do beyond the contract. As with helpers, every machine has
// the methods, and says vm.ErrUnsupported where its driver cannot.

// yardStates is how machines are saved.
type yardStates struct {
	saves    bool  // they can be
	tries    int   // calls of Save
	saveErr  error // what Save fails with, halfway
	stateErr error // what a start from a state fails with
	wakeErr  error // what a guest says to Wake
	mute     bool  // guests that started from a state never answer

	stateHang bool          // a start from a state does not return before its context ends
	stillborn bool          // machines from a state end at once
	saveTakes time.Duration // how long Save takes
	saveStops bool          // machines stand still after Save
	saving    func()        // called in Save
	entropy   map[string]bool
	faults    []string // what must never happen
}

// yardPorts is how machines are reached beside the agent.
type yardPorts struct {
	port      func(net.Conn) // serves port 22; nil: the driver has no ports
	address   string         // the driver's word; "": it has none
	refusals  int            // so many questions for the network fail
	addressed int            // questions to the driver
	network   time.Duration  // how long a guest's network takes to come up
}

// memory is what a state holds of its machine.
type memory struct {
	CPU      int
	Bytes    int64
	Identity string // as a MAC address is: no two machines may have one
}

const memoryFile = "memory"

// restore reads what a machine starts with; y.mu is held.
func (y *yard) restore(spec vm.Spec) (memory, error) {
	m := memory{CPU: spec.CPU, Bytes: spec.Memory, Identity: rand.Text()}
	if spec.State == "" {
		return m, nil
	}
	if y.stateErr != nil {
		return m, y.stateErr
	}
	data, err := os.ReadFile(filepath.Join(spec.State, memoryFile))
	if err != nil {
		return m, fmt.Errorf("%w: %w", vm.ErrState, err)
	}
	if err := json.Unmarshal(data, &m); err != nil {
		return m, fmt.Errorf("%w: %w", vm.ErrState, err)
	}
	identity, err := os.ReadFile(filepath.Join(spec.Dir, vm.IdentityFile))
	if err != nil || string(identity) != m.Identity || m.CPU != spec.CPU || m.Bytes != spec.Memory {
		y.faults = append(y.faults, fmt.Sprintf("a state of %+v is not for %+v (%v)", m, spec, err))
	}
	for id, other := range y.machines {
		if other.memory.Identity == m.Identity {
			y.faults = append(y.faults, fmt.Sprintf("machine %s has the identity of %s, which lives", spec.ID, id))
		}
	}
	return m, nil
}

// Save writes disk, identity and memory, and cuts the streams.
func (m *machine) Save(ctx context.Context, dir string) error {
	m.yard.mu.Lock()
	defer m.yard.mu.Unlock()
	takes, saving := m.yard.saveTakes, m.yard.saving
	m.yard.mu.Unlock()
	pause(ctx, takes)
	if saving != nil {
		saving()
	}
	m.yard.mu.Lock()
	if m.yard.tries++; !m.yard.saves {
		return vm.ErrUnsupported
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		m.yard.faults = append(m.yard.faults, fmt.Sprintf("saved into a directory with %v (%v)", left, err))
	}
	disk, err := os.ReadFile(filepath.Join(m.spec.Dir, vm.DiskFile))
	if err != nil {
		return err
	}
	data, err := json.Marshal(m.memory)
	if err != nil {
		return err
	}
	config, err := os.ReadFile(filepath.Join(m.spec.Dir, vm.ConfigFile))
	if err != nil {
		return err
	}
	err = errors.Join(
		os.WriteFile(filepath.Join(dir, vm.ConfigFile), config, 0o600),
		os.WriteFile(filepath.Join(dir, vm.DiskFile), disk, 0o600), m.yard.saveErr)
	if err == nil {
		err = errors.Join(
			os.WriteFile(filepath.Join(dir, vm.IdentityFile), []byte(m.memory.Identity), 0o600),
			os.WriteFile(filepath.Join(dir, memoryFile), data, 0o600))
	}
	for _, c := range m.conns {
		_ = c.Close()
	}
	m.conns, m.frozen = nil, m.yard.saveStops
	return errors.Join(err, ctx.Err())
}

// DialPort serves a stream as the guest's SSH server does.
func (m *machine) DialPort(ctx context.Context, port int) (net.Conn, error) {
	m.yard.mu.Lock()
	serve := m.yard.port
	m.yard.mu.Unlock()
	if serve == nil || port != 22 {
		return nil, fmt.Errorf("port %d: %w", port, vm.ErrUnsupported)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	host, inside := net.Pipe()
	go serve(inside)
	return host, nil
}

func (m *machine) Address(context.Context) (string, error) {
	m.yard.mu.Lock()
	defer m.yard.mu.Unlock()
	if m.yard.addressed++; m.yard.address == "" {
		return "", vm.ErrUnsupported
	}
	return m.yard.address, nil
}

// inside is what the guest agent does to its machine.
type inside struct{ m *machine }

func (i inside) NetworkUp(ctx context.Context) error {
	y := i.m.yard
	y.mu.Lock()
	takes := y.network
	y.mu.Unlock()
	pause(ctx, takes)
	y.mu.Lock()
	defer y.mu.Unlock()
	if y.refusals > 0 {
		y.refusals--
		return errors.New("no DHCP server answers")
	}
	return nil
}

// Wake notes the entropy, of which no two machines may get the same.
func (i inside) Wake(_ context.Context, w guest.Wake) error {
	y := i.m.yard
	y.mu.Lock()
	defer y.mu.Unlock()
	if i.m.asleep && y.wakeErr != nil {
		return y.wakeErr
	}
	if y.entropy == nil {
		y.entropy = map[string]bool{}
	}
	if len(w.Entropy) != 64 || y.entropy[string(w.Entropy)] || w.Now.IsZero() {
		y.faults = append(y.faults, fmt.Sprintf("machine %s was woken with %d bytes of entropy, which may not be fresh, at %v", i.m.id, len(w.Entropy), w.Now))
	}
	y.entropy[string(w.Entropy)] = true
	i.m.asleep = false
	return nil
}

func (i inside) Shutdown(context.Context) error {
	i.m.power()
	return nil
}

// check fails the test on what must never happen to machines.
func (y *yard) check(t *testing.T) {
	t.Helper()
	y.mu.Lock()
	defer y.mu.Unlock()
	for _, f := range y.faults {
		t.Error(f)
	}
}
