package server

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
)

// A node's credential is renewed in its syncs: the next one is handed out, recorded as
// the successor of the old, and when it is first used, which proves that it arrived, the
// old one is revoked. One credential has at most one successor at a time.

// renewAgain is how long a successor that was handed out may stay unused before it is
// taken for lost on its way, revoked, and another one handed out.
const renewAgain = time.Hour

// errRenewed ends a change of the ledger that another call has made already.
var errRenewed = errors.New("renewed already")

// renew hands out a new credential when the old one is about to end; "" if not. What
// fails here is tried again at the next sync, for a month.
func (s *Server) renew(ctx context.Context, c call) string {
	now := s.c.Now() // the call may have been parked
	if c.who.ExpiresAt.Sub(now) >= access.RenewBefore {
		return ""
	}
	known, err := s.ledger.get(ctx, now)
	if err == nil && underWay(&known, c.who.ID, now) {
		return ""
	}
	node := fleet.NodeID(c.id)
	token, expires, err := s.issueNode(ctx, node, c.who.ID, c.who.Actor(), now, func(l *store.Ledger) error {
		if _, revoked := l.Revoked[c.who.ID]; revoked || underWay(l, c.who.ID, now) {
			return errRenewed
		}
		revokeSuccessor(l, c.who.ID)
		return nil
	})
	if errors.Is(err, errRenewed) {
		return ""
	}
	if err != nil {
		s.log.Error("a node's credential could not be renewed", "node", node, "ends", c.who.ExpiresAt, "error", err)
		return ""
	}
	s.audit(ctx, fleet.Event{At: now, Kind: "node.renewed", Node: node, Actor: c.who.Actor(), Text: "a new credential until " + expires.Format(time.DateOnly)})
	return string(token)
}

// underWay reports whether the credential has a successor that may yet arrive.
func underWay(l *store.Ledger, id string, now time.Time) bool {
	return slices.ContainsFunc(l.Tokens, func(t store.TokenRecord) bool { return t.Replaces == id && now.Sub(t.CreatedAt) < renewAgain })
}

// revokeSuccessor ends the credential, if any, that was to take the place of id.
func revokeSuccessor(l *store.Ledger, id string) {
	l.Tokens = slices.DeleteFunc(l.Tokens, func(t store.TokenRecord) bool {
		if t.Replaces != id {
			return false
		}
		revoke(l, t)
		return true
	})
}

// used revokes the credential that the caller's own takes the place of. What fails here
// is tried again at the next sync.
func (s *Server) used(ctx context.Context, c call) {
	now := s.c.Now()
	known, err := s.ledger.get(ctx, now)
	if err != nil || !slices.ContainsFunc(known.Tokens, func(t store.TokenRecord) bool { return t.ID == c.who.ID && t.Replaces != "" }) {
		return
	}
	err = s.amend(ctx, now, func(l *store.Ledger) error {
		i := slices.IndexFunc(l.Tokens, func(t store.TokenRecord) bool { return t.ID == c.who.ID && t.Replaces != "" })
		if i < 0 {
			return errRenewed
		}
		// The old one had less than RenewBefore left when this one was made.
		old := store.TokenRecord{ID: l.Tokens[i].Replaces, ExpiresAt: l.Tokens[i].CreatedAt.Add(access.RenewBefore)}
		l.Tokens[i].Replaces = ""
		l.Tokens = slices.DeleteFunc(l.Tokens, func(t store.TokenRecord) bool { return t.ID == old.ID })
		revoke(l, old)
		return nil
	})
	if err != nil && !errors.Is(err, errRenewed) {
		s.log.Warn("a node's former credential could not be revoked yet", "node", c.id, "error", err)
	}
}
