// Package github is the way to GitHub: it logs in as an App, registers and removes
// just-in-time runners, asks for jobs and for webhook deliveries, and decodes what
// webhooks say about jobs.
//
// It does not listen (package webhook does), keeps nothing that matters (limits, answers
// already seen and installations are remembered to save requests, and can be forgotten
// at any time) and does not try again: it says until when GitHub wants to be left alone,
// and its callers, who are level-triggered, come back.
//
// The controller mints and removes runners with it, feed reads deliveries and jobs, and
// webhook uses ParseJob only.
//
// go-github v62 knows the paths; what it does badly with limits is done underneath it,
// in transport.go, and what it leaves out of webhooks is decoded in parse.go.
package github

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/bradleyfalzon/ghinstallation/v2"
	gh "github.com/google/go-github/v62/github"

	"github.com/paddock-ci/paddock/fleet"
)

// Errors that decisions depend on.
var (
	// ErrNoInstallation: the App is not installed for that owner.
	ErrNoInstallation = errors.New("the GitHub App is not installed there")
	// ErrNameTaken: a runner of that name is registered already (409).
	ErrNameTaken = errors.New("the runner's name is taken")
	// ErrUnprocessable: GitHub understood the request and will not do it (422): the
	// runner group does not exist or may not be used, or the name is not allowed.
	ErrUnprocessable = errors.New("GitHub refuses the runner")
	// ErrBusy: the runner has a job and was not removed (422).
	ErrBusy = errors.New("the runner is busy")
	// ErrNotFound: there is no such job, repository or delivery, or it may not be seen.
	ErrNotFound = errors.New("not found at GitHub")
)

// RateLimited says that GitHub wants to be left alone.
type RateLimited struct {
	// Until is when requests of this kind may be sent again.
	Until time.Time
	// Resource is GitHub's name for what is limited: core, actions_runner_registration, …
	Resource string
}

func (e *RateLimited) Error() string {
	return fmt.Sprintf("GitHub limits requests for %s until %s", e.Resource, e.Until.UTC().Format(time.RFC3339))
}

// Config is how to reach GitHub, and as which App.
type Config struct {
	// AppID is the App's number, on its page at GitHub; required.
	AppID int64
	// PrivateKey of the App in PEM, as downloaded from its page; required.
	PrivateKey []byte
	// BaseURL of the REST API; empty: https://api.github.com/. On a GitHub Enterprise
	// Server it is https://HOST/api/v3/.
	BaseURL string
	// Transport sends the requests; nil: as http.DefaultTransport, but it gives up on a
	// connection that brings no answer within 20 s.
	Transport http.RoundTripper
	// WritesPerMinute spaces requests that change something, for each installation; 0:
	// 150 after a burst of 30, which stays below the 180 that GitHub allows in any
	// minute; negative: not spaced, for a simulated GitHub.
	WritesPerMinute int
	// Log is told when GitHub limits us; nil: discarded.
	Log *slog.Logger
}

// Client talks to GitHub as one App. It is safe for concurrent use.
type Client struct {
	c    Config
	base *url.URL
	app  *gh.Client // with the App's own JWT

	mu            sync.Mutex
	installations map[string]found     // by lower-case owner
	clients       map[int64]*gh.Client // by installation
}

// found is the outcome of asking for an owner's installation.
type found struct {
	id      int64 // 0: none
	expires time.Time
}

// How long the answer to "which installation" is believed. An installation that has
// gone shows at the next request anyhow; one that was made must not wait long.
const (
	believePresent = time.Hour
	believeAbsent  = time.Minute
)

// maxConcurrent is how many requests are under way at once, for all installations:
// GitHub's secondary limit is 100.
const maxConcurrent = 60

// A connection may fall silent without being closed; nobody waits for it for ever.
const (
	headerTimeout  = 20 * time.Second // from a request sent to the first of its answer; GitHub itself gives up after 10 s
	requestTimeout = time.Minute      // one request in all: its turn, the login before it, and the last byte of its answer
)

// impatient is http.DefaultTransport with a limit on how long an answer may take.
func impatient() http.RoundTripper {
	base, ok := http.DefaultTransport.(*http.Transport)
	if !ok {
		return http.DefaultTransport // somebody put another one there
	}
	t := base.Clone()
	t.ResponseHeaderTimeout = headerTimeout
	return t
}

// New checks the key and makes a client. It sends no request.
func New(c Config) (*Client, error) {
	c.BaseURL = strings.TrimSuffix(cmp.Or(c.BaseURL, "https://api.github.com"), "/") + "/"
	base, err := url.Parse(c.BaseURL)
	if err != nil || base.Host == "" {
		return nil, fmt.Errorf("GitHub's base URL %q: want https://api.github.com/ or https://HOST/api/v3/", c.BaseURL)
	}
	if c.AppID <= 0 {
		return nil, errors.New("GitHub App: no id; it is on the App's page at GitHub, a number")
	}
	if c.Transport == nil {
		c.Transport = impatient()
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	c.Transport = &gate{next: c.Transport, free: make(chan struct{}, maxConcurrent)}
	client := &Client{c: c, base: base, installations: map[string]found{}, clients: map[int64]*gh.Client{}}
	login, err := ghinstallation.NewAppsTransport(client.limits("app"), c.AppID, c.PrivateKey)
	if err != nil {
		return nil, fmt.Errorf("GitHub App %d: its private key is not an RSA key in PEM, as downloaded from the App's page: %w", c.AppID, err)
	}
	client.app = client.wrap(login)
	return client, nil
}

// limits makes the transport that keeps one installation's limits, or the App's.
func (c *Client) limits(who string) *limits {
	return newLimits(c.c.Transport, c.c.WritesPerMinute, c.c.Log.With("installation", who))
}

func (c *Client) wrap(t http.RoundTripper) *gh.Client {
	client := gh.NewClient(&http.Client{Transport: t, Timeout: requestTimeout})
	client.BaseURL = c.base
	client.UserAgent = "paddock"
	return client
}

// as runs one request as the installation of the scope's owner. If GitHub does not know
// the installation or its token any more, it is looked up once more: the App may have
// been installed anew.
func (c *Client) as(ctx context.Context, scope fleet.Scope, do func(*gh.Client) error) error {
	for fresh := false; ; fresh = true {
		client, err := c.installation(ctx, scope)
		if err != nil {
			return err
		}
		err = do(client)
		var login *ghinstallation.HTTPError
		gone := errors.As(err, &login) && login.Response != nil && login.Response.StatusCode < http.StatusInternalServerError
		if !gone && status(err) != http.StatusUnauthorized {
			return err
		}
		if gone {
			_ = login.Response.Body.Close() // ghinstallation leaves it open for its caller to read
		}
		c.forget(scope)
		if fresh && gone {
			return fmt.Errorf("%w: %s", ErrNoInstallation, scope.Owner())
		}
		if fresh {
			return err
		}
	}
}

// installation finds the client for the scope's owner. Deliveries carry an installation
// id too, which is at times wrong, so the owner decides.
func (c *Client) installation(ctx context.Context, scope fleet.Scope) (*gh.Client, error) {
	owner := strings.ToLower(scope.Owner())
	c.mu.Lock()
	known, ok := c.installations[owner]
	c.mu.Unlock()
	if !ok || time.Now().After(known.expires) {
		id, err := c.lookUp(ctx, scope)
		if err != nil {
			return nil, fmt.Errorf("find the App's installation for %s: %w", scope.Owner(), err)
		}
		known = found{id: id, expires: time.Now().Add(believePresent)}
		if id == 0 {
			known.expires = time.Now().Add(believeAbsent)
		}
		c.mu.Lock()
		c.installations[owner] = known
		c.mu.Unlock()
	}
	if known.id == 0 {
		return nil, fmt.Errorf("%w: %s (install it at https://github.com/apps, then wait a minute)", ErrNoInstallation, scope.Owner())
	}
	return c.client(known.id)
}

// lookUp asks GitHub for the installation; 0: there is none.
func (c *Client) lookUp(ctx context.Context, scope fleet.Scope) (int64, error) {
	var installation *gh.Installation
	var err error
	if owner, repository, is := strings.Cut(string(scope), "/"); is {
		installation, _, err = c.app.Apps.FindRepositoryInstallation(ctx, owner, repository)
	} else {
		installation, _, err = c.app.Apps.FindOrganizationInstallation(ctx, owner)
	}
	if status(err) == http.StatusNotFound {
		return 0, nil
	}
	if err != nil {
		return 0, clean(err)
	}
	return installation.GetID(), nil
}

// client makes the client of an installation, once.
func (c *Client) client(installation int64) (*gh.Client, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if client, ok := c.clients[installation]; ok {
		return client, nil
	}
	login, err := ghinstallation.New(c.limits(fmt.Sprint(installation)), c.c.AppID, installation, c.c.PrivateKey)
	if err != nil {
		return nil, fmt.Errorf("log in as installation %d: %w", installation, err)
	}
	// Without options ghinstallation sends the body "null", which GitHub's own description
	// does not allow.
	login.InstallationTokenOptions = &gh.InstallationTokenOptions{}
	login.BaseURL = strings.TrimSuffix(c.c.BaseURL, "/")
	client := c.wrap(login)
	c.clients[installation] = client
	return client, nil
}

// forget drops what is known of an owner's installation.
func (c *Client) forget(scope fleet.Scope) {
	owner := strings.ToLower(scope.Owner())
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.clients, c.installations[owner].id)
	delete(c.installations, owner)
}

// status is the HTTP status of an answer that go-github made an error of; 0: none.
func status(err error) int {
	var answer *gh.ErrorResponse
	if errors.As(err, &answer) && answer.Response != nil {
		return answer.Response.StatusCode
	}
	return 0
}

// clean makes an error for people: GitHub's own message and the status, without the
// request's headers and without query values.
func clean(err error) error {
	var limited *RateLimited
	if errors.As(err, &limited) {
		return limited
	}
	var answer *gh.ErrorResponse
	if errors.As(err, &answer) && answer.Response != nil {
		return &Refused{Status: answer.Response.StatusCode, Message: answer.Message}
	}
	return err
}

// Refused is any other answer that GitHub gave instead of the one that was hoped for.
type Refused struct {
	Status  int    // HTTP status
	Message string // GitHub's own words
}

func (e *Refused) Error() string {
	return fmt.Sprintf("GitHub answers %d %s: %s", e.Status, http.StatusText(e.Status), e.Message)
}
