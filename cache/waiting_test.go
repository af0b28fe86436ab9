package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// rumour is a source of which is only known what it has; it counts how often it is asked.
type rumour struct {
	name  string
	kind  Kind
	asked int
	has   func(piece int) bool
}

func (r *rumour) Name() string { return r.name }
func (r *rumour) Kind() Kind   { return r.kind }

func (r *rumour) Has(w Want) (int64, bool) {
	r.asked++
	return w.Chunk.Size, r.has(w.Chunk.Index)
}

func (r *rumour) Manifest(context.Context, string, fleet.Digest) ([]byte, error) {
	return nil, errors.ErrUnsupported
}

func (r *rumour) Open(context.Context, Want, int64) (io.ReadCloser, error) {
	return nil, errors.ErrUnsupported
}

// crowd is a pull of some pieces that all wait: every second one is at one of the peers,
// the others are at the registry only and are not granted.
type crowd struct {
	supplies *supplies
	fetch    *fetch
	registry *rumour
	peers    []*rumour
	waiting  []*waiter
}

func newCrowd(t testing.TB, pieces, peers int) *crowd {
	t.Helper()
	c := &crowd{registry: &rumour{name: "registry", kind: KindRegistry, has: func(int) bool { return true }}}
	m := &image.Manifest{}
	for i := range pieces {
		m.Chunks = append(m.Chunks, image.Chunk{Index: i, Size: 1 << 20, BlobSize: 1 << 20, Content: image.DigestOf(fmt.Append(nil, i))})
	}
	s, err := Open(Config{Dir: t.TempDir(), Sources: []Source{c.registry}, Site: resident{newVillage(peers), "mac"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	c.fetch = &fetch{store: s, entry: &entry{}, turn: &turn{}, image: m}
	c.supplies = c.fetch.newSupplies()
	c.supplies.claims.answered = true
	for i := range peers {
		p := &rumour{name: fmt.Sprint("peer ", i), kind: KindPeer, has: func(piece int) bool { return piece%2 == 0 && piece/2%peers == i }}
		c.peers = append(c.peers, p)
		c.supplies.claims.peers = append(c.supplies.claims.peers, p)
	}
	for _, chunk := range m.Chunks {
		c.waiting = append(c.waiting, c.supplies.wait(c.fetch, Want{Chunk: chunk}, map[string]error{}))
	}
	c.supplies.mu.Lock()
	for _, x := range c.waiting {
		x.denied = true // all were offered
	}
	c.supplies.news()
	c.supplies.mu.Unlock()
	c.supplies.schedule()
	return c
}

// served are the supplies that were given out since the last call.
func (c *crowd) served() (served []*supply) {
	rest := c.waiting[:0]
	for _, x := range c.waiting {
		select {
		case got := <-x.got:
			served = append(served, got.supply)
		default:
			rest = append(rest, x)
		}
	}
	c.waiting = rest
	return served
}

func (c *crowd) asked() (sum int) {
	for _, p := range append(c.peers, c.registry) {
		sum += p.asked
	}
	return sum
}

// What a piece's end costs does not grow with the pieces that wait for others: each is
// looked at when it comes, when it may be served, and after news.
func TestQueueWasScannedAtEachEnd(t *testing.T) {
	const pieces, peers = 512, 4
	c := newCrowd(t, pieces, peers)
	open := c.served()
	ended := 0
	for ; len(open) > 0; ended++ {
		open[0].ended(nil)
		open = append(open[1:], c.served()...)
	}
	if ended != pieces/2 || len(c.waiting) != pieces/2 {
		t.Errorf("%d pieces came, %d wait; want half of %d each", ended, len(c.waiting), pieces)
	}
	if most := 4 * pieces * (peers + 1); c.asked() > most {
		t.Errorf("sources were asked %d times what they have; want at most %d", c.asked(), most)
	}
	// After news those who wait are looked at again: one is granted, one is at a peer now.
	p := c.supplies
	p.mu.Lock()
	p.claims.granted[c.waiting[7].piece] = time.Now().Add(time.Minute)
	c.peers[0].has = func(piece int) bool { return piece == c.waiting[9].piece }
	want := []int{c.waiting[7].piece, c.waiting[9].piece}
	p.news()
	p.mu.Unlock()
	p.schedule()
	if got := c.served(); len(got) != 2 || got[0].piece != want[0] || got[1].piece != want[1] {
		t.Errorf("%d pieces move after news; want %v", len(got), want)
	}
}

// BenchmarkQueue is all that the queue does in a pull of 4,096 pieces beside 16 peers: half
// of the pieces come, the others wait for grants.
func BenchmarkQueue(b *testing.B) {
	for b.Loop() {
		c := newCrowd(b, 4096, 16)
		var open []*supply
		for next := c.served(); ; {
			if open = append(open, next...); len(open) == 0 {
				break
			}
			open[0].ended(nil)
			next, open = c.served(), open[1:]
		}
	}
}
