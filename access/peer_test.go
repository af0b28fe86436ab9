package access

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"github.com/google/go-cmp/cmp"

	"github.com/paddock-ci/paddock/fleet"
)

const (
	anImage      = fleet.Digest("sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa")
	anotherImage = fleet.Digest("sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb")
)

func grant() PeerGrant {
	return PeerGrant{Receiver: "mac-1", Server: "mac-2", Image: anImage, ExpiresAt: now.Add(PeerLife), ReceiverCertificate: strings.Repeat("cd", 32)}
}

// peerVerifier is the way the key takes: as a text to the node that serves.
func peerVerifier(t testing.TB, k Key) PeerVerifier {
	t.Helper()
	text, err := k.PeerKey()
	if err != nil {
		t.Fatal(err)
	}
	v, err := ParsePeerKey(text)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// mac-1 may fetch an image from mac-2 for ten minutes, and nobody anything else.
func TestPeerGrant(t *testing.T) {
	key := NewKey()
	v := peerVerifier(t, key)
	token, err := key.SignPeer(grant())
	if err != nil {
		t.Fatal(err)
	}
	got, err := v.Verify(string(token), "mac-2", anImage, now)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(grant(), got); diff != "" {
		t.Error(diff)
	}
	if shown := fmt.Sprint(token); shown != peerPrefix+redacted {
		t.Errorf("the token prints as %s", shown)
	}

	changed := []byte(token)
	changed[len(peerPrefix)+60] ^= 1 // in the claims
	credential, err := key.Sign(identity())
	if err != nil {
		t.Fatal(err)
	}
	join, err := key.SignJoin(Join{ID: "1", Node: "mac-1", ExpiresAt: now.Add(time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		v      PeerVerifier
		token  string
		server fleet.NodeID
		image  fleet.Digest
		at     time.Time
		want   error
	}{
		"expired":               {v, string(token), "mac-2", anImage, now.Add(PeerLife + time.Minute), ErrExpired},
		"at another server":     {v, string(token), "mac-3", anImage, now, ErrPeerElsewhere},
		"at the receiver":       {v, string(token), "mac-1", anImage, now, ErrPeerElsewhere},
		"for another image":     {v, string(token), "mac-2", anotherImage, now, ErrPeerElsewhere},
		"changed":               {v, string(changed), "mac-2", anImage, now, ErrSignature},
		"another fleet's":       {peerVerifier(t, NewKey()), string(token), "mac-2", anImage, now, ErrSignature},
		"no key yet":            {PeerVerifier{}, string(token), "mac-2", anImage, now, ErrKey},
		"a node's credential":   {v, string(credential), "mac-2", anImage, now, ErrMalformed},
		"a credential, dressed": {v, peerPrefix + strings.TrimPrefix(string(credential), tokenPrefix), "mac-2", anImage, now, ErrSignature},
		"a join token, dressed": {v, peerPrefix + strings.TrimPrefix(string(join), joinPrefix), "mac-2", anImage, now, ErrSignature},
		"empty":                 {v, "", "mac-2", anImage, now, ErrMalformed},
		"no server's name":      {v, string(token), "", anImage, now, ErrMalformed},
	} {
		t.Run(name, func(t *testing.T) {
			if g, err := c.v.Verify(c.token, c.server, c.image, c.at); !errors.Is(err, c.want) || g != (PeerGrant{}) {
				t.Errorf("%+v, %v, want %v", g, err, c.want)
			}
		})
	}
	// Nor does a grant pass for anything else.
	dressed := strings.TrimPrefix(string(token), peerPrefix)
	if id, err := verifier(t, key).Verify(tokenPrefix+dressed, now, nil); !errors.Is(err, ErrSignature) {
		t.Errorf("a grant passed for a credential: %+v, %v", id, err)
	}
	if j, err := verifier(t, key).VerifyJoin(joinPrefix+dressed, now); !errors.Is(err, ErrSignature) {
		t.Errorf("a grant passed for a join token: %+v, %v", j, err)
	}
}

// A token for two servers, though signed, is none: each has one.
func TestPeerGrantForTwo(t *testing.T) {
	key := NewKey()
	r := registered("", "mac-1", time.Time{}, now.Add(time.Minute))
	r.Audience = jwt.ClaimStrings{"mac-2", "mac-3"}
	token, err := key.sign(purposePeer, peerPrefix, claims{Image: anImage, RegisteredClaims: r})
	if err != nil {
		t.Fatal(err)
	}
	if g, err := peerVerifier(t, key).Verify(string(token), "mac-2", anImage, now); !errors.Is(err, ErrPeerElsewhere) {
		t.Errorf("%+v, %v", g, err)
	}
}

func TestSignPeerRefusesHalfAGrant(t *testing.T) {
	for name, change := range map[string]func(*PeerGrant){
		"no receiver": func(g *PeerGrant) { g.Receiver = "" },
		"no server":   func(g *PeerGrant) { g.Server = "../mac" },
		"no image":    func(g *PeerGrant) { g.Image = "latest" },
		"no expiry":   func(g *PeerGrant) { g.ExpiresAt = time.Time{} },
	} {
		g := grant()
		change(&g)
		if token, err := NewKey().SignPeer(g); err == nil || token != "" {
			t.Errorf("%s: signed", name)
		}
	}
	if _, err := (Key{}).SignPeer(grant()); !errors.Is(err, ErrKey) {
		t.Errorf("without a key: %v", err)
	}
	if _, err := (Key{}).PeerKey(); !errors.Is(err, ErrKey) {
		t.Errorf("without a key: %v", err)
	}
}

// A signer is the key's, derived once: what it signs is believed, a token costs it less
// than it costs the key, and it does not print what it holds.
func TestPeerSigner(t *testing.T) {
	key := NewKey()
	signer, err := key.PeerSigner()
	if err != nil {
		t.Fatal(err)
	}
	token, err := signer.Sign(grant())
	if err != nil {
		t.Fatal(err)
	}
	if got, err := peerVerifier(t, key).Verify(string(token), "mac-2", anImage, now); err != nil || got != grant() {
		t.Errorf("%+v, %v", got, err)
	}
	cost := func(sign func(PeerGrant) (Token, error)) float64 {
		return testing.AllocsPerRun(20, func() {
			if _, err := sign(grant()); err != nil {
				t.Fatal(err)
			}
		})
	}
	if once, anew := cost(signer.Sign), cost(key.SignPeer); once >= anew {
		t.Errorf("%v allocations for a signature, %v with the derivation", once, anew)
	}
	text, err := json.Marshal(map[string]any{"signer": signer})
	if shown := fmt.Sprintf("%v %+v %x %s", signer, signer, signer, text); err != nil || strings.Count(shown, redacted) != 4 || len(shown) > 100 {
		t.Errorf("it prints as %s, %v", shown, err)
	}
	if token, err := (PeerSigner{}).Sign(grant()); !errors.Is(err, ErrKey) || token != "" {
		t.Errorf("without a key: %v", err)
	}
}

func TestParsePeerKey(t *testing.T) {
	for name, text := range map[string]string{
		"empty": "", "short": "AAAA", "long": base64.StdEncoding.EncodeToString(make([]byte, 33)), "words": "a key",
		"with a line end": base64.StdEncoding.EncodeToString(make([]byte, 32)) + "\n",
	} {
		if _, err := ParsePeerKey(text); !errors.Is(err, ErrKey) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// FuzzPeerVerify: nothing that this key did not sign is believed, and nothing panics.
func FuzzPeerVerify(f *testing.F) {
	key := Key{[keySize]byte{1, 2, 3}}
	v := peerVerifier(f, key)
	good, err := key.SignPeer(grant())
	if err != nil {
		f.Fatal(err)
	}
	for _, seed := range []string{string(good), string(good[:80]), "pdkpeer_", "pdkpeer_a.b.c", "pdkpeer_e30.e30.", ""} {
		f.Add(seed, string(anImage))
	}
	f.Fuzz(func(t *testing.T, text, d string) {
		g, err := v.Verify(text, "mac-2", fleet.Digest(d), now)
		if (err == nil) != (text == string(good) && d == string(anImage)) {
			t.Fatalf("%q for %q: %+v, %v", text, d, g, err)
		}
	})
}
