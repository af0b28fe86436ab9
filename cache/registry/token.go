package registry

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/paddock-ci/paddock/cache"
)

// defaultLife is how long a token is good whose server does not say (the token
// authentication specification of the distribution project).
const defaultLife = 60 * time.Second

// errOwn is the hint with registries that no token can be bought from.
var errOwn = errors.New("nodes need credentials of their own for it, in their Docker config")

// PullToken buys a token that is good for pulls from one repository (host/name) and for
// nothing else, with this client's own credentials, and says when it expires. It is
// empty where none is needed: nodes ask such a registry without. The token is for a
// node's Config.Token; neither it nor the credentials are in errors.
func (c *Client) PullToken(ctx context.Context, repository string) (token string, expires time.Time, err error) {
	r, err := c.place(repository)
	if err != nil {
		return "", time.Time{}, err
	}
	began := time.Now()
	bought, err := within(ctx, c.stall, func(ctx context.Context) (*transport.Token, error) {
		return c.buy(ctx, r.Repository())
	})
	if err != nil {
		return "", time.Time{}, fmt.Errorf("getting a pull token: %w", classify(r.Repository(), "", err))
	}
	if bought == nil {
		return "", time.Time{}, nil
	}
	life := time.Duration(bought.ExpiresIn) * time.Second
	if life <= 0 {
		life = defaultLife
	}
	return bought.Token, began.Add(life), nil
}

// buy asks the registry who sells its tokens, and buys one there; nil: none is needed.
func (c *Client) buy(ctx context.Context, repository name.Repository) (*transport.Token, error) {
	challenge, err := transport.Ping(ctx, repository.Registry, c.base)
	if err != nil {
		return nil, err
	}
	if challenge.Scheme == "" {
		return nil, nil
	}
	auth, err := authn.Resolve(ctx, c.keychain, repository)
	if err != nil {
		return nil, &cache.Error{Class: cache.ClassAuth, Err: fmt.Errorf("reading credentials for %s: %w; check the Docker config", repository.RegistryStr(), err)}
	}
	own, err := authn.Authorization(ctx, auth)
	if err != nil {
		return nil, &cache.Error{Class: cache.ClassAuth, Err: fmt.Errorf("reading credentials for %s: %w; check the Docker config", repository.RegistryStr(), err)}
	}
	refuse := func(why string) error {
		return &cache.Error{Class: cache.ClassAuth, Err: fmt.Errorf("%s %s; %w", repository.RegistryStr(), why, errOwn)}
	}
	switch {
	case *own == authn.AuthConfig{}:
		return nil, nil // what anyone may buy, nodes can buy themselves
	case !strings.EqualFold(challenge.Scheme, "bearer"):
		return nil, refuse("sells no tokens that are good for one repository only")
	case own.RegistryToken != "":
		return nil, refuse("is known here by a ready token, which may be good for more than pulls")
	}
	token, err := transport.Exchange(ctx, repository.Registry, auth, c.base, []string{repository.Scope(transport.PullScope)}, challenge)
	if err != nil {
		return nil, err
	}
	if token.Token == "" {
		token.Token = token.AccessToken
	}
	if reveals(token.Token, own) {
		return nil, refuse("gives the password itself as a token")
	}
	return token, nil
}

// reveals reports whether a token is the credentials in another dress, as some token
// servers answer.
func reveals(token string, own *authn.AuthConfig) bool {
	plain := token
	for _, encoding := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
		if decoded, err := encoding.DecodeString(strings.TrimRight(token, "=")); err == nil {
			plain += "\n" + string(decoded)
		}
	}
	for _, secret := range []string{own.Password, own.IdentityToken, own.Auth} {
		if secret != "" && strings.Contains(plain, secret) {
			return true
		}
	}
	return false
}

// within runs what may hang in spite of its context, as credential helpers do, and waits
// for it no longer than it should take.
func within[T any](ctx context.Context, limit time.Duration, f func(context.Context) (T, error)) (T, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	type result struct {
		value T
		err   error
	}
	done := make(chan result, 1)
	go func() {
		defer cancel()
		value, err := f(ctx)
		done <- result{value, err}
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case <-ctx.Done():
	}
	select {
	case r := <-done: // it ended at the same moment, or because of the context
		return r.value, r.err
	default:
		var none T
		return none, fmt.Errorf("a token server or a credential helper does not answer: %w", ctx.Err())
	}
}
