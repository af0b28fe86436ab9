package server

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
)

// till is a registry's token server as the controller sees it.
type till struct {
	h     *house
	asked atomic.Int32
	token string
	life  time.Duration
	err   error
	hold  chan struct{} // closed when it may answer; nil: at once
}

func (b *till) sell(ctx context.Context, repository string) (string, time.Time, error) {
	b.asked.Add(1)
	if b.hold != nil {
		select {
		case <-b.hold:
		case <-ctx.Done():
			return "", time.Time{}, ctx.Err()
		}
	}
	if b.err != nil {
		return "", time.Time{}, b.err
	}
	if b.token == "" {
		return "", time.Time{}, nil
	}
	return b.token + " " + repository, b.h.clock().Add(b.life), nil
}

// repository is the cast's image's.
const repository = "registry.example/macos/sequoia"

// buying is a house with a till and an allow-list of registry.example.
func buying(t *testing.T) (*house, *till) {
	t.Helper()
	b := &till{token: "SECRET-PULL-TOKEN", life: 5 * time.Minute}
	b.h = newHouse(t, func(c *Config) {
		c.PullToken = b.sell
		c.Allowed = func(ref string) error {
			if strings.HasPrefix(ref, "registry.example/") {
				return nil
			}
			return errors.New(ref + " is not in an allowed registry: images.registries lists registry.example")
		}
	})
	return b.h, b
}

// buy asks for a token, as a node with this id.
func (h *house) buy(id fleet.NodeID, repository string) (api.PullTokenReply, error) {
	return h.client(access.Node, string(id)).PullToken(h.t.Context(), id, api.PullTokenRequest{Repository: repository})
}

func TestPullToken(t *testing.T) {
	h, b := buying(t)
	h.puller("mac1", fleet.ImageCaching)
	h.puller("mac2", fleet.ImageQueued)
	h.advance(sitesAge)
	first, err := h.buy("mac1", repository)
	if err != nil || first.Token != "SECRET-PULL-TOKEN "+repository || !first.ExpiresAt.Equal(h.clock().Add(b.life)) {
		t.Fatalf("%+v, %v", first, err)
	}
	h.advance(4*time.Minute - time.Second)
	if again, err := h.buy("mac2", repository); err != nil || again != first || b.asked.Load() != 1 {
		t.Errorf("asked %d times: %+v, %v", b.asked.Load(), again, err)
	}
	h.advance(2 * time.Second) // less than a minute is left
	if later, err := h.buy("mac1", repository); err != nil || later.ExpiresAt.Equal(first.ExpiresAt) || b.asked.Load() != 2 {
		t.Errorf("asked %d times: %+v, %v", b.asked.Load(), later, err)
	}
	events, err := h.store.Events(t.Context(), store.EventFilter{Node: "mac1"})
	bought := 0
	for _, e := range events {
		if e.Kind == "pull.token" {
			bought++
		}
		if strings.Contains(e.Text, "SECRET") {
			t.Errorf("a token in an event: %s", e.Text)
		}
	}
	if err != nil || bought != 2 || strings.Contains(h.log.String(), "SECRET") {
		t.Errorf("%d events of tokens, %v; log: %s", bought, err, h.log.String())
	}
}

// Whoever wants what is not theirs is refused before a registry hears of it.
func TestPullTokenRefused(t *testing.T) {
	h, b := buying(t)
	m := h.puller("mac1", fleet.ImageCaching)
	h.advance(sitesAge)
	if code, body := h.request("POST", "/v1/nodes/mac1/pull-token", h.token(access.Node, "mac2"), `{"repository":"`+repository+`"}`); code != http.StatusForbidden {
		t.Errorf("in another's name: %d %s", code, body)
	}
	// A node that says that it pulls somebody's secret image does not get to read it.
	m.images = append(m.images, fleet.NodeImage{Digest: "sha256:" + fleet.Digest(strings.Repeat("9", 64)), Ref: "registry.example/private/app:1", State: fleet.ImageQueued})
	m.say()
	for name, c := range map[string]struct {
		node       fleet.NodeID
		repository string
		status     int
		says       string
	}{
		"a registry off the list":   {"mac1", "ghcr.io/acme/macos", http.StatusForbidden, "images.registries lists registry.example"},
		"an image of its own word":  {"mac1", "registry.example/private/app", http.StatusForbidden, "no order"},
		"a repository beside it":    {"mac1", repository + "-beta", http.StatusForbidden, "no order"},
		"no repository":             {"mac1", "registry.example/UPPER case", http.StatusBadRequest, "no repository"},
		"an empty one":              {"mac1", "", http.StatusBadRequest, "no repository"},
		"an overlong one":           {"mac1", strings.Repeat("a", maxText+1), http.StatusBadRequest, "overlong"},
		"a node without any orders": {"mac9", repository, http.StatusServiceUnavailable, "has not reported"},
	} {
		_, err := h.buy(c.node, c.repository)
		if err == nil || status(t, err) != c.status || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want a %d that says %q", name, err, c.status, c.says)
		}
	}
	if n := b.asked.Load(); n != 0 {
		t.Errorf("the registry was asked %d times", n)
	}
	// An order opens it.
	h.commit(store.Txn{Orders: []fleet.Orders{{Node: "mac1", Hold: []fleet.Hold{{Digest: digest, Ref: "registry.example/private/app:1"}}}}})
	if _, err := h.buy("mac1", "registry.example/private/app"); err != nil {
		t.Error(err)
	}
}

// 50 nodes ask at once: the registry is asked once, and the end of one call is not the
// end of the others'.
func TestPullTokenFlight(t *testing.T) {
	h, b := buying(t)
	h.puller("mac1", fleet.ImageCaching)
	h.advance(sitesAge)
	b.hold = make(chan struct{})
	hasty, cancel := context.WithCancel(t.Context())
	left := make(chan error)
	go func() {
		_, err := h.client(access.Node, "mac1").PullToken(hasty, "mac1", api.PullTokenRequest{Repository: repository})
		left <- err
	}()
	for deadline := time.Now().Add(20 * time.Second); b.asked.Load() == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the registry is never asked")
		}
	}
	cancel()
	if err := <-left; err == nil {
		t.Error("a call that was ended has an answer")
	}
	var all sync.WaitGroup
	for range 50 {
		all.Go(func() {
			if r, err := h.buy("mac1", repository); err != nil || r.Token == "" {
				t.Errorf("%+v, %v", r, err)
			}
		})
	}
	close(b.hold)
	all.Wait()
	if n := b.asked.Load(); n != 1 {
		t.Errorf("asked %d times", n)
	}
}

// A registry that needs no token or sells none leaves nodes to their own credentials; one
// that is silent is said so, and asked again soon.
func TestPullTokenNone(t *testing.T) {
	for name, c := range map[string]struct {
		token  string
		err    error
		status int
		again  time.Duration // after which the registry is asked again
	}{
		"none needed": {"", nil, http.StatusOK, noTokenAge},
		"none sold":   {"", &cache.Error{Class: cache.ClassAuth, Err: errors.New("sells none")}, http.StatusOK, noTokenAge},
		"silent":      {"", errors.New("no route to host"), http.StatusBadGateway, failedTokenAge},
	} {
		h, b := buying(t)
		h.puller("mac1", fleet.ImageCaching)
		h.advance(sitesAge)
		b.token, b.err = c.token, c.err
		for range 2 {
			r, err := h.buy("mac1", repository)
			if status(t, err) != c.status || r != (api.PullTokenReply{}) || b.asked.Load() != 1 {
				t.Errorf("%s: %+v, %v, asked %d times", name, r, err, b.asked.Load())
			}
		}
		h.advance(c.again)
		if _, err := h.buy("mac1", repository); status(t, err) != c.status || b.asked.Load() != 2 {
			t.Errorf("%s: %v, asked %d times", name, err, b.asked.Load())
		}
	}
	h := newHouse(t)
	h.puller("mac1", fleet.ImageCaching)
	if r, err := h.buy("mac1", repository); err != nil || r.Token != "" {
		t.Errorf("nobody sells: %+v, %v", r, err)
	}
}
