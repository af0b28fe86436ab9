// Package githubtest is a simulated GitHub over real HTTP: the REST API of an App and
// its installations, signed webhooks with their delivery log, the queue that gives
// jobs to runners, and the Actions service that a runner talks to. It holds itself to
// GitHub's own description: every REST request and response is validated against the
// OpenAPI document in data/, every webhook against the published schema, and what does
// not conform is recorded (Violations) and refused.
//
// It is not a mock: nothing is scripted, calls have effects, and a job really runs, in
// the real github-act-runner or in the small runner of package testrunner. It keeps
// everything in memory, and does only what the product and its tests touch: no
// contents, no checkout, no reusable actions.
//
// Tests of packages that talk to GitHub call it, and cmd/paddock-demo, which shows a
// whole fleet without an account. The product binary does not carry it.
//
// The source is read in this order: this file (what there is), queue.go (the life of a
// run and its jobs), match.go (which runner gets which job), rest.go and restruns.go
// (the REST API), webhook.go and deliver.go (payloads and deliveries), actions.go (the
// service that runners talk to), faults.go (bad weather), inspect.go (for assertions).
package githubtest

import (
	"cmp"
	"context"
	"crypto/rsa"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// Config is what the simulated GitHub starts with. The zero value is a GitHub without
// any repository.
type Config struct {
	// AppID of the one App that is registered; 0: 4711.
	AppID int64
	// Secret signs webhooks; nil: not signed, as at GitHub.
	Secret []byte
	// Webhook is where deliveries are posted; empty: nowhere, so each one is in the
	// delivery log as failed. SetWebhook changes it.
	Webhook string
	// URL is under which runners reach this handler; empty: the host by which the
	// runner's registration was asked for, over http.
	URL string
	// Repositories exist from the start; AddRepository makes more.
	Repositories []Repository
	// Groups are runner groups besides 1, "Default", which every repository may use.
	Groups []Group
	// Applications are the runners offered for download; nil: names such as GitHub's, behind
	// which there is nothing.
	Applications []Application
	// Assignment is how long a job waits for the runner it was given to, before it is
	// queued again; 0: 60 s, as at GitHub.
	Assignment time.Duration
	// Lock is how long a running job lives without a word from its runner, before it
	// fails; 0: 10 min, as at GitHub.
	Lock time.Duration
	// Idle is how long a registered runner may wait for a job before it is removed; 0: for ever.
	Idle time.Duration
	// Poll is how long a runner's request for a message is held open; 0: 20 s.
	Poll time.Duration
	// Senders is how many webhooks are under way at once; 0: 8; with 1 they arrive in order.
	Senders int
	// Limit is the number of REST requests an installation has per hour, for each
	// resource (core, actions_runner_registration); 0: 5,000.
	Limit int
	// Faults is the weather at the start; the zero value is fair. SetFaults changes it.
	Faults Faults
	// Now is the clock; nil: time.Now.
	Now func() time.Time
	// Transport posts webhooks; nil: http.DefaultTransport.
	Transport http.RoundTripper
	// Log is told about deliveries that fail and about violations; nil: discarded.
	Log *slog.Logger
}

// Repository is a repository at the simulated GitHub.
type Repository struct {
	Name   string // "owner/name"
	Public bool
	// User: the owner is a person, not an organization.
	User bool
	// Uninstalled: the App is not installed for the owner.
	Uninstalled bool
}

// Group is a runner group of an organization.
type Group struct {
	Org  string
	ID   int64
	Name string
	// Repositories ("owner/name") may use its runners; nil: all of the organization.
	Repositories []string
}

// Starting points of ids: of the order of GitHub's own, so that 32 bits do not hold them.
const (
	firstJobID      = 30_000_000_000
	firstRunID      = 9_000_000_000
	firstDeliveryID = 12_000_000_000
)

// GitHub is the simulated service. It is an http.Handler; Run sends its webhooks.
type GitHub struct {
	c      Config
	schema *schema
	appKey *rsa.PrivateKey
	rest   *http.ServeMux
	serve  *http.ServeMux // the Actions service

	mu sync.Mutex // guards all that follows

	accounts     map[string]*account    // by lower-case login
	repositories map[string]*repository // by lower-case full name
	runs         map[int64]*run
	jobs         map[fleet.JobID]*job
	order        []*job // all jobs, oldest first
	queue        []*job // queued and not assigned, oldest first
	runners      map[runnerKey]*runner
	byClient     map[string]*runner // by OAuth client id
	tokens       map[string]token   // installation tokens
	bearers      map[string]bearer  // tokens of the Actions service
	used         map[bucket]*usage  // REST requests
	deliveries   []*delivery        // oldest first
	outgoing     []*outgoing
	underWay     int // webhooks that are being sent
	violations   []string
	weather      Faults
	webhook      string
	nextID       int64
	nextRunner   map[string]int64 // by scope: runner ids are unique within a scope only
	requests     map[string]int   // by "METHOD path pattern"

	changed chan struct{} // closed at each change, and made anew
	wake    chan struct{} // holds one: Run has something to look at
}

// New makes a simulated GitHub. It fails if a repository's name has no owner or if the
// embedded descriptions cannot be read.
func New(c Config) (*GitHub, error) {
	c.AppID = cmp.Or(c.AppID, 4711)
	c.Assignment = cmp.Or(c.Assignment, time.Minute)
	c.Lock = cmp.Or(c.Lock, 10*time.Minute)
	c.Poll = cmp.Or(c.Poll, 20*time.Second)
	c.Senders = cmp.Or(c.Senders, 8)
	c.Limit = cmp.Or(c.Limit, 5000)
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Transport == nil {
		c.Transport = http.DefaultTransport
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	schema, err := loadSchema()
	if err != nil {
		return nil, fmt.Errorf("read GitHub's descriptions of itself: %w", err)
	}
	key, err := appKey()
	if err != nil {
		return nil, fmt.Errorf("make the App's key: %w", err)
	}
	g := &GitHub{
		c: c, schema: schema, appKey: key, weather: c.Faults, webhook: c.Webhook,
		accounts: map[string]*account{}, repositories: map[string]*repository{},
		runs: map[int64]*run{}, jobs: map[fleet.JobID]*job{},
		runners: map[runnerKey]*runner{}, byClient: map[string]*runner{},
		tokens: map[string]token{}, bearers: map[string]bearer{}, used: map[bucket]*usage{},
		nextRunner: map[string]int64{}, requests: map[string]int{},
		changed: make(chan struct{}), wake: make(chan struct{}, 1),
	}
	for _, r := range c.Repositories {
		if err := g.AddRepository(r); err != nil {
			return nil, err
		}
	}
	g.routeREST()
	g.routeActions()
	return g, nil
}

// account is a person or an organization, with the App's installation for it.
type account struct {
	login        string
	kind         string // Organization or User
	id           int64
	installation int64 // 0: the App is not installed
	since        time.Time
}

// repository belongs to an account.
type repository struct {
	Repository
	id    int64
	owner *account
	short string // the name without the owner
	// raw is object() and organization the owner's, as JSON, written once: they are most
	// of every webhook.
	raw, organization json.RawMessage
}

// AddRepository makes a repository, and its owner if that is new.
func (g *GitHub) AddRepository(r Repository) error {
	login, short, ok := strings.Cut(r.Name, "/")
	if !ok || login == "" || short == "" {
		return fmt.Errorf("repository %q: want owner/name", r.Name)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	owner := g.accounts[strings.ToLower(login)]
	if owner == nil {
		owner = &account{login: login, kind: "Organization", id: g.id(), since: g.c.Now()}
		if r.User {
			owner.kind = "User"
		}
		if !r.Uninstalled {
			owner.installation = g.id()
		}
		g.accounts[strings.ToLower(login)] = owner
	}
	made := &repository{Repository: r, id: g.id(), owner: owner, short: short}
	var err error
	if made.raw, err = json.Marshal(made.object()); err != nil {
		return fmt.Errorf("repository %q: %w", r.Name, err)
	}
	if owner.kind == "Organization" {
		if made.organization, err = json.Marshal(owner.organization()); err != nil {
			return fmt.Errorf("repository %q: %w", r.Name, err)
		}
	}
	g.repositories[strings.ToLower(r.Name)] = made
	return nil
}

// Reinstall removes the App from an account and installs it again, under a new
// installation id; the old one's tokens stop working.
func (g *GitHub) Reinstall(login string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if a := g.accounts[strings.ToLower(login)]; a != nil {
		a.installation = g.id()
	}
}

// AppID is the App's id.
func (g *GitHub) AppID() int64 { return g.c.AppID }

// SetWebhook changes where deliveries are posted.
func (g *GitHub) SetWebhook(url string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.webhook = url
}

// id draws the next number for things whose ids nobody reads.
func (g *GitHub) id() int64 { g.nextID++; return 1000 + g.nextID }

// touch tells everyone who waits that something changed.
func (g *GitHub) touch() {
	close(g.changed)
	g.changed = make(chan struct{})
	select {
	case g.wake <- struct{}{}:
	default:
	}
}

// ServeHTTP answers the REST API, and below /_services/ the Actions service.
func (g *GitHub) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if strings.HasPrefix(r.URL.Path, servicesPath) {
		g.serve.ServeHTTP(w, r)
		return
	}
	g.serveREST(w, r)
}

// tick bounds how late a driven clock is noticed.
const tick = 20 * time.Millisecond

// Run sends webhooks and lets time pass (assignments, locks, idle runners) until ctx
// ends; its error is ctx's. Without it nothing is delivered.
func (g *GitHub) Run(ctx context.Context) error {
	var senders sync.WaitGroup
	defer senders.Wait()
	free := make(chan struct{}, g.c.Senders)
	for {
		wait := g.step(ctx, free, &senders)
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("simulated GitHub: %w", ctx.Err())
		case <-g.wake:
			timer.Stop()
		case <-timer.C:
		}
	}
}

// step does what is due, and says how long nothing more will be.
func (g *GitHub) step(ctx context.Context, free chan struct{}, senders *sync.WaitGroup) time.Duration {
	g.mu.Lock()
	g.expire()
	due := g.due()
	g.mu.Unlock()
	for _, o := range due {
		select {
		case <-ctx.Done():
			return 0
		case free <- struct{}{}:
		}
		senders.Go(func() {
			defer func() { <-free }()
			g.send(ctx, o)
		})
	}
	return tick
}
