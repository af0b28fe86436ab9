package server

import (
	"context"
	"hash/fnv"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
)

const (
	// sitesAge is how old a picture of the sites may be: peers come and go in minutes, and
	// 1,000 nodes that ask once a second cost one look at the store.
	sitesAge = time.Second
	// freshGap is the least time between looks for those that need a newer picture.
	freshGap = 100 * time.Millisecond
	// askedLately is how long after its last word on an image a node is known to pull with
	// its site: a few times againAtMost.
	askedLately = 30 * time.Second
	// peerSilent is the silence after which a node is no peer.
	peerSilent = 90 * time.Second
	// egressSlack is by how much, in percent, the number of nodes that fetch from outside
	// may change before each is told of its new share.
	egressSlack = 20
)

// place is an image at a site.
type place struct {
	site  string
	image fleet.Digest
}

// sites is the fleet by who has and fetches which image where.
type sites struct {
	view  *store.View
	at    time.Time
	ready map[place][]*fleet.Node // that serve all of an image, by id
	parts map[place][]*fleet.Node // that pull it, have bytes of it and serve, by id
	// outside are the nodes that fetch from outside their site now: those that have claims,
	// and those that pull without asking their site.
	outside map[fleet.NodeID]bool
}

// siteCache keeps the last picture, and the fleet's bandwidth shared out by it.
type siteCache struct {
	flight singleflight.Group

	mu      sync.Mutex
	last    *sites
	looks   int           // so far
	next    time.Time     // when the next fresh look may be made, by the true clock
	sharers int           // nodes that were told to share the bandwidth
	changed chan struct{} // closed when that number changes
}

// sites returns a picture that is at most sitesAge old.
func (s *Server) sites(ctx context.Context, now time.Time) (*sites, error) {
	if kept := s.siteCache.kept(); kept != nil {
		if age := now.Sub(kept.at); age >= 0 && age < sitesAge {
			return kept, nil
		}
	}
	fresh, err, _ := s.siteCache.flight.Do("", func() (any, error) {
		// The end of one caller is nothing to the others; the store's calls end by themselves.
		return s.lookAtSites(context.WithoutCancel(ctx), now)
	})
	if err != nil {
		return nil, err
	}
	return fresh.(*sites), nil
}

// freshSites is sites with all that was written before the call. Calls that come within
// freshGap share a look: what makes one fail is cheap to ask for.
func (s *Server) freshSites(ctx context.Context, now time.Time) (*sites, error) {
	c := &s.siteCache
	done := c.flight.DoChan("fresh", func() (any, error) {
		<-time.After(c.turn())
		c.flight.Forget("fresh") // what is written from now on, this look may miss
		return s.lookAtSites(context.WithoutCancel(ctx), now)
	})
	select {
	case r := <-done:
		if r.Err != nil {
			return nil, r.Err
		}
		return r.Val.(*sites), nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// turn is how long to wait for the next look's turn.
func (c *siteCache) turn() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	if c.next.Before(now) {
		c.next = now
	}
	wait := c.next.Sub(now)
	c.next = c.next.Add(freshGap)
	return wait
}

func (s *Server) lookAtSites(ctx context.Context, now time.Time) (*sites, error) {
	view, err := s.c.Store.View(ctx)
	if err != nil {
		return nil, err
	}
	s.ordered.note(view, s.c.Pools(), now)
	asking, err := s.c.Store.Askers(ctx, askedLately)
	if err != nil {
		return nil, err
	}
	fresh := &sites{view: view, at: now, ready: map[place][]*fleet.Node{}, parts: map[place][]*fleet.Node{}, outside: map[fleet.NodeID]bool{}}
	for id, n := range view.Nodes {
		if now.Sub(n.SeenAt) >= peerSilent {
			continue
		}
		for i := range n.Images {
			image := &n.Images[i]
			switch at := (place{n.Site, image.Digest}); {
			case n.Peer.Address == "":
			case image.State == fleet.ImageReady:
				fresh.ready[at] = append(fresh.ready[at], n)
			case holds(image.State) && image.Done > 0:
				fresh.parts[at] = append(fresh.parts[at], n)
			}
			if _, asks := slices.BinarySearch(asking, id); image.State == fleet.ImageCaching && !asks {
				fresh.outside[id] = true
			}
		}
	}
	for _, by := range []map[place][]*fleet.Node{fresh.ready, fresh.parts} {
		for _, nodes := range by {
			slices.SortFunc(nodes, func(a, b *fleet.Node) int { return compareIDs(a.ID, b.ID) })
		}
	}
	claimants, err := s.c.Store.Claimants(ctx)
	if err != nil {
		return nil, err
	}
	for _, id := range claimants {
		fresh.outside[id] = true
	}
	s.siteCache.keep(fresh)
	s.metrics.outside.Set(float64(len(fresh.outside)))
	return fresh, nil
}

func compareIDs(a, b fleet.NodeID) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

func (c *siteCache) kept() *sites {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.last
}

// keep takes a picture and wakes the syncs of those that share the bandwidth if their
// number is another one.
func (c *siteCache) keep(fresh *sites) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.looks++
	if c.last != nil && fresh.view.Incarnation == c.last.view.Incarnation && fresh.view.Revision < c.last.view.Revision {
		return // looked at before what is kept
	}
	c.last = fresh
	n := len(fresh.outside)
	if difference := max(n-c.sharers, c.sharers-n); 100*difference > egressSlack*c.sharers {
		c.sharers = n
		if c.changed != nil {
			close(c.changed)
			c.changed = nil
		}
	}
}

// share is a node's part of what the fleet may move from outside, in bytes per second, 0
// for no limit. A node that moves nothing now is told what it would have if it began; that
// is no news to wake it for (counts).
func (s *Server) share(node fleet.NodeID) (bandwidth int64, counts bool) {
	if s.c.Egress <= 0 {
		return 0, false
	}
	s.siteCache.mu.Lock()
	defer s.siteCache.mu.Unlock()
	counts = s.siteCache.last != nil && s.siteCache.last.outside[node]
	sharers := s.siteCache.sharers
	if !counts {
		sharers++
	}
	return max(1, s.c.Egress/int64(max(1, sharers))), counts
}

// shareChanged returns a channel that is closed when the nodes' shares change; nil: they
// never do.
func (s *Server) shareChanged() <-chan struct{} {
	if s.c.Egress <= 0 {
		return nil
	}
	s.siteCache.mu.Lock()
	defer s.siteCache.mu.Unlock()
	if s.siteCache.changed == nil {
		s.siteCache.changed = make(chan struct{})
	}
	return s.siteCache.changed
}

// someOf picks n of the nodes for one that asks: others for another one and others in the
// next minutes, the same meanwhile, so that tokens and connections serve again.
func someOf(nodes []*fleet.Node, n int, asker fleet.NodeID, now time.Time) []*fleet.Node {
	if len(nodes) <= n {
		return nodes
	}
	h := fnv.New32a()
	_, _ = h.Write([]byte(asker))
	first := (int(h.Sum32()>>1) + int(now.Unix()/300)*n) % len(nodes)
	picked := make([]*fleet.Node, n)
	for i := range picked {
		picked[i] = nodes[(first+i)%len(nodes)]
	}
	return picked
}
