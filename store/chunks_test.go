package store_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
)

// The cast: nodes of the site lab that pull an image of 94 pieces, 2/3 of 50 GB.
const chunkPieces = 94

var chunkLimits = store.UsualChunks

func chunkWord(node fleet.NodeID, have ...int) store.ChunkWord {
	w := store.ChunkWord{
		Site: "lab", Image: fleet.Digest("sha256:" + strings.Repeat("a", 64)), Node: node, Pieces: chunkPieces,
		Have: make([]byte, (chunkPieces+7)/8), Serves: true,
	}
	for p := range chunkPieces {
		if slices.Contains(have, p) {
			w.Have[p/8] |= 1 << (p % 8)
		} else {
			w.Want = append(w.Want, p)
		}
	}
	return w
}

// TestClaimsAfterFlushAll: an emptied store has forgotten claims and pieces. What is being
// fetched is claimed again by the next word of whoever fetches it, and what a node has is
// known again by its own; nobody is refused.
func TestClaimsAfterFlushAll(t *testing.T) {
	s, ctl := openRedis(t, store.Config{})
	t.Run("redis", func(t *testing.T) { claimsFlushed(t, s, func() { ctl.Flush(t) }) })
	t.Run("redis killed", func(t *testing.T) {
		ctl.Flush(t)
		claimsFlushed(t, s, func() {
			ctl.Stop(t)
			if _, err := s.Chunks(t.Context(), chunkWord("mac-1"), chunkLimits); err == nil {
				t.Error("a store that is away grants claims")
			}
			ctl.Start(t)
			ctl.Flush(t)
		})
	})
	e := openEmbedded(t, store.EmbeddedConfig{})
	t.Run("embedded", func(t *testing.T) { claimsFlushed(t, e, e.FlushEmbedded) })
}

func claimsFlushed(t *testing.T, s *store.Store, flush func()) {
	say := func(w store.ChunkWord) store.ChunkAnswer {
		t.Helper()
		a, err := s.Chunks(t.Context(), w, chunkLimits)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	one := chunkWord("mac-1", 0, 1)
	one.Fetching = say(one).Grant
	say(chunkWord("mac-2", 20))
	flush()
	a := say(one)
	for _, p := range a.Grant {
		if slices.Contains(one.Fetching, p) {
			t.Errorf("piece %d, which mac-1 fetches, is granted to it again", p)
		}
	}
	two := say(chunkWord("mac-2", 20))
	if len(two.Peers) != 1 || two.Peers[0].Node != "mac-1" || len(two.Grant) == 0 {
		t.Errorf("%+v", two)
	}
	for _, p := range two.Grant {
		if p < 2 || slices.Contains(one.Fetching, p) {
			t.Errorf("piece %d is granted to mac-2, and mac-1 has or fetches it", p)
		}
	}
}

// A Redis does nothing else meanwhile: no word costs it much, neither one that changes all
// that a node has nor one after which eight silent nodes have to be forgotten.
func TestChunksCost(t *testing.T) {
	s, ctl := openRedis(t, store.Config{})
	const pieces, nodes, most = 5002, 30, 60 * time.Millisecond
	w := chunkWord("mac-0")
	w.Pieces, w.Want = pieces, nil
	full, limits := slices.Repeat([]byte{0xff}, (pieces+7)/8), chunkLimits
	took := map[string][]time.Duration{}
	say := func(what string) {
		t.Helper()
		before := ctl.CPU(t)
		if _, err := s.Chunks(t.Context(), w, limits); err != nil {
			t.Fatal(err)
		}
		took[what] = append(took[what], ctl.CPU(t)-before)
	}
	for i := range nodes {
		w.Node, w.Have = fleet.NodeID(fmt.Sprint("mac-", i)), full
		for range pieces/1000 + 1 {
			say("with all")
		}
	}
	w.Node = "mac-0"
	for range 4 {
		w.Have = nil
		say("with nothing any more")
		w.Have = full
		say("with all again")
	}
	limits.Silent = time.Millisecond
	w.Node, w.Have = "mac-99", nil
	for range 3 { // without a bound, 8 nodes each
		say("that forgets")
	}
	for what, costs := range took {
		slices.Sort(costs)
		cost := costs[len(costs)/2] // one may be charged with what is not its own
		t.Logf("a word %s costs %s", what, cost)
		if cost > most {
			t.Errorf("a word %s costs %s, want at most %s", what, cost, most)
		}
	}
}

// BenchmarkChunks is the words of 1,000 nodes that pull one image, one word after the
// other of random nodes on a real Redis, each with a few pieces more than its last.
func BenchmarkChunks(b *testing.B) {
	for _, pieces := range []int{chunkPieces, 4000} {
		b.Run(fmt.Sprint(pieces, "-pieces"), func(b *testing.B) { benchChunks(b, pieces) })
	}
}

func benchChunks(b *testing.B, pieces int) {
	const nodes = 1000
	s, ctl := openRedis(b, store.Config{})
	words := make([]store.ChunkWord, nodes)
	for i := range words {
		words[i] = chunkWord(fleet.NodeID(fmt.Sprint("mac-", i)))
		words[i].Pieces, words[i].Have = pieces, make([]byte, (pieces+7)/8)
		for range pieces / 2 {
			p := rand.IntN(pieces)
			words[i].Have[p/8] |= 1 << (p % 8)
		}
		for range pieces/1000 + 1 { // one does not note so many
			if _, err := s.Chunks(b.Context(), words[i], chunkLimits); err != nil {
				b.Fatal(err)
			}
		}
	}
	var last atomic.Int64
	b.SetParallelism(16)
	burned := ctl.CPU(b)
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			w := words[last.Add(1)%nodes]
			w.Have = slices.Clone(w.Have)
			p := rand.IntN(pieces)
			w.Have[p/8] |= 1 << (p % 8)
			if _, err := s.Chunks(b.Context(), w, chunkLimits); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "words/s")
	b.ReportMetric(float64((ctl.CPU(b)-burned).Microseconds())/float64(b.N), "redis-µs/word")
}
