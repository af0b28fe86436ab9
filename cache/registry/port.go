package registry

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/image"
)

// port is the way into one repository: authenticated, once for all requests.
type port struct {
	done chan struct{} // closed when what follows is set
	err  error

	client *http.Client
	scheme string
}

// enter returns the port of a repository, which it authenticates the first time; so 8
// streams share one token, and it is renewed for all when it expires. fresh: the
// credentials were read during this call. It returns within the stall time, whatever
// the registry, its token server or a credential helper do.
func (c *Client) enter(ctx context.Context, repository name.Repository) (p *port, fresh bool, err error) {
	c.mu.Lock()
	p = c.ports[repository.Name()]
	if p == nil {
		p = &port{done: make(chan struct{})}
		c.ports[repository.Name()] = p
		// It ends without this caller too: others wait for it, and a credential helper
		// that hangs cannot be ended at all.
		go c.authenticate(context.WithoutCancel(ctx), p, repository)
	}
	c.mu.Unlock()

	select {
	case <-p.done:
		return p, false, p.err
	default:
	}
	timer := time.NewTimer(c.stall)
	defer timer.Stop()
	select {
	case <-p.done:
		return p, true, p.err
	case <-ctx.Done():
		return nil, true, ctx.Err()
	case <-timer.C:
		return nil, true, &cache.Error{Class: cache.ClassNetwork, Err: fmt.Errorf("logging in to %s took more than %s: its token server or a credential helper does not answer", repository.RegistryStr(), c.stall)}
	}
}

// authenticate fills p in. One that fails is forgotten, so that the next request tries
// again; one that hangs is not, so that there is only one of them.
func (c *Client) authenticate(ctx context.Context, p *port, repository name.Repository) {
	ctx, cancel := context.WithTimeout(ctx, c.stall)
	defer cancel()
	defer close(p.done)
	if p.err = c.login(ctx, p, repository); p.err != nil {
		c.forget(p, repository)
	}
}

// login reads the credentials and gets a token for them.
func (c *Client) login(ctx context.Context, p *port, repository name.Repository) error {
	auth, err := c.credentials(ctx, repository)
	if err != nil {
		return err
	}
	trip, err := transport.NewWithContext(ctx, repository.Registry, auth, c.base, []string{repository.Scope(transport.PullScope)})
	if err != nil {
		return err
	}
	p.scheme = "https"
	if image.Loopback(repository.RegistryStr()) {
		p.scheme = "http" // the transport changes it to what answered its ping
	}
	p.client = &http.Client{Transport: trip, CheckRedirect: checkRedirect}
	return nil
}

// credentials are a token for this very repository if there is one, else the keychain's.
func (c *Client) credentials(ctx context.Context, repository name.Repository) (authn.Authenticator, error) {
	if c.token != nil {
		token, err := c.token(ctx, repository.Name())
		if err != nil {
			return nil, &cache.Error{Class: cache.ClassOf(err), Err: fmt.Errorf("getting a token for %s: %w", repository.Name(), err)}
		}
		if token != "" {
			return authn.FromConfig(authn.AuthConfig{RegistryToken: token}), nil
		}
	}
	auth, err := authn.Resolve(ctx, c.keychain, repository)
	if err != nil {
		return nil, &cache.Error{Class: cache.ClassAuth, Err: fmt.Errorf("reading credentials for %s: %w; check the Docker config", repository.RegistryStr(), err)}
	}
	return auth, nil
}

// forget makes the next request read the credentials anew.
func (c *Client) forget(p *port, repository name.Repository) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ports[repository.Name()] == p {
		delete(c.ports, repository.Name())
	}
}
