package api

import (
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// ChunksRequest is a node's word on an image that it pulls; see cache.Ask, which it is on
// the wire. With no Pieces and no lists it is the word of a node that has not got the
// manifest yet, and the answer names peers that have it, without their pieces.
type ChunksRequest struct {
	Image    fleet.Digest `json:"image"`
	Ref      string       `json:"ref"`
	Pieces   int          `json:"pieces"`
	Have     string       `json:"have,omitempty"` // base64 of a bit for each piece, the lowest of each byte first
	Fetching []int        `json:"fetching,omitempty"`
	Want     []int        `json:"want,omitempty"`
	Insist   []int        `json:"insist,omitempty"`
	Leave    bool         `json:"leave,omitempty"`
}

// ChunksReply says what may be fetched from outside, and who has the rest.
type ChunksReply struct {
	Grant []int         `json:"grant,omitempty"`
	Peers []Peer        `json:"peers,omitempty"`
	Again time.Duration `json:"again"`
}

// Peer is a node that has pieces of an image.
type Peer struct {
	Node fleet.NodeID `json:"node"`
	fleet.NodePeer
	Have  string `json:"have,omitempty"` // as in ChunksRequest; empty: all
	Token string `json:"token"`          // secret: for this node at that one, for this image, ten minutes
}

// PullTokenRequest asks for a registry's token.
type PullTokenRequest struct {
	Repository string `json:"repository"` // host/name, of an image that the node was ordered to hold
}

// PullTokenReply is what the controller's credentials bought, good for pulls from that
// repository only. Empty: the repository is asked without one.
type PullTokenReply struct {
	Token     string    `json:"token,omitempty"` // secret
	ExpiresAt time.Time `json:"expires_at,omitzero"`
}
