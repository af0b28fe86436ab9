package server

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"golang.org/x/sync/singleflight"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/fleet"
)

const (
	// pullTokenTime bounds the buying of a token: a ping and a login.
	pullTokenTime = 20 * time.Second
	// pullTokenMargin is how long before its end a token is not handed out any more, or
	// half its life if that is less: a node has to come to the registry with it.
	pullTokenMargin = time.Minute
	// noTokenAge is how long it is remembered that a registry sells none, and
	// failedTokenAge that it could not be asked: a fleet's nodes all ask at once.
	noTokenAge     = time.Minute
	failedTokenAge = 5 * time.Second
	// maxPullTokens bounds the repositories whose tokens are kept.
	maxPullTokens = 1000
)

// pullToken buys a registry's token for a node with the controller's credentials: for
// pulls from the repository of an image that the node may pull, and for nothing else.
func (s *Server) pullToken(ctx context.Context, c call, q api.PullTokenRequest) (api.PullTokenReply, error) {
	node := fleet.NodeID(c.id)
	if err := s.ownWord(c); err != nil {
		return api.PullTokenReply{}, err
	}
	if long(maxText, q.Repository) {
		return api.PullTokenReply{}, refusal(http.StatusBadRequest, "an overlong repository", "want host/name")
	}
	repository, err := name.NewRepository(q.Repository)
	if err != nil {
		return api.PullTokenReply{}, refusal(http.StatusBadRequest, cut(fmt.Sprintf("%q is no repository", q.Repository)), "want host/name, without a tag")
	}
	if s.c.Allowed != nil {
		if err := s.c.Allowed(repository.Name()); err != nil {
			return api.PullTokenReply{}, refusal(http.StatusForbidden, cut(err.Error()), "the controller's configuration lists the registries that may be pulled from: images.registries")
		}
	}
	if _, err := s.knowing(ctx, c.now, node, func(at *sites) error { return s.mayPullFrom(at.view, node, repository.Name()) }); err != nil {
		return api.PullTokenReply{}, err
	}
	if s.c.PullToken == nil {
		return api.PullTokenReply{}, nil
	}
	bought, fresh, err := s.pullTokens.get(ctx, repository.Name(), c.now, s.c.PullToken)
	if err != nil {
		s.log.Warn("no pull token", "node", node, "repository", repository.Name(), "error", err)
		return api.PullTokenReply{}, refusal(http.StatusBadGateway, cut(fmt.Sprintf("the registry of %s gives no token now: %v", repository.Name(), err)), "it is asked again in a few seconds")
	}
	if fresh && bought.token != "" {
		s.audit(ctx, fleet.Event{At: c.now, Kind: "pull.token", Node: node, Actor: c.who.Actor(),
			Text: fmt.Sprintf("a token for pulls from %s until %s", repository.Name(), bought.ends.UTC().Format(time.TimeOnly))})
	}
	return api.PullTokenReply{Token: bought.token, ExpiresAt: bought.ends}, nil
}

// boughtToken is what a registry answered.
type boughtToken struct {
	token string // secret; "": none is needed, or none is sold
	ends  time.Time
	err   error
	until time.Time // when it is not handed out any more
}

// pullTokens keeps tokens, by repository, in memory only.
type pullTokens struct {
	flight singleflight.Group

	mu   sync.Mutex
	kept map[string]boughtToken
}

func newPullTokens() *pullTokens { return &pullTokens{kept: map[string]boughtToken{}} }

// get returns a token that is good for a while, and whether it was bought just now by this
// call.
func (p *pullTokens) get(ctx context.Context, repository string, now time.Time, buy func(context.Context, string) (string, time.Time, error)) (boughtToken, bool, error) {
	if kept, ok := p.find(repository, now); ok {
		return kept, false, kept.err
	}
	fresh := false
	// Others wait for the same answer: it does not end with the first of them.
	done := p.flight.DoChan(repository, func() (any, error) {
		asking, cancel := context.WithTimeout(context.WithoutCancel(ctx), pullTokenTime)
		defer cancel()
		fresh = true
		token, ends, err := buy(asking, repository)
		return p.keep(repository, now, token, ends, err), nil
	})
	select {
	case r := <-done:
		bought := r.Val.(boughtToken)
		return bought, fresh, bought.err
	case <-ctx.Done():
		return boughtToken{}, false, ctx.Err()
	}
}

func (p *pullTokens) find(repository string, now time.Time) (boughtToken, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	kept, ok := p.kept[repository]
	return kept, ok && now.Before(kept.until)
}

// keep notes an answer. A registry that sells no token that could be handed on, or not for
// our credentials, leaves nodes to their own.
func (p *pullTokens) keep(repository string, now time.Time, token string, ends time.Time, err error) boughtToken {
	b := boughtToken{token: token, ends: ends, err: err}
	var refused *cache.Error
	if errors.As(err, &refused) && refused.Class == cache.ClassAuth {
		b = boughtToken{}
	}
	switch life := b.ends.Sub(now); {
	case b.err != nil:
		b.until = now.Add(failedTokenAge)
	case b.token == "" || b.ends.IsZero():
		b.until = now.Add(noTokenAge)
	default:
		b.until = b.ends.Add(-min(pullTokenMargin, life/2))
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.kept) >= maxPullTokens {
		clear(p.kept)
	}
	p.kept[repository] = b
	return b
}
