package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/vm"
)

// A session connects a person with a VM here, by a call that this node makes: an order
// names it, the VM is dialled first, and then the controller, whose answer is a raw
// stream. What cannot be had is said to the person in words. A session belongs to its
// machine: it ends when that does, and nothing waits for it but the agent's own end.

// Sessions is what the agent needs to answer people. *api.Client has it.
type Sessions interface {
	// Answer makes the stream to whoever waits; ctx bounds only that.
	Answer(ctx context.Context, node fleet.NodeID, sid string) (api.Stream, error)
	// Refuse tells them why there is none.
	Refuse(ctx context.Context, node fleet.NodeID, sid string, why api.Error) error
}

const (
	// maxSessions is how many this node has at once; each has a few goroutines and files.
	maxSessions = 16
	// guestTime is how long a session's way into the guest may take: less than the 20 s
	// for which the controller waits, so that it hears why.
	guestTime = 15 * time.Second
	// meetTime bounds the tries to reach the replica of the controller that waits.
	meetTime = 20 * time.Second
	// meetPause and meetMost bound the pause between them.
	meetPause = 50 * time.Millisecond
	meetMost  = time.Second
	// consoleEvery is how often a console is looked at for more.
	consoleEvery = 200 * time.Millisecond
	// lastWords is how long what a machine printed at its end may take to be passed on.
	lastWords = 500 * time.Millisecond
	// firstLogs is how long the first of a runner's kept output may take to come, and
	// restLogs the rest: a runner may print faster than it is read. The silence of
	// quietLogs says before that what has come is all there is, and so do keptLogs bytes:
	// over SSH 2.5 MiB are kept at most, by the other ways less.
	firstLogs = 2 * time.Second
	restLogs  = 2 * time.Second
	quietLogs = 500 * time.Millisecond
	keptLogs  = 3 << 20
)

// connector keeps account of sessions; its fields are guarded by Agent.mu.
type connector struct {
	taken map[string]bool // ids that the last reply named: each is answered once
	open  int
}

// connectPeople takes each session of a reply once.
func (a *Agent) connectPeople(lives context.Context, orders []api.SessionOrder) {
	if a.c.Sessions == nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	named := make(map[string]bool, len(orders))
	for _, o := range orders {
		named[o.ID] = true
		if a.people.taken[o.ID] || a.isStopping() {
			continue
		}
		a.people.open++
		over := a.people.open > maxSessions
		a.short.Go(func() {
			defer func() {
				a.mu.Lock()
				a.people.open--
				a.mu.Unlock()
			}()
			if over {
				a.refusePerson(lives, o, fmt.Errorf("node %s has %d sessions open: end one, or try again", a.c.ID, maxSessions))
				return
			}
			a.connectPerson(lives, o)
		})
	}
	a.people.taken = named
}

// connectPerson lives one session.
func (a *Agent) connectPerson(lives context.Context, o api.SessionOrder) {
	to, err := a.contactOf(o.VM)
	if err != nil {
		a.refusePerson(lives, o, err)
		return
	}
	ctx, end := context.WithCancel(lives)
	var watch sync.WaitGroup
	defer watch.Wait()
	defer end()
	watch.Go(func() {
		defer end()
		a.untilEnded(ctx, to)
	})
	source, err := a.source(ctx, to, o)
	if err != nil {
		a.refusePerson(lives, o, err)
		return
	}
	defer source.close()
	stream, err := a.answerPerson(ctx, o)
	if err != nil {
		a.log.Info("a session was not joined", "vm", o.VM, "kind", o.Kind, "error", err)
		return
	}
	a.log.Info("a session begins", "vm", o.VM, "kind", o.Kind, "port", o.Port)
	source.serve(ctx, stream)
}

// untilEnded returns when a machine has ended, or ctx has.
func (a *Agent) untilEnded(ctx context.Context, to contact) {
	for n := 1; ctx.Err() == nil; n++ {
		if _, err := to.machine.Wait(ctx); err == nil {
			return
		}
		if _, err := a.contactOf(to.order.ID); err != nil {
			return
		}
		pause(ctx, backoff(n, dialPause, dialMost))
	}
}

// answerPerson calls the controller until the replica that waits is reached.
func (a *Agent) answerPerson(ctx context.Context, o api.SessionOrder) (api.Stream, error) {
	var stream api.Stream
	err := meet(ctx, func(ctx context.Context) (err error) {
		stream, err = a.c.Sessions.Answer(ctx, a.c.ID, o.ID)
		return err
	})
	return stream, err
}

// refusePerson says why there is no session.
func (a *Agent) refusePerson(ctx context.Context, o api.SessionOrder, why error) {
	a.log.Info("a session is refused", "vm", o.VM, "kind", o.Kind, "port", o.Port, "error", why)
	said := api.Error{Message: fmt.Sprintf("node %s: %v", a.c.ID, why), Hint: hintFor(why)}
	if err := meet(ctx, func(ctx context.Context) error { return a.c.Sessions.Refuse(ctx, a.c.ID, o.ID, said) }); err != nil {
		a.log.Info("nobody was told why there is no session", "vm", o.VM, "error", err)
	}
}

// hintFor knows what helps against a refusal.
func hintFor(err error) string {
	switch {
	case errors.Is(err, vm.ErrUnsupported), errors.Is(err, guest.ErrUnsupported):
		return "this VM's driver, bootstrap or agent cannot do that; the VM's console is there for all of them"
	case errors.Is(err, vm.ErrEnded):
		return "paddock vm list shows those that run"
	case errors.Is(err, context.DeadlineExceeded):
		return "the guest does not answer: paddock vm console shows what it prints"
	}
	return ""
}

// meet repeats a call that another replica of the controller, or an error on the way,
// answers; any other answer is final.
func meet(ctx context.Context, call func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, meetTime)
	defer cancel()
	for n := 1; ; n++ {
		err := call(ctx)
		var said *api.Error
		again := err != nil && (!errors.As(err, &said) || said.Status == http.StatusMisdirectedRequest || said.Status >= http.StatusInternalServerError)
		if !again || ctx.Err() != nil {
			return err
		}
		pause(ctx, backoff(n, meetPause, meetMost))
	}
}

// source is the VM's end of a session: serve carries it until either end is over, ctx
// ends, or the stream breaks; it closes the stream. close gives free what serve was not
// called for, and does nothing after it.
type source struct {
	serve func(ctx context.Context, stream api.Stream)
	close func()
}

// source opens what an order asks for.
func (a *Agent) source(ctx context.Context, to contact, o api.SessionOrder) (source, error) {
	opening, cancel := context.WithTimeout(ctx, guestTime)
	defer cancel()
	switch o.Kind {
	case api.SessionPort:
		conn, err := dialPort(opening, to, o.Port)
		if err != nil {
			return source{}, because(ctx, err)
		}
		return source{
			serve: func(ctx context.Context, stream api.Stream) { join(ctx, stream, conn) },
			close: func() { _ = conn.Close() },
		}, nil
	case api.SessionConsole:
		path := filepath.Join(to.dir, vm.ConsoleFile)
		return source{
			serve: func(ctx context.Context, stream api.Stream) {
				show(ctx, stream, func(ctx context.Context, w io.Writer) { printConsole(ctx, w, path, o.Once) })
			},
			close: func() {},
		}, nil
	case api.SessionLogs:
		return a.logs(opening, to, o)
	}
	return source{}, fmt.Errorf("%q is no kind of session that this node knows: its agent may be older than the controller", o.Kind)
}

// logs opens a way of the session's own to what the runner prints.
func (a *Agent) logs(ctx context.Context, to contact, o api.SessionOrder) (source, error) {
	way, err := a.connect(ctx, to)
	if err != nil {
		return source{}, err
	}
	printer, ok := way.(interface {
		Output(ctx context.Context, p func([]byte)) error
	})
	if ok {
		_, err = way.Hello(ctx) // else a guest that is away is found out too late to say so
	} else {
		err = fmt.Errorf("the runner's output does not come out of a guest with bootstrap %s: %w", to.order.Bootstrap, vm.ErrUnsupported)
	}
	if err != nil {
		return source{}, errors.Join(err, way.Close())
	}
	return source{
		serve: func(ctx context.Context, stream api.Stream) {
			show(ctx, stream, func(ctx context.Context, w io.Writer) {
				if err := printLogs(ctx, w, printer.Output, o.Once); err != nil && ctx.Err() == nil {
					a.log.Info("a session's output broke off", "vm", o.VM, "error", err)
				}
			})
		},
		close: func() { _ = way.Close() },
	}, nil
}

// dialPort connects to a TCP port of the guest: by the agent, which reaches what listens
// on the guest's loopback only, else by the driver.
func dialPort(ctx context.Context, to contact, port int) (net.Conn, error) {
	if port < 1 || port > 65535 {
		return nil, fmt.Errorf("%d is no port", port)
	}
	if bootstrapOf(to.order) == fleet.BootstrapAgent {
		conn, err := to.machine.Dial(ctx)
		if err != nil {
			return nil, fmt.Errorf("dialling the guest: %w", err)
		}
		err = guest.Connect(ctx, conn, port)
		if err == nil {
			return conn, nil
		}
		_ = conn.Close()
		if !errors.Is(err, guest.ErrUnsupported) {
			return nil, err
		}
	}
	ports, ok := to.machine.(vm.PortDialer)
	if !ok {
		return nil, fmt.Errorf("connecting to port %d of the guest: %w", port, vm.ErrUnsupported)
	}
	conn, err := ports.DialPort(ctx, port)
	if errors.Is(err, context.DeadlineExceeded) {
		return nil, fmt.Errorf("nobody answered at port %d of the guest within %v: %w", port, guestTime, err)
	}
	if err != nil {
		return nil, fmt.Errorf("connecting to port %d of the guest: %w", port, err)
	}
	return conn, nil
}

// join copies between two streams until both directions have ended, one has failed, or
// ctx ends; then both are closed.
func join(ctx context.Context, stream api.Stream, conn net.Conn) {
	cut := func() { _, _ = stream.Close(), conn.Close() }
	stop := context.AfterFunc(ctx, cut)
	defer stop()
	defer cut()
	var both sync.WaitGroup
	both.Go(func() {
		if pour(conn, stream) != nil {
			cut()
		}
	})
	if pour(stream, conn) != nil {
		cut()
	}
	both.Wait()
}

// pour copies one direction and passes its end on: by half, or, where a stream has no
// halves, as a whole.
func pour(to io.WriteCloser, from io.Reader) error {
	if _, err := io.Copy(to, from); err != nil {
		return err
	}
	if half, ok := to.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return to.Close()
}

// show lets a printer write to a stream until it has said all, the other side leaves, or
// ctx ends: then it has lastWords for the rest.
func show(ctx context.Context, stream api.Stream, print func(context.Context, io.Writer)) {
	ctx, leave := context.WithCancel(ctx)
	var left sync.WaitGroup
	defer left.Wait()
	defer func() { _ = stream.Close() }() // which ends the reading below
	defer leave()
	left.Go(func() {
		_, _ = io.Copy(io.Discard, stream) // nothing is expected; its end is
		leave()
	})
	printed := make(chan struct{})
	left.Go(func() {
		defer close(printed)
		print(ctx, stream)
	})
	select {
	case <-printed:
		return
	case <-ctx.Done():
	}
	late := time.NewTimer(lastWords)
	defer late.Stop()
	select {
	case <-printed:
	case <-late.C: // its write is ended with the stream
	}
}

// printConsole writes what a machine prints from its beginning, and with once no more
// than is there. When ctx ends it writes the rest: a machine's last words say why it ended.
func printConsole(ctx context.Context, w io.Writer, path string, once bool) {
	tick := time.NewTicker(consoleEvery)
	defer tick.Stop()
	f, err := os.Open(path)
	for errors.Is(err, fs.ErrNotExist) && !once {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		f, err = os.Open(path)
	}
	if err != nil {
		return // nothing was printed
	}
	defer func() { _ = f.Close() }()
	if once {
		if info, err := f.Stat(); err == nil {
			_, _ = io.CopyN(w, f, info.Size())
		}
		return
	}
	for last := false; ; {
		if err := catchUp(w, f); err != nil || last {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			last = true
		}
	}
}

// catchUp writes what was added to a console's file. Drivers bound the file: once it is
// full it is shorter than what was read, and what is at its end was read before, mostly.
func catchUp(w io.Writer, f *os.File) error {
	at, err := f.Seek(0, io.SeekCurrent)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.Size() < at {
		if _, err := io.WriteString(w, "\r\n[the console is long: a part of it was left out]\r\n"); err != nil {
			return err
		}
		if _, err := f.Seek(info.Size(), io.SeekStart); err != nil {
			return err
		}
	}
	_, err = io.Copy(w, f)
	return err
}

// printLogs writes what a runner prints; with once, what is kept of it. A runner that goes
// on printing does not keep once from ending.
func printLogs(ctx context.Context, w io.Writer, output func(context.Context, func([]byte)) error, once bool) error {
	ctx, end := context.WithCancel(ctx)
	defer end()
	pass := func(p []byte) {
		if _, err := w.Write(p); err != nil {
			end()
		}
	}
	run := func(p func([]byte)) error {
		if err := output(ctx, p); ctx.Err() == nil {
			return err
		}
		return nil // it was ended here
	}
	if !once {
		return run(pass)
	}
	quiet := time.AfterFunc(firstLogs, end)
	defer quiet.Stop()
	var (
		left = keptLogs // bytes
		last time.Time
	)
	return run(func(p []byte) {
		if ctx.Err() != nil {
			return
		}
		if last.IsZero() {
			last = time.Now().Add(restLogs)
		}
		p = p[:min(len(p), left)]
		pass(p)
		if left -= len(p); left == 0 {
			end()
			return
		}
		quiet.Reset(min(quietLogs, time.Until(last)))
	})
}
