package cache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// claimTime is how long a village's claims last without being renewed.
const claimTime = time.Minute

// village is a site in memory, for one image: who has what and who fetches what.
type village struct {
	pulling int // nodes expected, by which claims are shared out

	mu     sync.Mutex
	claims map[int]claim
	have   map[string]map[int]bool
	stores map[string]*Store
	asks   map[string][]Ask
	at     map[string][]time.Time // of asks
	pieces int
	fail   error
	silent bool
	rate   float64 // of each peer, in bytes per second
	broken bool    // peers fail
	forged bool    // peers give another manifest
}

type claim struct {
	node  string
	until time.Time
}

func newVillage(pulling int) *village {
	return &village{
		pulling: pulling, claims: map[int]claim{}, have: map[string]map[int]bool{}, stores: map[string]*Store{},
		asks: map[string][]Ask{}, at: map[string][]time.Time{}, rate: 100e6,
	}
}

// resident is the village as one of its nodes sees it.
type resident struct {
	*village
	name string
}

func (r resident) Ask(ctx context.Context, a Ask) (Answer, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.asks[r.name], r.at[r.name] = append(r.asks[r.name], a), append(r.at[r.name], time.Now())
	if r.silent {
		r.mu.Unlock()
		<-ctx.Done()
		r.mu.Lock()
		return Answer{}, ctx.Err()
	}
	if r.fail != nil {
		return Answer{}, r.fail
	}
	if a.Pieces == 0 {
		return Answer{Peers: r.others(), Again: time.Second}, nil
	}
	r.pieces = a.Pieces
	for n, c := range r.claims {
		if c.node == r.name && (a.Leave || slices.Contains(a.Have, n)) || time.Now().After(c.until) {
			delete(r.claims, n)
		}
	}
	if r.have[r.name] == nil {
		r.have[r.name] = map[int]bool{}
	}
	for _, n := range a.Have {
		r.have[r.name][n] = true
	}
	for _, n := range a.Fetching {
		if c := r.claims[n]; c.node == "" || c.node == r.name {
			r.claims[n] = claim{r.name, time.Now().Add(claimTime)}
		}
	}
	answer := Answer{Again: time.Second}
	for _, n := range a.Insist {
		answer.Grant = append(answer.Grant, r.grant(n)...)
	}
	for _, n := range a.Want {
		if !r.held(n) {
			answer.Grant = append(answer.Grant, r.grant(n)...)
		}
	}
	answer.Peers = r.others()
	return answer, nil
}

// others are the other nodes that have anything; r.mu is held.
func (r resident) others() (peers []Source) {
	for name, have := range r.have {
		if name != r.name {
			peers = append(peers, &neighbour{village: r.village, name: name, have: have})
		}
	}
	return peers
}

func (r resident) held(n int) bool {
	for name, have := range r.have {
		if name != r.name && have[n] {
			return true
		}
	}
	return false
}

// grant claims a piece; r.mu is held.
func (r resident) grant(n int) []int {
	mine := 0
	for _, c := range r.claims {
		if c.node == r.name {
			mine++
		}
	}
	if c, claimed := r.claims[n]; claimed && c.node != r.name || mine >= max(1, 16/r.pulling) {
		return nil
	}
	r.claims[n] = claim{r.name, time.Now().Add(claimTime)}
	return []int{n}
}

// neighbour is a node as a source: what its store serves.
type neighbour struct {
	*village
	name string
	have map[int]bool
}

func (p *neighbour) Name() string { return "peer " + p.name }
func (p *neighbour) Kind() Kind   { return KindPeer }

func (p *neighbour) Manifest(_ context.Context, _ string, d fleet.Digest) ([]byte, error) {
	p.mu.Lock()
	store, broken, forged := p.stores[p.name], p.broken, p.forged
	p.mu.Unlock()
	switch {
	case broken || store == nil:
		return nil, &Error{Class: ClassNetwork, Err: errors.New("the cable is out")}
	case forged:
		return []byte("{}"), nil
	}
	return store.ServeManifest(d)
}

func (p *neighbour) Has(w Want) (int64, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := w.Chunk.Index
	if n < 0 { // the numbers of NVRAM and VM config follow the chunks'
		n = p.pieces - 1 - (n - image.ConfigIndex)
	}
	return w.Chunk.Size, p.have[n]
}

func (p *neighbour) Open(ctx context.Context, w Want, from int64) (io.ReadCloser, error) {
	p.mu.Lock()
	store, broken := p.stores[p.name], p.broken
	p.mu.Unlock()
	if broken {
		return nil, &Error{Class: ClassNetwork, Err: errors.New("the cable is out")}
	}
	piece, err := store.Serve(w.Image, w.Chunk.Content)
	if err != nil {
		return nil, &Error{Class: ClassNotFound, Err: err}
	}
	if _, err := piece.Seek(from, io.SeekStart); err != nil {
		return nil, errors.Join(err, piece.Close())
	}
	return bodyOf{readerFunc(func(b []byte) (int, error) {
		n, err := piece.Read(b)
		if !pause(ctx, time.Duration(float64(n)/p.rate*float64(time.Second))) {
			return 0, ctx.Err()
		}
		return n, err
	}), func() { _ = piece.Close() }}, nil
}

// settle opens a store for a resident.
func (v *village) settle(t *testing.T, name string, cfg Config, sources ...*well) *Store {
	t.Helper()
	cfg.Site = resident{v, name}
	s := openWells(t, cfg, sources...)
	v.mu.Lock()
	defer v.mu.Unlock()
	v.stores[name] = s
	return s
}

func (v *village) set(change func()) {
	v.mu.Lock()
	defer v.mu.Unlock()
	change()
}

// Eight nodes pull one image through one line: each chunk comes through it once, the
// others get it from each other, and that takes little longer than one node alone.
func TestSiteFetchesOnce(t *testing.T) {
	// On the slow line pieces are waited for longer than others' word is believed.
	for name, line := range map[string]float64{"usual line": 250e3, "slow line": 20e3} {
		t.Run(name, func(t *testing.T) { testSiteFetchesOnce(t, line) })
	}
}

func testSiteFetchesOnce(t *testing.T, line float64) {
	synctest.Test(t, func(t *testing.T) {
		const nodes = 8
		shelf := newShelf()
		h, m := shelf.put(t, alphabet(0, 64))
		registry := newWell("registry", KindRegistry, shelf, line)
		v := newVillage(nodes)
		var pulls sync.WaitGroup
		began := time.Now()
		for i := range nodes {
			s := v.settle(t, fmt.Sprint("mac-", i), Config{}, registry)
			pulls.Go(func() {
				if err := s.Pull(t.Context(), h); err != nil {
					t.Error(err)
				}
			})
		}
		pulls.Wait()
		took, alone := time.Since(began), time.Duration(float64(m.Bytes())/line*float64(time.Second))
		if took > alone*3/2 {
			t.Errorf("%d nodes took %s; one alone takes %s", nodes, took, alone)
		}
		times := map[fleet.Digest]int{}
		for _, content := range registry.asked {
			times[content]++
		}
		for _, c := range m.Distinct() {
			if times[c.Content] != 1 {
				t.Errorf("chunk %d was fetched %d times", c.Index, times[c.Content])
			}
		}
		first := map[string]bool{}
		for i := range nodes {
			for _, a := range v.asks[fmt.Sprint("mac-", i)] {
				if len(a.Want) > 8 {
					first[fmt.Sprint(a.Want[:8])] = true
					break
				}
			}
		}
		if len(first) < nodes/2 {
			t.Errorf("the nodes wish in %d orders; want one for each: %v", len(first), first)
		}
	})
}

// What a node has is told within half a second, claims are renewed while bytes move, and
// given back at the end.
func TestSiteIsKeptInformed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		shelf := newShelf()
		h, m := shelf.put(t, "ABCD")
		registry := newWell("registry", KindRegistry, shelf, 1e3) // each chunk takes minutes
		v := newVillage(1)
		s := v.settle(t, "mac", Config{Streams: 1}, registry)
		arrived := map[int]time.Time{} // seen every 20 ms by who would be served
		ended := make(chan error, 1)
		go func() { ended <- s.Pull(t.Context(), h) }()
		for pulling := true; pulling; {
			select {
			case err := <-ended:
				if pulling = false; err != nil {
					t.Fatal(err)
				}
			case <-time.After(20 * time.Millisecond):
			}
			for _, c := range m.Chunks {
				if p, err := s.Serve(h.Digest, c.Content); err == nil {
					if _ = p.Close(); arrived[c.Index].IsZero() {
						arrived[c.Index] = time.Now()
					}
				}
			}
		}
		told := map[int]time.Time{}
		renewed := map[int]int{}
		for i, a := range v.asks["mac"] {
			for _, n := range a.Have {
				if told[n].IsZero() {
					told[n] = v.at["mac"][i]
				}
			}
			for _, n := range a.Fetching {
				renewed[n]++
			}
		}
		if len(arrived) != len(m.Chunks) {
			t.Errorf("%d chunks were seen to arrive; want %d", len(arrived), len(m.Chunks))
		}
		for n, at := range arrived {
			if late := told[n].Sub(at); told[n].IsZero() || late > 500*time.Millisecond {
				t.Errorf("chunk %d was told %s after it came", n, late)
			}
		}
		for _, c := range m.Chunks {
			if renewed[c.Index] < 2 {
				t.Errorf("the claim of chunk %d was renewed %d times in a minute", c.Index, renewed[c.Index])
			}
		}
		last := v.asks["mac"][len(v.asks["mac"])-1]
		if !last.Leave || len(v.claims) != 0 {
			t.Errorf("the last word was %+v, claims left: %v", last, v.claims)
		}
	})
}

// A node died with a claim: its chunk is waited for until the claim has lapsed, and then
// fetched. What the dead node had said it has fails there, and is fetched all the same.
func TestClaimOfDeadNodeLapses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		shelf := newShelf()
		h, m := shelf.put(t, "ABCD")
		registry := newWell("registry", KindRegistry, shelf, 1e6)
		v := newVillage(2)
		s := v.settle(t, "mac", Config{}, registry)
		v.claims[2] = claim{"ghost", time.Now().Add(claimTime)}
		v.have["ghost"] = map[int]bool{1: true}
		v.broken = true
		if took := pullTook(t, s, h); took < claimTime || took > claimTime+3*time.Second {
			t.Errorf("the pull took %s; want the claim's %s", took, claimTime)
		}
		if n := registry.count(); n != len(m.Pieces()) {
			t.Errorf("%d pieces came from outside; want %d", n, len(m.Pieces()))
		}
		insisted := slices.ContainsFunc(v.asks["mac"], func(a Ask) bool { return slices.Contains(a.Insist, 1) })
		if !insisted {
			t.Error("the node did not insist on what the peer failed to give")
		}
	})
}

// A peer is said to have all pieces and lacks one: that one comes from outside, the others
// from the peer.
func TestPeerThatLacksAPiece(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		shelf := newShelf()
		h, m := shelf.put(t, "ABCDEF")
		registry := newWell("registry", KindRegistry, shelf, 1e6)
		v := newVillage(2)
		half := openShelf(t, shelf)
		free := shelf.hold(m.Chunks[2].Blob)
		ended := make(chan error, 1)
		go func() { ended <- half.Pull(t.Context(), h) }()
		synctest.Wait()
		all := map[int]bool{}
		for n := range m.PieceCount() {
			all[n] = true
		}
		v.stores["half"], v.have["half"] = half, all
		s := v.settle(t, "mac", Config{Streams: 1}, registry)
		pullTook(t, s, h)
		outside := 0
		for _, content := range registry.asked {
			if content != m.Config.Digest {
				outside++
			}
		}
		if outside != 1 || !slices.Contains(registry.asked, m.Chunks[2].Content) {
			t.Errorf("%d pieces came from outside; want the missing one", outside)
		}
		free()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// A site that fails, or does not answer at all, delays a pull by three seconds at most,
// and is complained of once.
func TestSilentSite(t *testing.T) {
	for name, hush := range map[string]func(*village){
		"fails": func(v *village) { v.fail = errors.New("503") },
		"hangs": func(v *village) { v.silent = true },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				shelf := newShelf()
				h, _ := shelf.put(t, "ABCD")
				v := newVillage(1)
				hush(v)
				var log bytes.Buffer
				s := v.settle(t, "mac", Config{Log: slog.New(slog.NewTextHandler(&log, nil))}, newWell("registry", KindRegistry, shelf, 100e3))
				if took := pullTook(t, s, h); took > 3*time.Second+4*time.Second {
					t.Errorf("the pull took %s; want 3 s and the transfer", took)
				}
				if n := strings.Count(log.String(), "the site does not answer"); n != 1 {
					t.Errorf("%d complaints:\n%s", n, &log)
				}
			})
		})
	}
}

// The site falls silent in the middle and comes back: the pull goes on meanwhile, and
// tells all it has when it is heard again.
func TestSiteComesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		shelf := newShelf()
		h, m := shelf.put(t, alphabet(0, 40))
		v := newVillage(4)
		s := v.settle(t, "mac", Config{Streams: 2}, newWell("registry", KindRegistry, shelf, 100e3))
		go func() {
			time.Sleep(5 * time.Second)
			v.set(func() { v.fail = errors.New("503") })
			time.Sleep(8 * time.Second)
			v.set(func() { v.fail = nil })
		}()
		alone := time.Duration(float64(m.Bytes()) / 100e3 * float64(time.Second))
		if took := pullTook(t, s, h); took > alone+4*time.Second {
			t.Errorf("the pull took %s; without a site %s", took, alone)
		}
		if n := len(v.have["mac"]); n != m.PieceCount() {
			t.Errorf("the site knows of %d pieces; want %d", n, m.PieceCount())
		}
	})
}

// timid grants one piece of an image at a time, and has no peers.
type timid struct {
	mu    sync.Mutex
	image fleet.Digest
	asked []time.Time
}

func (s *timid) Ask(_ context.Context, a Ask) (Answer, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	grant := append(a.Insist, a.Want...)
	if a.Image == s.image {
		s.asked = append(s.asked, time.Now())
		grant = grant[:min(len(grant), 1)]
		if len(a.Fetching) > 0 {
			grant = nil
		}
	}
	return Answer{Grant: grant, Again: 10 * time.Second}, nil
}

// A pull that waits for its turn has nothing to wish, and asks no sooner than it was told;
// when the turn comes back, it says what it wishes at once.
func TestPausedPullAskedWithoutEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		shelf := newShelf()
		calm, _ := shelf.put(t, "abcdefgh")
		urgent, _ := shelf.put(t, "ABCDEFGHIJKLMNOP")
		site := &timid{image: calm.Digest}
		s := openWells(t, Config{Site: site, Streams: 2}, newWell("registry", KindRegistry, shelf, 8<<10))
		var pulls sync.WaitGroup
		pulls.Go(func() {
			if err := s.Pull(t.Context(), calm); err != nil {
				t.Error(err)
			}
		})
		time.Sleep(8 * time.Second)
		urgent.Demand = true
		began := time.Now()
		if err := s.Pull(t.Context(), urgent); err != nil {
			t.Error(err)
		}
		ended := time.Now()
		pulls.Wait()
		site.mu.Lock()
		defer site.mu.Unlock()
		paused, next := 0, time.Duration(-1)
		for _, at := range site.asked {
			switch {
			case at.Before(began):
			case at.Before(ended):
				paused++
			case next < 0:
				next = at.Sub(ended)
			}
		}
		if most := 3 * int(ended.Sub(began)/(10*time.Second)); paused > most { // each piece that comes is told, too
			t.Errorf("paused for %s, it asked %d times; want at most %d", ended.Sub(began), paused, most)
		}
		if next < 0 || next > 2*time.Second {
			t.Errorf("the first question after the turn came back was %s later", next)
		}
	})
}
