package store

import (
	"context"
	"errors"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
	"golang.org/x/sync/errgroup"

	"github.com/paddock-ci/paddock/fleet"
)

// Topic is something to be woken about.
type Topic string

// Anything is every change that was not Quiet.
const Anything Topic = ""

// nodePrefix tells nodes' topics from others in a message.
const nodePrefix = "n:"

// NodeTopic is what concerns one node: its record, its VMs, its orders.
func NodeTopic(n fleet.NodeID) Topic { return Topic(nodePrefix + string(n)) }

// ledgerTopic is a new version of the ledger, for Run itself.
const ledgerTopic Topic = "ledger"

// hub wakes those who wait in this process.
type hub struct {
	mu      sync.Mutex
	waiting map[Topic]chan struct{}
}

func newHub() *hub { return &hub{waiting: map[Topic]chan struct{}{}} }

func (h *hub) wait(t Topic) <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	c := h.waiting[t]
	if c == nil {
		c = make(chan struct{})
		h.waiting[t] = c
	}
	return c
}

// wake closes the channels of the topics.
func (h *hub) wake(topics ...Topic) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, t := range topics {
		if c := h.waiting[t]; c != nil {
			close(c)
			delete(h.waiting, t)
		}
	}
}

// wakeAll is for when messages may have been missed.
func (h *hub) wakeAll() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, c := range h.waiting {
		close(c)
	}
	clear(h.waiting)
}

// Notify returns a channel that is closed at the next change of a topic. Take it
// before reading the View that decides whether to wait: a change in between then
// closes it. It works while Run runs; a wake-up may also come for no reason, and when
// the connection to Redis breaks one may be late, so wait with a timeout as well.
func (s *Store) Notify(t Topic) <-chan struct{} { return s.hub.wait(t) }

// listenPause is how long a broken subscription waits before it tries again, and
// followPeriod how often the ledger's version is compared without having been told.
const (
	listenPause  = 500 * time.Millisecond
	followPeriod = 20 * time.Second
)

// Run holds the store's one subscription, follows the ledger and, for an embedded
// store, writes a snapshot every minute. It returns when ctx ends; a Redis that goes
// away is waited for.
func (s *Store) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return s.listen(ctx) })
	group.Go(func() error { return s.follow(ctx) })
	if s.deliveries != nil {
		group.Go(func() error { return s.snapshots(ctx) })
	}
	err := group.Wait()
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// listen keeps a subscription up.
func (s *Store) listen(ctx context.Context) error {
	for {
		if err := s.subscription(ctx); ctx.Err() == nil {
			s.log.Warn("the subscription broke; wake-ups are late until it is back", "error", s.wrap(ctx, "listen", err))
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(listenPause):
		}
	}
}

// subscription receives until the connection breaks. Everyone is woken once it stands:
// what happened before went unheard.
func (s *Store) subscription(ctx context.Context) error {
	sub := s.rdb.Subscribe(ctx, s.channel)
	defer func() { _ = sub.Close() }()
	// Receive blocks on the connection without looking at ctx.
	stop := context.AfterFunc(ctx, func() { _ = sub.Close() })
	defer stop()
	for {
		message, err := sub.ReceiveTimeout(ctx, pingPeriod)
		if isTimeout(err) {
			// Nothing heard for a while: a dead peer shows itself by the ping's answer.
			if err = sub.Ping(ctx); err == nil {
				message, err = sub.ReceiveTimeout(ctx, ioTimeout)
			}
		}
		if err != nil {
			return err
		}
		switch m := message.(type) {
		case *redis.Subscription:
			s.settle(ctx)
			s.hub.wakeAll()
		case *redis.Message:
			s.hub.wake(topics(m.Payload)...)
		}
	}
}

// settle waits, for 2 s at most, until other connections work as well: after many
// failures go-redis refuses for up to a second to dial, and whoever is woken would
// find the store still away.
func (s *Store) settle(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for s.Ready(ctx) != nil {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// pingPeriod is the silence after which the subscription's connection is tested.
const pingPeriod = 5 * time.Second

func isTimeout(err error) bool {
	var timeout interface{ Timeout() bool }
	return errors.As(err, &timeout) && timeout.Timeout()
}

// topics reads a message: the topics to wake, and Anything always.
func topics(payload string) []Topic {
	list := []Topic{Anything}
	for word := range strings.FieldsSeq(payload) {
		list = append(list, Topic(word))
	}
	return list
}

// follow keeps this replica's ledger file up to date.
func (s *Store) follow(ctx context.Context) error {
	tick := time.NewTicker(followPeriod)
	defer tick.Stop()
	for {
		told := s.Notify(ledgerTopic)
		if _, err := s.ReadLedger(ctx); err != nil && ctx.Err() == nil {
			s.log.Warn("the ledger cannot be followed now", "error", err)
		}
		if err := s.ledger.retry(); err != nil {
			s.log.Warn("the ledger cannot be written now", "error", err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		case <-told:
		}
	}
}
