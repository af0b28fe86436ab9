package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/vm"
)

// The cast of these tests. The office is a controller without a fleet: it keeps orders,
// parks calls and records reports. The yard is a driver whose machines are goroutines
// that outlive the agent, each with the real guest agent on in-memory streams. The shelf
// is an image store of one file per image.

// office is the controller's half of the exchange.
type office struct {
	mu       sync.Mutex
	revision int
	changed  chan struct{}
	run      map[fleet.VMID]api.VMOrder
	start    map[fleet.VMID]api.RunnerOrder
	destroy  map[fleet.VMID]string
	hold     []fleet.Hold
	evict    []fleet.Digest
	logins   []api.PoolLogin
	sessions map[string]api.SessionOrder
	more     func(*api.SyncReply) // adds to each reply; nil: nothing

	reports  map[fleet.VMID]api.VMReport // the latest of each
	gone     map[fleet.VMID]bool         // no longer reported after it was done
	last     api.SyncRequest
	calls    int
	inFlight int
	remote   bool // calls come over HTTP: one that was cut is noticed late
	problems []string
	fail     error // answered instead of anything else
	deaf     bool  // nothing is applied: Applied stays 0
}

func newOffice() *office {
	return &office{
		changed: make(chan struct{}),
		run:     map[fleet.VMID]api.VMOrder{}, start: map[fleet.VMID]api.RunnerOrder{}, destroy: map[fleet.VMID]string{},
		reports: map[fleet.VMID]api.VMReport{}, gone: map[fleet.VMID]bool{},
	}
}

// order changes the orders under the lock, and wakes the parked call.
func (o *office) order(change func()) {
	o.mu.Lock()
	defer o.mu.Unlock()
	change()
	o.revision++
	o.wake()
}

func (o *office) wake() {
	close(o.changed)
	o.changed = make(chan struct{})
}

func (o *office) place(order api.VMOrder) { o.order(func() { o.run[order.ID] = order }) }

// Sync is what the agent calls.
func (o *office) Sync(ctx context.Context, r api.SyncRequest) (api.SyncReply, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.calls++
	if o.inFlight++; o.inFlight > 1 && !o.remote {
		o.problems = append(o.problems, "two calls at once")
	}
	defer func() { o.inFlight-- }()
	if o.fail != nil {
		return api.SyncReply{}, o.fail
	}
	switch {
	case r.Session != o.last.Session || r.Sequence > o.last.Sequence:
		o.take(r)
	case !o.remote:
		o.problems = append(o.problems, fmt.Sprintf("sequence %d after %d", r.Sequence, o.last.Sequence))
	} // else: one that was cut came late, and is ignored
	parked := time.NewTimer(r.Wait)
	defer parked.Stop()
	for r.Wait > 0 && r.Have == fmt.Sprint(o.revision) && o.fail == nil {
		changed := o.changed
		o.mu.Unlock()
		over := false
		select {
		case <-changed:
		case <-parked.C:
			over = true
		case <-ctx.Done():
		}
		o.mu.Lock()
		if ctx.Err() != nil {
			return api.SyncReply{}, ctx.Err()
		}
		if over {
			break
		}
	}
	return o.reply(r), o.fail
}

// take records a request.
func (o *office) take(r api.SyncRequest) {
	o.last = r
	seen := map[fleet.VMID]bool{}
	for _, v := range r.VMs {
		if was := o.reports[v.ID]; stage(v.State) < stage(was.State) {
			o.problems = append(o.problems, fmt.Sprintf("VM %s went from %s to %s", v.ID, was.State, v.State))
		}
		o.reports[v.ID] = v
		seen[v.ID] = true
	}
	for id, v := range o.reports {
		if !seen[id] && v.State == fleet.VMDone {
			o.gone[id] = true
		} else if !seen[id] {
			o.problems = append(o.problems, fmt.Sprintf("VM %s is %s and was not reported", id, v.State))
		}
	}
	o.wake()
}

// reply is the whole will.
func (o *office) reply(r api.SyncRequest) api.SyncReply {
	reply := api.SyncReply{Revision: fmt.Sprint(o.revision), Applied: r.Sequence, Hold: o.hold, Evict: o.evict, Logins: o.logins}
	for _, id := range slices.Sorted(maps.Keys(o.sessions)) {
		reply.Sessions = append(reply.Sessions, o.sessions[id])
	}
	if o.deaf {
		reply.Applied = 0
	}
	if o.more != nil {
		o.more(&reply)
	}
	for _, id := range slices.Sorted(maps.Keys(o.run)) {
		if _, told := o.reports[id]; !told {
			reply.Run = append(reply.Run, o.run[id])
		}
	}
	for _, id := range slices.Sorted(maps.Keys(o.start)) {
		if v := o.reports[id]; v.State != "" && v.State != fleet.VMDone && v.Runner == nil {
			reply.Start = append(reply.Start, o.start[id])
		}
	}
	for _, id := range slices.Sorted(maps.Keys(o.destroy)) {
		if o.reports[id].State != fleet.VMDone {
			reply.Destroy = append(reply.Destroy, api.DestroyOrder{VM: id, Reason: o.destroy[id]})
		}
	}
	return reply
}

// await returns once seen holds, and fails the test if it does not within a minute.
func (o *office) await(t *testing.T, what string, seen func() bool) {
	t.Helper()
	late := time.After(time.Minute)
	for {
		o.mu.Lock()
		ok, changed := seen(), o.changed
		last := fmt.Sprintf("%+v", o.last.VMs)
		o.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-changed:
		case <-late:
			t.Fatalf("not seen within a minute: %s; last report: %s", what, last)
		}
	}
}

// awaitState waits until a VM was reported in that state.
func (o *office) awaitState(t *testing.T, id fleet.VMID, state fleet.VMState) api.VMReport {
	t.Helper()
	o.await(t, fmt.Sprintf("VM %s %s", id, state), func() bool { return o.reports[id].State == state })
	return o.report(id)
}

func (o *office) report(id fleet.VMID) api.VMReport {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.reports[id]
}

// latest is the last request.
func (o *office) latest() api.SyncRequest {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.last
}

// check fails the test on anything that an agent must never do.
func (o *office) check(t *testing.T) {
	t.Helper()
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, p := range o.problems {
		t.Error(p)
	}
}

// yard is a driver in this process.
type yard struct {
	mu       sync.Mutex
	machines map[fleet.VMID]*machine
	boots    map[fleet.VMID]int
	bootErr  error
	full     int    // so many boots find no slot
	silent   bool   // machines whose guest never answers
	stubborn int    // so many calls of Destroy fail
	hang     bool   // Boot does not return before its context ends
	console  string // what machines print
	// noReadOnly: it has no shares that a guest only reads.
	noReadOnly bool
	yardStates
	yardPorts
}

func newYard() *yard {
	return &yard{machines: map[fleet.VMID]*machine{}, boots: map[fleet.VMID]int{}}
}

type machine struct {
	yard   *yard
	id     fleet.VMID
	dials  chan net.Conn
	power  context.CancelFunc
	off    <-chan struct{} // closed when the power goes
	ended  chan struct{}
	reason string
	spec   vm.Spec
	memory memory
	asleep bool       // started from a state and not woken yet
	frozen bool       // it stands still: no stream is accepted any more
	conns  []net.Conn // the host's ends of streams
}

// Boot runs a guest agent in a goroutine that belongs to the machine, not to ctx.
func (y *yard) Boot(ctx context.Context, spec vm.Spec) (vm.Machine, error) {
	y.mu.Lock()
	defer y.mu.Unlock()
	if err := os.WriteFile(filepath.Join(spec.Dir, vm.ConsoleFile), []byte(y.console), 0o600); err != nil {
		return nil, err
	}
	if y.hang || y.stateHang && spec.State != "" {
		y.mu.Unlock()
		<-ctx.Done()
		y.mu.Lock()
		return nil, ctx.Err()
	}
	if y.full > 0 {
		y.full--
		return nil, vm.ErrAtCapacity
	}
	if y.bootErr != nil {
		return nil, y.bootErr
	}
	if _, err := os.Stat(filepath.Join(spec.Dir, vm.DiskFile)); err != nil {
		return nil, &vm.BootError{Err: err}
	}
	for _, m := range spec.Mounts {
		if m.ReadOnly && y.noReadOnly {
			return nil, fmt.Errorf("the share %q: %w", m.Name, vm.ErrUnsupported)
		}
	}
	if y.machines[spec.ID] != nil {
		return nil, fmt.Errorf("machine %s booted twice", spec.ID)
	}
	mem, err := y.restore(spec)
	if err != nil {
		return nil, err
	}
	y.boots[spec.ID]++
	on, off := context.WithCancel(context.WithoutCancel(ctx))
	m := &machine{yard: y, id: spec.ID, dials: make(chan net.Conn), power: off, off: on.Done(), ended: make(chan struct{}), spec: spec, memory: mem, asleep: spec.State != ""}
	y.machines[spec.ID] = m
	if y.stillborn && spec.State != "" {
		off()
	}
	silent := y.silent || !spec.Agent || spec.State != "" && y.mute
	config := guest.AgentConfig{Dir: spec.Dir}
	if y.saves {
		config.System = inside{m}
	}
	go func() {
		defer close(m.ended)
		if silent {
			<-on.Done()
			return
		}
		if err := guest.Serve(on, m, config); err != nil {
			panic(err)
		}
	}()
	return m, nil
}

func (y *yard) Adopt(_ context.Context, id fleet.VMID) (vm.Machine, error) {
	y.mu.Lock()
	defer y.mu.Unlock()
	if m := y.machines[id]; m != nil {
		return m, nil
	}
	return nil, fmt.Errorf("machine %s: %w", id, vm.ErrUnknown)
}

func (y *yard) List() ([]fleet.VMID, error) {
	y.mu.Lock()
	defer y.mu.Unlock()
	return slices.Sorted(maps.Keys(y.machines)), nil
}

// Accept, Close and Addr make the machine the listener of its guest agent.
func (m *machine) Accept() (net.Conn, error) {
	select {
	case c := <-m.dials:
		return c, nil
	case <-m.off:
		return nil, net.ErrClosed
	}
}

func (m *machine) Close() error {
	m.power()
	return nil
}

func (m *machine) Addr() net.Addr { return &net.UnixAddr{Name: string(m.id)} }

func (m *machine) Dial(ctx context.Context) (net.Conn, error) {
	host, inside := net.Pipe()
	dials := m.dials
	m.yard.mu.Lock()
	if m.frozen {
		dials = nil
	}
	m.yard.mu.Unlock()
	select {
	case dials <- inside:
		m.yard.mu.Lock()
		m.conns = append(m.conns, host)
		m.yard.mu.Unlock()
		return host, nil
	case <-m.ended:
		return nil, vm.ErrEnded
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (m *machine) Wait(ctx context.Context) (vm.Exit, error) {
	select {
	case <-m.ended:
		return vm.Exit{Reason: m.reason}, nil
	case <-ctx.Done():
		return vm.Exit{}, ctx.Err()
	}
}

// die ends the machine as a crash of the guest does.
func (m *machine) die(reason string) {
	m.yard.mu.Lock()
	m.reason = reason
	m.yard.mu.Unlock()
	m.power()
	<-m.ended
}

func (m *machine) Destroy(context.Context) error {
	m.yard.mu.Lock()
	if m.yard.stubborn > 0 {
		m.yard.stubborn--
		m.yard.mu.Unlock()
		return errors.New("the machine would not go")
	}
	m.yard.mu.Unlock()
	m.die("destroyed")
	m.yard.mu.Lock()
	delete(m.yard.machines, m.id)
	m.yard.mu.Unlock()
	return nil
}

// stand is one node's surroundings, which outlive its agents.
type stand struct {
	people Sessions
	change func(*Config) // of the agent; nil: none
	office *office
	yard   *yard
	shelf  *shelf
	dir    string
	keep   bool
	slots  int
	states bool         // VMs start from saved states
	shares bool         // a copy of a file costs no room
	free   atomic.Int64 // bytes of disk
	log    *slog.Logger
}

const base = fleet.Digest("sha256:1111111111111111111111111111111111111111111111111111111111111111")

func newStand(t *testing.T) *stand {
	s := &stand{office: newOffice(), yard: newYard(), shelf: newShelf(base), dir: t.TempDir(), slots: 2, log: slog.New(slog.NewTextHandler(t.Output(), nil))}
	s.free.Store(1 << 50)
	return s
}

// agent starts an agent; stop ends it and returns when it has gone.
func (s *stand) agent(t *testing.T) (stop func()) {
	t.Helper()
	config := Config{
		ID: "mac-1", Slots: s.slots, Dir: s.dir, Driver: "yard", Machines: s.yard, Images: s.shelf,
		Sync: s.office.Sync, Sessions: s.people, Keep: func() bool { return s.keep }, Log: s.log,
		SaveStates: s.states, CloneFile: cache.CloneFile, Free: func() (int64, error) { return s.free.Load(), nil },
		CanShare: func() (bool, error) { return s.shares, nil },
	}
	if s.change != nil {
		s.change(&config)
	}
	a, err := New(config)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- a.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("the agent: %v", err)
		}
	})
	t.Cleanup(stop)
	return stop
}

// order is one for a VM that runs script as its runner.
func (s *stand) order(id fleet.VMID, script string) api.VMOrder {
	return api.VMOrder{
		ID: id, Pool: "p", Image: base, Bootstrap: fleet.BootstrapAgent,
		Runner: []string{"sh", "-c", script}, PlacedAt: time.Now(),
	}
}

func runnerOrder(id fleet.VMID) api.RunnerOrder {
	return api.RunnerOrder{VM: id, JIT: "c2VjcmV0", Runner: api.RunnerReport{Name: fleet.RunnerName("f", id, 1), RunnerID: 7, Scope: "org", Attempt: 1}}
}

// checkEmpty fails the test if anything of a VM is left.
func (s *stand) checkEmpty(t *testing.T) {
	t.Helper()
	s.office.check(t)
	s.yard.check(t)
	if ids, _ := s.yard.List(); len(ids) > 0 {
		t.Errorf("machines left: %v", ids)
	}
	clones, err := os.ReadDir(filepath.Join(s.dir, "clones"))
	if err != nil || len(clones) > 0 {
		t.Errorf("clones left: %v (%v)", clones, err)
	}
	s.shelf.mu.Lock()
	defer s.shelf.mu.Unlock()
	if len(s.shelf.leases) > 0 {
		t.Errorf("leases left: %v", s.shelf.leases)
	}
}
