package server

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
	"github.com/paddock-ci/paddock/store/storetest"
)

// rollout is nodes of one site that pull the image of the cast through the controller: a
// piece a round each from outside, as far as they are granted, and one from a peer.
type rollout struct {
	h       *house
	macs    []*mac
	have    []map[int]bool
	claimed []map[int]bool
	outside int // pieces that came from outside
	failed  int // words that were not answered
}

const rolloutPieces = 60

func newRollout(h *house, n int) *rollout {
	r := &rollout{h: h}
	for i := range n {
		r.macs = append(r.macs, h.puller(fleet.NodeID(fmt.Sprint("mac", i)), fleet.ImageCaching))
		r.have, r.claimed = append(r.have, map[int]bool{}), append(r.claimed, map[int]bool{})
	}
	h.advance(sitesAge)
	return r
}

// replace has the macs talk to another server, as after a restart.
func (r *rollout) replace(s *Server) {
	r.h.http.Close()
	r.h.server = s
	r.h.http = httptest.NewServer(s.Handler())
	r.h.t.Cleanup(r.h.http.Close)
	for _, m := range r.macs {
		m.client = r.h.client(access.Node, string(m.id))
	}
}

// round has every node speak and fetch; it reports whether all have all.
func (r *rollout) round() (done bool) {
	r.h.t.Helper()
	done = true
	for i, m := range r.macs {
		if len(r.have[i]) == rolloutPieces {
			continue
		}
		done = false
		r.h.advance(wordGap)
		reply, err := m.client.Chunks(r.h.t.Context(), m.id, r.word(i))
		if err != nil {
			if status(r.h.t, err) != http.StatusServiceUnavailable {
				r.h.t.Fatal(err)
			}
			r.failed++
			m.say() // the store was emptied: it hears of the node again
			continue
		}
		for _, p := range reply.Grant {
			r.claimed[i][p] = true
		}
		for p := range r.claimed[i] {
			delete(r.claimed[i], p)
			r.have[i][p] = true
			r.outside++
			break
		}
		r.fromPeers(i, reply.Peers)
	}
	return done
}

func (r *rollout) word(i int) api.ChunksRequest {
	q := api.ChunksRequest{Image: digest, Ref: ref, Pieces: rolloutPieces}
	bits := make([]byte, (rolloutPieces+7)/8)
	for p := range rolloutPieces {
		switch {
		case r.have[i][p]:
			bits[p/8] |= 1 << (p % 8)
		case r.claimed[i][p]:
			q.Fetching = append(q.Fetching, p)
		default:
			q.Want = append(q.Want, p)
		}
	}
	q.Have = base64.StdEncoding.EncodeToString(bits)
	return q
}

// fromPeers takes a piece from one of the peers, which must have what is said of it.
func (r *rollout) fromPeers(i int, peers []api.Peer) {
	r.h.t.Helper()
	for _, peer := range peers {
		bits, err := base64.StdEncoding.DecodeString(peer.Have)
		if err != nil {
			r.h.t.Fatal(err)
		}
		for k, m := range r.macs {
			if m.id != peer.Node {
				continue
			}
			for p := range rolloutPieces {
				if p/8 >= len(bits) || bits[p/8]>>(p%8)&1 == 0 {
					continue
				}
				if !r.have[k][p] {
					r.h.t.Fatalf("%s is said to have piece %d", peer.Node, p)
				}
				if !r.have[i][p] && !r.claimed[i][p] {
					r.have[i][p] = true
					return
				}
			}
		}
	}
}

// Eight nodes pull an image while the controller is replaced and the store is emptied:
// nobody is refused for good, all get all, and from outside come besides each piece once
// only those that the emptied store did not know of for a moment.
func TestPullThroughRestartAndEmptiedStore(t *testing.T) {
	url, redis := storetest.StartRedis(t)
	s, err := store.Open(t.Context(), store.Config{URL: url})
	if err != nil {
		t.Fatal(err)
	}
	h := newHouseOn(t, s)
	r := newRollout(h, 8)
	for n := 0; !r.round(); n++ {
		switch n {
		case 2:
			before := r.outside
			r.replace(h.serve())
			if r.round(); r.outside == before || r.failed != 0 {
				t.Error("the restart of the controller stops the pulls")
			}
		case 4:
			redis.Flush(t)
			h.advance(sitesAge)
		case 1000:
			t.Fatalf("no end: %v", r.have)
		}
	}
	t.Logf("%d pieces from outside of %d, %d words not answered", r.outside, rolloutPieces, r.failed)
	again := 0 // what the nodes may claim one after the other before the last of them has spoken
	for n := range r.macs {
		again += max(1, store.UsualChunks.Open/(n+1))
	}
	if r.outside < rolloutPieces || r.outside > rolloutPieces+again {
		t.Errorf("%d pieces from outside, want %d and at most %d more for the emptied store", r.outside, rolloutPieces, again)
	}
	if r.failed == 0 {
		t.Error("the store was not emptied in mid-pull")
	}
}
