package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/fleet"
)

const (
	// tokenShared is how long a token is given to all who ask for it: the streams of a pull
	// begin together. Who asks again later was refused with it, and gets a new one.
	tokenShared = 30 * time.Second
	// tokenMargin is how long before its end a token is not given out any more: a request
	// with it has to arrive.
	tokenMargin = 10 * time.Second
	// tokenTime bounds a question: the controller may have to log in somewhere first.
	tokenTime = 25 * time.Second
	// tokenPause is how long a controller that does not answer is not asked again.
	tokenPause = 5 * time.Second
)

// TokensConfig of Tokens. Node and PullToken are required.
type TokensConfig struct {
	Node fleet.NodeID
	// PullToken asks the controller; *api.Client's.
	PullToken func(ctx context.Context, node fleet.NodeID, r api.PullTokenRequest) (api.PullTokenReply, error)
	Now       func() time.Time // nil: time.Now
	Log       *slog.Logger     // nil: nothing is logged
}

// Tokens are the registries' tokens that the controller buys for this node, each good for
// pulls from one repository. They are held in memory for moments only.
type Tokens struct {
	c TokensConfig

	mu   sync.Mutex
	held map[string]*pullToken // by repository
}

// pullToken is a token, or one that is being asked for.
type pullToken struct {
	done   chan struct{} // closed when the rest is set
	token  string
	until  time.Time // when it is no longer given out
	failed error
	left   bool // who asked went away: who waits asks again
}

// NewTokens checks the configuration.
func NewTokens(c TokensConfig) (*Tokens, error) {
	if c.PullToken == nil {
		return nil, errors.New("tokens: PullToken is needed")
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return &Tokens{c: c, held: map[string]*pullToken{}}, nil
}

// PullToken is a token for pulls from a repository (host/name); empty: it is asked without
// one. Calls at the same time make one question. It fails where the controller refuses;
// while that does not answer, a pull goes on with what credentials this node has. It is
// registry.Config's Token.
func (t *Tokens) PullToken(ctx context.Context, repository string) (string, error) {
	for {
		p, mine := t.enter(repository)
		if mine {
			t.ask(ctx, repository, p)
			return p.token, p.failed
		}
		select {
		case <-p.done:
		case <-ctx.Done():
			return "", ctx.Err()
		}
		if p.failed == nil {
			return p.token, nil
		}
		if !p.left {
			return "", p.failed
		}
	}
}

// enter finds the question that is asked or answered already, or begins one.
func (t *Tokens) enter(repository string) (p *pullToken, mine bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if p := t.held[repository]; p != nil {
		select {
		case <-p.done:
			if p.failed == nil && t.c.Now().Before(p.until) {
				return p, false
			}
		default:
			return p, false
		}
	}
	p = &pullToken{done: make(chan struct{})}
	t.held[repository] = p
	return p, true
}

// ask fills p in, for all who wait for it.
func (t *Tokens) ask(ctx context.Context, repository string, p *pullToken) {
	defer close(p.done)
	call, cancel := context.WithTimeout(ctx, tokenTime)
	defer cancel()
	reply, err := t.c.PullToken(call, t.c.Node, api.PullTokenRequest{Repository: repository})
	var refused *api.Error
	switch {
	case err == nil:
		p.token, p.until = reply.Token, t.c.Now().Add(tokenShared)
		if end := reply.ExpiresAt.Add(-tokenMargin); !reply.ExpiresAt.IsZero() && end.Before(p.until) {
			p.until = end
		}
	case ctx.Err() != nil:
		p.left, p.failed = true, ctx.Err()
	case errors.As(err, &refused) && refused.Status/100 == 4:
		p.failed = &cache.Error{Class: cache.ClassAuth, Err: fmt.Errorf("asking the controller for a token for %s: %w", repository, err)}
	default:
		t.c.Log.Warn("the controller gives no token for a registry; this node's own credentials must do", "repository", repository, "error", err)
		p.until = t.c.Now().Add(tokenPause)
	}
}
