package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/vm"
)

// The cast besides the stand's: the desk is where people wait at the controller. What
// the yard's guests serve is served by this process's loopback.

// desk is the controller's half of sessions.
type desk struct {
	t       *testing.T
	met     chan met
	refused chan api.Error

	mu      sync.Mutex
	misses  int // so many calls reach another replica
	answers map[string]int
}

// met is a person's end of a session.
type met struct {
	sid  string
	conn *net.TCPConn
}

func newDesk(t *testing.T) *desk {
	return &desk{t: t, met: make(chan met, 32), refused: make(chan api.Error, 32), answers: map[string]int{}}
}

func (d *desk) call(sid string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.misses > 0 {
		d.misses--
		return &api.Error{Status: http.StatusMisdirectedRequest, Message: "another replica"}
	}
	if d.answers[sid]++; d.answers[sid] > 1 {
		return &api.Error{Status: http.StatusNotFound, Message: "nobody waits"}
	}
	return nil
}

func (d *desk) Answer(ctx context.Context, node fleet.NodeID, sid string) (api.Stream, error) {
	if err := d.call(sid); err != nil {
		return nil, err
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	defer func() { _ = l.Close() }()
	near, err := new(net.Dialer).DialContext(ctx, "tcp", l.Addr().String())
	if err != nil {
		return nil, err
	}
	far, err := l.Accept()
	if err != nil {
		return nil, errors.Join(err, near.Close())
	}
	d.t.Cleanup(func() { _ = near.Close() })
	_ = near.SetDeadline(time.Now().Add(time.Minute))
	d.met <- met{sid, near.(*net.TCPConn)}
	return far.(*net.TCPConn), nil
}

func (d *desk) Refuse(_ context.Context, _ fleet.NodeID, sid string, why api.Error) error {
	if err := d.call(sid); err != nil {
		return err
	}
	d.refused <- why
	return nil
}

// meet is the next session that is answered.
func (d *desk) meet() *net.TCPConn {
	d.t.Helper()
	select {
	case m := <-d.met:
		return m.conn
	case why := <-d.refused:
		d.t.Fatalf("refused: %v", &why)
	case <-time.After(time.Minute):
		d.t.Fatal("no session within a minute")
	}
	return nil
}

// refusal is the next session that is not.
func (d *desk) refusal() api.Error {
	d.t.Helper()
	select {
	case why := <-d.refused:
		return why
	case <-d.met:
		d.t.Fatal("a session, where none can be")
	case <-time.After(time.Minute):
		d.t.Fatal("no answer within a minute")
	}
	return api.Error{}
}

// people is a stand with a desk, on which VM a is warm.
func people(t *testing.T) (*stand, *desk, func()) {
	t.Helper()
	s, d := newStand(t), newDesk(t)
	s.people = d
	s.yard.console = "booting\n"
	stop := s.agent(t)
	s.office.place(s.order("a", jobLasts))
	s.office.awaitState(t, "a", fleet.VMWarm)
	return s, d, stop
}

func (s *stand) ask(o api.SessionOrder) {
	s.office.order(func() {
		if s.office.sessions == nil {
			s.office.sessions = map[string]api.SessionOrder{}
		}
		s.office.sessions[o.ID] = o
	})
}

// leave has the VM destroyed and sees that all of it goes.
func (s *stand) leave(t *testing.T) {
	t.Helper()
	s.office.order(func() { s.office.destroy["a"] = "test" })
	s.office.awaitState(t, "a", fleet.VMDone)
	s.checkEmpty(t)
}

// listen serves one port of the guests' until the test ends.
func listen(t *testing.T, serve func(net.Conn)) int {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var conns sync.WaitGroup
	t.Cleanup(func() { _ = l.Close(); conns.Wait() })
	conns.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			conns.Go(func() { defer func() { _ = conn.Close() }(); serve(conn) })
		}
	})
	return l.Addr().(*net.TCPAddr).Port
}

func echo(conn net.Conn) { _, _ = io.Copy(conn, conn) }

// ping sees that a session carries both ways.
func ping(t *testing.T, conn net.Conn) {
	t.Helper()
	if _, err := io.WriteString(conn, "ping"); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4)
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != "ping" {
		t.Fatalf("%q, %v", got, err)
	}
}

// over sees that a session ends.
func over(t *testing.T, conn net.Conn) {
	t.Helper()
	_, err := io.Copy(io.Discard, conn)
	if late := net.Error(nil); errors.As(err, &late) && late.Timeout() {
		t.Fatal("the session goes on")
	}
}

// A port is carried, however many replicas are asked first; an order that is repeated is
// the same session; and the VM's end is the session's.
func TestPortSession(t *testing.T) {
	s, d, _ := people(t)
	d.misses = 3
	o := api.SessionOrder{ID: "one", VM: "a", Kind: api.SessionPort, Port: listen(t, echo)}
	s.ask(o)
	conn := d.meet()
	ping(t, conn)
	for range 3 {
		s.office.order(func() {}) // another reply, with the same order
		s.office.await(t, "the reply is applied", func() bool { return s.office.last.Have == fmt.Sprint(s.office.revision) })
	}
	d.mu.Lock()
	if d.answers["one"] != 1 {
		t.Errorf("answered %d times", d.answers["one"])
	}
	d.mu.Unlock()
	s.leave(t)
	over(t, conn)
}

func TestSessionsThatCannotBe(t *testing.T) {
	s, d, _ := people(t)
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := l.Addr().(*net.TCPAddr).Port
	_ = l.Close()
	for name, c := range map[string]struct {
		order api.SessionOrder
		says  string
	}{
		"an unknown VM":   {api.SessionOrder{VM: "b", Kind: api.SessionConsole}, "VM b is not on this node"},
		"a closed port":   {api.SessionOrder{VM: "a", Kind: api.SessionPort, Port: closed}, "refused"},
		"no port":         {api.SessionOrder{VM: "a", Kind: api.SessionPort}, "0 is no port"},
		"beyond the last": {api.SessionOrder{VM: "a", Kind: api.SessionPort, Port: 65536}, "65536 is no port"},
		"another kind":    {api.SessionOrder{VM: "a", Kind: "screen"}, "no kind of session"},
	} {
		c.order.ID = name
		s.ask(c.order)
		if why := d.refusal(); !strings.Contains(why.Message, c.says) || !strings.HasPrefix(why.Message, "node mac-1: ") {
			t.Errorf("%s: %v, want %q", name, &why, c.says)
		}
	}
	s.leave(t)
	s.ask(api.SessionOrder{ID: "late", VM: "a", Kind: api.SessionConsole})
	if why := d.refusal(); !strings.Contains(why.Message, "VM a is") {
		t.Errorf("a VM that is done: %v", &why)
	}
}

// More sessions than a node has are refused, and one that ends gives its place free.
func TestSessionsAreBounded(t *testing.T) {
	s, d, _ := people(t)
	port := listen(t, echo)
	ask := func(id string) { s.ask(api.SessionOrder{ID: id, VM: "a", Kind: api.SessionPort, Port: port}) }
	var conns []*net.TCPConn
	for i := range maxSessions {
		ask(fmt.Sprint("s", i))
		conns = append(conns, d.meet())
	}
	ask("more")
	if why := d.refusal(); !strings.Contains(why.Message, "has 16 sessions open") {
		t.Errorf("%v", &why)
	}
	_ = conns[0].Close()
	for n := 0; ; n++ {
		ask(fmt.Sprint("again", n))
		select {
		case <-d.refused: // it has not been noticed yet
		case m := <-d.met:
			ping(t, m.conn)
			s.leave(t)
			for _, conn := range append(conns[1:], m.conn) {
				over(t, conn)
			}
			return
		}
		if n == 1000 {
			t.Fatal("the place is not free again")
		}
	}
}

// A console comes from its beginning and goes on, and the machine's last words are in it.
func TestConsoleSession(t *testing.T) {
	s, d, _ := people(t)
	path := filepath.Join(s.dir, "clones", "a", vm.ConsoleFile)
	say := func(text string) {
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
		if err == nil {
			_, err = f.WriteString(text)
		}
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	s.ask(api.SessionOrder{ID: "once", VM: "a", Kind: api.SessionConsole, Once: true})
	if text, err := io.ReadAll(d.meet()); err != nil || string(text) != "booting\n" {
		t.Fatalf("%q, %v", text, err)
	}
	s.ask(api.SessionOrder{ID: "follow", VM: "a", Kind: api.SessionConsole})
	conn := d.meet()
	got := make([]byte, 8)
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != "booting\n" {
		t.Fatalf("%q, %v", got, err)
	}
	say("up")
	if _, err := io.ReadFull(conn, got[:2]); err != nil || string(got[:2]) != "up" {
		t.Fatalf("%q, %v", got[:2], err)
	}
	s.yard.mu.Lock()
	m := s.yard.machines["a"]
	s.yard.mu.Unlock()
	say("panic!")
	m.die("it crashed")
	if text, err := io.ReadAll(conn); err != nil || string(text) != "panic!" {
		t.Errorf("last words %q, %v", text, err)
	}
	s.office.awaitState(t, "a", fleet.VMDone)
}

// Who asks for a console and does not read it holds nothing up.
func TestTeardownHeldUpByAReader(t *testing.T) {
	s, d, _ := people(t)
	flood := bytes.Repeat([]byte("flood\n"), 16<<20/6)
	if err := os.WriteFile(filepath.Join(s.dir, "clones", "a", vm.ConsoleFile), flood, 0o600); err != nil {
		t.Fatal(err)
	}
	s.ask(api.SessionOrder{ID: "one", VM: "a", Kind: api.SessionConsole})
	conn := d.meet()
	if _, err := io.ReadFull(conn, make([]byte, 6)); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	s.leave(t)
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("the teardown took %v", took)
	}
	over(t, conn)
}

func TestLogsSession(t *testing.T) {
	s, d, _ := people(t)
	s.office.order(func() { s.office.start["a"] = runnerOrder("a") })
	s.office.awaitState(t, "a", fleet.VMBusy)
	s.ask(api.SessionOrder{ID: "once", VM: "a", Kind: api.SessionLogs, Once: true})
	const want = "2026-01-01 00:00:00Z: Running job: build\n"
	if text, err := io.ReadAll(d.meet()); err != nil || string(text) != want {
		t.Errorf("%q, %v", text, err)
	}
	s.ask(api.SessionOrder{ID: "follow", VM: "a", Kind: api.SessionLogs})
	conn := d.meet()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != want {
		t.Errorf("%q, %v", got, err)
	}
	s.leave(t)
	over(t, conn)
}

// An agent that is stopped ends its sessions, also where it leaves its VMs.
func TestSessionsOfAStoppedAgent(t *testing.T) {
	s, d, stop := people(t)
	s.keep = true
	s.ask(api.SessionOrder{ID: "port", VM: "a", Kind: api.SessionPort, Port: listen(t, echo)})
	port := d.meet()
	ping(t, port)
	s.ask(api.SessionOrder{ID: "console", VM: "a", Kind: api.SessionConsole})
	console := d.meet()
	began := time.Now()
	stop()
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("it took %v", took)
	}
	over(t, port)
	over(t, console)
	s.office.order(func() { s.office.sessions = nil })
	s.keep = false
	s.agent(t)
	s.leave(t)
}

// ported is a machine whose driver reaches the guest's ports.
type ported struct {
	vm.Machine
	to int
}

func (p ported) DialPort(ctx context.Context, port int) (net.Conn, error) {
	if port != 22 {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return new(net.Dialer).DialContext(ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", p.to))
}

// Without the agent a port is the driver's to reach.
func TestPortWithoutAgent(t *testing.T) {
	c := contact{order: api.VMOrder{Bootstrap: fleet.BootstrapSSH}, machine: ported{to: listen(t, echo)}}
	conn, err := dialPort(t.Context(), c, 22)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	ping(t, conn)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := dialPort(ctx, c, 23); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "nobody answered at port 23") || hintFor(err) == "" {
		t.Errorf("%v", err)
	}
	c.machine = struct{ vm.Machine }{}
	if _, err := dialPort(t.Context(), c, 22); !errors.Is(err, vm.ErrUnsupported) || hintFor(err) == "" {
		t.Errorf("a driver that does not: %v", err)
	}
}

// A guest without the agent is connected to all the same: its ports by the driver, its
// runner's output by the way that its pool uses.
func TestSessionsOverSSH(t *testing.T) {
	s, d, sshd := newStand(t), newDesk(t), newSSHD(t)
	s.people, s.yard.port = d, sshd.serve
	end := filepath.Join(sshd.dir, "end")
	order := s.order("a", jobRuns+"; until test -e "+end+"; do sleep 0.05; done")
	order.Bootstrap = fleet.BootstrapSSH
	s.office.order(func() {
		s.office.start["a"], s.office.logins = runnerOrder("a"), []api.PoolLogin{sshd.login}
	})
	s.office.place(order)
	stop := s.agent(t)
	s.office.awaitState(t, "a", fleet.VMBusy)
	s.ask(api.SessionOrder{ID: "port", VM: "a", Kind: api.SessionPort, Port: 22})
	conn := d.meet()
	banner := make([]byte, 8)
	if _, err := io.ReadFull(conn, banner); err != nil || string(banner) != "SSH-2.0-" {
		t.Errorf("%q, %v", banner, err)
	}
	s.ask(api.SessionOrder{ID: "once", VM: "a", Kind: api.SessionLogs, Once: true})
	if text, err := io.ReadAll(d.meet()); err != nil || !strings.Contains(string(text), "Running job: build\n") {
		t.Errorf("%q, %v", text, err)
	}
	s.ask(api.SessionOrder{ID: "follow", VM: "a", Kind: api.SessionLogs})
	follow := d.meet()
	if _, err := io.ReadFull(follow, make([]byte, 10)); err != nil {
		t.Error(err)
	}
	must(t, os.WriteFile(end, nil, 0o600))
	s.office.awaitState(t, "a", fleet.VMDone)
	over(t, follow)
	over(t, conn)
	stop()
	s.checkEmpty(t)
	sshd.check(t)
}

// What is kept of a runner's output has an end, also where the runner goes on printing or
// prints nothing.
func TestLogsOnceEnd(t *testing.T) {
	for name, c := range map[string]struct {
		begin, every time.Duration // of the runner's output; 0 begin: never
		piece        int           // bytes of it at a time
		kept         int           // bytes of it at the beginning
		most         time.Duration
		least        int // bytes that have to come
	}{
		"a line after the other":    {begin: 1, every: 100 * time.Millisecond, piece: 40, kept: 64 << 10, most: restLogs, least: 64 << 10},
		"without a pause":           {begin: 1, every: time.Millisecond, piece: 32 << 10, kept: 64 << 10, most: time.Second, least: keptLogs},
		"all that a way ever keeps": {begin: 1, kept: keptLogs, most: time.Second, least: keptLogs},
		"a late first line":         {begin: firstLogs - 1, kept: 40, most: firstLogs + quietLogs, least: 40},
		"nothing":                   {most: firstLogs},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				// As a guest's way does it, output returns when ctx ends and not before.
				output := func(ctx context.Context, print func([]byte)) error {
					wait := func(d time.Duration) bool {
						pause(ctx, d)
						return ctx.Err() == nil
					}
					if c.begin > 0 && wait(c.begin) {
						print(make([]byte, c.kept))
						for c.every > 0 && wait(c.every) {
							print(make([]byte, c.piece))
						}
					}
					<-ctx.Done()
					return ctx.Err()
				}
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				var got bytes.Buffer
				began := time.Now()
				if err := printLogs(ctx, &got, output, true); err != nil {
					t.Error(err)
				}
				if took := time.Since(began); took > c.most+time.Millisecond || got.Len() < c.least || got.Len() > keptLogs {
					t.Errorf("%d bytes in %v, want %d to %d within %v", got.Len(), took, c.least, keptLogs, c.most)
				}
			})
		})
	}
}
