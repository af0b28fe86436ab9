// Package store is where the parts of Paddock meet: jobs, VMs, nodes, orders, events,
// the leader's lease and the ledger, in a Redis or Valkey, or in one that runs inside
// this process.
//
// Every mutation is one Lua script (the folder lua): scripts compare and set, Go
// decides. The store is not the truth about anything but the ledger: emptied, it is
// filled again by GitHub (jobs), by the nodes (VMs, images) and by the ledger file
// (what only people said). No correctness rests on keys that expire.
//
// It does not know what a VM may do next (runner), where a job should run (placement)
// or when somebody is late (controller). webhook and feed merge jobs into it, the
// controller commits what it decided, server commits what nodes report; all of them
// read a View. This is the only package that knows Redis.
package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"
)

// Errors that decisions depend on; test with errors.Is.
var (
	// ErrFenced: the writer's term or incarnation is over; decide again on a new View.
	ErrFenced = errors.New("fenced off")
	// ErrStale: a later report of the node was already taken; drop this one.
	ErrStale = errors.New("stale report")
	// ErrConflict: a record changed since it was read; read again and decide again.
	ErrConflict = errors.New("conflict")
	// ErrFull: a bound was reached; the error says which. Try again once there is less.
	ErrFull = errors.New("too many")
	// ErrDown: the store cannot be reached or cannot write now; try again later.
	ErrDown = errors.New("store unavailable")
)

// Times by which a dead Redis is noticed: the sum of any path stays under the 5 s in
// which the webhook has to answer.
const (
	dialTimeout = 2 * time.Second
	ioTimeout   = 3 * time.Second
	callTimeout = 4 * time.Second
)

// poolSize is the number of connections; scripts run one at a time in Redis anyway,
// the rest hides the round trip.
const poolSize = 32

// Config says which Redis.
type Config struct {
	// URL is redis://, rediss:// or unix://, with user, password and database as
	// go-redis reads them; required; never logged.
	URL string
	// Prefix begins every key and the channel; "": "paddock".
	Prefix string
	// Ledger is the path of the ledger's file; "": the ledger is in memory (and Redis) only.
	Ledger string
	// Log gets what no caller can be told; nil: discarded.
	Log *slog.Logger
}

// Store is a connection to the store with a mirror of its records. It is safe for
// concurrent use.
type Store struct {
	rdb     *redis.Client
	log     *slog.Logger
	keys    []string // of every script, in order
	channel string
	hub     *hub
	mirror  mirror
	ledger  ledgerFile

	// cursorHome is the incarnation each cursor was last read in.
	cursorMu   sync.Mutex
	cursorHome map[string]string

	// Only of the embedded store.
	embedded   *miniredis.Miniredis
	deliveries *deliveryLog // nil: memory only
	dir        string
	finish     func() error // the last snapshot; nil: none
	unlock     func() error // gives dir free
}

// Open connects to a Redis and checks that it answers. A Redis that is away gives an
// ErrDown; one that goes away later is waited for by each call for at most 4 s.
func Open(ctx context.Context, c Config) (*Store, error) {
	options, err := redis.ParseURL(c.URL)
	if err != nil {
		// The error of net/url quotes the URL, password and all.
		return nil, errors.New("store: the Redis URL cannot be read; want redis://user:password@host:port/db, rediss://… or unix://…")
	}
	s, err := connect(options, c)
	if err != nil {
		return nil, err
	}
	if err := s.Ready(ctx); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// connect builds the client and the store around it without a round trip.
func connect(options *redis.Options, c Config) (*Store, error) {
	quiet()
	options.DialTimeout, options.ReadTimeout, options.WriteTimeout = dialTimeout, ioTimeout, ioTimeout
	options.PoolTimeout = ioTimeout
	options.PoolSize = poolSize
	options.ContextTimeoutEnabled = true
	options.Protocol = 2
	options.DisableIdentity = true
	options.MaintNotificationsConfig = &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}
	// A lost answer must not become a second Commit: who may repeat decides.
	options.MaxRetries = -1
	options.DialerRetries = 1
	log := c.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	prefix := c.Prefix
	if prefix == "" {
		prefix = "paddock"
	}
	s := &Store{
		rdb:        redis.NewClient(options),
		log:        log,
		keys:       keys(prefix),
		channel:    prefix + ":news",
		hub:        newHub(),
		cursorHome: map[string]string{},
	}
	s.mirror.turn = make(chan struct{}, 1)
	if err := s.ledger.load(c.Ledger); err != nil {
		return nil, errors.Join(err, s.rdb.Close())
	}
	return s, nil
}

// quiet stops go-redis from printing to stderr: all that it prints is also returned
// as an error, which the caller can put in order.
var quiet = sync.OnceFunc(func() { redis.SetLogger(silence{}) })

type silence struct{}

func (silence) Printf(context.Context, string, ...any) {}

// Ready reports whether the store answers and lets this user in.
func (s *Store) Ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return s.wrap(ctx, "ping the store", s.rdb.Ping(ctx).Err())
}

// Close ends the connections. The embedded store writes a last snapshot before.
func (s *Store) Close() error {
	var errs []error
	if s.finish != nil {
		errs = append(errs, s.finish())
	}
	errs = append(errs, s.rdb.Close())
	if s.embedded != nil {
		s.embedded.Close()
	}
	return errors.Join(errs...)
}

// wrap says what was being done and sorts errors: everything but an answer from Redis
// means that Redis is away, and so do the answers of one that is starting or read-only.
func (s *Store) wrap(ctx context.Context, doing string, err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, context.Canceled) && ctx.Err() != nil {
		return fmt.Errorf("%s: %w", doing, err)
	}
	var answer redis.Error
	if !errors.As(err, &answer) || unwilling(answer.Error()) {
		// go-redis' errors name the address at most, never the password.
		return fmt.Errorf("%s: %w: %w", doing, ErrDown, err)
	}
	return fmt.Errorf("%s: %w", doing, err)
}

// unwilling picks the answers of a Redis that works but will not serve now.
func unwilling(answer string) bool {
	for _, prefix := range []string{"LOADING", "READONLY", "MASTERDOWN", "NOREPLICAS", "MISCONF", "OOM", "CLUSTERDOWN", "TRYAGAIN", "BUSY"} {
		if strings.HasPrefix(answer, prefix) {
			return true
		}
	}
	return false
}
