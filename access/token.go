package access

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"github.com/paddock-ci/paddock/fleet"
)

// Lifetimes.
const (
	// NodeLife is how long a node's credential lasts, and RenewBefore how long before
	// its end sync hands out the next: a Mac may be off for two months.
	NodeLife    = 90 * 24 * time.Hour
	RenewBefore = 30 * 24 * time.Hour
	// JoinLife is how long a join token waits to be used.
	JoinLife = 15 * time.Minute
)

// Prefixes tell people and secret scanners what a string is.
const (
	tokenPrefix = "pdk_"
	joinPrefix  = "pdkjoin_"
)

// maxToken bounds what is parsed at all, in bytes; a real token has about 400.
const maxToken = 4096

// issuer is what our tokens say who made them.
const issuer = "paddock"

// Token is a signed token. It prints as a prefix only; string(token) is the secret.
type Token string

// Format and LogValue keep the token out of logs and errors.
func (t Token) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(t.redacted())) }

// LogValue is for slog.
func (t Token) LogValue() slog.Value { return slog.StringValue(t.redacted()) }

func (t Token) redacted() string {
	for _, prefix := range []string{joinPrefix, peerPrefix} {
		if strings.HasPrefix(string(t), prefix) {
			return prefix + redacted
		}
	}
	return tokenPrefix + redacted
}

// Hash names a token without giving it away: hex SHA-256.
func (t Token) Hash() string {
	sum := sha256.Sum256([]byte(t))
	return hex.EncodeToString(sum[:])
}

// Identity is who a token speaks for.
type Identity struct {
	ID        string // of the token, for revoking it; 16 hex digits
	Role      Role
	Subject   string // a person's or pipeline's name, or the node's id
	IssuedAt  time.Time
	ExpiresAt time.Time
}

// Actor is how the audit trail names them: "operator:ci" or "node:mac1".
func (i Identity) Actor() string { return string(i.Role) + ":" + i.Subject }

// Join is what a join token says.
type Join struct {
	ID        string
	Node      fleet.NodeID // the only name it admits
	URL       string       // the controller's; may be empty
	ExpiresAt time.Time
	// Certificate is the hex SHA-256 of the controller's self-made certificate, which
	// the node then trusts and no other; empty: the system's roots.
	Certificate string
}

// NewID draws a token's id: 16 hex digits.
func NewID() string {
	var b [8]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// claims are a token's words on the wire.
type claims struct {
	Role        Role   `json:"role,omitempty"`
	Certificate string `json:"cert,omitempty"`
	URL         string `json:"url,omitempty"`

	Image fleet.Digest `json:"img,omitempty"` // of a peer's grant
	jwt.RegisteredClaims
}

// Sign makes a token for id. Its ID, Role, Subject and ExpiresAt must be set.
func (k Key) Sign(id Identity) (Token, error) {
	if id.ID == "" || id.Subject == "" || id.ExpiresAt.IsZero() || !slices.Contains(Roles, id.Role) {
		return "", fmt.Errorf("sign a token for %q: id, role, subject and expiry must be set", id.Actor())
	}
	return k.sign(purposeToken, tokenPrefix, claims{Role: id.Role, RegisteredClaims: registered(id.ID, id.Subject, id.IssuedAt, id.ExpiresAt)})
}

// SignJoin makes a join token. Its ID, Node and ExpiresAt must be set.
func (k Key) SignJoin(j Join) (Token, error) {
	if err := fleet.CheckName("node", string(j.Node)); err != nil {
		return "", &Error{Message: "a join token names one node", Hint: err.Error()}
	}
	if j.ID == "" || j.ExpiresAt.IsZero() {
		return "", fmt.Errorf("sign a join token for %q: id and expiry must be set", j.Node)
	}
	return k.sign(purposeJoin, joinPrefix, claims{
		Certificate: j.Certificate, URL: j.URL,
		RegisteredClaims: registered(j.ID, string(j.Node), time.Time{}, j.ExpiresAt),
	})
}

func registered(id, subject string, issued, expires time.Time) jwt.RegisteredClaims {
	r := jwt.RegisteredClaims{ID: id, Subject: subject, Issuer: issuer, ExpiresAt: jwt.NewNumericDate(expires)}
	if !issued.IsZero() {
		r.IssuedAt = jwt.NewNumericDate(issued)
	}
	return r
}

func (k Key) sign(purpose, prefix string, c claims) (Token, error) {
	signer, err := k.signer(purpose)
	if err != nil {
		return "", err
	}
	return signed(signer, prefix, c)
}

func signed(signer ed25519.PrivateKey, prefix string, c claims) (Token, error) {
	text, err := jwt.NewWithClaims(jwt.SigningMethodEdDSA, c).SignedString(signer)
	if err != nil {
		return "", fmt.Errorf("sign a token: %w", err)
	}
	return Token(prefix + text), nil
}

// Verifier checks tokens; it holds no secret. Make one with Key.Verifier.
type Verifier struct{ token, join ed25519.PublicKey }

// Verifier derives what checks this key's tokens; do it once, not for each request.
func (k Key) Verifier() (Verifier, error) {
	token, err := k.signer(purposeToken)
	if err != nil {
		return Verifier{}, err
	}
	join, err := k.signer(purposeJoin)
	if err != nil {
		return Verifier{}, err
	}
	return Verifier{public(token), public(join)}, nil
}

func public(k ed25519.PrivateKey) ed25519.PublicKey {
	return ed25519.PublicKey(k[ed25519.PrivateKeySize-ed25519.PublicKeySize:])
}

// Verify tells who token speaks for. It fails with ErrMalformed, ErrSignature,
// ErrExpired or ErrRevoked. revoked is asked for the token's id; nil: none is revoked.
func (v Verifier) Verify(token string, now time.Time, revoked func(id string) bool) (Identity, error) {
	c, err := verify(token, tokenPrefix, v.token, now)
	if err != nil {
		return Identity{}, err
	}
	if c.ID == "" || c.Subject == "" || !slices.Contains(Roles, c.Role) {
		return Identity{}, ErrMalformed
	}
	if revoked != nil && revoked(c.ID) {
		return Identity{}, ErrRevoked
	}
	id := Identity{ID: c.ID, Role: c.Role, Subject: c.Subject, ExpiresAt: c.ExpiresAt.UTC()}
	if c.IssuedAt != nil {
		id.IssuedAt = c.IssuedAt.UTC()
	}
	return id, nil
}

// VerifyJoin checks a join token; whether it was used before is for the caller to know
// (by Token.Hash). It fails like Verify.
func (v Verifier) VerifyJoin(token string, now time.Time) (Join, error) {
	c, err := verify(token, joinPrefix, v.join, now)
	if err != nil {
		return Join{}, err
	}
	return joinOf(c)
}

// ReadJoin reads a join token without checking its signature: a node that joins has
// nothing to check it with. The node learns from it whom to trust; the controller
// verifies it. It fails with ErrMalformed.
func ReadJoin(token string) (Join, error) {
	text, ok := strings.CutPrefix(strings.TrimSpace(token), joinPrefix)
	if !ok || len(token) > maxToken {
		return Join{}, ErrMalformed
	}
	var c claims
	if _, _, err := jwt.NewParser().ParseUnverified(text, &c); err != nil || c.ExpiresAt == nil {
		return Join{}, ErrMalformed
	}
	return joinOf(&c)
}

// ReadToken reads what a token says of itself without checking its signature: for who
// holds it and wants to know when it ends. It fails with ErrMalformed.
func ReadToken(token string) (Identity, error) {
	text, ok := strings.CutPrefix(strings.TrimSpace(token), tokenPrefix)
	if !ok || len(token) > maxToken {
		return Identity{}, ErrMalformed
	}
	var c claims
	if _, _, err := jwt.NewParser().ParseUnverified(text, &c); err != nil || c.ExpiresAt == nil {
		return Identity{}, ErrMalformed
	}
	id := Identity{ID: c.ID, Role: c.Role, Subject: c.Subject, ExpiresAt: c.ExpiresAt.UTC()}
	if c.IssuedAt != nil {
		id.IssuedAt = c.IssuedAt.UTC()
	}
	return id, nil
}

func joinOf(c *claims) (Join, error) {
	if c.ID == "" || fleet.CheckName("node", c.Subject) != nil {
		return Join{}, ErrMalformed
	}
	return Join{
		ID: c.ID, Node: fleet.NodeID(c.Subject), URL: c.URL,
		ExpiresAt: c.ExpiresAt.UTC(), Certificate: c.Certificate,
	}, nil
}

// verify checks form, signature, issuer and expiry; c.ExpiresAt is set if err is nil.
func verify(token, prefix string, key ed25519.PublicKey, now time.Time) (*claims, error) {
	text, ok := strings.CutPrefix(token, prefix)
	// Base64 decoders skip line ends; here a token has one spelling only, so that a used
	// join token cannot come back under another hash.
	if !ok || len(token) > maxToken || strings.ContainsAny(text, "\r\n") {
		return nil, ErrMalformed
	}
	if len(key) == 0 {
		return nil, ErrKey
	}
	var c claims
	_, err := jwt.ParseWithClaims(text, &c, func(*jwt.Token) (any, error) { return key, nil },
		jwt.WithValidMethods([]string{jwt.SigningMethodEdDSA.Alg()}),
		jwt.WithIssuer(issuer), jwt.WithExpirationRequired(), jwt.WithStrictDecoding(),
		jwt.WithTimeFunc(func() time.Time { return now }), jwt.WithLeeway(clockSkew))
	switch {
	case err == nil:
		return &c, nil
	case errors.Is(err, jwt.ErrTokenExpired):
		return nil, ErrExpired
	case errors.Is(err, jwt.ErrTokenSignatureInvalid):
		return nil, ErrSignature
	}
	return nil, ErrMalformed
}

// clockSkew is how far two replicas' clocks may be apart.
const clockSkew = 5 * time.Second
