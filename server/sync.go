package server

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
)

const (
	// maxWait is the longest a sync is parked: a missed wake-up costs no more.
	maxWait = 20 * time.Second
	// unreachableAfter is the silence after which the controller gives a node nothing
	// new; here it only decides whether a report is a return.
	unreachableAfter = 45 * time.Second
	// tries bounds how often a report is applied anew because the leader wrote the same
	// records meanwhile.
	tries = 8
)

// sync takes a node's report, then answers with its orders: at once if they are not
// what the node has, else when they change or q.Wait has passed.
func (s *Server) sync(ctx context.Context, c call, q api.SyncRequest) (api.SyncReply, error) {
	node := fleet.NodeID(c.id)
	if err := s.ownWord(c); err != nil {
		return api.SyncReply{}, err
	}
	if err := checkSync(&q); err != nil {
		return api.SyncReply{}, err
	}
	// Taken before the view is read: what changes after that wakes us.
	changed := s.c.Store.Notify(store.NodeTopic(node))
	view, err := s.take(ctx, c, &q)
	if err != nil {
		return api.SyncReply{}, err
	}
	if _, err := s.sites(ctx, c.now); err != nil { // who shares the bandwidth, now and then
		return api.SyncReply{}, err
	}
	reply, err := s.park(ctx, node, &q, view, changed, c.parked)
	if err != nil {
		return api.SyncReply{}, err
	}
	s.used(ctx, c)
	reply.Applied = q.Sequence
	reply.Credential = s.renew(ctx, c)
	return reply, nil
}

// take applies the report and returns a view that includes it.
func (s *Server) take(ctx context.Context, c call, q *api.SyncRequest) (*store.View, error) {
	node := fleet.NodeID(c.id)
	for range tries {
		view, err := s.c.Store.View(ctx)
		if err != nil {
			return nil, err
		}
		cordoned := false
		if view.Nodes[node] == nil {
			if cordoned, err = s.admit(ctx, c); err != nil {
				return nil, err
			}
		}
		r := report{view: view, node: node, fleet: s.c.Fleet, now: c.now, boot: s.bootDeadline, ours: s.hasScope}
		if err := r.apply(q, cordoned); err != nil {
			return nil, err
		}
		err = s.c.Store.Commit(ctx, r.txn)
		switch {
		case errors.Is(err, store.ErrConflict), errors.Is(err, store.ErrFenced):
			continue // somebody wrote in between, or the store was emptied: look again
		case err != nil:
			return nil, err
		}
		s.noted(&r)
		if o := view.Orders[node]; r.txn.Quiet && (o == nil || len(o.Evict) == 0) {
			// Nothing in it that orders depend on has changed. An eviction that was recalled
			// before the report was taken must not be told any more, though.
			return view, nil
		}
		return s.c.Store.View(ctx)
	}
	return nil, fmt.Errorf("apply a report of node %s: %w", node, store.ErrConflict)
}

// noted logs and counts what a report changed, once it is written.
func (s *Server) noted(r *report) {
	for _, e := range r.txn.Events {
		s.log.Info("reported", "event", e.Kind, "node", e.Node, "vm", e.VM, "job", e.Job, "actor", e.Actor, "reason", e.Text)
	}
	for i := range r.moves {
		m := &r.moves[i]
		s.metrics.moved(&m.vm, m.on, r.view.Jobs[m.vm.Job])
	}
}

// park waits until the node's orders are not those it has.
func (s *Server) park(ctx context.Context, node fleet.NodeID, q *api.SyncRequest, view *store.View, changed <-chan struct{}, parked *time.Duration) (api.SyncReply, error) {
	shares := s.shareChanged()
	reply, err := s.orders(view, node, q)
	wait := min(q.Wait, maxWait)
	if err != nil || wait <= 0 || reply.Revision != q.Have {
		return reply, err
	}
	began := time.Now()
	s.metrics.parked.Inc()
	defer func() {
		s.metrics.parked.Dec()
		*parked = time.Since(began)
	}()
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for reply.Revision == q.Have {
		select {
		case <-changed:
		case <-shares:
		case <-timer.C:
			return reply, nil
		case <-s.drain:
			return reply, nil
		case <-ctx.Done():
			return reply, ctx.Err()
		}
		changed, shares = s.c.Store.Notify(store.NodeTopic(node)), s.shareChanged()
		if view, err = s.c.Store.View(ctx); err != nil {
			return reply, err
		}
		if reply, err = s.orders(view, node, q); err != nil {
			return reply, err
		}
	}
	return reply, nil
}

// orders is all that the view wants of a node that has said q, with a revision that
// is equal for equal orders.
func (s *Server) orders(view *store.View, node fleet.NodeID, q *api.SyncRequest) (api.SyncReply, error) {
	reply := api.SyncReply{Incarnation: view.Incarnation}
	if o := view.Orders[node]; o != nil {
		reply.Hold, reply.Evict = o.Hold, o.Evict
	}
	living := map[fleet.VMID]bool{}
	for _, v := range q.VMs {
		if v.State != fleet.VMDone {
			living[v.ID] = true
		}
	}
	pools := map[fleet.PoolName]*fleet.Pool{}
	configured := s.c.Pools()
	for i := range configured {
		pools[configured[i].Name] = &configured[i]
	}
	for _, vm := range view.VMsOn(node) {
		pool := pools[vm.Pool]
		if vm.State == fleet.VMPlaced && pool != nil {
			reply.Run = append(reply.Run, vmOrder(vm, pool))
		}
		switch {
		case vm.State.Final():
			if living[vm.ID] {
				reply.Destroy = append(reply.Destroy, api.DestroyOrder{VM: vm.ID, Reason: reason(vm)})
			}
		case vm.Destroy:
			reply.Destroy = append(reply.Destroy, api.DestroyOrder{VM: vm.ID, Reason: reason(vm)})
		case vm.Claim != nil && vm.Claim.Sealed != "" && !vm.Claim.Started && vm.Retire == fleet.RetireNone:
			if start, ok := s.runnerOrder(vm); ok {
				if pool != nil && len(pool.Runner) == 0 {
					start.Archives = s.c.Archives()
				}
				reply.Start = append(reply.Start, start)
			}
		}
	}
	reply.Logins = logins(view.VMsOn(node), pools)
	reply.Sessions = sessionOrders(view, node)
	reply.PeerKey = s.peerKey
	bandwidth, counts := s.share(node)
	if counts {
		reply.Bandwidth = bandwidth
	}
	var err error
	reply.Revision, err = revision(reply)
	reply.Bandwidth = bandwidth
	return reply, err
}

func reason(vm *fleet.VM) string {
	if vm.Reason == "" {
		return "it is " + string(vm.State)
	}
	return vm.Reason
}

// vmOrder asks for a VM as its pool describes it.
func vmOrder(vm *fleet.VM, pool *fleet.Pool) api.VMOrder {
	return api.VMOrder{
		ID: vm.ID, Pool: vm.Pool, Image: vm.Image, Ref: pool.Image,
		CPU: pool.CPU, Memory: pool.Memory, Disk: pool.Disk, Growth: pool.Growth, Mounts: pool.Mounts, Env: pool.Env,
		Bootstrap: pool.Bootstrap, Runner: pool.Runner, Deadlines: pool.Deadlines.WithDefaults(),
		PlacedAt: vm.PlacedAt, Job: vm.Job,
	}
}

// runnerOrder opens the JIT config of a claim. One that does not open (another fleet
// key sealed it) is left to the leader: the claimed VM runs out of time and is retired.
func (s *Server) runnerOrder(vm *fleet.VM) (api.RunnerOrder, bool) {
	jit, err := s.c.Key.Open(vm.Claim.Sealed, vm.ID, vm.Claim.Runner)
	if err != nil {
		s.log.Error("a runner's configuration cannot be opened", "runner", vm.Claim.Runner, "node", vm.Node, "error", err)
		return api.RunnerOrder{}, false
	}
	return api.RunnerOrder{VM: vm.ID, JIT: jit, Runner: api.RunnerReport{
		Name: vm.Claim.Runner, RunnerID: vm.Claim.RunnerID, Scope: vm.Claim.Scope, Group: vm.Claim.Group,
		Labels: vm.Claim.Labels, Attempt: vm.Attempt, Job: vm.Job,
	}}, true
}

// revision is a hash of orders; a job that a VM is meant for is a hint that may change
// without waking the node, and secrets stay out of hashes.
func revision(reply api.SyncReply) (string, error) {
	reply.Run = append([]api.VMOrder(nil), reply.Run...)
	for i := range reply.Run {
		reply.Run[i].Job = 0
	}
	reply.Start = append([]api.RunnerOrder(nil), reply.Start...)
	for i := range reply.Start {
		reply.Start[i].JIT, reply.Start[i].Runner.Job = "", 0
	}
	reply.Logins = withoutSecrets(reply.Logins)
	text, err := json.Marshal(reply)
	if err != nil {
		return "", fmt.Errorf("encode orders: %w", err)
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:12]), nil // 96 bits: no two wills of a node meet
}

// bootDeadline is a pool's, or the default of a pool that is gone.
func (s *Server) bootDeadline(name fleet.PoolName) time.Duration {
	for _, p := range s.c.Pools() {
		if p.Name == name {
			return p.Deadlines.WithDefaults().Boot
		}
	}
	return fleet.Deadlines{}.WithDefaults().Boot
}

// hasScope reports whether a pool registers runners in the scope.
func (s *Server) hasScope(scope fleet.Scope) bool {
	return slices.ContainsFunc(s.c.Pools(), func(p fleet.Pool) bool { return slices.Contains(p.Scopes, scope) })
}
