package peer

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/time/rate"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// hall is the site of these tests: who has what, and one fetch from outside for each
// piece, as the controller sees to it. It notes what each node opens where.
type hall struct {
	home *home

	mu      sync.Mutex
	members []*member
	claims  map[int]fleet.NodeID
	opened  []opening
}

// member is a node as the others know it.
type member struct {
	id   fleet.NodeID
	at   func() fleet.NodePeer
	sign func(from *station) access.Token
	all  bool
	have map[int]bool
}

// opening is one Open of a source.
type opening struct {
	by      fleet.NodeID
	source  string
	content fleet.Digest
	from    int64
}

func newHall(h *home) *hall { return &hall{home: h, claims: map[int]fleet.NodeID{}} }

// join makes a station known; all: it has the image.
func (l *hall) join(t *testing.T, s *station, all bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.members = append(l.members, &member{
		id: s.id, at: s.server.Where, all: all, have: map[int]bool{},
		sign: func(from *station) access.Token { return l.home.token(t, from, s) },
	})
}

// seat is the hall as one station has it.
type seat struct {
	hall *hall
	*station
}

func (s *seat) Ask(_ context.Context, a cache.Ask) (cache.Answer, error) {
	l := s.hall
	l.mu.Lock()
	defer l.mu.Unlock()
	answer := cache.Answer{Again: 50 * time.Millisecond}
	held := map[int]bool{}
	for _, m := range l.members {
		if m.id == s.id {
			m.have = map[int]bool{}
			for _, n := range a.Have {
				m.have[n] = true
			}
			continue
		}
		for n := range a.Pieces {
			held[n] = held[n] || m.all || m.have[n]
		}
		has := func(c cache.Want) bool {
			n, _ := l.home.manifest.Piece(c.Chunk.Content)
			l.mu.Lock()
			defer l.mu.Unlock()
			return m.all || m.have[n]
		}
		if at := m.at(); at.Address != "" {
			answer.Peers = append(answer.Peers, noted{s.client.Source(m.id, at, m.sign(s.station), has), s.hall, s.id})
		}
	}
	for n, id := range l.claims {
		if id == s.id && (a.Leave || slices.Contains(a.Have, n)) {
			delete(l.claims, n)
		}
	}
	for _, n := range slices.Concat(a.Want, a.Insist) {
		if id := l.claims[n]; (id == "" || id == s.id) && (!held[n] || slices.Contains(a.Insist, n)) {
			l.claims[n] = s.id
			answer.Grant = append(answer.Grant, n)
		}
	}
	return answer, nil
}

// noted notes what is opened.
type noted struct {
	cache.Source
	hall *hall
	by   fleet.NodeID
}

func (n noted) Open(ctx context.Context, w cache.Want, from int64) (io.ReadCloser, error) {
	n.hall.mu.Lock()
	n.hall.opened = append(n.hall.opened, opening{n.by, n.Name(), w.Chunk.Content, from})
	n.hall.mu.Unlock()
	return n.Source.Open(ctx, w, from)
}

// opens are those of a source by a node.
func (l *hall) opens(by fleet.NodeID, source string) (found []opening) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, o := range l.opened {
		if o.by == by && strings.HasPrefix(o.source, source) {
			found = append(found, o)
		}
	}
	return found
}

// puller is a station that is to pull: with a port, in the hall, and with all of the
// registry if outside is true, else with its manifest only.
func (l *hall) puller(t *testing.T, id fleet.NodeID, outside bool, streams int) *station {
	t.Helper()
	s := &seat{hall: l}
	var registry cache.Source = noted{l.home.client(t), l, id}
	if !outside {
		registry = manifestOnly{registry}
	}
	config := cache.Config{Site: s, Streams: streams, Sources: []cache.Source{registry}}
	s.station = l.home.newStation(t, id, config, plain)
	l.join(t, s.station, false)
	return s.station
}

// check compares the published image with what was pushed.
func (h *home) check(t *testing.T, s *station) {
	t.Helper()
	dir, err := s.store.Path(h.manifest.Digest)
	if err != nil {
		t.Error(err)
		return
	}
	disk, err := os.ReadFile(filepath.Join(dir, "disk.img"))
	if err != nil || !bytes.Equal(disk, h.disk) {
		t.Errorf("%s has another disk: %d bytes, %v", s.id, len(disk), err)
	}
}

// pull pulls on all stations at once.
func (h *home) pull(t *testing.T, stations ...*station) {
	t.Helper()
	var pulls sync.WaitGroup
	for _, s := range stations {
		pulls.Go(func() {
			if err := s.store.Pull(t.Context(), h.hold()); err != nil {
				t.Errorf("%s: %v", s.id, err)
			}
		})
	}
	pulls.Wait()
	for _, s := range stations {
		h.check(t, s)
	}
}

// Two and three nodes pull one image at the same time: each piece of it leaves the
// registry once, and the rest comes from each other.
func TestOneFetchPerSite(t *testing.T) {
	for _, nodes := range []int{2, 3} {
		t.Run(strconv.Itoa(nodes), func(t *testing.T) {
			h := newHome(t, "abcdefgh0ijklmnop")
			l := newHall(h)
			var all []*station
			for n := range nodes {
				all = append(all, l.puller(t, fleet.NodeID("mac-"+strconv.Itoa(n+1)), true, 4))
			}
			h.pull(t, all...)
			counts := h.registry.Counts()
			for _, c := range h.manifest.Distinct() {
				if n := counts.Requests[c.Blob]; n != 1 {
					t.Errorf("chunk %d was asked for %d times", c.Index, n)
				}
			}
			if n := counts.Requests[h.manifest.NVRAM.Digest]; n != 1 {
				t.Errorf("the NVRAM was asked for %d times", n)
			}
			var moved int64
			for _, s := range all {
				for name, n := range s.store.Moved() {
					if strings.HasPrefix(name, "peer ") {
						moved += n
					}
				}
				s.idle(t)
			}
			var content int64
			for _, c := range h.manifest.Pieces() {
				if c.Index != -2 { // the config is smaller than the question about it
					content += c.Size
				}
			}
			if want := content * int64(nodes-1); moved < want || moved > want+want/100 {
				t.Errorf("%d bytes of content came from peers, want %d", moved, want)
			}
			_, egress := counts.Total()
			t.Logf("%d nodes: %d bytes left the registry, the image has %d", nodes, egress, h.manifest.Bytes())
		})
	}
}

// slow keeps a piece under way for seconds.
func slow(c *Config) { c.Bandwidth = 2 << 20 }

// A peer dies in mid-piece: the other one goes on at the byte.
func TestPeerToPeer(t *testing.T) {
	h := newHomeOf(t, "a", hugeChunk)
	l := newHall(h)
	two, three := h.full(t, "mac-2", slow), h.full(t, "mac-3", slow)
	l.join(t, two, true)
	l.join(t, three, true)
	one := l.puller(t, "mac-1", false, 1)
	content := h.manifest.Chunks[0].Content
	done := make(chan error, 1)
	go func() { done <- one.store.Pull(t.Context(), h.hold()) }()

	dead, heir := two, three
	eventually(t, "the chunk moves", func() bool {
		for _, o := range l.opens("mac-1", "peer ") {
			if o.content == content && o.source == "peer mac-3" {
				dead, heir = three, two
			}
			if o.content == content && max(two.server.Sent(), three.server.Sent()) > 1<<20 {
				return true
			}
		}
		return false
	})
	heir.server.pace.SetLimit(rate.Inf)
	dead.stop()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	h.check(t, one)
	at := int64(-1)
	for _, o := range l.opens("mac-1", "peer "+string(heir.id)) {
		if o.content == content && o.from > 0 {
			at = o.from
		}
	}
	if sent := dead.server.Sent(); at < 1 || at > sent || sent >= hugeChunk {
		t.Errorf("%s died after %d bytes, %s was asked from byte %d on", dead.id, sent, heir.id, at)
	}
	if sent := heir.server.Sent(); sent > hugeChunk-at+int64(len(h.nvram))+1<<16 {
		t.Errorf("%s sent %d bytes, although it was asked from byte %d of %d on", heir.id, sent, at, hugeChunk)
	}
}

// manifestOnly is a registry of which only the manifest is to be had.
type manifestOnly struct{ cache.Source }

func (manifestOnly) Has(cache.Want) (int64, bool) { return 0, false }

// The last peer dies in mid-piece: the registry gives the piece, from its beginning.
func TestPeerToRegistry(t *testing.T) {
	h := newHomeOf(t, "a", hugeChunk)
	l := newHall(h)
	two := h.full(t, "mac-2", slow)
	l.join(t, two, true)
	one := l.puller(t, "mac-1", true, 1)
	done := make(chan error, 1)
	go func() { done <- one.store.Pull(t.Context(), h.hold()) }()
	c := h.manifest.Chunks[0]
	eventually(t, "the chunk moves", func() bool {
		moving := slices.ContainsFunc(l.opens("mac-1", "peer mac-2"), func(o opening) bool { return o.content == c.Content })
		return moving && two.server.Sent() > 1<<20
	})
	two.stop()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	h.check(t, one)
	asked := l.opens("mac-1", "registry")
	asked = slices.DeleteFunc(asked, func(o opening) bool { return o.content != c.Content })
	if len(asked) != 1 || asked[0].from != 0 {
		t.Errorf("the registry was asked for the chunk by %+v, want once from its beginning", asked)
	}
	if n := h.registry.Counts().Requests[c.Blob]; n != 1 {
		t.Errorf("%d requests of the chunk", n)
	}
}

// A peer that the controller named sends what it likes, well-formed: its bytes are caught
// by the digest of the content, nothing of them is published, and the pull succeeds
// elsewhere: at another peer, or at the registry.
func TestLyingPeer(t *testing.T) {
	for _, honest := range []string{"peer mac-3", "registry"} {
		t.Run(honest, func(t *testing.T) {
			h := newHome(t, "ab0c")
			l := newHall(h)
			var lied atomic.Int32
			liar := newImpostor(t, func(w http.ResponseWriter, r *http.Request) {
				asked, _ := parseTarget(r.URL.Path)
				from, _ := parseRange(r.Header)
				if asked.content == "" { // true, so that it is believed to have the pieces
					_, _ = w.Write(h.manifest.Raw)
				}
				for _, c := range h.manifest.Pieces() {
					if c.Content != asked.content {
						continue
					}
					w.Header().Set("Content-Length", strconv.FormatInt(c.Size-from, 10))
					if from > 0 {
						w.Header().Set("Content-Range", contentRange(from, c.Size))
						w.WriteHeader(http.StatusPartialContent)
					}
					lied.Add(1)
					_, _ = w.Write(bytes.Repeat([]byte{'x'}, int(c.Size-from)))
				}
			})
			l.members = append(l.members, &member{id: "mac-2", all: true, at: func() fleet.NodePeer { return liar.at }, sign: func(*station) access.Token { return "pdkpeer_x" }})
			if honest != "registry" {
				l.join(t, h.full(t, "mac-3", plain), true)
			}
			one := l.puller(t, "mac-1", honest == "registry", 2)
			if err := one.store.Pull(t.Context(), h.hold()); err != nil {
				t.Fatal(err)
			}
			h.check(t, one)
			if lied.Load() == 0 {
				t.Error("the liar was never asked: the test shows nothing")
			}
			if n := len(l.opens("mac-1", honest)); n == 0 {
				t.Errorf("%s was never asked", honest)
			}
		})
	}
}

// A peer lies about the manifest: another image's, a changed one, none, or one that never
// ends. It is asked before the registry, and its word counts for nothing: the pull takes the
// manifest from another peer or the registry, and what is published and served is that.
func TestLyingAboutManifest(t *testing.T) {
	h := newHome(t, "ab0c")
	foreign := newHome(t, "d0e").manifest.Raw
	changed := bytes.Replace(h.manifest.Raw, []byte(h.manifest.Chunks[0].Content), []byte(h.manifest.Chunks[1].Content), 1)
	if bytes.Equal(changed, h.manifest.Raw) {
		t.Fatal("the lie is true")
	}
	for name, lie := range map[string][]byte{
		"another image's": foreign, "changed": changed, "empty": nil, "no manifest": []byte("<html>"),
		"huge": bytes.Repeat([]byte{' '}, image.MaxManifestBytes+1),
	} {
		for _, honest := range []string{"peer mac-3", "registry"} {
			t.Run(name+", "+honest, func(t *testing.T) {
				l := newHall(h)
				var lied atomic.Int32
				liar := newImpostor(t, func(w http.ResponseWriter, r *http.Request) {
					if asked, _ := parseTarget(r.URL.Path); asked.content != "" {
						w.WriteHeader(http.StatusNotFound)
						return
					}
					lied.Add(1)
					_, _ = w.Write(lie)
				})
				l.members = append(l.members, &member{id: "mac-2", have: map[int]bool{}, at: func() fleet.NodePeer { return liar.at }, sign: func(*station) access.Token { return "pdkpeer_x" }})
				if honest != "registry" {
					l.join(t, h.full(t, "mac-3", plain), true)
				}
				one := l.puller(t, "mac-1", honest == "registry", 2)
				h.pull(t, one)
				if lied.Load() == 0 {
					t.Error("the liar was never asked: the test shows nothing")
				}
				dir, err := one.store.Path(h.manifest.Digest)
				if err != nil {
					t.Fatal(err)
				}
				kept, err := os.ReadFile(filepath.Join(dir, "manifest.json"))
				if err != nil || !bytes.Equal(kept, h.manifest.Raw) {
					t.Errorf("the manifest that was kept has digest %s, %v", image.DigestOf(kept), err)
				}
				if served, err := one.store.ServeManifest(h.manifest.Digest); err != nil || !bytes.Equal(served, h.manifest.Raw) {
					t.Errorf("others are served a manifest with digest %s, %v", image.DigestOf(served), err)
				}
				if list := one.store.List(); len(list) != 1 || list[0].Digest != h.manifest.Digest {
					t.Errorf("the store has %+v; want the one image", list)
				}
			})
		}
	}
}

// Peers that nobody can use (another certificate, a token of another fleet, a closed port)
// hold up no pull: the registry gives all.
func TestUselessPeers(t *testing.T) {
	h := newHome(t, "ab")
	l := newHall(h)
	two := h.full(t, "mac-2", plain)
	foreign := access.NewKey()
	l.members = []*member{
		{id: "mac-2", all: true, sign: func(from *station) access.Token { return h.token(t, from, two) }, at: func() fleet.NodePeer {
			return fleet.NodePeer{Address: two.server.Where().Address, Certificate: strings.Repeat("00", 32)}
		}},
		{id: "mac-3", all: true, at: two.server.Where, sign: func(from *station) access.Token {
			token, err := foreign.SignPeer(access.PeerGrant{Receiver: from.id, Server: "mac-3", Image: h.manifest.Digest, ExpiresAt: time.Now().Add(time.Minute)})
			if err != nil {
				t.Error(err)
			}
			return token
		}},
		{id: "mac-4", all: true, sign: func(*station) access.Token { return "" }, at: func() fleet.NodePeer {
			return fleet.NodePeer{Address: "127.0.0.1:1", Certificate: strings.Repeat("00", 32)}
		}},
	}
	one := l.puller(t, "mac-1", true, 2)
	begun := time.Now()
	h.pull(t, one)
	if took := time.Since(begun); took > 30*time.Second {
		t.Errorf("it took %s", took)
	}
	if n := two.looked.Load(); n != 0 {
		t.Errorf("mac-2 looked up %d pieces for nobody", n)
	}
	if err := two.store.Evict(h.manifest.Digest); err != nil && errors.Is(err, cache.ErrLeased) {
		t.Errorf("mac-2's image is leased: %v", err)
	}
}
