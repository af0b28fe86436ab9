package helper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/paddock-ci/paddock/vm"
)

// machine is a handle: all it knows it asks of the helper or reads from the folder.
type machine struct {
	d      *Driver
	folder folder
	reaped <-chan struct{} // closed when the helper, our child, is gone; nil if adopted

	turn chan struct{} // holds a token while one goroutine destroys or reaps

	mu   sync.Mutex
	last *report // the final report, once known
}

// Whether the driver behind it can do what the optional interfaces say, the helper
// answers: vm.ErrUnsupported if not.
var (
	_ vm.Machine    = (*machine)(nil)
	_ vm.Saver      = (*machine)(nil)
	_ vm.Addresser  = (*machine)(nil)
	_ vm.PortDialer = (*machine)(nil)
)

func newMachine(d *Driver, f folder) *machine {
	return &machine{d: d, folder: f, turn: make(chan struct{}, 1)}
}

// errGone: nobody listens on the socket, or the stream broke without an answer.
var errGone = errors.New("the vm helper does not answer")

// Dial opens a stream to the guest through the helper.
func (m *machine) Dial(ctx context.Context) (net.Conn, error) {
	return m.dial(ctx, request{Op: opDial})
}

// DialPort opens a stream to a port of the guest through the helper.
func (m *machine) DialPort(ctx context.Context, port int) (net.Conn, error) {
	return m.dial(ctx, request{Op: opPort, Port: port})
}

// Save has the helper save the machine's state into dir.
func (m *machine) Save(ctx context.Context, dir string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return fmt.Errorf("saving the machine's state: %w", err)
	}
	if _, err := m.ask(ctx, request{Op: opSave, Dir: dir}); err != nil {
		return fmt.Errorf("saving the machine's state: %w", err)
	}
	return nil
}

// Address asks the helper for the guest's address.
func (m *machine) Address(ctx context.Context) (string, error) {
	r, err := m.ask(ctx, request{Op: opAddress})
	if err != nil {
		return "", fmt.Errorf("asking for the guest's address: %w", err)
	}
	return r.Address, nil
}

// ask makes a request that has one answer.
func (m *machine) ask(ctx context.Context, q request) (report, error) {
	conn, err := m.call(ctx, q)
	if err == nil {
		defer func() { _ = conn.Close() }()
		var r report
		if err = m.receive(ctx, conn, &r); err == nil {
			return r, r.Error.asError()
		}
	}
	if errors.Is(err, errGone) {
		return report{}, vm.ErrEnded
	}
	return report{}, err
}

func (m *machine) dial(ctx context.Context, q request) (net.Conn, error) {
	conn, err := m.call(ctx, q)
	if err != nil {
		return nil, m.dialError(ctx, err)
	}
	var r report
	err = m.receive(ctx, conn, &r)
	if err == nil {
		err = r.Error.asError()
	}
	if err != nil {
		_ = conn.Close()
		return nil, m.dialError(ctx, err)
	}
	return conn, nil
}

// dialError tells an ended machine from a failure.
func (m *machine) dialError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("dialling the guest: %w", ctx.Err())
	}
	if errors.Is(err, errGone) || errors.Is(err, vm.ErrEnded) {
		return vm.ErrEnded
	}
	return fmt.Errorf("dialling the guest: %w", err)
}

// Wait returns how the machine ended. A helper that was killed counts as its end.
func (m *machine) Wait(ctx context.Context) (vm.Exit, error) {
	r, err := m.watch(ctx, func(r report) bool { return r.State.final() })
	if err != nil {
		return vm.Exit{}, fmt.Errorf("waiting for the machine: %w", err)
	}
	return r.Exit, nil
}

// Destroy ends the machine and removes its folder. A helper that does not answer within
// Config.Patience is killed, and the rest reaped.
func (m *machine) Destroy(ctx context.Context) error {
	select {
	case m.turn <- struct{}{}:
		defer func() { <-m.turn }()
	case <-ctx.Done():
		return fmt.Errorf("destroying the machine: %w", ctx.Err())
	}
	if known, err := m.folder.exists(); err == nil && !known {
		return nil // destroyed before, by us or through another handle
	}
	r, err := m.destroy(ctx)
	if err == nil && r.Error != nil && r.State == ended {
		// The driver could not destroy all of it, and its helper is gone: try once more.
		if spec, ok, specErr := m.folder.spec(); specErr != nil || !ok || m.d.reap(ctx, m.folder, spec) != nil {
			err = r.Error.asError()
		}
	}
	if err != nil {
		return fmt.Errorf("destroying the machine: %w", err)
	}
	m.remember(r)
	if m.reaped != nil {
		select {
		case <-m.reaped:
		case <-ctx.Done():
			return fmt.Errorf("waiting for the vm helper to exit: %w", ctx.Err())
		}
	}
	if err := os.RemoveAll(string(m.folder)); err != nil {
		return fmt.Errorf("removing the machine's folder: %w", err)
	}
	return nil
}

// destroy asks the helper, and kills one that hangs. The caller has the turn.
func (m *machine) destroy(ctx context.Context) (report, error) {
	patient, cancel := context.WithTimeout(ctx, m.d.config.Patience)
	defer cancel()
	r, err := m.askToDestroy(patient)
	switch {
	case err == nil:
		return r, nil
	case ctx.Err() != nil:
		return report{}, ctx.Err()
	case patient.Err() != nil:
		// It lives, since its socket took the call: the pid is still its own.
		if pid := m.folder.pid(); pid > 1 {
			m.d.log.Warn("vm helper does not answer and is killed", "vm", m.folder, "pid", pid)
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
				return report{}, fmt.Errorf("killing the vm helper: %w", err)
			}
		}
		if err := m.awaitSilence(ctx); err != nil {
			return report{}, err
		}
	case !errors.Is(err, errGone):
		return report{}, err
	}
	return m.lastWord(ctx)
}

// askToDestroy returns the final report once the helper has exited.
func (m *machine) askToDestroy(ctx context.Context) (report, error) {
	conn, err := m.call(ctx, request{Op: opDestroy})
	if err != nil {
		return report{}, err
	}
	defer func() { _ = conn.Close() }()
	var r report
	if err := m.receive(ctx, conn, &r); err != nil {
		return report{}, err
	}
	// The stream ends when the process does: then nothing of it is left.
	var more report
	if err := m.receive(ctx, conn, &more); !errors.Is(err, errGone) {
		return report{}, fmt.Errorf("waiting for the vm helper to exit: %w", err)
	}
	return r, nil
}

// awaitSilence waits until nobody listens any more.
func (m *machine) awaitSilence(ctx context.Context) error {
	for {
		conn, err := m.connect(ctx)
		if errors.Is(err, errGone) {
			return nil
		}
		if err != nil {
			return err
		}
		_ = conn.Close()
		select {
		case <-time.After(5 * time.Millisecond): // a killed process needs a moment to die
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// watch returns the first report that is enough, or the last word of the machine.
func (m *machine) watch(ctx context.Context, enough func(report) bool) (report, error) {
	if r := m.known(); r != nil {
		return *r, nil
	}
	conn, err := m.call(ctx, request{Op: opWatch})
	if err == nil {
		defer func() { _ = conn.Close() }()
		for {
			var r report
			if err = m.receive(ctx, conn, &r); err != nil {
				break
			}
			if r.State.final() {
				m.remember(r)
				return r, nil
			}
			if enough(r) {
				return r, nil
			}
		}
	}
	if !errors.Is(err, errGone) {
		return report{}, err
	}
	// One goroutine at a time reads or makes the last word: reaping twice is a waste.
	select {
	case m.turn <- struct{}{}:
		defer func() { <-m.turn }()
	case <-ctx.Done():
		return report{}, ctx.Err()
	}
	return m.lastWord(ctx)
}

// lastWord is the final report when the helper does not answer: what it left, or, if it
// was killed, what we make of that after reaping. The caller has the turn.
func (m *machine) lastWord(ctx context.Context) (report, error) {
	if r := m.known(); r != nil {
		return *r, nil
	}
	// Gone while we waited for the turn, or through another handle.
	if exists, err := m.folder.exists(); err != nil || !exists {
		return report{State: ended, Exit: vm.Exit{At: time.Now().UTC(), Reason: "destroyed"}}, err
	}
	var r report
	ok, err := m.folder.get(resultName, &r)
	if err != nil {
		return report{}, fmt.Errorf("reading the machine's result: %w", err)
	}
	if !ok {
		if r, err = m.lost(ctx); err != nil {
			return report{}, err
		}
	}
	m.remember(r)
	return r, nil
}

// lost makes the result of a machine whose helper was killed.
func (m *machine) lost(ctx context.Context) (report, error) {
	// A dying process closes its streams one by one, its socket perhaps as the last.
	dying, cancel := context.WithTimeout(ctx, m.d.config.Patience)
	defer cancel()
	if err := m.awaitSilence(dying); err != nil {
		return report{}, fmt.Errorf("the vm helper hung up without an answer, and lives: %w", err)
	}
	reason := "the vm helper was killed"
	if words := m.folder.lastWords(); words != "" {
		reason = "the vm helper crashed: " + words
	}
	spec, started, err := m.folder.spec()
	if err == nil && started {
		err = m.d.reap(ctx, m.folder, spec)
	}
	if err != nil {
		return report{}, fmt.Errorf("%s; %w", reason, err)
	}
	m.d.log.Warn("vm helper lost", "vm", spec.ID, "reason", reason)
	r := report{State: ended, Exit: vm.Exit{At: time.Now().UTC(), Reason: reason}}
	if err := m.folder.put(resultName, r); err != nil {
		return report{}, fmt.Errorf("keeping the machine's result: %w", err)
	}
	return r, nil
}

func (m *machine) known() *report {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.last
}

// remember keeps the first final report.
func (m *machine) remember(r report) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.last == nil {
		m.last = &r
	}
}

// call connects and sends a request.
func (m *machine) call(ctx context.Context, q request) (net.Conn, error) {
	conn, err := m.connect(ctx)
	if err != nil {
		return nil, err
	}
	if err := write(conn, q); err != nil {
		_ = conn.Close()
		return nil, errGone // the socket closed between the two
	}
	return conn, nil
}

// connect fails with errGone if nobody listens.
func (m *machine) connect(ctx context.Context) (net.Conn, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", m.folder.path(socketName))
	switch {
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ENOENT):
		return nil, errGone
	case ctx.Err() != nil && err != nil:
		return nil, ctx.Err()
	case err != nil:
		return nil, fmt.Errorf("connecting to the vm helper: %w", err)
	}
	if err := checkPeer(conn); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return conn, nil
}

// receive reads one report until ctx ends; errGone is a stream that ended first.
func (m *machine) receive(ctx context.Context, conn net.Conn, r *report) error {
	stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })
	err := read(conn, r)
	if !stop() {
		return ctx.Err()
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) {
		return errGone
	}
	if err != nil {
		return fmt.Errorf("the vm helper's answer: %w", err)
	}
	return nil
}
