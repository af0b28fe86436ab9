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
	Log     *slog.Logger // nil: no log
}

// Limits of one agent. The host needs one connection with three requests; more of
// either is a mistake or an attack from inside.
const (
	maxConns    = 16
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
}

// Serve answers on l until ctx ends or l fails; then it kills the runner with its
// process group, closes l and every connection, and returns when nothing of it runs.
// The error is nil if ctx ended.
func Serve(ctx context.Context, l net.Listener, c AgentConfig) error {
	if c.Version == "" {
		c.Version = "unknown"
	}
	a := &agent{config: c, log: c.Log, status: Status{State: Idle}, changed: make(chan struct{})}
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
		select {
		case free <- struct{}{}:
		case <-serving.Done():
			return nil
		}
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			_ = l.Close()
			return fmt.Errorf("guest agent: accepting a connection: %w", err)
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

	mu   sync.Mutex // guards writes and open
	open map[uint32]context.CancelFunc
}

// serveConn answers one connection until it ends; what it asked for goes on.
func (a *agent) serveConn(ctx context.Context, conn net.Conn) {
	ctx, cancel := context.WithCancel(ctx)
	s := &session{agent: a, conn: conn, open: map[uint32]context.CancelFunc{}}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer func() {
		if stop() { // otherwise it is closed already
			_ = conn.Close()
		}
	}()
	for {
		f, err := readFrame(conn)
		if err != nil {
			if errors.Is(err, errFrame) {
				a.log.Warn("connection dropped", "error", err)
			}
			return
		}
		if f.kind == kindCancel {
			s.end(f.id)
			continue
		}
		requestCtx, ok := s.begin(ctx, f.id)
		if !ok {
			a.log.Warn("connection dropped: too many requests at once, or an id used twice", "id", f.id)
			return
		}
		wg.Go(func() {
			defer s.end(f.id)
			s.answer(requestCtx, f)
		})
	}
}

// begin notes an open request; false if there are too many or its id is in use.
func (s *session) begin(ctx context.Context, id uint32) (context.Context, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, used := s.open[id]; used || len(s.open) >= maxRequests {
		return nil, false
	}
	ctx, s.open[id] = context.WithCancel(ctx)
	return ctx, true
}

func (s *session) end(id uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if cancel, ok := s.open[id]; ok {
		cancel()
		delete(s.open, id)
	}
}

// answer handles one request.
func (s *session) answer(ctx context.Context, f frame) {
	a := s.agent
	switch f.kind {
	case kindHello:
		status, _ := a.now()
		s.send(kindHelloAnswer, f.id, Hello{Protocol: Protocol, Version: a.config.Version, Status: status})
	case kindStart:
		var b startBody
		err := f.decode(&b)
		if err == nil {
			err = a.start(ctx, Run(b))
		}
		clear(f.body) // holds the input
		if err != nil {
			s.fail(f.id, err)
			return
		}
		s.send(kindDone, f.id, nil)
	case kindWatch:
		s.watch(ctx, f.id)
	case kindCancel, kindHelloAnswer, kindDone, kindStatus, kindError:
		fallthrough
	default:
		s.fail(f.id, fmt.Errorf("%w: kind %d", ErrUnsupported, f.kind))
	}
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
	s.mu.Lock()
	defer s.mu.Unlock()
	_, err = s.conn.Write(b)
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
