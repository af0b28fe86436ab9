package store

import (
	"context"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/paddock-ci/paddock/fleet"
)

// What a call to Chunks looks at and remembers, at most.
const (
	// ringSize is how many nodes are noted for a piece, those that got it last: enough to
	// find it if some of them go, and they have served it least.
	ringSize = 8
	// lookAt is how many missing pieces a call looks at: all of an image of 64 GiB, and of
	// larger ones enough for what a node does next.
	lookAt = 128
	// swarmTries is how often room is made for an image that none has pulled yet: others may
	// take it meanwhile.
	swarmTries = 3
	// sweepAtOnce is how many images' keys one sweep deletes.
	sweepAtOnce = 100
)

// ChunkLimits are the times and bounds of claims. All must be set; times are compared with
// the store's clock, in milliseconds.
type ChunkLimits struct {
	Claim  time.Duration // how long a claim holds without being renewed
	Stand  time.Duration // how long one that is renewed holds against others' wishes
	Silent time.Duration // how long after its last word a node is no peer any more
	Left   time.Duration // how long a node is one after its Leave; see DropChunks
	Open   int           // claims at one site on one image; each node may have one
	Nodes  int           // that pull one image at one site
	Swarms int           // pairs of a site and an image; for one more the oldest is forgotten
	Joined int           // of them that one node pulls
	Peers  int           // in an answer
}

// UsualChunks are the limits in use.
var UsualChunks = ChunkLimits{
	// In five minutes a piece of 512 MB comes at 1.7 MB/s.
	Claim: time.Minute, Stand: 5 * time.Minute, Silent: 90 * time.Second, Left: time.Hour,
	Open:  16, // enough to keep a fast line busy with a few nodes
	Nodes: 5000, Swarms: 500, Joined: 16, Peers: 16,
}

// ChunkWord is a node's word on one image that it pulls at a site.
type ChunkWord struct {
	Site  string
	Image fleet.Digest
	Node  fleet.NodeID
	// Pieces is how many there are in all; those below are numbered from 0. Nodes that say
	// another number are of another image to each other.
	Pieces int
	Have   []byte // a bit for each piece, the lowest of each byte first; may be shorter
	// Serves: other nodes can fetch what it has.
	Serves bool
	// Ready: there is a node at the site that has the whole image.
	Ready    bool
	Fetching []int // with bytes moving: their claims are renewed
	Want     []int // to be claimed unless somebody has them, in this order
	Insist   []int // to be claimed although somebody has them; before Want
	Leave    bool  // the pull has ended: the claims are given back
}

// ChunkAnswer is what the site knows.
type ChunkAnswer struct {
	Grant   []int // of Want and Insist: claimed for the node from now on
	Pulling int   // nodes that pull the image at the site, this one too
	Peers   []ChunkPeer
}

// ChunkPeer is a node that has pieces which the asker has not.
type ChunkPeer struct {
	Node fleet.NodeID
	Have []byte // as in ChunkWord
	Left bool   // its pull has ended; see DropChunks
}

// Chunks takes a node's word on an image that it pulls and claims pieces for it: no two
// nodes have a claim on the same piece of one image at one site at the same time, though
// one that has had it for long may still fetch what was granted to another since. What an
// emptied store forgets comes back by the nodes' next words. It fails with ErrFull at a
// limit.
func (s *Store) Chunks(ctx context.Context, w ChunkWord, l ChunkLimits) (ChunkAnswer, error) {
	doing := fmt.Sprintf("claim pieces of image %s for node %s", w.Image.Short(), w.Node)
	have := trimBits(w.Have, w.Pieces)
	fetching, err := missing(w.Fetching, have, w.Pieces, nil)
	if err != nil {
		return ChunkAnswer{}, fmt.Errorf("%s: %w", doing, err)
	}
	look, insisted, wished, err := w.look(have)
	if err != nil {
		return ChunkAnswer{}, fmt.Errorf("%s: %w", doing, err)
	}
	fetching = fetching[:min(len(fetching), lookAt)]
	swarm := swarmName(w.Site, w.Image, w.Pieces)
	args := []any{
		swarm, ringSize, string(w.Node), have, flag(w.Serves), flag(w.Ready), flag(w.Leave),
		l.Claim.Milliseconds(), l.Stand.Milliseconds(), l.Silent.Milliseconds(), l.Left.Milliseconds(),
		l.Open, l.Nodes, l.Swarms, l.Joined, l.Peers, draw(w.Node, time.Now()),
	}
	args = append(append(args, len(fetching)), fetching...)
	args = append(append(args, insisted, wished, len(look)), look...)
	keys := append(s.swarmKeys(swarm), s.keys[keyAskers]+":"+string(w.Node))
	for range swarmTries {
		answer, err := s.runOn(ctx, doing, keys, chunksScript, args...)
		if err != nil {
			return ChunkAnswer{}, err
		}
		if text(answer, 0) != "oldest" {
			return chunkAnswer(answer), refusal(doing, answer)
		}
		oldest := text(answer, 1)
		if _, err := s.runOn(ctx, doing, s.swarmKeys(oldest), sweepSwarmScript, oldest, ringSize, 0); err != nil {
			return ChunkAnswer{}, err
		}
	}
	return ChunkAnswer{}, fmt.Errorf("%s: %w: images are pulled at this moment", doing, ErrFull)
}

// chunkAnswer reads what chunks.lua answered; of a refusal it makes the zero answer.
func chunkAnswer(answer []any) ChunkAnswer {
	if text(answer, 0) != "" {
		return ChunkAnswer{}
	}
	a := ChunkAnswer{Pulling: int(number(answer, 1))}
	at := 3
	for range number(answer, 2) {
		a.Grant = append(a.Grant, int(number(answer, at)))
		at++
	}
	for ; at+2 < len(answer); at += 3 {
		a.Peers = append(a.Peers, ChunkPeer{
			Node: fleet.NodeID(text(answer, at)), Left: number(answer, at+1) == 1, Have: []byte(text(answer, at+2)),
		})
	}
	return a
}

// look picks the pieces that the script looks at: first what is insisted on, then what is
// wanted, at the end some of the others that are missing, for which there may be peers.
func (w *ChunkWord) look(have []byte) (look []any, insisted, wished int, err error) {
	seen := make(map[int]bool, lookAt)
	for _, p := range w.Fetching {
		seen[p] = true
	}
	insist, err := missing(w.Insist, have, w.Pieces, seen)
	if err != nil {
		return nil, 0, 0, err
	}
	want, err := missing(w.Want, have, w.Pieces, seen)
	if err != nil {
		return nil, 0, 0, err
	}
	look = append(insist, want...)
	look = look[:min(len(look), lookAt)]
	insisted, wished = min(len(insist), len(look)), len(look)
	first := 0
	if w.Pieces > 0 {
		first = rand.IntN(w.Pieces)
	}
	for i := 0; i < w.Pieces && len(look) < lookAt; i++ {
		if p := (first + i) % w.Pieces; !hasBit(have, p) && !seen[p] {
			look = append(look, p)
		}
	}
	return look, insisted, wished, nil
}

// drawAgain is how long a node is told of the same nodes out of several that have a piece:
// its connections and tokens for them serve again.
const drawAgain = 5 * time.Minute

// draw is the number by which the script picks among nodes: another one for each node, so
// that not all come to the same.
func draw(node fleet.NodeID, now time.Time) int {
	h := fnv.New32a()
	_, _ = h.Write([]byte(node))
	return int(h.Sum32()>>2) + int(now.Unix()/int64(drawAgain/time.Second))%1000
}

// missing are the pieces of a list that are not in have and not in seen yet, and puts
// them there.
func missing(list []int, have []byte, pieces int, seen map[int]bool) ([]any, error) {
	var args []any
	for _, p := range list {
		if p < 0 || p >= pieces {
			return nil, fmt.Errorf("there is no piece %d of %d", p, pieces)
		}
		if hasBit(have, p) || seen[p] {
			continue
		}
		if seen != nil {
			seen[p] = true
		}
		args = append(args, p)
	}
	return args, nil
}

// hasBit tells whether piece p is in a set.
func hasBit(bits []byte, p int) bool { return p/8 < len(bits) && bits[p/8]>>(p%8)&1 == 1 }

// trimBits cuts what is no piece's bit and the zeros at the end: equal sets become equal
// strings.
func trimBits(bits []byte, pieces int) []byte {
	bits = slices.Clone(bits[:min(len(bits), (pieces+7)/8)])
	if full := pieces / 8; full < len(bits) {
		bits[full] &= 1<<(pieces%8) - 1
	}
	for len(bits) > 0 && bits[len(bits)-1] == 0 {
		bits = bits[:len(bits)-1]
	}
	return bits
}

// DropChunks forgets what nodes have of an image of that many pieces that have left and
// have it no more, by their reports; those that have said a word since are left alone.
func (s *Store) DropChunks(ctx context.Context, site string, image fleet.Digest, pieces int, nodes []fleet.NodeID) error {
	swarm := swarmName(site, image, pieces)
	args := []any{swarm, ringSize, len(nodes)}
	for _, n := range nodes {
		args = append(args, string(n))
	}
	_, err := s.runOn(ctx, "forget what nodes had of image "+image.Short(), s.swarmKeys(swarm), dropScript, args...)
	return err
}

// Claimants lists the nodes that have a claim now, of any image: those that fetch from
// outside their site. It is sorted.
func (s *Store) Claimants(ctx context.Context) ([]fleet.NodeID, error) {
	return s.since(ctx, "list who has claims", keyClaimants, 0)
}

// Askers lists the nodes that have said a word on any image lately: those that pull and are
// not among them pull without their site. It is sorted.
func (s *Store) Askers(ctx context.Context, lately time.Duration) ([]fleet.NodeID, error) {
	return s.since(ctx, "list who asks for pieces", keyAskers, lately)
}

// since lists the nodes at the end of the members of a sorted set whose time is later than
// so long ago.
func (s *Store) since(ctx context.Context, doing string, key int, ago time.Duration) ([]fleet.NodeID, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	now, err := s.rdb.Time(ctx).Result()
	if err != nil {
		return nil, s.wrap(ctx, doing, err)
	}
	members, err := s.rdb.ZRangeArgs(ctx, redis.ZRangeArgs{
		Key: s.keys[key], ByScore: true, Start: "(" + strconv.FormatInt(now.Add(-ago).UnixMilli(), 10), Stop: "+inf",
	}).Result()
	if err != nil {
		return nil, s.wrap(ctx, doing, err)
	}
	nodes := make([]fleet.NodeID, 0, len(members))
	for _, m := range members {
		nodes = append(nodes, fleet.NodeID(m[strings.LastIndexByte(m, ' ')+1:]))
	}
	slices.Sort(nodes)
	return slices.Compact(nodes), nil
}

// SweepChunks deletes what is kept of images of which no node has said a word for as long
// as a node that has left is remembered, and returns their number.
func (s *Store) SweepChunks(ctx context.Context, l ChunkLimits) (int, error) {
	const doing = "sweep claims"
	asking, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	oldest, err := s.rdb.ZRange(asking, s.keys[keySwarms], 0, sweepAtOnce-1).Result()
	if err != nil {
		return 0, s.wrap(asking, doing, err)
	}
	swept := 0
	for _, swarm := range oldest {
		answer, err := s.runOn(ctx, doing, s.swarmKeys(swarm), sweepSwarmScript, swarm, ringSize, l.Left.Milliseconds())
		if err != nil {
			return swept, err
		}
		if number(answer, 0) == 0 {
			break // the others are younger
		}
		swept++
	}
	return swept, nil
}

// swarmName is a site and an image in one word; neither has a space or a slash in it. The
// number of pieces is in it, since the store cannot know which one is true: whoever says a
// wrong one is alone with it.
func swarmName(site string, image fleet.Digest, pieces int) string {
	return site + "/" + string(image) + "/" + strconv.Itoa(pieces)
}

// swarmKeys are the keys of the scripts about one swarm: those of all, and its own.
func (s *Store) swarmKeys(swarm string) []string {
	prefix := s.keys[keySwarms] + ":" + swarm + ":"
	return append(slices.Clone(s.keys), prefix+"pullers", prefix+"claims", prefix+"holders")
}
