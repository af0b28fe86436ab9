// Package server is the controller's HTTP interface: for nodes, for the command line,
// for probes and for Prometheus.
//
//  1. A table says each route's method, path and the action that its caller must be
//     allowed; one wrapper does identity, body, errors and metrics for all of them.
//  2. sync takes a node's report: every VM in it is walked forward through the table of
//     package runner, and all of it is one transaction of the store.
//  3. The reply is computed from the store's view alone: orders for images, VMs to
//     run, runners to start, VMs to destroy. While it is what the node already has, the
//     call is parked until the store says that something changed.
//  4. join makes a node of whoever has a one-time token; tokens let people in.
//  5. A session is a person's call and a node's answer to it, spliced: the way into a VM
//     that needs no port.
//  6. Nodes that pull an image say what they have of it, and are told what they may fetch
//     from outside their site and who nearby has the rest; registries' tokens are bought
//     for them.
//  7. The lists are views, turned into rows.
//
// It decides nothing about the fleet: the controller does, and meets it in the store.
// Webhooks are package webhook's, on the same port; cmd puts the two together.
package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gin-gonic/gin"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/placement"
	"github.com/paddock-ci/paddock/store"
)

// Config of a Server. Store, Key and Fleet are required.
type Config struct {
	Store *store.Store
	Key   access.Key // of the fleet
	Fleet string     // part of every runner's name

	// Pools in file order, as configured now; nil: none.
	Pools func() []fleet.Pool
	// Explain says why a job waits; the controller's. Nil: the route answers 501.
	Explain func(ctx context.Context, id fleet.JobID) (placement.Explanation, error)
	// Evictions says what would leave a node; the controller's. Nil: the route answers 501.
	Evictions func(ctx context.Context, node fleet.NodeID, free int64) ([]placement.NodeEvictions, error)

	// Archives are GitHub's runner applications, for pools that name no command of their
	// own; nil: none, and their guests need a runner in the image.
	Archives func() []fleet.Archive

	// PullToken buys a token that is good for pulls from one repository (host/name) and for
	// nothing else, and says when it ends; empty: none is needed or sold. Nil: nodes have
	// their own credentials.
	PullToken func(ctx context.Context, repository string) (token string, ends time.Time, err error)
	// Allowed refuses registries outside the list, before any request; nil: all are allowed.
	Allowed func(ref string) error
	// Egress is what all nodes together may move from outside their sites, in bytes per
	// second; 0: no limit.
	Egress int64

	// SelfURL is where nodes reach this controller, and Certificate the hex SHA-256 of
	// its self-made certificate; both go into join tokens. "": the node has to be told.
	SelfURL     string
	Certificate string

	Metrics *prometheus.Registry // nil: one of its own
	Log     *slog.Logger         // nil: discarded
	Now     func() time.Time     // nil: time.Now
}

// Server answers the controller's HTTP interface. It starts nothing by itself.
type Server struct {
	c        Config
	log      *slog.Logger
	verifier access.Verifier
	metrics  metrics
	ledger   *ledgerCache
	waiters  waiters

	siteCache  siteCache
	ordered    ordered
	lastWords  lastWords
	peerKey    string // checks the tokens that peerTokens signs
	peerTokens *peerTokens
	pullTokens *pullTokens

	weighing chan struct{} // full while a pass over the evictions runs

	times    sessionTimes
	engine   *gin.Engine
	bodyTime time.Duration // see bodyTime; tests have less of it
	looks    atomic.Int64  // how often open sessions were looked at, for tests that wait for it

	drain    chan struct{} // closed when parked calls shall be answered
	draining sync.Once
}

// New checks the configuration.
func New(c Config) (*Server, error) {
	if c.Store == nil {
		return nil, errors.New("server: Store is required")
	}
	if err := fleet.CheckName("fleet", c.Fleet); err != nil {
		return nil, err
	}
	verifier, err := c.Key.Verifier()
	if err != nil {
		return nil, fmt.Errorf("server: the fleet key: %w", err)
	}
	peerKey, err := c.Key.PeerKey()
	if err != nil {
		return nil, fmt.Errorf("server: the fleet key: %w", err)
	}
	signer, err := c.Key.PeerSigner()
	if err != nil {
		return nil, fmt.Errorf("server: the fleet key: %w", err)
	}
	if c.Pools == nil {
		c.Pools = func() []fleet.Pool { return nil }
	}
	if c.Archives == nil {
		c.Archives = func() []fleet.Archive { return nil }
	}
	if c.Metrics == nil {
		c.Metrics = prometheus.NewRegistry()
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	s := &Server{c: c, log: c.Log, verifier: verifier, metrics: newMetrics(c.Metrics), drain: make(chan struct{}), weighing: make(chan struct{}, 1),
		ledger: newLedgerCache(c.Store.ReadLedger), bodyTime: bodyTime, waiters: waiters{by: map[string]*waiter{}}, times: usualTimes,
		peerKey: peerKey, peerTokens: newPeerTokens(signer), pullTokens: newPullTokens()}
	s.engine = s.routes()
	return s, nil
}

// Handler answers everything below /v1, the probes and /metrics; anything else is a 404
// with a hint.
func (s *Server) Handler() http.Handler { return s.engine }

// Drain answers all parked calls and parks no more, so that an http.Server can shut
// down without waiting for them: give it to RegisterOnShutdown. It ends the sessions,
// which an http.Server does not know of, after a second.
func (s *Server) Drain() { s.draining.Do(func() { close(s.drain) }) }

// route is one line of the table.
type route struct {
	method string
	path   string        // with {id}, from package api
	needs  access.Action // "": anyone
	do     func(*Server, route) gin.HandlerFunc
}

// maxBody, maxSync and maxWordBody bound request bodies in bytes. A sync with 1,000 VMs has
// 1 MB, a node's word on an image of the most pieces 70 KB.
const (
	maxBody     = 64 << 10
	maxSync     = 8 << 20
	maxWordBody = 256 << 10
)

// bodyLimit is a route's.
func bodyLimit(path string) int64 {
	switch path {
	case api.RouteSync:
		return maxSync
	case api.RouteChunks:
		return maxWordBody
	}
	return maxBody
}

// bodyTime is how long a body may take: a sync of 1 MB over 1 Mbit/s. It counts before
// anybody has said who they are.
const bodyTime = 10 * time.Second

var table = []route{
	{http.MethodPost, api.RouteSync, access.Sync, endpoint((*Server).sync)},
	{http.MethodPost, api.RouteChunks, access.Sync, endpoint((*Server).chunks)},
	{http.MethodPost, api.RoutePullToken, access.Sync, endpoint((*Server).pullToken)},
	{http.MethodPost, api.RouteJoin, "", endpoint((*Server).join)},

	{http.MethodGet, api.RouteNodes, access.Read, endpoint((*Server).listNodes)},
	{http.MethodDelete, api.RouteNode, access.Operate, endpoint((*Server).removeNode)},
	{http.MethodPost, api.RouteCordon, access.Operate, endpoint((*Server).cordon)},
	{http.MethodPost, api.RouteUncordon, access.Operate, endpoint((*Server).uncordon)},
	{http.MethodGet, api.RouteVMs, access.Read, endpoint((*Server).listVMs)},
	{http.MethodPost, api.RouteVMSession, access.Operate, upgrade((*Server).vmSession)},
	{http.MethodPost, api.RouteNodeSession, access.Sync, upgrade((*Server).nodeSession)},
	{http.MethodGet, api.RouteImages, access.ReadImages, endpoint((*Server).listImages)},
	{http.MethodGet, api.RouteEvictions, access.Read, endpoint((*Server).listEvictions)},
	{http.MethodGet, api.RouteJobs, access.Read, endpoint((*Server).listJobs)},
	{http.MethodGet, api.RouteExplain, access.Read, endpoint((*Server).explain)},
	{http.MethodGet, api.RouteEvents, access.Read, endpoint((*Server).listEvents)},

	{http.MethodGet, api.RouteTokens, access.Tokens, endpoint((*Server).listTokens)},
	{http.MethodPost, api.RouteTokens, access.Tokens, endpoint((*Server).createToken)},
	{http.MethodDelete, api.RouteToken, access.Tokens, endpoint((*Server).revokeToken)},

	{http.MethodGet, api.RouteHealth, "", endpoint((*Server).healthy)},
	{http.MethodGet, api.RouteReady, "", endpoint((*Server).ready)},
}

func (s *Server) routes() *gin.Engine {
	gin.SetMode(gin.ReleaseMode) // gin's debug mode prints to stdout
	engine := gin.New()
	engine.HandleMethodNotAllowed = true
	engine.UseRawPath = true // an id with an escaped slash stays one segment
	engine.Use(s.recover)
	for _, r := range table {
		engine.Handle(r.method, ginPath(r.path), r.do(s, r))
	}
	engine.GET(api.RouteMetrics, gin.WrapH(promhttp.HandlerFor(s.c.Metrics, promhttp.HandlerOpts{})))
	engine.NoRoute(func(c *gin.Context) {
		s.refuse(c, "none", refusal(http.StatusNotFound, "no such path", "the interface is below /v1; docs/api.md lists its paths"))
	})
	engine.NoMethod(func(c *gin.Context) {
		s.refuse(c, "none", refusal(http.StatusMethodNotAllowed, "this path does not take a "+c.Request.Method, "docs/api.md lists what there is"))
	})
	return engine
}

// ginPath writes {id} and {sid} as gin does.
func ginPath(path string) string {
	return strings.NewReplacer("{id}", ":id", "{sid}", ":sid").Replace(path)
}

type probe struct {
	Status string `json:"status"`
}

func (s *Server) healthy(context.Context, call, struct{}) (probe, error) { return probe{"ok"}, nil }

func (s *Server) ready(ctx context.Context, _ call, _ struct{}) (probe, error) {
	if err := s.c.Store.Ready(ctx); err != nil {
		return probe{}, err
	}
	return probe{"ok"}, nil
}
