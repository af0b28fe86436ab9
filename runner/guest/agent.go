package guest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"
)

// AgentConfig makes an agent.
type AgentConfig struct {
	Dir     string       // the runner's working directory; "": the agent's own
	Version string       // said in hello; "": "unknown"
	System  System       // nil: the machine is not the agent's to change, as with a process on a host
	Log     *slog.Logger // nil: no log
}

// Limits of one agent. The host needs one connection with a few requests, and one for
// each port that somebody forwards; what is beyond is hung up on.
const (
	maxConns    = 256
	maxRequests = 16 // open at once, per connection
)

// agent is the state that outlives connections.
type agent struct {
	config AgentConfig
	log    *slog.Logger

	mu      sync.Mutex
	status  Status
	changed chan struct{} // closed and replaced at each change of status
	process *process      // the one runner; nil until started

	network chan struct{} // holds a token while the network is being brought up
}

// Serve answers on l until ctx ends or l fails; then it kills the runner with its
// process group, closes l and every connection, and returns when nothing of it runs.
// The error is nil if ctx ended.
func Serve(ctx context.Context, l net.Listener, c AgentConfig) error {
	if c.Version == "" {
		c.Version = "unknown"
	}
	a := &agent{config: c, log: c.Log, status: Status{State: Idle}, changed: make(chan struct{}), network: make(chan struct{}, 1)}
	if a.log == nil {
		a.log = slog.New(slog.DiscardHandler)
	}
	serving, cancel := context.WithCancel(ctx)
	defer a.killRunner()
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	// Closing the listener is the only way to wake Accept.
	stop := context.AfterFunc(serving, func() { _ = l.Close() })
	defer stop()

	free := make(chan struct{}, maxConns)
	for {
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			_ = l.Close()
			return fmt.Errorf("guest agent: accepting a connection: %w", err)
		}
		select {
		case free <- struct{}{}:
		default:
			_ = conn.Close()
			continue
		}
		wg.Go(func() {
			a.serveConn(serving, conn)
			<-free
		})
	}
}

// session is one connection. Answers of concurrent requests share its write lock.
type session struct {
	agent *agent
	conn  net.Conn

	writing sync.Mutex // one frame at a time

	mu   sync.Mutex // guards what follows
	open map[uint32]*request
}

// request is one that is being answered.
type request struct {
	id     uint32
	cancel context.CancelFunc
	unread chan struct{} // holds a token for each output answer that the host has not consumed
	data   chan []byte   // pieces of a put's file that are not yet written
}

// serveConn answers one connection until it ends; the runner that it asked for goes on.
func (a *agent) serveConn(ctx context.Context, conn net.Conn) {
	ctx, cancel := context.WithCancel(ctx)
	s := &session{agent: a, conn: conn, open: map[uint32]*request{}}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer func() {
		if stop() { // otherwise it is closed already
			_ = conn.Close()
		}
	}()
	for first := true; ; first = false {
		f, err := readFrame(conn)
		if err != nil {
			if errors.Is(err, errFrame) {
				a.log.Warn("connection dropped", "error", err)
			}
			return
		}
		if first && f.kind == kindConnect {
			s.connect(ctx, f)
			return
		}
		if err := s.take(ctx, f, &wg); err != nil {
			a.log.Warn("connection dropped", "error", err)
			return
		}
	}
}

// take handles one message: it begins a request, or belongs to one that is open; what
// belongs to one that is over is late, and dropped. It does not wait.
func (s *session) take(ctx context.Context, f frame, wg *sync.WaitGroup) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, known := s.open[f.id]
	switch f.kind {
	case kindCancel, kindCredit, kindData:
		if !known {
			return nil
		}
		return s.goOn(r, f)
	default:
	}
	if known || len(s.open) >= maxRequests {
		return fmt.Errorf("%w: too many requests at once, or an id used twice: %d", errFrame, f.id)
	}
	ctx, cancel := context.WithCancel(ctx)
	r = &request{id: f.id, cancel: cancel, unread: make(chan struct{}, window), data: make(chan []byte, window)}
	s.open[f.id] = r
	wg.Go(func() {
		defer s.end(r)
		s.answer(ctx, r, f)
	})
	return nil
}

// goOn handles a message about an open request. The caller holds s.mu.
func (s *session) goOn(r *request, f frame) error {
	switch f.kind {
	case kindCancel:
		r.cancel()
		delete(s.open, r.id)
	case kindCredit:
		select {
		case <-r.unread:
		default: // for nothing that we sent
		}
	default:
		select {
		case r.data <- f.body:
		default:
			return fmt.Errorf("%w: more data than was asked for", errFrame)
		}
	}
	return nil
}

// end forgets a request, unless its id is in use again already.
func (s *session) end(r *request) {
	r.cancel()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open[r.id] == r {
		delete(s.open, r.id)
	}
}

// answer handles one request.
func (s *session) answer(ctx context.Context, r *request, f frame) {
	var err error
	switch f.kind {
	case kindHello:
		status, _ := s.agent.now()
		s.send(kindHelloAnswer, f.id, Hello{Protocol: Protocol, Version: s.agent.config.Version, Status: status})
	case kindStart:
		err = s.start(ctx, f)
	case kindWatch:
		s.watch(ctx, f.id)
	case kindExec:
		err = s.exec(ctx, r, f)
	case kindPut:
		err = s.put(ctx, r, f)
	case kindOutput:
		s.output(ctx, r)
	case kindNetwork:
		err = s.networkUp(ctx, f)
	case kindWake:
		err = s.wake(ctx, f)
	case kindShutdown:
		err = s.shutdown(ctx, f)
	case kindConnect:
		err = errors.New("a stream to a port must be a fresh one")
	default:
		err = fmt.Errorf("%w: kind %d", ErrUnsupported, f.kind)
	}
	if err != nil {
		s.fail(f.id, err)
	}
}

func (s *session) start(ctx context.Context, f frame) error {
	var b startBody
	err := f.decode(&b)
	if err == nil {
		err = s.agent.start(ctx, Run(b))
	}
	clear(f.body) // holds the input
	if err == nil {
		s.send(kindDone, f.id, nil)
	}
	return err
}

// watch sends the status now and at each change, until it is final.
func (s *session) watch(ctx context.Context, id uint32) {
	for {
		status, changed := s.agent.now()
		if !s.send(kindStatus, id, status) || status.State == Exited {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

func (s *session) fail(id uint32, err error) {
	body := errorBody{Text: clip(err.Error(), maxText)}
	switch {
	case errors.Is(err, ErrOccupied):
		body.Code = codeOccupied
	case errors.Is(err, ErrUnsupported):
		body.Code = codeUnsupported
	}
	s.send(kindError, id, body)
}

// send writes one answer; false ends the request, since the connection is gone.
func (s *session) send(k kind, id uint32, body any) bool {
	b, err := encodeFrame(k, id, body)
	if err != nil {
		s.agent.log.Error("answer not sent", "error", err)
		return false
	}
	return s.write(b)
}

// chunk sends a piece of output once the host has room for it; false ends the request.
func (s *session) chunk(ctx context.Context, r *request, k kind, p []byte) bool {
	select {
	case r.unread <- struct{}{}:
	case <-ctx.Done():
		return false
	}
	b, err := encodeRaw(k, r.id, p)
	return err == nil && s.write(b)
}

func (s *session) write(b []byte) bool {
	s.writing.Lock()
	defer s.writing.Unlock()
	_, err := s.conn.Write(b)
	return err == nil
}

// now returns the status and a channel that is closed when it changes.
func (a *agent) now() (Status, <-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.status, a.changed
}

// set changes the status and wakes the watchers. The caller holds a.mu.
func (a *agent) set(s Status) {
	a.status = s
	close(a.changed)
	a.changed = make(chan struct{})
}

// start runs the one runner; the same name again is a success, whatever became of it.
func (a *agent) start(ctx context.Context, r Run) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.process != nil {
		if a.status.Name != r.Name {
			return fmt.Errorf("%w: it is %q", ErrOccupied, a.status.Name)
		}
		return nil
	}
	if r.Name == "" || len(r.Name) > maxText || len(r.Argv) == 0 {
		return errors.New("a runner needs a name and a program")
	}
	if r.Dir == "" {
		r.Dir = a.config.Dir
	}
	p, err := startProcess(ctx, r, a.busy)
	if err != nil {
		return fmt.Errorf("starting the runner: %w", err)
	}
	a.process = p
	a.set(Status{State: Running, Name: r.Name})
	a.log.Info("runner started", "runner", r.Name)
	go func() {
		code := p.wait()
		a.exited(code, p.out.tail())
		p.out.ring.close()
		close(p.gone)
	}()
	return nil
}

// busy is called from the runner's output.
func (a *agent) busy(job string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := a.status
	s.State, s.Job, s.BusyAt = Busy, job, time.Now().UTC()
	a.set(s)
	a.log.Info("runner is busy", "runner", s.Name)
}

func (a *agent) exited(code int, tail string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := a.status
	s.State, s.ExitCode, s.Tail, s.ExitedAt = Exited, code, tail, time.Now().UTC()
	a.set(s)
	a.log.Info("runner exited", "runner", s.Name, "code", code)
}

// killRunner ends the runner with its process group and waits until it is reaped.
func (a *agent) killRunner() {
	a.mu.Lock()
	p, status := a.process, a.status
	a.mu.Unlock()
	if p == nil {
		return
	}
	if status.State != Exited { // its group was killed when it ended
		p.kill()
	}
	<-p.gone
}
