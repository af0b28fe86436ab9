package server

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
)

func (s *Server) cordon(ctx context.Context, c call, _ struct{}) (api.NodeRow, error) {
	return s.setCordon(ctx, c, true)
}

func (s *Server) uncordon(ctx context.Context, c call, _ struct{}) (api.NodeRow, error) {
	return s.setCordon(ctx, c, false)
}

// setCordon writes the ledger first: it is what an emptied store is refilled from.
func (s *Server) setCordon(ctx context.Context, c call, on bool) (api.NodeRow, error) {
	node, actor := fleet.NodeID(c.id), c.who.Actor()
	view, err := s.c.Store.View(ctx)
	if err != nil {
		return api.NodeRow{}, err
	}
	if view.Nodes[node] == nil {
		return api.NodeRow{}, refusal(http.StatusNotFound, fmt.Sprintf("no node %q", node), "paddock nodes list shows those that have reported")
	}
	err = s.amend(ctx, c.now, func(l *store.Ledger) error {
		if !on {
			delete(l.Cordons, node)
			return nil
		}
		if l.Cordons == nil {
			l.Cordons = map[fleet.NodeID]string{}
		}
		l.Cordons[node] = actor
		return nil
	})
	if err != nil {
		return api.NodeRow{}, err
	}
	kind := map[bool]string{true: "node.cordoned", false: "node.uncordoned"}[on]
	e := fleet.Event{At: c.now, Kind: kind, Node: node, Actor: actor, Text: fmt.Sprintf("%s by %s", kind, actor)}
	for range tries {
		if view, err = s.c.Store.View(ctx); err != nil {
			return api.NodeRow{}, err
		}
		was := view.Nodes[node]
		if was == nil {
			break // emptied meanwhile; the node's next report finds the ledger
		}
		next := *was
		next.Cordoned = on
		err = s.c.Store.Commit(ctx, store.Txn{Nodes: []fleet.Node{next}, Events: []fleet.Event{e}})
		if err == nil {
			s.log.Info("changed", "event", e.Kind, "node", node, "actor", actor)
			return nodeRow(view, &next, c.now), nil
		}
		if !errors.Is(err, store.ErrConflict) {
			return api.NodeRow{}, err
		}
	}
	return api.NodeRow{}, fmt.Errorf("%s %s: %w", kind, node, store.ErrConflict)
}

// lostAfter is the silence after which the leader gives a node's VMs up by itself.
const lostAfter = 15 * time.Minute

// removeNode forgets a Mac that was taken out of service: its record, its place in the
// ledger and its credentials. What VMs it may still have, the leader gives up as those of
// any node that is silent.
func (s *Server) removeNode(ctx context.Context, c call, _ struct{}) (api.NodeRow, error) {
	node, actor := fleet.NodeID(c.id), c.who.Actor()
	view, err := s.c.Store.View(ctx)
	if err != nil {
		return api.NodeRow{}, err
	}
	ledger, err := s.c.Store.ReadLedger(ctx)
	if err != nil {
		return api.NodeRow{}, err
	}
	row := api.NodeRow{ID: node, Status: api.NodeUnreachable}
	if known := view.Nodes[node]; known != nil {
		row = nodeRow(view, known, c.now)
	} else if _, joined := ledger.Nodes[node]; !joined {
		return api.NodeRow{}, refusal(http.StatusNotFound, fmt.Sprintf("no node %q", node), "paddock nodes list shows those that have reported")
	}
	switch {
	case row.Used > 0 && c.now.Sub(row.SeenAt) < lostAfter:
		return api.NodeRow{}, refusal(http.StatusConflict, fmt.Sprintf("%d VMs live on node %s", row.Used, node),
			"cordon it and wait until paddock vm list shows none there; once it has been silent for 15 minutes it can be removed as it is")
	case row.Status == api.NodeReady:
		return api.NodeRow{}, refusal(http.StatusConflict, fmt.Sprintf("node %s reports and takes work", node),
			"paddock nodes cordon "+string(node)+" and stop its agent first")
	}
	// First the credentials: else its next report would make it known again.
	if err := s.amend(ctx, c.now, func(l *store.Ledger) error { forgetNode(l, node, c.now); return nil }); err != nil {
		return api.NodeRow{}, err
	}
	if err := s.c.Store.Commit(ctx, store.Txn{DropNodes: []fleet.NodeID{node}}); err != nil {
		return api.NodeRow{}, err
	}
	s.audit(ctx, fleet.Event{At: c.now, Kind: "node.removed", Node: node, Actor: actor, Text: fmt.Sprintf("node %s removed by %s", node, actor)})
	return row, nil
}

// forgetNode takes all that the ledger has of a node out; join tokens for its name that
// nobody used yet are spent, since a signature alone would let one in again.
func forgetNode(l *store.Ledger, node fleet.NodeID, now time.Time) {
	revokeNode(l, node)
	delete(l.Nodes, node)
	delete(l.Cordons, node)
	for i := range l.Joins {
		if l.Joins[i].Node == node && l.Joins[i].UsedAt.IsZero() {
			l.Joins[i].UsedAt = now
		}
	}
}

// admit looks at the ledger as it is now, before a node gets a record: a copy of it that
// is a second old may not know that the node was just removed, or cordoned.
func (s *Server) admit(ctx context.Context, c call) (cordoned bool, err error) {
	ledger, err := s.c.Store.ReadLedger(ctx)
	if err != nil {
		return false, err
	}
	if _, revoked := ledger.Revoked[c.who.ID]; revoked {
		return false, access.ErrRevoked
	}
	_, cordoned = ledger.Cordons[fleet.NodeID(c.id)]
	return cordoned, nil
}
