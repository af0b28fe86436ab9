package server

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
	"github.com/paddock-ci/paddock/store"
)

const (
	// maxPieces is an image's most: its layers, which include NVRAM and config, and two to
	// spare for formats whose config is none.
	maxPieces = image.MaxLayers + 2
	// maxPeers is how many nodes one is told of: more than it fetches from at a time, and a
	// few kilobytes.
	maxPeers = 16
	// readyPeers of them may be nodes that have all; the rest is kept for those that have
	// parts, as far as there are any, so that one that is finished does not serve all.
	readyPeers = 8

	// againSoon and againAtMost bound the time until a node's next word on an image, and
	// againNodes is how many may speak every againSoon: together 40 words a second.
	againSoon   = 500 * time.Millisecond
	againAtMost = 5 * time.Second
	againNodes  = 20
)

// chunks takes a node's word on an image that it pulls, and answers what it may fetch from
// outside its site and who nearby has the rest.
func (s *Server) chunks(ctx context.Context, c call, q api.ChunksRequest) (api.ChunksReply, error) {
	node := fleet.NodeID(c.id)
	if err := s.ownWord(c); err != nil {
		return api.ChunksReply{}, err
	}
	have, err := checkChunks(&q)
	if err != nil {
		return api.ChunksReply{}, err
	}
	if wait := s.lastWords.early(wordOn{node, q.Image, q.Pieces == 0, q.Leave}, c.now); wait > 0 {
		return api.ChunksReply{}, &api.Error{Status: http.StatusTooManyRequests, Again: wait,
			Message: fmt.Sprintf("node %s spoke of image %s just now", node, q.Image.Short()), Hint: "speak when the last answer said"}
	}
	known, err := s.knowing(ctx, c.now, node, func(at *sites) error { return s.mayPull(at.view, node, q.Image) })
	if err != nil {
		return api.ChunksReply{}, err
	}
	self := known.view.Nodes[node]
	others := func(nodes []*fleet.Node) []*fleet.Node {
		return slices.DeleteFunc(slices.Clone(nodes), func(n *fleet.Node) bool { return n.ID == node })
	}
	ready := others(known.ready[place{self.Site, q.Image}])
	if q.Pieces == 0 {
		reply := api.ChunksReply{Again: againSoon}
		reply.Peers, err = s.manifestPeers(self, q.Image, ready, others(known.parts[place{self.Site, q.Image}]), c.now)
		return reply, err
	}
	answer, err := s.c.Store.Chunks(ctx, store.ChunkWord{
		Site: self.Site, Image: q.Image, Node: node, Pieces: q.Pieces, Have: have,
		Serves: self.Peer.Address != "", Ready: len(ready) > 0,
		Fetching: q.Fetching, Want: q.Want, Insist: q.Insist, Leave: q.Leave,
	}, store.UsualChunks)
	if errors.Is(err, store.ErrFull) {
		return api.ChunksReply{}, refusal(http.StatusTooManyRequests, "more is being pulled than claims are kept for: "+err.Error(), "try again when some of it is done; until then pull without the site")
	}
	if err != nil {
		return api.ChunksReply{}, err
	}
	reply := api.ChunksReply{Grant: answer.Grant, Again: again(answer.Pulling)}
	s.metrics.grants.Add(float64(len(answer.Grant)))
	if q.Leave {
		return reply, nil
	}
	reply.Peers, err = s.peers(ctx, known, self, &q, ready, answer.Peers, c.now)
	return reply, err
}

// ownWord refuses a node's call in another's name.
func (s *Server) ownWord(c call) error {
	if c.who.Subject == c.id {
		return nil
	}
	return refusal(http.StatusForbidden, fmt.Sprintf("this credential is node %s's, not %s's: a node speaks only for itself", c.who.Subject, c.id),
		"join under this name with a token of its own (paddock node join)")
}

// knowing returns a picture of the fleet that has the node and agrees; only if the kept
// one does not, the store is read, so that most calls cost no look at it.
func (s *Server) knowing(ctx context.Context, now time.Time, node fleet.NodeID, agrees func(*sites) error) (*sites, error) {
	known, err := s.sites(ctx, now)
	if err == nil && known.view.Nodes[node] != nil && agrees(known) == nil {
		return known, nil
	}
	if err != nil {
		return nil, err
	}
	if known, err = s.freshSites(ctx, now); err != nil {
		return nil, err
	}
	if known.view.Nodes[node] == nil {
		return nil, refusal(http.StatusServiceUnavailable, fmt.Sprintf("node %s has not reported since the store was made", node), "try again after its next sync")
	}
	return known, agrees(known)
}

// checkChunks refuses what no agent of ours sends, and reads the pieces it has.
func checkChunks(q *api.ChunksRequest) (have []byte, err error) {
	bad := func(what string) error {
		return refusal(http.StatusBadRequest, "a word on an image with "+what, "this is not what a paddock node sends; compare the versions")
	}
	if err := fleet.CheckDigest(q.Image); err != nil {
		return nil, bad(cut(err.Error()))
	}
	if q.Pieces < 0 || q.Pieces > maxPieces {
		return nil, bad(fmt.Sprintf("%d pieces; want at most %d", q.Pieces, maxPieces))
	}
	if long(maxText, q.Ref) {
		return nil, bad("an overlong image reference")
	}
	for _, list := range [][]int{q.Fetching, q.Want, q.Insist} {
		if len(list) > q.Pieces {
			return nil, bad("a list of more pieces than there are")
		}
		for _, p := range list {
			if p < 0 || p >= q.Pieces {
				return nil, bad(fmt.Sprintf("piece %d of %d", p, q.Pieces))
			}
		}
	}
	have, err = base64.StdEncoding.DecodeString(q.Have)
	if err != nil || len(have) > (q.Pieces+7)/8 {
		return nil, bad("what it has not as base64 of a bit for each piece")
	}
	return have, nil
}

// again is when a node shall speak again: often enough to learn of peers' new pieces while
// they matter, and all together not too often.
func again(pulling int) time.Duration {
	return min(againAtMost, againSoon*time.Duration(max(againNodes, pulling))/againNodes)
}

// manifestPeers answers a node that has not even the manifest, and so cannot say a word on
// pieces: nodes of the site that have it, since they have the image or parts of it.
func (s *Server) manifestPeers(self *fleet.Node, d fleet.Digest, ready, parts []*fleet.Node, now time.Time) (peers []api.Peer, err error) {
	nodes := append(someOf(ready, readyPeers, self.ID, now), someOf(parts, maxPeers-readyPeers, self.ID, now)...)
	for _, n := range nodes {
		token, err := s.peerTokens.token(self, n, d, now)
		if err != nil {
			return nil, err
		}
		peers = append(peers, api.Peer{Node: n.ID, NodePeer: n.Peer, Token: token})
	}
	return peers, nil
}

// peers are nodes of the site that have the image or parts of it, with a token for each.
// Nodes that the store remembers for what they had, and that have it no more by their own
// reports, are forgotten on the way.
func (s *Server) peers(ctx context.Context, known *sites, self *fleet.Node, q *api.ChunksRequest, ready []*fleet.Node, parts []store.ChunkPeer, now time.Time) ([]api.Peer, error) {
	var (
		gone  []fleet.NodeID
		peers []api.Peer
		add   = func(n *fleet.Node, have []byte) error {
			token, err := s.peerTokens.token(self, n, q.Image, now)
			if err != nil {
				return err
			}
			peers = append(peers, api.Peer{Node: n.ID, NodePeer: n.Peer, Have: base64.StdEncoding.EncodeToString(have), Token: token})
			return nil
		}
	)
	first := someOf(ready, min(len(ready), max(readyPeers, maxPeers-len(parts))), self.ID, now)
	for _, n := range first {
		if err := add(n, nil); err != nil {
			return nil, err
		}
	}
	for _, p := range parts {
		n := known.view.Nodes[p.Node]
		serves := n != nil && n.Peer.Address != "" && n.Site == self.Site
		if p.Left && (!serves || !stillHas(n, q.Image) || now.Sub(n.SeenAt) >= peerSilent) {
			gone = append(gone, p.Node)
			continue
		}
		if !serves || len(peers) == maxPeers || slices.Contains(ready, n) {
			continue
		}
		if err := add(n, p.Have); err != nil {
			return nil, err
		}
	}
	if len(gone) > 0 {
		// What fails here is tried again by the next node that is told of them.
		if err := s.c.Store.DropChunks(ctx, self.Site, q.Image, q.Pieces, gone); err != nil {
			s.log.Warn("nodes that had parts of an image are not forgotten yet", "image", q.Image, "error", err)
		}
	}
	return peers, nil
}

// stillHas: the node reports the image as there, or as coming.
func stillHas(n *fleet.Node, d fleet.Digest) bool {
	i, ok := n.Image(d)
	return ok && holds(i.State)
}
