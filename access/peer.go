package access

import (
	"crypto/ed25519"
	"encoding/base64"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"github.com/paddock-ci/paddock/fleet"
)

// PeerLife is how long a grant lasts. A node gets new ones at each of its asks, which are
// seconds apart, so it only has to outlast a transfer's beginning.
const PeerLife = 10 * time.Minute

// peerPrefix tells such a token from the others, for people and secret scanners.
const peerPrefix = "pdkpeer_"

// PeerGrant lets one node fetch one image's pieces from another. Its token goes to the
// receiver, who shows it at the server's peer port. It is a bearer token: it travels in
// TLS to a server that is known by the hash of its certificate, and nowhere else; and if
// ReceiverCertificate is set, whoever shows it must also hold that certificate's key, so
// that the token alone, were it stolen by a guest, opens nothing.
type PeerGrant struct {
	Receiver, Server fleet.NodeID
	Image            fleet.Digest // of the manifest
	ExpiresAt        time.Time    // in whole seconds
	// ReceiverCertificate is the hex SHA-256 of the certificate (DER) that the receiver
	// shows as a TLS client: its fleet.NodePeer.Certificate. Empty: any, or none.
	ReceiverCertificate string
}

// ErrPeerElsewhere refuses a token at a node or for an image that it does not name.
var ErrPeerElsewhere = &Error{"the peer token is for another node, image or receiver", "each token opens one image on one node for one other node"}

// PeerSigner signs grants. It holds the one subkey that this needs, derived once: that
// costs as much as a signature. The zero one signs nothing and fails with ErrKey.
type PeerSigner struct{ key ed25519.PrivateKey }

// PeerSigner derives what signs this key's grants.
func (k Key) PeerSigner() (PeerSigner, error) {
	signer, err := k.signer(purposePeer)
	return PeerSigner{signer}, err
}

// Format, LogValue and MarshalText keep the key out of logs and errors.
func (p PeerSigner) Format(f fmt.State, _ rune)   { _, _ = f.Write([]byte(redacted)) }
func (p PeerSigner) LogValue() slog.Value         { return slog.StringValue(redacted) }
func (p PeerSigner) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// Sign makes the token of a grant. All but ReceiverCertificate must be set.
func (p PeerSigner) Sign(g PeerGrant) (Token, error) {
	if err := g.check(); err != nil {
		return "", fmt.Errorf("sign a peer token for %q at %q: %w", g.Receiver, g.Server, err)
	}
	if g.ExpiresAt.IsZero() {
		return "", fmt.Errorf("sign a peer token for %q at %q: it must end some time", g.Receiver, g.Server)
	}
	if p.key == nil {
		return "", fmt.Errorf("sign a peer token for %q at %q: %w", g.Receiver, g.Server, ErrKey)
	}
	r := registered("", string(g.Receiver), time.Time{}, g.ExpiresAt)
	r.Audience = jwt.ClaimStrings{string(g.Server)}
	return signed(p.key, peerPrefix, claims{Certificate: g.ReceiverCertificate, Image: g.Image, RegisteredClaims: r})
}

// SignPeer is PeerSigner's Sign for a single token.
func (k Key) SignPeer(g PeerGrant) (Token, error) {
	signer, err := k.PeerSigner()
	if err != nil {
		return "", err
	}
	return signer.Sign(g)
}

// check holds a grant to what its fields can be at all.
func (g PeerGrant) check() error {
	for _, id := range []fleet.NodeID{g.Receiver, g.Server} {
		if err := fleet.CheckName("node", string(id)); err != nil {
			return err
		}
	}
	return fleet.CheckDigest(g.Image)
}

// PeerKey is what checks this key's grants, as a text for nodes: base64 of an Ed25519
// public key. It is no secret.
func (k Key) PeerKey() (string, error) {
	signer, err := k.signer(purposePeer)
	if err != nil {
		return "", err
	}
	return base64.StdEncoding.EncodeToString(public(signer)), nil
}

// PeerVerifier checks grants; it holds no secret. The zero one refuses all with ErrKey.
type PeerVerifier struct{ key ed25519.PublicKey }

// ParsePeerKey reads what Key.PeerKey wrote. It fails with ErrKey.
func ParsePeerKey(text string) (PeerVerifier, error) {
	raw, err := base64.StdEncoding.Strict().DecodeString(text)
	if err != nil || len(raw) != ed25519.PublicKeySize || strings.ContainsAny(text, "\r\n") {
		return PeerVerifier{}, fmt.Errorf("the key for peers' tokens: %w", ErrKey)
	}
	return PeerVerifier{raw}, nil
}

// Verify checks that token grants something of an image on server, and returns what.
// Whether the receiver is who it says (ReceiverCertificate) is for the caller to compare.
// It fails with ErrMalformed, ErrSignature, ErrExpired, ErrPeerElsewhere, or ErrKey.
func (v PeerVerifier) Verify(token string, server fleet.NodeID, d fleet.Digest, now time.Time) (PeerGrant, error) {
	c, err := verify(token, peerPrefix, v.key, now)
	if err != nil {
		return PeerGrant{}, err
	}
	g := PeerGrant{
		Receiver: fleet.NodeID(c.Subject), Server: server, Image: c.Image,
		ExpiresAt: c.ExpiresAt.UTC(), ReceiverCertificate: c.Certificate,
	}
	if g.check() != nil {
		return PeerGrant{}, ErrMalformed
	}
	if !slices.Equal(c.Audience, jwt.ClaimStrings{string(server)}) || g.Image != d {
		return PeerGrant{}, ErrPeerElsewhere
	}
	return g, nil
}
