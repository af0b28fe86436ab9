package server

import (
	"sync"
	"time"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/fleet"
)

const (
	// peerTokenAge is how long a token for a peer is handed out again instead of a new one:
	// half its life, so that whoever gets it can still use it as long.
	peerTokenAge = access.PeerLife / 2
	// maxPeerTokens bounds those that are kept, half a kilobyte each: 1,000 nodes that are
	// told of 16 each, twice over. One more only costs a signature.
	maxPeerTokens = 32_000
)

// peerTokens signs what opens one node's peer port to another, and keeps it for a while:
// a node speaks every second or so, and a signature costs 30 µs.
type peerTokens struct {
	signer access.PeerSigner

	mu         sync.Mutex
	young, old map[peerPair]peerToken // old: of the period before
	turned     time.Time              // when young was begun
}

// peerPair is what a token is for. The certificates are in it: with a new one a node needs
// new tokens.
type peerPair struct {
	receiver, server fleet.NodeID
	certificate      string // the receiver's
	image            fleet.Digest
}

type peerToken struct {
	text string
	made time.Time
}

func newPeerTokens(signer access.PeerSigner) *peerTokens {
	return &peerTokens{signer: signer, young: map[peerPair]peerToken{}}
}

// token is for receiver at server, for one image, good for access.PeerLife at most and for
// half of it at least.
func (p *peerTokens) token(receiver, server *fleet.Node, d fleet.Digest, now time.Time) (string, error) {
	pair := peerPair{receiver.ID, server.ID, receiver.Peer.Certificate, d}
	if kept, ok := p.kept(pair, now); ok {
		return kept, nil
	}
	signed, err := p.signer.Sign(access.PeerGrant{
		Receiver: pair.receiver, Server: pair.server, Image: d, ReceiverCertificate: pair.certificate, ExpiresAt: now.Add(access.PeerLife),
	})
	if err != nil {
		return "", err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.young) >= maxPeerTokens {
		p.turn(now)
	}
	p.young[pair] = peerToken{string(signed), now}
	return string(signed), nil
}

// kept finds a token that is young enough.
func (p *peerTokens) kept(pair peerPair, now time.Time) (string, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if now.Sub(p.turned) >= peerTokenAge {
		p.turn(now)
	}
	kept, ok := p.young[pair]
	if !ok {
		kept, ok = p.old[pair]
	}
	age := now.Sub(kept.made)
	return kept.text, ok && age >= 0 && age < peerTokenAge
}

// turn begins a period; what is from before the last is dropped.
func (p *peerTokens) turn(now time.Time) {
	p.old, p.young, p.turned = p.young, map[peerPair]peerToken{}, now
}
