package node

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// askTime bounds one question to the controller while a pull waits for the answer.
const askTime = 10 * time.Second

// SiteConfig of a Site. Node and Chunks are required.
type SiteConfig struct {
	Node fleet.NodeID
	// Chunks asks the controller; *api.Client's.
	Chunks func(ctx context.Context, node fleet.NodeID, r api.ChunksRequest) (api.ChunksReply, error)
	// Source makes a source of another node, known by its name, its address, its
	// certificate's hash and a token for it, that has what has says; (*peer.Client).Source.
	// nil: nothing is fetched from other nodes.
	Source func(id fleet.NodeID, at fleet.NodePeer, token access.Token, has func(cache.Want) bool) cache.Source
	Log    *slog.Logger // nil: nothing is logged
}

// Site is the other nodes nearby as the image store sees them, through the controller. It
// is made before the store and the agent, which both work with it, and holds no state.
type Site struct{ c SiteConfig }

var _ cache.Site = (*Site)(nil)

// NewSite checks the configuration.
func NewSite(c SiteConfig) (*Site, error) {
	if c.Chunks == nil {
		return nil, errors.New("site: Chunks is needed")
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return &Site{c: c}, nil
}

// Ask passes a pull's word on, and returns what it may fetch from outside and the nodes
// that have the rest. What is not to be understood of one node costs that node only.
func (s *Site) Ask(ctx context.Context, a cache.Ask) (cache.Answer, error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	reply, err := s.c.Chunks(ctx, s.c.Node, api.ChunksRequest{
		Image: a.Image, Ref: a.Ref, Pieces: a.Pieces, Have: writeBits(a.Have, a.Pieces),
		Fetching: a.Fetching, Want: a.Want, Insist: a.Insist, Leave: a.Leave,
	})
	if err != nil {
		return cache.Answer{}, fmt.Errorf("asking the controller who has image %s: %w", a.Image.Short(), err)
	}
	answer := cache.Answer{Again: reply.Again}
	for _, n := range reply.Grant {
		if slices.Contains(a.Want, n) || slices.Contains(a.Insist, n) {
			answer.Grant = append(answer.Grant, n)
		}
	}
	for _, p := range reply.Peers {
		if s.c.Source == nil || p.Node == s.c.Node || p.Address == "" {
			continue
		}
		has, err := s.pieces(p, a.Pieces)
		if err != nil {
			s.c.Log.Debug("a peer is left out", "image", a.Image.Short(), "error", err) // at each ask
			continue
		}
		answer.Peers = append(answer.Peers, s.c.Source(p.Node, p.NodePeer, access.Token(p.Token), has))
	}
	return answer, nil
}

// pieces tells of a piece whether a peer has it.
func (s *Site) pieces(p api.Peer, pieces int) (func(cache.Want) bool, error) {
	if p.Have == "" {
		return func(cache.Want) bool { return true }, nil
	}
	bits, err := base64.StdEncoding.DecodeString(p.Have)
	if err != nil || len(bits) > (pieces+7)/8 {
		return nil, fmt.Errorf("the controller's word on what node %s has is no list of %d pieces", p.Node, pieces)
	}
	return func(w cache.Want) bool { return hasBit(bits, pieceOf(w, pieces)) }, nil
}

// pieceOf is a piece's number: disk chunks, then the NVRAM, then the VM config.
func pieceOf(w cache.Want, pieces int) int {
	switch w.Chunk.Index {
	case image.NVRAMIndex:
		return pieces - 2
	case image.ConfigIndex:
		return pieces - 1
	}
	return w.Chunk.Index
}

// writeBits is base64 of a bit for each piece, the lowest of each byte first.
func writeBits(have []int, pieces int) string {
	if len(have) == 0 {
		return ""
	}
	bits := make([]byte, (pieces+7)/8)
	for _, n := range have {
		if n >= 0 && n < pieces {
			bits[n/8] |= 1 << (n % 8)
		}
	}
	return base64.StdEncoding.EncodeToString(bits)
}

func hasBit(bits []byte, n int) bool {
	return n >= 0 && n/8 < len(bits) && bits[n/8]>>(n%8)&1 == 1
}
