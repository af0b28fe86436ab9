package node

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// named is a source that only says who it is and what it has.
type named struct {
	cache.Source
	id    fleet.NodeID
	at    fleet.NodePeer
	token access.Token
	has   func(cache.Want) bool
}

func newNamed(id fleet.NodeID, at fleet.NodePeer, token access.Token, has func(cache.Want) bool) cache.Source {
	return &named{id: id, at: at, token: token, has: has}
}

func want(index int) cache.Want { return cache.Want{Chunk: image.Chunk{Index: index}} }

// mac-1 pulls an image of 20 chunks, NVRAM and config: 22 pieces. mac-2 has chunks 0, 9
// and 19 and the config, mac-3 has all, mac-4 listens nowhere. What is said of mac-2 and
// cannot be read costs mac-2 only.
func TestAsk(t *testing.T) {
	theirs := writeBits([]int{0, 9, 19, 21}, 22)
	var asked api.ChunksRequest
	reply := api.ChunksReply{
		Grant: []int{3, 5, 7}, Again: 4 * time.Second,
		Peers: []api.Peer{
			{Node: "mac-2", NodePeer: fleet.NodePeer{Address: "10.0.0.2:7600", Certificate: "c2"}, Have: theirs, Token: "t2"},
			{Node: "mac-3", NodePeer: fleet.NodePeer{Address: "10.0.0.3:7600", Certificate: "c3"}, Token: "t3"},
			{Node: "mac-4", NodePeer: fleet.NodePeer{Certificate: "c4"}, Token: "t4"},
			{Node: "mac-1", NodePeer: fleet.NodePeer{Address: "10.0.0.1:7600", Certificate: "c1"}, Token: "t1"},
		},
	}
	site, err := NewSite(SiteConfig{Node: "mac-1", Source: newNamed, Chunks: func(ctx context.Context, id fleet.NodeID, r api.ChunksRequest) (api.ChunksReply, error) {
		if _, bounded := ctx.Deadline(); !bounded || id != "mac-1" {
			t.Errorf("asked for %s, bounded: %v", id, bounded)
		}
		asked = r
		return reply, nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	answer, err := site.Ask(t.Context(), cache.Ask{Ref: "r", Image: base, Pieces: 22, Have: []int{1, 8, 21}, Fetching: []int{2}, Want: []int{3, 4}, Insist: []int{5}})
	if err != nil {
		t.Fatal(err)
	}
	wanted := api.ChunksRequest{Ref: "r", Image: base, Pieces: 22, Have: "AgEg", Fetching: []int{2}, Want: []int{3, 4}, Insist: []int{5}}
	if diff := cmp.Diff(wanted, asked); diff != "" {
		t.Error(diff)
	}
	if !slices.Equal(answer.Grant, []int{3, 5}) || answer.Again != 4*time.Second {
		t.Errorf("granted %v, again in %s: want what was asked for only", answer.Grant, answer.Again)
	}
	if len(answer.Peers) != 2 {
		t.Fatalf("%d peers, want mac-2 and mac-3", len(answer.Peers))
	}
	second, third := answer.Peers[0].(*named), answer.Peers[1].(*named)
	if second.id != "mac-2" || second.at.Certificate != "c2" || second.at.Address != "10.0.0.2:7600" || second.token != "t2" || third.id != "mac-3" {
		t.Errorf("%+v, %+v", second, third)
	}
	for index, has := range map[int]bool{0: true, 1: false, 9: true, 19: true, 20: false, 1000: false, image.NVRAMIndex: false, image.ConfigIndex: true} {
		if second.has(want(index)) != has || !third.has(want(index)) {
			t.Errorf("piece %d: mac-2 has it: %v; mac-3: %v", index, second.has(want(index)), third.has(want(index)))
		}
	}

	for name, have := range map[string]string{"too long": writeBits([]int{25}, 30), "no base64": "§"} {
		reply.Peers[0].Have = have
		answer, err := site.Ask(t.Context(), cache.Ask{Image: base, Pieces: 22, Want: []int{3}})
		if err != nil || len(answer.Peers) != 1 || answer.Peers[0].(*named).id != "mac-3" || !slices.Equal(answer.Grant, []int{3}) {
			t.Errorf("%s: granted %v, peers %v, %v; want all but mac-2", name, answer.Grant, answer.Peers, err)
		}
	}
}

func TestAskFails(t *testing.T) {
	gone := errors.New("no route")
	site, err := NewSite(SiteConfig{Node: "mac-1", Chunks: func(context.Context, fleet.NodeID, api.ChunksRequest) (api.ChunksReply, error) {
		return api.ChunksReply{}, gone
	}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := site.Ask(t.Context(), cache.Ask{Image: base}); !errors.Is(err, gone) {
		t.Errorf("%v", err)
	}
}

// FuzzPieces: whatever the controller says of who has what, nothing panics, and no piece
// is there that no bit stands for.
func FuzzPieces(f *testing.F) {
	f.Add("AgEg", 22, 1)
	f.Add("", 0, -1)
	f.Add("////", 9, -2)
	f.Fuzz(func(t *testing.T, have string, pieces, index int) {
		if pieces < 0 || pieces > 1<<16 {
			return
		}
		has, err := (&Site{}).pieces(api.Peer{Have: have}, pieces)
		if err == nil && have != "" && has(want(index)) && pieceOf(want(index), pieces) >= (pieces+7)/8*8 {
			t.Errorf("piece %d of %d is there, by %q", index, pieces, have)
		}
	})
}

// till sells tokens: it counts them, and can be slow or closed.
type till struct {
	sold  atomic.Int32
	life  time.Duration
	fail  error
	takes time.Duration
}

func (b *till) sell(ctx context.Context, id fleet.NodeID, r api.PullTokenRequest) (api.PullTokenReply, error) {
	select {
	case <-time.After(b.takes):
	case <-ctx.Done():
		return api.PullTokenReply{}, ctx.Err()
	}
	if b.fail != nil {
		return api.PullTokenReply{}, b.fail
	}
	return api.PullTokenReply{Token: fmt.Sprintf("%s %s %d", id, r.Repository, b.sold.Add(1)), ExpiresAt: time.Now().Add(b.life)}, nil
}

// Streams that begin together share one token; who comes back after half a minute was
// refused with it and gets another; one that ends sooner is not given out at its end.
func TestTokens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &till{life: 5 * time.Minute, takes: time.Second}
		tokens, err := NewTokens(TokensConfig{Node: "mac-1", PullToken: b.sell})
		if err != nil {
			t.Fatal(err)
		}
		get := func(ctx context.Context, repository, want string) {
			t.Helper()
			if got, err := tokens.PullToken(ctx, repository); err != nil || got != want {
				t.Errorf("%q, %v, want %q", got, err, want)
			}
		}
		// The one who asks first gives up while the others wait: one of them asks again.
		hasty, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		var streams sync.WaitGroup
		streams.Go(func() {
			if _, err := tokens.PullToken(hasty, "r/a"); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%v", err)
			}
		})
		synctest.Wait()
		for range 8 {
			streams.Go(func() { get(t.Context(), "r/a", "mac-1 r/a 1") })
		}
		streams.Wait()
		get(t.Context(), "r/b", "mac-1 r/b 2")
		time.Sleep(tokenShared)
		b.life = tokenMargin + 3*time.Second
		get(t.Context(), "r/a", "mac-1 r/a 3")
		time.Sleep(2 * time.Second)
		get(t.Context(), "r/a", "mac-1 r/a 3")
		time.Sleep(2 * time.Second)
		get(t.Context(), "r/a", "mac-1 r/a 4")

		// What the controller refuses is not asked for otherwise; when it is away, the node
		// goes on with what it has, and asks again a little later.
		b.fail = &api.Error{Status: http.StatusForbidden, Message: "not from there"}
		time.Sleep(tokenShared)
		for range 2 {
			if _, err := tokens.PullToken(t.Context(), "r/a"); !errors.Is(err, b.fail) || cache.ClassOf(err) != cache.ClassAuth {
				t.Errorf("%v", err)
			}
		}
		for _, away := range []error{errors.New("no route to host"), &api.Error{Status: http.StatusBadGateway, Message: "down"}} {
			b.fail = away
			get(t.Context(), "r/a", "")
			time.Sleep(tokenPause)
		}
		b.fail, b.takes = nil, tokenTime+time.Second
		get(t.Context(), "r/a", "")
		b.takes = 0
		get(t.Context(), "r/a", "")
		time.Sleep(tokenPause)
		get(t.Context(), "r/a", "mac-1 r/a 5")
	})
}
