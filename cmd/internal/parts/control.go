// Package parts builds the two halves of a running Paddock from a configuration: the
// Control half (store, controller, webhook, feed, server) and the Node half (agent,
// image store, driver). It is the wiring that cmd/paddock and cmd/paddock-demo share.
//
// It decides nothing about jobs, and it is not a framework: each half is built once,
// top to bottom, and its parts run in one errgroup.
package parts

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sync/errgroup"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/cache/registry"
	"github.com/paddock-ci/paddock/cmd/internal/config"
	"github.com/paddock-ci/paddock/controller"
	"github.com/paddock-ci/paddock/demand"
	"github.com/paddock-ci/paddock/feed"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github"
	"github.com/paddock-ci/paddock/server"
	"github.com/paddock-ci/paddock/store"
	"github.com/paddock-ci/paddock/webhook"
)

// WebhookPath is where GitHub posts its deliveries.
const WebhookPath = "/webhook"

// saveHistoryEvery is how often learned durations are copied beside the ledger.
const saveHistoryEvery = time.Hour

// ControlConfig of a Control. Config is required and has its defaults filled.
type ControlConfig struct {
	Config  *config.Config
	Version string       // for people
	Log     *slog.Logger // nil: discarded
	// Transport carries the calls of GitHub; nil: the default one.
	Transport http.RoundTripper
	// GhostsEvery and WritesPerMinute are controller.Config's and github.Config's; 0: the
	// defaults, which are right for GitHub.
	GhostsEvery     time.Duration
	WritesPerMinute int
}

// Control is everything of Paddock that is not on a node.
type Control struct {
	c        ControlConfig
	key      access.Key
	hash     string // of the certificate
	url      string // as nodes elsewhere reach it
	local    string // URL as this host reaches it
	listener net.Listener

	store      *store.Store
	controller *controller.Controller
	runners    *github.Applications
	feed       *feed.Feed
	http       *http.Server
}

// NewControl checks that the configuration has what a controller needs.
func NewControl(c ControlConfig) (*Control, error) {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	g := c.Config.GitHub
	switch {
	case g.AppID == 0:
		return nil, errors.New("the controller needs github.app_id (hint: docs/github-app.md tells how to make the App)")
	case g.PrivateKeyFile == "":
		return nil, errors.New("the controller needs github.private_key_file (hint: the App's settings page makes one)")
	case len(g.WebhookSecretFiles) == 0:
		return nil, errors.New("the controller needs github.webhook_secret_files (hint: a file with the secret of the App's settings page)")
	}
	return &Control{c: c}, nil
}

// Open opens the store and the port and builds the parts; nothing runs yet. When it
// fails, nothing is left open.
func (c *Control) Open(ctx context.Context) (err error) {
	cfg := c.c.Config
	if err := os.MkdirAll(cfg.Data, 0o700); err != nil {
		return fmt.Errorf("make the data directory: %w", err)
	}
	if err := cfg.ReadLogins(); err != nil {
		return err
	}
	if c.key, err = fleetKey(cfg.Data); err != nil {
		return err
	}
	pair, hash, err := certificate(cfg)
	if err != nil {
		return err
	}
	c.hash = hash
	if c.listener, err = new(net.ListenConfig).Listen(ctx, "tcp", cfg.Listen); err != nil {
		return fmt.Errorf("listen on %s: %w (hint: another paddock may be running; listen: names another port)", cfg.Listen, err)
	}
	defer func() {
		if err != nil {
			_ = c.listener.Close()
		}
	}()
	c.url = cfg.URL
	if _, port, _ := net.SplitHostPort(cfg.Listen); port == "0" || c.url == "" {
		c.url = "https://" + c.listener.Addr().String()
	}
	c.local = localURL(c.listener.Addr())
	if c.store, err = c.openStore(ctx); err != nil {
		return err
	}
	handler, drain, err := c.build()
	if err != nil {
		return errors.Join(err, c.store.Close())
	}
	c.http = &http.Server{
		Handler: handler, TLSConfig: &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12},
		ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute,
		ReadTimeout: 30 * time.Second, // of bodies that no handler reads; those that do are stricter
		ErrorLog:    slog.NewLogLogger(c.c.Log.Handler(), slog.LevelDebug),
	}
	c.http.RegisterOnShutdown(drain)
	if err := c.leaveTokenForCLI(ctx, time.Now()); err != nil {
		return errors.Join(err, c.store.Close())
	}
	return nil
}

func (c *Control) openStore(ctx context.Context) (*store.Store, error) {
	ledger := filepath.Join(c.c.Config.Data, "ledger.json")
	if c.c.Config.Redis != "" {
		return store.Open(ctx, store.Config{URL: c.c.Config.Redis, Ledger: ledger, Log: c.c.Log})
	}
	return store.OpenEmbedded(ctx, store.EmbeddedConfig{Dir: filepath.Join(c.c.Config.Data, "store"), Ledger: ledger, Log: c.c.Log})
}

// build makes the parts around the open store and returns the one HTTP handler, and
// what has it answer the calls that nodes have parked.
func (c *Control) build() (handler http.Handler, drain func(), err error) {
	cfg := c.c.Config
	metrics := prometheus.NewRegistry()
	metrics.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))

	gh, err := c.github()
	if err != nil {
		return nil, nil, err
	}
	durations, images, err := c.loadHistory()
	if err != nil {
		return nil, nil, err
	}
	resolver, err := registry.New(registry.Config{Log: c.c.Log})
	if err != nil {
		return nil, nil, err
	}
	if c.controller, err = controller.New(controller.Config{
		Store: c.store, GitHub: gh, Seal: c.key.Seal, Fleet: cfg.Fleet, Pools: cfg.FleetPools(),
		Resolve:      allowed(&cfg.Images, resolver.Resolve),
		ResolveEvery: cfg.Images.ResolveEvery.Duration(), Durations: durations, Demand: images,
		GhostsEvery: c.c.GhostsEvery, Metrics: metrics, Log: c.c.Log,
	}); err != nil {
		return nil, nil, err
	}
	if c.feed, err = feed.New(feed.Config{
		GitHub: gh, Store: c.store, Active: c.controller.Leading, Every: cfg.GitHub.SweepEvery.Duration(), Metrics: metrics, Log: c.c.Log,
	}); err != nil {
		return nil, nil, err
	}
	c.runners = github.NewApplications(gh, scopesOfOwnRunner(cfg.FleetPools()), c.c.Log)
	secrets := make([][]byte, 0, len(cfg.GitHub.WebhookSecretFiles))
	for _, path := range cfg.GitHub.WebhookSecretFiles {
		secret, err := config.ReadSecret(path)
		if err != nil {
			return nil, nil, err
		}
		secrets = append(secrets, secret)
	}
	hooks, err := webhook.New(webhook.Config{Secrets: secrets, Merge: c.store.MergeJob, Metrics: metrics, Log: c.c.Log})
	if err != nil {
		return nil, nil, err
	}
	nodes, err := server.New(server.Config{
		Store: c.store, Key: c.key, Pools: cfg.FleetPools, Fleet: cfg.Fleet, Explain: c.controller.Explain, Evictions: c.controller.Evictions,
		Archives:  c.runners.Latest,
		PullToken: resolver.PullToken, Allowed: cfg.Images.Allowed, Egress: int64(cfg.Images.Egress),
		SelfURL: c.url, Certificate: c.pinned(), Metrics: metrics, Log: c.c.Log,
	})
	if err != nil {
		return nil, nil, err
	}
	mux := http.NewServeMux()
	mux.Handle(WebhookPath, hooks)
	mux.Handle("/", nodes.Handler())
	return mux, nodes.Drain, nil
}

// scopesOfOwnRunner are those of pools that run GitHub's own runner, which is brought into
// their guests.
func scopesOfOwnRunner(pools []fleet.Pool) []fleet.Scope {
	var scopes []fleet.Scope
	for _, p := range pools {
		if len(p.Runner) == 0 {
			scopes = append(scopes, p.Scopes...)
		}
	}
	return scopes
}

func (c *Control) github() (*github.Client, error) {
	g := c.c.Config.GitHub
	key, err := os.ReadFile(g.PrivateKeyFile)
	if err != nil {
		return nil, fmt.Errorf("read the App's private key: %w", err)
	}
	return github.New(github.Config{AppID: g.AppID, PrivateKey: key, BaseURL: g.API, Transport: c.c.Transport, WritesPerMinute: c.c.WritesPerMinute, Log: c.c.Log})
}

// allowed refuses registries outside the list before any request is made.
func allowed(images *config.Images, resolve func(context.Context, string) (fleet.Image, error)) func(context.Context, string) (fleet.Image, error) {
	return func(ctx context.Context, ref string) (fleet.Image, error) {
		if err := images.Allowed(ref); err != nil {
			return fleet.Image{}, err
		}
		return resolve(ctx, ref)
	}
}

// Run runs all parts until ctx ends or one of them fails.
func (c *Control) Run(ctx context.Context) error {
	defer func() { _ = c.listener.Close() }()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return c.store.Run(ctx) })
	group.Go(func() error { return c.controller.Run(ctx) })
	group.Go(func() error { return c.controller.Errands(ctx) })
	group.Go(func() error { return c.controller.Resolver(ctx) })
	group.Go(func() error { return c.feed.Run(ctx) })
	group.Go(func() error { return c.runners.Run(ctx) })
	group.Go(func() error { return c.keepHistory(ctx) })
	group.Go(func() error { return c.keepTokenForCLI(ctx) })
	group.Go(func() error {
		if err := c.http.ServeTLS(c.listener, "", ""); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serve: %w", err)
		}
		return nil
	})
	group.Go(func() error {
		<-ctx.Done()
		// Parked syncs are answered at once; a moment is for webhooks under way.
		closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		if err := c.http.Shutdown(closing); err != nil {
			return c.http.Close()
		}
		return nil
	})
	c.c.Log.Info("listening", "url", c.url, "certificate", c.hash)
	err := group.Wait()
	if errors.Is(err, context.Canceled) {
		err = nil
	}
	return errors.Join(err, c.store.Close())
}

// Store is what the demo follows its jobs in.
func (c *Control) Store() *store.Store { return c.store }

// pinned is the hash that join tokens carry: of the self-made certificate, which is good
// for ten years. A configured one is renewed by its authority, which nodes trust instead.
func (c *Control) pinned() string {
	if c.c.Config.TLS.Cert != "" {
		return ""
	}
	return c.hash
}

// localURL is a listener's address as this host dials it.
func localURL(at net.Addr) string {
	tcp, ok := at.(*net.TCPAddr)
	if !ok || !tcp.IP.IsUnspecified() {
		return "https://" + at.String()
	}
	return fmt.Sprintf("https://127.0.0.1:%d", tcp.Port)
}

// URL is how nodes reach this controller.
func (c *Control) URL() string { return c.url }

// Client returns a client with a short-lived token of the role, for this process's own use.
func (c *Control) Client(role access.Role) (*api.Client, error) {
	token, err := c.token(role, time.Hour)
	if err != nil {
		return nil, err
	}
	return Endpoint{URL: c.local, Certificate: c.hash, Token: string(token)}.Client()
}

func (c *Control) token(role access.Role, life time.Duration) (access.Token, error) {
	now := time.Now()
	return c.key.Sign(access.Identity{ID: access.NewID(), Role: role, Subject: "local", IssuedAt: now, ExpiresAt: now.Add(life)})
}

// JoinToken asks the running server for a node's one-time join token.
func (c *Control) JoinToken(ctx context.Context, node fleet.NodeID) (string, error) {
	client, err := c.Client(access.Admin)
	if err != nil {
		return "", err
	}
	reply, err := client.CreateToken(ctx, api.TokenRequest{Node: node})
	return reply.Token, err
}

// JoinOwn makes n a node of this controller, which runs in the same process, or tells the
// node that it is one where the controller is now: its port or certificate may be others
// than at the last start. The node dials this host itself, whatever the URL for others is.
func (c *Control) JoinOwn(ctx context.Context, n config.Node) error {
	here := Endpoint{URL: c.local, Certificate: c.hash}
	path := filepath.Join(n.Dir, credentialFile)
	verifier, err := c.key.Verifier()
	if err != nil {
		return err
	}
	known, err := ReadEndpoint(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read the node's credential: %w", err)
	}
	// One of another fleet, of another name, or one that has run out is replaced.
	if who, err := verifier.Verify(known.Token, time.Now(), nil); err == nil && who.Subject == n.Name {
		here.Token = known.Token
		return writeFile(path, here)
	}
	token, err := c.JoinToken(ctx, fleet.NodeID(n.Name))
	if err != nil {
		return err
	}
	return join(ctx, n, token, here)
}

// Endpoint is a controller and the right to speak to it.
type Endpoint struct {
	URL         string `json:"url"`
	Certificate string `json:"certificate"` // hex SHA-256 of the pinned one
	Token       string `json:"token"`       // secret
}

// Client returns a client of the endpoint.
func (e Endpoint) Client() (*api.Client, error) {
	return api.New(api.Config{URL: e.URL, Token: e.Token, CertificateHash: e.Certificate})
}

// ReadEndpoint reads one that Control or Join wrote.
func ReadEndpoint(path string) (Endpoint, error) {
	var e Endpoint
	text, err := os.ReadFile(path)
	if err != nil {
		return e, err
	}
	if err := json.Unmarshal(text, &e); err != nil {
		return e, fmt.Errorf("%s is damaged: %w", path, err)
	}
	return e, nil
}

// writeFile replaces a file of the owner's alone, whole or not at all.
func writeFile(path string, content any) error {
	text, err := json.MarshalIndent(content, "", "  ")
	if err != nil {
		return err
	}
	temporary := path + ".new"
	if err := os.Remove(temporary); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := writeSecret(temporary, text); err != nil {
		return err
	}
	return os.Rename(temporary, path)
}

func (c *Control) historyPath() string { return filepath.Join(c.c.Config.Data, "history.json") }

func (c *Control) loadHistory() (*demand.Durations, *demand.Images, error) {
	durations, images := demand.New(demand.Config{}), demand.NewImages()
	f, err := os.Open(c.historyPath())
	if errors.Is(err, fs.ErrNotExist) {
		return durations, images, nil
	}
	if err != nil {
		return nil, nil, fmt.Errorf("read the history of durations: %w", err)
	}
	defer func() { _ = f.Close() }()
	if err := durations.Load(f, images); err != nil {
		// History is worth less than a start: begin a new one.
		c.c.Log.Warn("the history of durations is damaged and begun anew", "error", err)
		return demand.New(demand.Config{}), demand.NewImages(), nil
	}
	return durations, images, nil
}

// keepHistory copies what was learned to disk every hour and at the end.
func (c *Control) keepHistory(ctx context.Context) error {
	tick := time.NewTicker(saveHistoryEvery)
	defer tick.Stop()
	for {
		ended := false
		select {
		case <-ctx.Done():
			ended = true
		case <-tick.C:
		}
		if err := c.saveHistory(); err != nil {
			c.c.Log.Warn("the history of durations was not kept", "error", err)
		}
		if ended {
			return nil
		}
	}
}

func (c *Control) saveHistory() error {
	temporary := c.historyPath() + ".new"
	f, err := os.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(c.controller.SaveHistory(f), f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(temporary, c.historyPath())
}
