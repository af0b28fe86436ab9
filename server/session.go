package server

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/gin-gonic/gin"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/store"
)

// A session connects a person with a VM, by two calls that become raw streams: the
// person's, which waits here, and the one by which the VM's node answers it. The order to
// answer goes through the store and the node's sync, wherever that is parked; the answer
// has to come to this replica, so the node tries until a balancer sends it here.

// sessionTimes are the patience of sessions; tests have less of it.
type sessionTimes struct {
	answer time.Duration // a node has to answer
	look   time.Duration // between two looks at an open session
	quiet  time.Duration // one without a byte lasts so long once one side has ended
	grace  time.Duration // open ones have to end by themselves when the server drains
}

// usualTimes: a sync that is woken and a guest that is dialled take one second, and a
// person waits. A side that has ended may be gone or may wait for the other's answer,
// which cannot be told apart. With a moment's grace a person sees the last words.
var usualTimes = sessionTimes{answer: 20 * time.Second, look: 2 * time.Second, quiet: 5 * time.Minute, grace: time.Second}

// pendingSlack is how long an order outlives its caller's patience, for who looks at it
// at the last moment.
const pendingSlack = 5 * time.Second

// pendingLimits bound what waits: each costs its node a try and a connection here.
var pendingLimits = store.PendingLimits{Node: 32, Actor: 16}

// waiters are the callers of this replica whose nodes have not answered.
type waiters struct {
	mu sync.Mutex
	by map[string]*waiter
}

// waiter is one of them.
type waiter struct {
	node   fleet.NodeID
	answer chan answer // has room for the one that is given
}

// answer is a node's: a stream, or why there is none.
type answer struct {
	conn *stream
	why  *api.Error
}

func (w *waiters) add(sid string, node fleet.NodeID) *waiter {
	waiting := &waiter{node: node, answer: make(chan answer, 1)}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.by[sid] = waiting
	return waiting
}

// claim takes a waiter out, so that one call answers it; nil: none waits for this node.
func (w *waiters) claim(sid string, node fleet.NodeID) *waiter {
	w.mu.Lock()
	defer w.mu.Unlock()
	found := w.by[sid]
	if found == nil || found.node != node {
		return nil
	}
	delete(w.by, sid)
	return found
}

// leave ends a waiting. What was answered at the same moment is closed.
func (w *waiters) leave(sid string, waiting *waiter) {
	if w.claim(sid, waiting.node) != nil {
		return
	}
	// Claimed: the answer is there within handoverTime.
	if a := <-waiting.answer; a.conn != nil {
		_ = a.conn.Close()
	}
}

// upgrade makes a handler of a method whose call may become a stream. The method
// answers what has to be said as an error; else it has answered the call, and what it
// returns is run after the call is counted.
func upgrade(do func(*Server, *gin.Context, call) (then func(), err error)) func(*Server, route) gin.HandlerFunc {
	return func(s *Server, r route) gin.HandlerFunc {
		return func(c *gin.Context) {
			began := time.Now()
			var parked time.Duration
			to := call{id: c.Param("id"), query: c.Request.URL.Query(), now: s.c.Now(), parked: &parked}
			// As for every route: the body of one who is refused net/http reads, and that ends.
			control := http.NewResponseController(c.Writer)
			_ = control.SetReadDeadline(began.Add(s.bodyTime))
			then, err := func() (func(), error) {
				var err error
				if to.who, err = s.identify(c.Request, r.needs, to.now); err != nil {
					return nil, err
				}
				return do(s, c, to)
			}()
			status := http.StatusSwitchingProtocols
			if err != nil {
				s.refuse(c, r.path, err)
			}
			if then == nil {
				status = c.Writer.Status()
			}
			s.metrics.requests.WithLabelValues(r.path, strconv.Itoa(status)).Observe((time.Since(began) - parked).Seconds())
			if then != nil {
				then()
			}
		}
	}
}

// vmSession is a person's call: it waits for the VM's node, and becomes the stream.
func (s *Server) vmSession(c *gin.Context, to call) (func(), error) {
	ctx := c.Request.Context()
	view, err := s.c.Store.View(ctx)
	if err != nil {
		return nil, err
	}
	asked, err := readSession(to)
	if err != nil {
		return nil, err
	}
	if asked.Node, err = sessionNode(view, &asked, to.now); err != nil {
		return nil, err
	}
	if !upgrades(c) {
		return nil, noUpgrade(c)
	}
	_ = http.NewResponseController(c.Writer).SetReadDeadline(time.Time{}) // else it would end the waiting
	far, err := s.meet(ctx, asked, to.parked)
	if err != nil {
		return nil, err
	}
	// Nobody is let in without a trace of it.
	e := fleet.Event{At: to.now, Kind: "vm.session", VM: asked.VM, Node: asked.Node, Actor: asked.Actor, Text: asked.Actor + " opened a session: " + what(&asked)}
	if err := s.c.Store.Commit(ctx, store.Txn{Events: []fleet.Event{e}, Quiet: true}); err != nil {
		return nil, errors.Join(err, far.Close())
	}
	s.log.Info("changed", "event", e.Kind, "vm", e.VM, "node", e.Node, "actor", e.Actor, "reason", e.Text)
	near, err := take(c)
	if err != nil {
		return nil, errors.Join(err, far.Close())
	}
	watched := context.WithoutCancel(ctx) // net/http ends its context with the handler, not with the connection
	return func() { s.splice(watched, near, far, asked, to.who) }, nil
}

// what names a session's purpose for people.
func what(p *store.Pending) string {
	if p.Port != 0 {
		return "port " + strconv.Itoa(p.Port)
	}
	return p.Kind
}

// readSession reads what is wanted of which VM.
func readSession(to call) (store.Pending, error) {
	p := store.Pending{ID: rand.Text(), VM: fleet.VMID(to.id), Kind: to.query.Get("kind"), Actor: to.who.Actor(), Once: to.query.Get("once") == "true"}
	port := to.query.Get("port")
	switch api.SessionKind(p.Kind) {
	case api.SessionPort:
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 {
			return p, refusal(http.StatusBadRequest, fmt.Sprintf("%.20q is not a port", port), "1 to 65535, as port=22")
		}
		p.Port = int(n)
	case api.SessionConsole, api.SessionLogs:
		if port != "" {
			return p, refusal(http.StatusBadRequest, "a port is for kind=port", "leave it out")
		}
	default:
		return p, refusal(http.StatusBadRequest, fmt.Sprintf("%.20q is no kind of session", p.Kind), "kind=port, console or logs")
	}
	return p, nil
}

// sessionNode is where the VM lives, if it can be connected to now.
func sessionNode(view *store.View, p *store.Pending, now time.Time) (fleet.NodeID, error) {
	vm := view.VMs[p.VM]
	if vm == nil {
		return "", refusal(http.StatusNotFound, fmt.Sprintf("no VM %q", p.VM), "paddock vm list shows them")
	}
	switch {
	case vm.State.Final():
		return "", refusal(http.StatusConflict, fmt.Sprintf("VM %s is %s: %s", vm.ID, vm.State, reason(vm)), "paddock vm list shows those that run")
	case vm.Destroy:
		return "", refusal(http.StatusConflict, fmt.Sprintf("VM %s is being destroyed: %s", vm.ID, reason(vm)), "paddock vm list shows those that run")
	case vm.State == fleet.VMPlaced:
		return "", refusal(http.StatusConflict, fmt.Sprintf("VM %s has not been started yet", vm.ID), "wait until paddock vm list shows it booting or warm")
	case p.Kind == string(api.SessionLogs) && vm.State != fleet.VMRegistered && vm.State != fleet.VMBusy:
		return "", refusal(http.StatusConflict, fmt.Sprintf("VM %s is %s: no runner runs in it yet", vm.ID, vm.State), "paddock vm console shows what the machine prints")
	}
	node := view.Nodes[vm.Node]
	if node == nil || now.Sub(node.SeenAt) > unreachableAfter {
		return "", refusal(http.StatusServiceUnavailable, fmt.Sprintf("node %s, where VM %s lives, does not report", vm.Node, vm.ID), "paddock nodes list shows since when; the VM may well go on")
	}
	return vm.Node, nil
}

// meet waits until the node has answered with a stream.
func (s *Server) meet(ctx context.Context, p store.Pending, parked *time.Duration) (*stream, error) {
	w := s.waiters.add(p.ID, p.Node)
	defer s.waiters.leave(p.ID, w)
	err := s.c.Store.Pend(ctx, p, s.times.answer+pendingSlack, pendingLimits)
	if errors.Is(err, store.ErrFull) {
		return nil, refusal(http.StatusTooManyRequests, "too many sessions wait for their nodes to answer",
			fmt.Sprintf("at most %d of one node and %d of one caller may; try again in a few seconds", pendingLimits.Node, pendingLimits.Actor))
	}
	if err != nil {
		return nil, err
	}
	defer func() {
		forgetting, cancel := context.WithTimeout(context.WithoutCancel(ctx), pendingSlack)
		defer cancel()
		if _, err := s.c.Store.Unpend(forgetting, p.ID); err != nil {
			s.log.Warn("a session's order is left to its deadline", "vm", p.VM, "node", p.Node, "error", err)
		}
	}()
	began := time.Now()
	defer func() { *parked = time.Since(began) }()
	timer := time.NewTimer(s.times.answer)
	defer timer.Stop()
	select {
	case a := <-w.answer:
		w.answer <- answer{} // for leave, which finds this waiter claimed
		if a.why != nil {
			return nil, a.why
		}
		return a.conn, nil
	case <-timer.C:
		return nil, refusal(http.StatusGatewayTimeout, fmt.Sprintf("node %s did not answer within %v", p.Node, s.times.answer),
			"the guest may not listen yet; if this stays so, see the log of the node's agent")
	case <-s.drain:
		return nil, refusal(http.StatusServiceUnavailable, "this controller is stopping", "try again")
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// nodeSession is a node's call: it becomes the far end of the stream that somebody here
// waits for, or, without an Upgrade, tells them why there is none.
func (s *Server) nodeSession(c *gin.Context, to call) (func(), error) {
	node, sid := fleet.NodeID(to.id), c.Param("sid")
	if to.who.Subject != to.id {
		return nil, refusal(http.StatusForbidden, fmt.Sprintf("this credential is node %s's, not %s's: a node speaks only for itself", to.who.Subject, to.id),
			"join under this name with a token of its own (paddock node join)")
	}
	why, err := s.readWhy(c)
	if err != nil {
		return nil, err
	}
	w := s.waiters.claim(sid, node)
	if w == nil {
		return nil, s.elsewhere(c.Request.Context(), node, sid)
	}
	if why != nil {
		w.answer <- answer{why: why}
		c.JSON(http.StatusOK, struct{}{})
		return nil, nil
	}
	conn, err := take(c)
	if err != nil {
		w.answer <- answer{why: &api.Error{Status: http.StatusBadGateway, Message: fmt.Sprintf("the connection of node %s broke", node), Hint: "try again"}}
		return nil, err
	}
	w.answer <- answer{conn: conn} // theirs from here on
	return func() {}, nil
}

// readWhy reads a node's reason for refusing; nil if the call is to become a stream.
func (s *Server) readWhy(c *gin.Context) (*api.Error, error) {
	if upgrades(c) {
		return nil, nil
	}
	var why api.Error
	if err := decode(http.MaxBytesReader(c.Writer, c.Request.Body, maxBody), &why); err != nil {
		return nil, err
	}
	if why.Message == "" {
		return nil, noUpgrade(c)
	}
	return &api.Error{Status: http.StatusBadGateway, Message: tame(why.Message), Hint: tame(why.Hint)}, nil
}

// maxWhy bounds a node's words, in bytes.
const maxWhy = 1000

// tame makes one harmless line of a node's words: they may repeat a guest's, and end on
// a terminal.
func tame(text string) string { return strings.TrimSpace(guest.Plain(text, maxWhy)) }

// elsewhere says whether another replica holds a session, or nobody.
func (s *Server) elsewhere(ctx context.Context, node fleet.NodeID, sid string) error {
	// First what a replica left that has ended: its orders would stay for good.
	if err := s.c.Store.SweepPending(ctx); err != nil {
		return err
	}
	view, err := s.c.Store.View(ctx)
	if err != nil {
		return err
	}
	if p := view.Pending[sid]; p != nil && p.Node == node {
		return refusal(http.StatusMisdirectedRequest, "another replica of the controller holds this session", "try again until it is reached")
	}
	return refusal(http.StatusNotFound, "nobody waits for this session", "its caller may have left; there is nothing to do")
}

// sessionOrders are the sessions that a node shall answer.
func sessionOrders(view *store.View, node fleet.NodeID) []api.SessionOrder {
	var orders []api.SessionOrder
	for _, p := range view.Pending {
		if p.Node == node {
			orders = append(orders, api.SessionOrder{ID: p.ID, VM: p.VM, Kind: api.SessionKind(p.Kind), Port: p.Port, Once: p.Once})
		}
	}
	slices.SortFunc(orders, func(a, b api.SessionOrder) int { return cmp.Compare(a.ID, b.ID) })
	return orders
}
