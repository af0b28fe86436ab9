package storetest

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
)

// The cast: mac-1, mac-2 and mac-3 at the site lab, which pull an image of 20 pieces.
const (
	pulled     fleet.Digest = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	pulledToo  fleet.Digest = "sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
	pieceCount              = 20
)

// slow limits have times that do not pass within a test; tests of time shorten one.
var slow = store.ChunkLimits{
	Claim: time.Minute, Silent: 2 * time.Minute, Left: time.Hour, Open: 4, Nodes: 50, Swarms: 10, Peers: 16,
}

// bits is a set of pieces as a node tells it.
func bits(pieces ...int) []byte {
	b := make([]byte, (pieceCount+7)/8)
	for _, p := range pieces {
		b[p/8] |= 1 << (p % 8)
	}
	return b
}

func upTo(n int) []int {
	all := make([]int, n)
	for i := range all {
		all[i] = i
	}
	return all
}

// word is what a node of the cast says, with a peer port, wanting all.
func word(node fleet.NodeID, have ...int) store.ChunkWord {
	return store.ChunkWord{
		Site: "lab", Image: pulled, Node: node, Pieces: pieceCount, Have: bits(have...), Serves: true, Want: upTo(pieceCount),
	}
}

// ask says it and expects success.
func ask(t *testing.T, s *store.Store, w store.ChunkWord, l store.ChunkLimits) store.ChunkAnswer {
	t.Helper()
	a, err := s.Chunks(t.Context(), w, l)
	if err != nil {
		t.Fatalf("Chunks: %v", err)
	}
	return a
}

// granted says it and expects these grants.
func granted(t *testing.T, s *store.Store, w store.ChunkWord, want ...int) store.ChunkAnswer {
	t.Helper()
	a := ask(t, s, w, slow)
	if diff := cmp.Diff(want, a.Grant); diff != "" {
		t.Fatalf("%s is granted (-want +got):\n%s", w.Node, diff)
	}
	return a
}

// names are the nodes of the peers, sorted.
func names(a store.ChunkAnswer) []fleet.NodeID {
	var all []fleet.NodeID
	for _, p := range a.Peers {
		all = append(all, p.Node)
	}
	slices.Sort(all)
	return all
}

func chunkClaims(t *testing.T, s *store.Store) {
	granted(t, s, word("mac-1"), 0, 1, 2, 3) // alone: all that may be open
	granted(t, s, word("mac-1"), 0, 1, 2, 3) // an answer that was lost is given again
	one := word("mac-2")
	one.Want = []int{2, 7, 6, 5}
	if a := granted(t, s, one, 7, 6); a.Pulling != 2 { // in its order, and half of what may be open
		t.Errorf("%d nodes pull, want 2", a.Pulling)
	}
	fetching := word("mac-1", 0)
	fetching.Fetching, fetching.Want = []int{1, 2, 3}, []int{4}
	granted(t, s, fetching) // it has more open than its part now
	insisting := word("mac-2", 7, 6)
	insisting.Want, insisting.Insist = nil, []int{1, 0, 8}
	granted(t, s, insisting, 0, 8) // 1 is another's claim, 0 only another's piece
	other := word("mac-3")
	other.Site, other.Want = "elsewhere", []int{1}
	granted(t, s, other, 1)
	other.Site, other.Image = "lab", pulledToo
	granted(t, s, other, 1)
	if who, err := s.Claimants(t.Context()); err != nil || !slices.Equal(who, []fleet.NodeID{"mac-1", "mac-2", "mac-3"}) {
		t.Errorf("claims have %v, %v", who, err)
	}
	done := word("mac-1", upTo(pieceCount)...)
	granted(t, s, done)
	if who, err := s.Claimants(t.Context()); err != nil || slices.Contains(who, "mac-1") {
		t.Errorf("mac-1 has all, and claims have %v, %v", who, err)
	}
}

func chunkRush(t *testing.T, s *store.Store) {
	limits := slow
	limits.Open = 1000
	var (
		mu    sync.Mutex
		by    = map[int]fleet.NodeID{}
		group sync.WaitGroup
	)
	for i := range 16 {
		group.Go(func() {
			w := word(fleet.NodeID(fmt.Sprint("mac-", i)))
			a, err := s.Chunks(t.Context(), w, limits)
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			for _, p := range a.Grant {
				if by[p] != "" {
					t.Errorf("piece %d is granted to %s and to %s", p, by[p], w.Node)
				}
				by[p] = w.Node
			}
		})
	}
	group.Wait()
	if len(by) != pieceCount {
		t.Errorf("%d pieces granted of %d", len(by), pieceCount)
	}
}

func chunkLapse(t *testing.T, s *store.Store) {
	limits := slow
	limits.Claim, limits.Open = 300*time.Millisecond, 2*pieceCount
	first := word("mac-1")
	if a := ask(t, s, first, limits); len(a.Grant) != pieceCount {
		t.Fatalf("granted %v", a.Grant)
	}
	// mac-1 goes on with one piece; mac-2 gets the others when they have lapsed, and that
	// one when mac-1 has stopped.
	first.Fetching, first.Want = []int{7}, nil
	second, got := word("mac-2"), map[int]bool{}
	eventually(t, func() bool {
		began := time.Now()
		ask(t, s, first, limits)
		a := ask(t, s, second, limits)
		if slices.Contains(a.Grant, 7) && time.Since(began) < limits.Claim {
			t.Fatal("a claim that was renewed just now is another's")
		}
		for _, p := range a.Grant {
			got[p] = true
		}
		return len(got) >= pieceCount-1
	})
	eventually(t, func() bool { return slices.Contains(ask(t, s, second, limits).Grant, 7) })
	if a := ask(t, s, first, limits); len(a.Grant) != 0 {
		t.Errorf("mac-1 goes on with what is mac-2's: %v", a.Grant)
	}
}

func chunkPeers(t *testing.T, s *store.Store) {
	granted(t, s, word("mac-1", 0, 1, 2, 9), 3, 4, 5, 6)
	a := granted(t, s, word("mac-2", 9), 7, 8)
	if diff := cmp.Diff([]store.ChunkPeer{{Node: "mac-1", Have: bits(0, 1, 2, 9)[:2]}}, a.Peers); diff != "" {
		t.Error(diff)
	}
	hidden := word("mac-3", 10, 11) // serves nobody
	hidden.Serves, hidden.Want = false, []int{12}
	granted(t, s, hidden, 12)
	late := word("mac-4")
	late.Want = []int{0, 11}
	if a := granted(t, s, late, 11); !slices.Equal(names(a), []fleet.NodeID{"mac-1", "mac-2"}) {
		t.Errorf("peers %v", names(a))
	}
	// mac-1 has lost a piece: it is not looked for there any more.
	less := word("mac-1", 1, 2, 9, 11)
	less.Want = nil
	if a := granted(t, s, less); len(a.Peers) != 0 {
		t.Errorf("mac-1 needs nothing of %v", names(a))
	}
	lost := word("mac-5")
	lost.Want = []int{0}
	granted(t, s, lost, 0)
	// Somebody has the whole image: nothing comes from outside unless a node insists.
	ready := word("mac-6")
	ready.Ready, ready.Insist = true, []int{15}
	granted(t, s, ready, 15)
}

// One node has a piece that nobody else has, many have the others: it is among the peers
// however few are told.
func chunkRarest(t *testing.T, s *store.Store) {
	limits := slow
	limits.Peers = 2
	for i := range 30 {
		ask(t, s, word(fleet.NodeID(fmt.Sprint("mac-", 10+i)), upTo(pieceCount-1)...), limits)
	}
	ask(t, s, word("mac-2", pieceCount-1), limits)
	for range 20 {
		if a := ask(t, s, word("mac-1"), limits); len(a.Peers) != 2 || !slices.Contains(names(a), "mac-2") {
			t.Fatalf("peers %v", names(a))
		}
	}
}

func chunkLeave(t *testing.T, s *store.Store) {
	granted(t, s, word("mac-1", 0, 1), 2, 3, 4, 5)
	leaving := word("mac-1", 0, 1, 2)
	leaving.Leave = true
	granted(t, s, leaving)
	two := word("mac-2")
	a := granted(t, s, two, 3, 4, 5, 6)
	if diff := cmp.Diff([]store.ChunkPeer{{Node: "mac-1", Have: bits(0, 1, 2)[:1], Left: true}}, a.Peers); diff != "" || a.Pulling != 1 {
		t.Errorf("%s\n%d pull", diff, a.Pulling)
	}
	drop := func(nodes ...fleet.NodeID) {
		t.Helper()
		if err := s.DropChunks(t.Context(), "lab", pulled, nodes); err != nil {
			t.Fatal(err)
		}
	}
	drop("mac-1", "mac-2", "mac-9") // mac-2 has not left: its claims stand
	three := word("mac-3")
	three.Want = []int{3, 0}
	if a := granted(t, s, three, 0); len(a.Peers) != 0 {
		t.Errorf("peers %v of what was dropped", names(a))
	}
	// Whoever comes back is as anybody.
	back := word("mac-1", 1, 2)
	back.Want = nil
	granted(t, s, back)
	drop("mac-1")
	if a := granted(t, s, three, 0); !slices.Equal(names(a), []fleet.NodeID{"mac-1"}) {
		t.Errorf("peers %v, want mac-1", names(a))
	}
	empty := word("mac-3")
	empty.Leave = true // it has nothing and serves nobody
	granted(t, s, empty)
	if a := granted(t, s, two, 3, 4, 5, 6); a.Pulling != 2 {
		t.Errorf("%d pull", a.Pulling)
	}
}

func chunkSilence(t *testing.T, s *store.Store) {
	limits := slow
	limits.Silent, limits.Claim = 300*time.Millisecond, 200*time.Millisecond
	ask(t, s, word("mac-1", 0, 1), limits)
	two := word("mac-2", 5)
	began := time.Now()
	if a := ask(t, s, two, limits); time.Since(began) < limits.Silent/2 && !slices.Equal(names(a), []fleet.NodeID{"mac-1"}) {
		t.Errorf("peers %v, want mac-1", names(a))
	}
	two.Want = []int{0}
	eventually(t, func() bool {
		a := ask(t, s, two, limits)
		return slices.Equal(a.Grant, []int{0}) && len(a.Peers) == 0 && a.Pulling == 1
	})
}

func chunkBounds(t *testing.T, s *store.Store) {
	limits := slow
	limits.Nodes, limits.Swarms = 2, 2
	ask(t, s, word("mac-1"), limits)
	ask(t, s, word("mac-2"), limits)
	if _, err := s.Chunks(t.Context(), word("mac-3"), limits); !errors.Is(err, store.ErrFull) {
		t.Errorf("a third node: %v, want ErrFull", err)
	}
	ask(t, s, word("mac-1"), limits)
	other := word("mac-3")
	other.Site = "b"
	ask(t, s, other, limits)
	other.Site = "c"
	if _, err := s.Chunks(t.Context(), other, limits); !errors.Is(err, store.ErrFull) {
		t.Errorf("a third site: %v, want ErrFull", err)
	}
	for _, p := range []int{-1, pieceCount} {
		bad := word("mac-1")
		bad.Want = []int{p}
		if _, err := s.Chunks(t.Context(), bad, limits); err == nil {
			t.Errorf("piece %d of %d is no error", p, pieceCount)
		}
	}
	// Bits beyond the last piece are nobody's.
	wide := word("mac-1", 0)
	wide.Have = append(wide.Have, 0xff, 0xff)
	wide.Have[2] |= 0xf0
	ask(t, s, wide, limits)
	if a := ask(t, s, word("mac-2"), limits); len(a.Peers) != 1 || !slices.Equal(a.Peers[0].Have, []byte{1}) {
		t.Errorf("peers %+v", a.Peers)
	}
	// An image of the most pieces there can be, wanted whole, then had whole.
	big := store.ChunkWord{Site: "lab", Image: pulled, Node: "mac-8", Pieces: 4098, Serves: true, Want: upTo(4098)}
	if a := ask(t, s, big, slow); len(a.Grant) == 0 {
		t.Error("nothing granted of a big image")
	}
	big.Have, big.Want = slices.Repeat([]byte{0xff}, 4098/8+1), nil
	ask(t, s, big, slow)
	big.Node, big.Have, big.Want = "mac-9", nil, upTo(4098)
	if a := ask(t, s, big, slow); len(a.Grant) != 0 || len(a.Peers) != 2 {
		t.Errorf("granted %d, peers %v", len(a.Grant), names(a))
	}
}

func chunkSweep(t *testing.T, s *store.Store) {
	ask(t, s, word("mac-1", 0), slow)
	limits := slow
	if n, err := s.SweepChunks(t.Context(), limits); n != 0 || err != nil {
		t.Errorf("swept %d, %v", n, err)
	}
	if a := ask(t, s, word("mac-2"), slow); len(a.Peers) != 1 || a.Pulling != 2 {
		t.Errorf("after a sweep of what is older: %+v", a)
	}
	limits.Left = time.Millisecond
	eventually(t, func() bool {
		n, err := s.SweepChunks(t.Context(), limits)
		return n == 1 && err == nil
	})
	if a := ask(t, s, word("mac-2"), slow); len(a.Peers) != 0 || a.Pulling != 1 {
		t.Errorf("%+v", a)
	}
}
