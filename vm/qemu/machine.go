package qemu

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/vm"
)

// How long QEMU may take for what takes it milliseconds, before it is killed or given up.
const (
	quitLimit    = 300 * time.Millisecond
	commandLimit = 10 * time.Second
)

// machine is one QEMU.
type machine struct {
	plan    *plan
	clone   func(ctx context.Context, src, dst string) error
	log     *slog.Logger
	owner   *owner
	monitor *monitor
	port    *port
	shares  []*share
	passt   *passt // nil: another network
	line    *guest.Line
	printed chan error    // the end of the console
	opened  chan struct{} // closed when the guest has opened its port

	saving   chan struct{} // holds one token: one save at a time
	forwards sync.Mutex    // one change of forwarded ports at a time
	address  atomic.Bool   // the guest was seen at its address

	ending  chan struct{} // closed when Destroy was called
	destroy func()        // closes it, once
	done    chan struct{} // closed when nothing is left
	exit    vm.Exit       // set before done is closed
	broken  error         // set before done is closed: of what served the machine, if that failed
	reason  atomic.Value  // of QEMU's end, in QEMU's word: a string
}

// streams are our ends of what QEMU inherits, and its own.
type streams struct {
	monitor, console, port *net.UnixConn
	theirs                 []*os.File
}

// openStreams makes them; close both sides' after a failure, theirs in any case.
func openStreams() (s streams, err error) {
	for _, e := range []struct {
		ours **net.UnixConn
		what string
	}{{&s.monitor, "QEMU's monitor"}, {&s.console, "the console"}, {&s.port, "the guest's port"}} {
		ours, theirs, err := pair(e.what)
		if err != nil {
			s.close()
			s.closeTheirs()
			return streams{}, err
		}
		*e.ours, s.theirs = ours, append(s.theirs, theirs)
	}
	return s, nil
}

func (s streams) close() {
	for _, c := range []*net.UnixConn{s.monitor, s.console, s.port} {
		if c != nil {
			_ = c.Close()
		}
	}
}

func (s streams) closeTheirs() {
	for _, f := range s.theirs {
		_ = f.Close()
	}
}

// launch starts QEMU and what serves its shares; the caller calls live.
func launch(ctx context.Context, p *plan, clone func(ctx context.Context, src, dst string) error, log *slog.Logger) (_ *machine, err error) {
	m := &machine{
		plan: p, clone: clone, log: log,
		printed: make(chan error, 1), opened: make(chan struct{}), saving: make(chan struct{}, 1),
		ending: make(chan struct{}), done: make(chan struct{}),
	}
	defer func() {
		if err != nil {
			_ = m.endHelpers() // err says more
		}
	}()
	screen, err := openConsole(p.spec.Dir)
	if err != nil {
		return nil, err
	}
	s, err := openStreams()
	if err != nil {
		return nil, errors.Join(err, screen.file.Close())
	}
	defer s.closeTheirs() // the child has its own
	if err = m.start(ctx, s.theirs); err != nil {
		s.close()
		return nil, errors.Join(err, screen.file.Close())
	}
	m.saving <- struct{}{}
	m.destroy = sync.OnceFunc(func() { close(m.ending) })
	open := sync.OnceFunc(func() { close(m.opened) })
	m.monitor = newMonitor(s.monitor, func(e message) { m.happened(e, open) })
	go func() { m.printed <- screen.copy(s.console) }()
	m.port = newPort(m.monitor, s.port)
	m.line = guest.NewLine(m.port.open)
	return m, nil
}

// start starts the processes; inherited are QEMU's ends of the streams.
func (m *machine) start(ctx context.Context, inherited []*os.File) error {
	p := m.plan
	for _, mount := range p.spec.Mounts {
		s, err := openShare(ctx, p.shares, mount, p.spec.Dir)
		if err != nil {
			return err
		}
		m.shares, inherited = append(m.shares, s), append(inherited, s.conn)
	}
	if p.passt != "" {
		var err error
		if m.passt, err = openPasst(ctx, p, m.log); err != nil {
			return err
		}
		inherited = append(inherited, m.passt.qemu)
	}
	args, err := p.args(3, 4, 5) // where ExtraFiles begin
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(context.WithoutCancel(ctx), p.program.path, args...)
	cmd.Dir = p.spec.Dir
	cmd.Env = append(vm.ChildEnv(), markEnv+"="+p.spec.Dir)
	cmd.ExtraFiles = inherited
	if m.owner, err = own(cmd); err != nil {
		return err
	}
	for _, s := range m.shares {
		_ = s.conn.Close() // so that QEMU's end is the stream's
	}
	if m.passt != nil {
		_ = m.passt.qemu.Close()
	}
	return nil
}

// endHelpers ends what runs beside QEMU. The error says which shares failed by themselves.
func (m *machine) endHelpers() error {
	m.passt.end()
	var failed []error
	for _, s := range m.shares {
		failed = append(failed, s.end())
	}
	return errors.Join(failed...)
}

// happened takes note of an event.
func (m *machine) happened(e message, open func()) {
	switch d := e.data(); e.Event {
	case "VSERPORT_CHANGE":
		if d.ID == portID && d.Open {
			open()
		}
	case "SHUTDOWN":
		m.reason.Store(d.Reason)
	}
}

// live waits for QEMU's end or for Destroy, which it then brings about, and for the end
// of everything around it. ctx is never cancelled; the killing is bounded.
func (m *machine) live(ctx context.Context) {
	select {
	case <-m.owner.exited:
		m.exit.At = time.Now().UTC()
		<-m.monitor.done // QEMU's last word may be why
		m.exit.Reason = m.why()
		if m.broken = m.endHelpers(); m.broken != nil {
			m.exit.Reason += ": " + m.broken.Error()
		}
	case <-m.ending:
		m.exit.Reason = "destroyed"
		m.quit(ctx)
		m.exit.At = time.Now().UTC()
		_ = m.endHelpers() // however they ended: it was wanted
	}
	m.monitor.close()
	m.port.end()
	_ = m.line.Close()
	if err := <-m.printed; err != nil {
		m.log.Warn("part of the console is lost", "vm", m.plan.spec.ID, "error", err)
	}
}

// quit ends QEMU, by its own hand if it is quick. A machine that stands still is asked
// in vain.
func (m *machine) quit(ctx context.Context) {
	limited, cancel := context.WithTimeout(ctx, quitLimit)
	defer cancel()
	_ = m.monitor.run(limited, "quit", nil)
	select {
	case <-m.owner.exited:
		return
	case <-limited.Done():
	}
	_ = m.owner.cmd.Process.Kill()
	<-m.owner.exited
}

// why says in words how QEMU ended.
func (m *machine) why() string {
	switch reason, _ := m.reason.Load().(string); reason {
	case "guest-shutdown":
		return "the guest powered off"
	case "guest-reset", "guest-panic":
		return "the guest restarted or panicked, which ends the machine"
	}
	why := "QEMU ended: " + m.owner.cmd.ProcessState.String()
	if said := strings.TrimSpace(m.owner.said.String()); said != "" {
		why += ": " + said
	}
	return why
}

// up waits until the machine runs and, if there is one, the guest's agent has opened its
// port.
func (m *machine) up(ctx context.Context) error {
	if err := m.monitor.hello(ctx); err != nil {
		return m.ended(ctx, err)
	}
	if m.plan.state != nil {
		if err := m.restore(ctx); err != nil {
			return err
		}
	}
	if !m.plan.spec.Agent {
		return nil
	}
	select {
	case <-m.opened:
		return nil
	case <-m.owner.exited:
		return m.ended(ctx, errMonitorGone)
	case <-ctx.Done():
		return fmt.Errorf("waiting for the guest's agent to open the port %s: %w", portName, ctx.Err())
	}
}

// ended is err, or why QEMU ended if it did, which it may do a moment later; if that was
// for want of a share, why there was none.
func (m *machine) ended(ctx context.Context, err error) error {
	if !errors.Is(err, errMonitorGone) {
		return err
	}
	select {
	case <-m.done:
		if m.broken != nil {
			return m.broken
		}
		return errors.New(m.exit.Reason)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// failed destroys a machine whose boot failed with cause, and says how.
func (m *machine) failed(ctx context.Context, cause error) error {
	cancelled := ctx.Err() != nil && errors.Is(cause, ctx.Err())
	// The kill is bounded by itself, so the cleaning goes on when ctx has ended.
	clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), commandLimit)
	defer cancel()
	leftover := m.Destroy(clean)
	switch console := vm.ConsoleTail(m.plan.spec.Dir); {
	case leftover != nil || errors.Is(cause, context.Canceled) || errors.Is(cause, vm.ErrState) || errors.Is(cause, errShare):
		return errors.Join(cause, leftover)
	case cancelled && m.plan.kernel == "":
		return &vm.BootError{Console: console, Err: fmt.Errorf("%w (is there a boot loader on its disk?)", cause)}
	default:
		return &vm.BootError{Console: console, Err: cause}
	}
}

// Dial opens a stream to the guest's agent.
func (m *machine) Dial(ctx context.Context) (net.Conn, error) {
	if m.over() {
		return nil, vm.ErrEnded
	}
	ctx, cancel := m.whileAlive(ctx)
	defer cancel()
	conn, err := m.line.Dial(ctx)
	switch {
	case err == nil:
		return conn, nil
	case m.over():
		return nil, vm.ErrEnded
	}
	return nil, fmt.Errorf("dialling the guest: %w", err)
}

// over tells whether the machine has ended or is about to.
func (m *machine) over() bool {
	select {
	case <-m.ending:
		return true
	case <-m.owner.exited:
		return true
	default:
		return false
	}
}

// whileAlive is ctx until the machine ends.
func (m *machine) whileAlive(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		select {
		case <-m.ending:
		case <-m.owner.exited:
		case <-ctx.Done():
		}
		cancel()
	}()
	return ctx, func() {
		cancel()
		<-watched
	}
}

// Wait returns when nothing of the machine is left.
func (m *machine) Wait(ctx context.Context) (vm.Exit, error) {
	select {
	case <-m.done:
		return m.exit, nil
	case <-ctx.Done():
		return vm.Exit{}, ctx.Err()
	}
}

// Destroy ends QEMU; if ctx ends first, the ending goes on.
func (m *machine) Destroy(ctx context.Context) error {
	m.destroy()
	select {
	case <-m.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("destroying the machine: %w", ctx.Err())
	}
}
