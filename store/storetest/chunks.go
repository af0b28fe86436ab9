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
	Claim: time.Minute, Stand: time.Hour, Silent: 2 * time.Minute, Left: time.Hour,
	Open: 4, Nodes: 50, Swarms: 10, Joined: 10, Peers: 16,
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

// mac-1 says that it fetches and never has anything. What it fetches is granted to others
// after a while, first what nobody has; each that gets it may have it for longer than the
// one before, and who has had it does not get it back.
func chunkStand(t *testing.T, s *store.Store) {
	limits := slow
	limits.Stand, limits.Open = 400*time.Millisecond, 2*pieceCount
	hog, began := word("mac-1"), time.Now()
	hog.Want = upTo(4)
	hog.Fetching = ask(t, s, hog, limits).Grant
	two := word("mac-2", upTo(pieceCount)[5:]...)
	two.Want, two.Insist = []int{0, 1, 4}, []int{2}
	if a := ask(t, s, two, limits); time.Since(began) < limits.Stand && !slices.Equal(a.Grant, []int{4}) {
		t.Fatalf("granted %v, want what nobody has", a.Grant)
	}
	got, at := map[int]bool{}, time.Now()
	eventually(t, func() bool {
		ask(t, s, hog, limits)
		at = time.Now()
		for _, p := range ask(t, s, two, limits).Grant {
			got[p] = true
		}
		if len(got) > 1 && time.Since(began) < limits.Stand {
			t.Fatalf("granted %v after %s", got, time.Since(began))
		}
		return got[0] && got[1] && got[2]
	})
	if got[3] {
		t.Error("granted what it does not want")
	}
	three := word("mac-3", upTo(pieceCount)[5:]...)
	three.Want = []int{0}
	eventually(t, func() bool {
		hog.Want = upTo(4)
		back, a := ask(t, s, hog, limits), ask(t, s, three, limits)
		ask(t, s, two, limits)
		if slices.Contains(back.Grant, 0) {
			t.Fatal("mac-1 has it again")
		}
		if len(a.Grant) > 0 && time.Since(at) < 2*limits.Stand {
			t.Fatalf("mac-2 had it for %s", time.Since(at))
		}
		return len(a.Grant) > 0
	})
}

// What a node says it fetches without a grant is its claim only within its part, and if
// nobody has it; just after the store was emptied its part is all.
func chunkTaken(t *testing.T, s *store.Store) {
	limits := slow
	limits.Claim = time.Second
	one, two := word("mac-1"), word("mac-2", 9)
	one.Want, two.Want = nil, nil
	one.Fetching = []int{9, 0, 1, 2, 3, 4, 5}
	began := time.Now()
	ask(t, s, two, limits)
	known := time.Now()
	ask(t, s, one, limits) // takes 4, all that may be open
	two.Want = upTo(10)
	first := ask(t, s, two, limits)
	if time.Since(began) < limits.Claim && !slices.Equal(first.Grant, []int{4, 5}) {
		t.Fatalf("mac-2 is granted %v beside what mac-1 took up", first.Grant)
	}
	leaving := one
	leaving.Leave = true
	ask(t, s, leaving, limits)
	two.Leave = true // with piece 9: the image is remembered
	ask(t, s, two, limits)
	two.Leave, two.Want = false, nil
	eventually(t, func() bool { return time.Since(known) > limits.Claim })
	ask(t, s, two, limits)
	eventually(t, func() bool { // until it takes less than a claim lasts
		two.Want = nil
		ask(t, s, two, limits)
		began = time.Now()
		ask(t, s, one, limits) // takes 2, its part
		two.Want = upTo(10)
		a := ask(t, s, two, limits)
		if time.Since(began) >= limits.Claim {
			return false
		}
		if !slices.Equal(a.Grant, []int{2, 3}) {
			t.Fatalf("mac-2 is granted %v beside what mac-1 took up within its part", a.Grant)
		}
		return true
	})
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
		if err := s.DropChunks(t.Context(), "lab", pulled, pieceCount, nodes); err != nil {
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
	limits.Nodes = 2
	ask(t, s, word("mac-1"), limits)
	ask(t, s, word("mac-2"), limits)
	if _, err := s.Chunks(t.Context(), word("mac-3"), limits); !errors.Is(err, store.ErrFull) {
		t.Errorf("a third node: %v, want ErrFull", err)
	}
	ask(t, s, word("mac-1"), limits)
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
	if a := ask(t, s, big, slow); len(a.Grant) != 0 || !slices.Equal(names(a), []fleet.NodeID{"mac-8"}) {
		t.Errorf("granted %d, peers %v", len(a.Grant), names(a))
	}
}

// A node is in so many swarms at once, and for one more than there may be the one of which
// nothing was heard for longest is forgotten.
func chunkSwarms(t *testing.T, s *store.Store) {
	limits := slow
	limits.Swarms, limits.Joined = 3, 2
	at := func(node fleet.NodeID, site string, have ...int) store.ChunkWord {
		w := word(node, have...)
		w.Site = site
		return w
	}
	ask(t, s, at("mac-1", "a", 0), limits)
	ask(t, s, at("mac-1", "b"), limits)
	if _, err := s.Chunks(t.Context(), at("mac-1", "c"), limits); !errors.Is(err, store.ErrFull) {
		t.Errorf("a third image of a node: %v, want ErrFull", err)
	}
	ask(t, s, at("mac-2", "c"), limits)
	eventually(t, func() bool { // until the words are in different milliseconds
		ask(t, s, at("mac-1", "a", 0), limits)
		ask(t, s, at("mac-2", "c"), limits)
		ask(t, s, at("mac-3", "d"), limits) // instead of b
		a := ask(t, s, at("mac-4", "a"), limits)
		return slices.Equal(names(a), []fleet.NodeID{"mac-1"})
	})
	leaving := at("mac-1", "b")
	leaving.Leave = true
	ask(t, s, leaving, limits) // from what is forgotten: nothing is made of it
	leaving = at("mac-1", "a", 0)
	leaving.Leave = true
	ask(t, s, leaving, limits)
	ask(t, s, at("mac-1", "c"), limits)
	// Another number of pieces is another image.
	other := at("mac-5", "c", 0)
	other.Pieces++
	ask(t, s, other, limits)
	if a := ask(t, s, at("mac-2", "c"), limits); len(a.Peers) != 0 || a.Pulling != 2 {
		t.Errorf("%+v", a)
	}
}

// Many nodes with a whole image fall silent at once: a call forgets a part of it, and none
// of them is a peer meanwhile.
func chunkForgotten(t *testing.T, s *store.Store) {
	limits := slow
	limits.Silent, limits.Claim = 300*time.Millisecond, 200*time.Millisecond
	const pieces = 4098
	big := store.ChunkWord{Site: "lab", Image: pulled, Pieces: pieces, Serves: true, Have: slices.Repeat([]byte{0xff}, pieces/8)}
	for i := range 4 {
		big.Node = fleet.NodeID(fmt.Sprint("mac-1", i))
		for range pieces/1000 + 1 {
			ask(t, s, big, limits)
		}
	}
	big.Node, big.Have, big.Want = "mac-2", nil, []int{pieces - 3}
	began := time.Now()
	if a := ask(t, s, big, limits); time.Since(began) < limits.Silent/2 && len(a.Grant) != 0 {
		t.Errorf("granted %v", a.Grant)
	}
	words := 0
	eventually(t, func() bool {
		words++
		a := ask(t, s, big, limits)
		if time.Since(began) > 3*limits.Silent && len(a.Peers) > 0 {
			t.Fatalf("the silent are peers: %v", names(a))
		}
		return len(a.Grant) == 1 && a.Pulling == 1
	})
	if words < 2 {
		t.Error("all were forgotten by one word")
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
