package server

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
)

// Lifetimes of service tokens.
const (
	defaultLife = 90 * 24 * time.Hour
	maxLife     = 366 * 24 * time.Hour
)

// audit writes a change's event and its log line. The change stands, so a failure is
// logged and the caller still gets its answer: a secret that was made is shown once.
func (s *Server) audit(ctx context.Context, e fleet.Event) {
	s.log.Info("changed", "event", e.Kind, "node", e.Node, "actor", e.Actor, "reason", e.Text)
	if err := s.c.Store.Commit(ctx, store.Txn{Events: []fleet.Event{e}}); err != nil {
		s.log.Error("a change is not in the audit trail", "event", e.Kind, "node", e.Node, "actor", e.Actor, "error", err)
	}
}

// join makes a node of whoever has an unused join token. Credentials that the name had
// before are revoked: a Mac that was set up anew must not have a twin.
func (s *Server) join(ctx context.Context, c call, q api.JoinRequest) (api.JoinReply, error) {
	token := strings.TrimSpace(q.Token)
	join, err := s.verifier.VerifyJoin(token, c.now)
	if err != nil {
		return api.JoinReply{}, err
	}
	hash := access.Token(token).Hash()
	actor := string(access.Node) + ":" + string(join.Node)
	credential, expires, err := s.issueNode(ctx, join.Node, "", actor, c.now, func(l *store.Ledger) error {
		if err := use(l, hash, join, c.now); err != nil {
			return err
		}
		if l.Nodes == nil {
			l.Nodes = map[fleet.NodeID]time.Time{}
		}
		l.Nodes[join.Node] = c.now
		revokeNode(l, join.Node)
		return nil
	})
	if err != nil {
		return api.JoinReply{}, err
	}
	s.audit(ctx, fleet.Event{At: c.now, Kind: "node.joined", Node: join.Node, Actor: actor, Text: fmt.Sprintf("node %s joined", join.Node)})
	return api.JoinReply{Node: join.Node, Credential: string(credential), ExpiresAt: expires, Fleet: s.c.Fleet}, nil
}

// use spends a join token; one that was spent before is refused.
func use(l *store.Ledger, hash string, join access.Join, now time.Time) error {
	for i := range l.Joins {
		if l.Joins[i].Hash != hash {
			continue
		}
		if !l.Joins[i].UsedAt.IsZero() {
			return refusal(http.StatusUnauthorized, "the join token was used before",
				"make another (paddock token create --node NAME); if nobody of yours used it, revoke the node's credential")
		}
		l.Joins[i].UsedAt = now
		return nil
	}
	// Made with the fleet key, not by this interface: the signature is proof enough.
	l.Joins = append(l.Joins, store.JoinRecord{Hash: hash, Node: join.Node, ExpiresAt: join.ExpiresAt, UsedAt: now})
	return nil
}

func revokeNode(l *store.Ledger, node fleet.NodeID) {
	l.Tokens = slices.DeleteFunc(l.Tokens, func(t store.TokenRecord) bool {
		its := t.Role == string(access.Node) && t.Name == string(node)
		if its {
			revoke(l, t)
		}
		return its
	})
}

func revoke(l *store.Ledger, t store.TokenRecord) {
	if l.Revoked == nil {
		l.Revoked = map[string]time.Time{}
	}
	l.Revoked[t.ID] = t.ExpiresAt
}

// issueNode signs a node's credential and records it together with change; replaces is
// the id of the one that it renews, "" if none.
func (s *Server) issueNode(ctx context.Context, node fleet.NodeID, replaces, by string, now time.Time, change func(*store.Ledger) error) (access.Token, time.Time, error) {
	id := access.Identity{ID: access.NewID(), Role: access.Node, Subject: string(node), IssuedAt: now, ExpiresAt: now.Add(access.NodeLife).Truncate(time.Second)}
	token, err := s.c.Key.Sign(id)
	if err != nil {
		return "", time.Time{}, err
	}
	err = s.amend(ctx, now, func(l *store.Ledger) error {
		if err := change(l); err != nil {
			return err
		}
		entry := record(id, now, by)
		entry.Replaces = replaces
		l.Tokens = append(l.Tokens, entry)
		return nil
	})
	return token, id.ExpiresAt, err
}

func record(id access.Identity, now time.Time, by string) store.TokenRecord {
	return store.TokenRecord{ID: id.ID, Name: id.Subject, Role: string(id.Role), CreatedAt: now, ExpiresAt: id.ExpiresAt, CreatedBy: by}
}

func row(t store.TokenRecord) api.TokenRow {
	return api.TokenRow{ID: t.ID, Name: t.Name, Role: t.Role, CreatedAt: t.CreatedAt, ExpiresAt: t.ExpiresAt, CreatedBy: t.CreatedBy}
}

// createToken makes a service token, or a join token if a node is named.
func (s *Server) createToken(ctx context.Context, c call, q api.TokenRequest) (api.TokenReply, error) {
	if q.Node != "" {
		return s.createJoin(ctx, c, q)
	}
	role, err := access.ParseRole(q.Role)
	if err != nil {
		return api.TokenReply{}, asBadRequest(err)
	}
	if err := fleet.CheckName("token", q.Name); err != nil {
		return api.TokenReply{}, refusal(http.StatusBadRequest, "a token needs a name", err.Error())
	}
	life := cmp.Or(q.Life, defaultLife)
	if life < time.Minute || life > maxLife {
		return api.TokenReply{}, refusal(http.StatusBadRequest, fmt.Sprintf("a token cannot live for %s", life), "from a minute to a year (8784h)")
	}
	id := access.Identity{ID: access.NewID(), Role: role, Subject: q.Name, IssuedAt: c.now, ExpiresAt: c.now.Add(life).Truncate(time.Second)}
	token, err := s.c.Key.Sign(id)
	if err != nil {
		return api.TokenReply{}, err
	}
	entry := record(id, c.now, c.who.Actor())
	if err := s.amend(ctx, c.now, func(l *store.Ledger) error { l.Tokens = append(l.Tokens, entry); return nil }); err != nil {
		return api.TokenReply{}, err
	}
	s.audit(ctx, fleet.Event{
		At: c.now, Kind: "token.created", Actor: c.who.Actor(), Text: fmt.Sprintf("token %s for %s, until %s", id.ID, id.Actor(), id.ExpiresAt.Format(time.DateOnly)),
	})
	return api.TokenReply{TokenRow: row(entry), Token: string(token)}, nil
}

// createJoin makes a one-time token with which a node of one name may join.
func (s *Server) createJoin(ctx context.Context, c call, q api.TokenRequest) (api.TokenReply, error) {
	if q.Name != "" || q.Role != "" || q.Life != 0 {
		return api.TokenReply{}, refusal(http.StatusBadRequest, "a join token has a node and nothing else", "leave name, role and life out; it lasts 15 minutes")
	}
	if err := fleet.CheckName("node", string(q.Node)); err != nil {
		return api.TokenReply{}, refusal(http.StatusBadRequest, "a join token names one node", err.Error())
	}
	join := access.Join{ID: access.NewID(), Node: q.Node, URL: s.c.SelfURL, Certificate: s.c.Certificate, ExpiresAt: c.now.Add(access.JoinLife).Truncate(time.Second)}
	token, err := s.c.Key.SignJoin(join)
	if err != nil {
		return api.TokenReply{}, err
	}
	err = s.amend(ctx, c.now, func(l *store.Ledger) error {
		l.Joins = append(l.Joins, store.JoinRecord{Hash: token.Hash(), Node: q.Node, ExpiresAt: join.ExpiresAt})
		return nil
	})
	if err != nil {
		return api.TokenReply{}, err
	}
	s.audit(ctx, fleet.Event{At: c.now, Kind: "token.created", Node: q.Node, Actor: c.who.Actor(), Text: fmt.Sprintf("join token for node %s", q.Node)})
	return api.TokenReply{Token: string(token), TokenRow: api.TokenRow{
		ID: join.ID, Name: string(q.Node), Role: "join", CreatedAt: c.now, ExpiresAt: join.ExpiresAt, CreatedBy: c.who.Actor(),
	}}, nil
}

// asBadRequest keeps an access error's words; as it is it would mean a bad token.
func asBadRequest(err error) error {
	e := told(err)
	return refusal(http.StatusBadRequest, e.Message, e.Hint)
}

// listTokens shows what is in force: service tokens and nodes' credentials.
func (s *Server) listTokens(ctx context.Context, c call, _ struct{}) ([]api.TokenRow, error) {
	ledger, err := s.c.Store.ReadLedger(ctx)
	if err != nil {
		return nil, err
	}
	rows := []api.TokenRow{}
	for _, t := range ledger.Tokens {
		if t.ExpiresAt.After(c.now) {
			rows = append(rows, row(t))
		}
	}
	slices.SortFunc(rows, func(a, b api.TokenRow) int {
		return cmp.Or(cmp.Compare(a.Role, b.Role), cmp.Compare(a.Name, b.Name), a.CreatedAt.Compare(b.CreatedAt), cmp.Compare(a.ID, b.ID))
	})
	return rows, nil
}

// revokeToken ends a token or a node's credential.
func (s *Server) revokeToken(ctx context.Context, c call, _ struct{}) (api.TokenRow, error) {
	var found api.TokenRow
	err := s.amend(ctx, c.now, func(l *store.Ledger) error {
		i := slices.IndexFunc(l.Tokens, func(t store.TokenRecord) bool { return t.ID == c.id })
		if i < 0 {
			return refusal(http.StatusNotFound, fmt.Sprintf("no token %q is in force", c.id), "the first column of paddock token list is the id")
		}
		found = row(l.Tokens[i])
		revoke(l, l.Tokens[i])
		l.Tokens = slices.Delete(l.Tokens, i, i+1)
		revokeSuccessor(l, c.id) // whoever has the one may have got the other by it
		return nil
	})
	if err != nil {
		return api.TokenRow{}, err
	}
	s.audit(ctx, fleet.Event{At: c.now, Kind: "token.revoked", Actor: c.who.Actor(), Text: fmt.Sprintf("token %s of %s:%s", found.ID, found.Role, found.Name)})
	return found, nil
}
