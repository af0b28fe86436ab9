package helper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/paddock-ci/paddock/vm"
)

// socketFD is where a helper finds its socket: the first after standard error.
const socketFD = 3

// Limits of a helper.
const (
	requestLimit = 10 * time.Second // for a peer to say what it wants
	destroyLimit = 20 * time.Second // for the driver to destroy; below Config.Patience
	goodbyeLimit = 2 * time.Second  // for peers to take the final report
)

// Main is the body of a helper process: it reads its order from stdin, boots the
// machine and returns when that has ended and its result is in the folder. When ctx
// ends it destroys the machine. An error is for standard error, which is kept.
func Main(ctx context.Context, driver vm.Driver, stdin io.Reader) error {
	var o order
	if err := read(stdin, &o); err != nil {
		return fmt.Errorf("vm helper: no order on standard input; it is started by the node agent, not by hand: %w", err)
	}
	switch o.Op {
	case orderReap:
		if reaper, ok := driver.(vm.Reaper); ok {
			return reaper.Reap(ctx, o.Spec)
		}
		return nil // such a driver's machines cannot outlive their process
	case orderBoot:
	default:
		return fmt.Errorf("vm helper: unknown order %q", o.Op)
	}
	file := os.NewFile(socketFD, "socket")
	l, err := net.FileListener(file) // its own copy, close-on-exec
	_ = file.Close()
	if err != nil {
		return fmt.Errorf("vm helper: no socket: %w", err)
	}
	return newServer(driver, o).run(ctx, l)
}

// server is a helper's one machine and the connections about it.
type server struct {
	driver vm.Driver
	order  order
	end    chan struct{} // closed when somebody asked to destroy
	ask    func()        // closes it, once

	mu      sync.Mutex
	report  report
	changed chan struct{} // closed and replaced with each report
	machine vm.Machine    // while running
	conns   map[net.Conn]bool
}

func newServer(driver vm.Driver, o order) *server {
	s := &server{
		driver: driver, order: o, end: make(chan struct{}),
		report: report{State: booting}, changed: make(chan struct{}), conns: map[net.Conn]bool{},
	}
	s.ask = sync.OnceFunc(func() { close(s.end) })
	return s
}

// run lives the machine while it answers on l.
func (s *server) run(ctx context.Context, l net.Listener) error {
	var wg sync.WaitGroup
	// Peers are served to the end: when ctx ends they are told how it went.
	serving, stop := context.WithCancel(context.WithoutCancel(ctx))
	wg.Go(func() { s.accept(serving, l, &wg) })

	last := s.live(ctx)
	err := folder(s.order.Folder).put(resultName, last)
	s.set(last, nil)
	_ = l.Close() // only now: who finds it closed finds the result

	// The final report is on its way to those who asked; streams to a guest that is
	// gone end by themselves. What is left after a moment is cut.
	cut := time.AfterFunc(goodbyeLimit, s.cutAll)
	defer cut.Stop()
	s.sayGoodbye()
	stop()
	wg.Wait()
	if err != nil {
		return fmt.Errorf("vm helper: keeping the result: %w", err)
	}
	return nil
}

// live boots the machine, waits for its end or for the word to destroy it, and returns
// the final report. A panic of the driver is the end of this process, on purpose.
func (s *server) live(ctx context.Context) report {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan struct{})
	defer close(done)
	go func() {
		select {
		case <-s.end:
			cancel()
		case <-done:
		}
	}()
	m, err := s.driver.Boot(ctx, s.order.Spec)
	if err != nil { // the contract: nothing is left
		exit := vm.Exit{At: time.Now().UTC(), Reason: "did not boot: " + err.Error()}
		return report{State: failed, Exit: exit, Error: newFailure(err)}
	}
	s.set(report{State: running}, m)
	exit, err := m.Wait(ctx)
	// Also after an end of its own: Destroy is what promises that nothing is left.
	limit, stop := context.WithTimeout(context.WithoutCancel(ctx), destroyLimit)
	defer stop()
	destroyed := m.Destroy(limit)
	if err != nil { // it was we who ended it
		if exit, err = m.Wait(limit); err != nil {
			exit = vm.Exit{At: time.Now().UTC(), Reason: "destroyed"}
		}
	}
	last := report{State: ended, Exit: exit}
	if destroyed != nil {
		last.Error = newFailure(destroyed)
	}
	return last
}

// set changes the report and wakes whoever watches.
func (s *server) set(r report, m vm.Machine) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.report, s.machine = r, m
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *server) now() (report, vm.Machine, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.report, s.machine, s.changed
}

// accept takes connections until l is closed.
func (s *server) accept(ctx context.Context, l net.Listener, wg *sync.WaitGroup) {
	for {
		conn, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			select {
			case <-time.After(100 * time.Millisecond): // out of files: others may end
				continue
			case <-ctx.Done():
				return
			}
		}
		if checkPeer(conn) != nil {
			_ = conn.Close()
			continue
		}
		s.mu.Lock()
		s.conns[conn] = true
		s.mu.Unlock()
		wg.Go(func() {
			if s.handle(ctx, conn) {
				return // closed by the end of this process
			}
			s.mu.Lock()
			delete(s.conns, conn)
			s.mu.Unlock()
			_ = conn.Close()
		})
	}
}

// sayGoodbye ends the patience with peers that have not said what they want.
func (s *server) sayGoodbye() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for conn := range s.conns {
		_ = conn.SetReadDeadline(time.Now())
	}
}

func (s *server) cutAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for conn := range s.conns {
		_ = conn.Close()
	}
}

// handle serves one connection: one request. Who asked to destroy is kept on the line
// until this process exits: its end of file is the proof that nothing of it is left.
func (s *server) handle(ctx context.Context, conn net.Conn) (keep bool) {
	_ = conn.SetReadDeadline(time.Now().Add(requestLimit))
	var r request
	if err := read(conn, &r); err != nil {
		return false // nobody to tell
	}
	_ = conn.SetReadDeadline(time.Time{})
	ctx, listened := untilHangUp(ctx, conn)
	switch r.Op {
	case opDestroy:
		s.ask() // stands, even if the peer hangs up
		s.reportFrom(ctx, conn, true)
	case opWatch:
		s.reportFrom(ctx, conn, false)
	case opDial, opPort:
		guest, err := s.dial(ctx, r)
		listened() // from here the peer's bytes are the guest's
		s.connectThrough(conn, guest, err)
		return false
	case opSave, opAddress:
		_ = write(conn, s.carryOut(ctx, r))
	default:
		text := fmt.Sprintf("this machine's vm helper is older than the agent and does not know %q: it ends with the machine", r.Op)
		_ = write(conn, report{Error: &failure{Kind: kindUnknown, Text: text}})
	}
	listened()
	return r.Op == opDestroy
}

// untilHangUp returns a context that ends when the peer closes its side; no peer speaks
// before it has its answer. listened must be called, and gives the reading back.
func untilHangUp(ctx context.Context, conn net.Conn) (_ context.Context, listened func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, err := conn.Read(make([]byte, 1))
		if err == nil || !errors.Is(err, os.ErrDeadlineExceeded) {
			cancel()
		}
	}()
	return ctx, func() {
		_ = conn.SetReadDeadline(time.Unix(1, 0))
		<-done
		_ = conn.SetReadDeadline(time.Time{})
		cancel()
	}
}

// reportFrom sends reports, or only the final one, until it is sent or the peer left.
func (s *server) reportFrom(ctx context.Context, conn net.Conn, onlyFinal bool) {
	for {
		r, _, changed := s.now()
		if r.State.final() || !onlyFinal {
			if write(conn, r) != nil || r.State.final() {
				return
			}
		}
		select {
		case <-changed:
		case <-ctx.Done(): // hung up, or this process ends: then the final report is due
			if now, _, _ := s.now(); !now.State.final() {
				return
			}
		}
	}
}

// running is the machine, if it runs.
func (s *server) running() (vm.Machine, error) {
	r, m, _ := s.now()
	switch {
	case r.State.final():
		return nil, vm.ErrEnded
	case m == nil:
		return nil, errors.New("the machine is still booting")
	}
	return m, nil
}

// dial opens the stream that a request asks for.
func (s *server) dial(ctx context.Context, r request) (net.Conn, error) {
	m, err := s.running()
	if err != nil {
		return nil, err
	}
	if r.Op == opDial {
		return m.Dial(ctx)
	}
	ports, ok := m.(vm.PortDialer)
	if !ok {
		return nil, fmt.Errorf("reaching a port of the guest: %w", vm.ErrUnsupported)
	}
	return ports.DialPort(ctx, r.Port)
}

// carryOut answers a request about the machine that has one answer.
func (s *server) carryOut(ctx context.Context, r request) report {
	m, err := s.running()
	answer, _, _ := s.now()
	if err == nil {
		answer.Address, err = perform(ctx, m, r)
	}
	answer.Error = nil
	if err != nil {
		answer.Error = newFailure(err)
	}
	return answer
}

func perform(ctx context.Context, m vm.Machine, r request) (address string, err error) {
	if saver, ok := m.(vm.Saver); ok && r.Op == opSave {
		return "", saver.Save(ctx, r.Dir)
	}
	if a, ok := m.(vm.Addresser); ok && r.Op == opAddress {
		return a.Address(ctx)
	}
	return "", fmt.Errorf("%s: %w", r.Op, vm.ErrUnsupported)
}

// connectThrough answers a dial and carries the stream until both sides have ended.
func (s *server) connectThrough(conn, guest net.Conn, err error) {
	r, _, _ := s.now()
	if err != nil {
		r.Error = newFailure(err)
		_ = write(conn, r)
		return
	}
	defer func() { _ = guest.Close() }()
	r.Error = nil
	if write(conn, r) != nil {
		return
	}
	var wg sync.WaitGroup
	wg.Go(func() { pipe(guest, conn) })
	pipe(conn, guest)
	wg.Wait()
}

// pipe copies until from ends, and passes the end on: by half where the stream can.
func pipe(to, from net.Conn) {
	_, err := io.Copy(to, from)
	if half, ok := to.(interface{ CloseWrite() error }); ok && err == nil {
		_ = half.CloseWrite()
		return
	}
	_ = to.Close()
}
