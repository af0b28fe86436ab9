package access

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"github.com/google/go-cmp/cmp"
)

var now = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// The policy, said once more in prose and by hand: viewers look, operators also act,
// admins also let others in, pipelines announce images, nodes only sync.
func TestAllows(t *testing.T) {
	want := map[Role][]Action{
		Viewer:   {Read, ReadImages},
		Operator: {Read, ReadImages, Cache, Operate},
		Admin:    {Read, ReadImages, Cache, Operate, Tokens},
		Pipeline: {ReadImages, Cache},
		Node:     {Sync},
		"":       nil,
		"root":   nil,
	}
	for role, actions := range want {
		var got []Action
		for _, a := range append(Actions, "anything") {
			if Allows(role, a) {
				got = append(got, a)
			}
		}
		if diff := cmp.Diff(actions, got); diff != "" {
			t.Errorf("%q: %s", role, diff)
		}
	}
}

func TestWhoMay(t *testing.T) {
	for action, want := range map[Action][]string{
		Operate: {"operator", "admin"}, Tokens: {"admin"}, Sync: {"node"}, "anything": nil,
	} {
		if diff := cmp.Diff(want, WhoMay(action)); diff != "" {
			t.Errorf("%s: %s", action, diff)
		}
	}
}

func TestParseRole(t *testing.T) {
	for _, role := range []Role{Viewer, Operator, Admin, Pipeline} {
		if got, err := ParseRole(string(role)); err != nil || got != role {
			t.Errorf("%s: %s, %v", role, got, err)
		}
	}
	for _, bad := range []string{"", "root", "node", "Admin"} {
		var e *Error
		if _, err := ParseRole(bad); !errors.As(err, &e) || e.Hint == "" {
			t.Errorf("%q: %v, want an error with a hint", bad, err)
		}
	}
}

func identity() Identity {
	return Identity{ID: NewID(), Role: Operator, Subject: "ann", IssuedAt: now, ExpiresAt: now.Add(time.Hour)}
}

func verifier(t *testing.T, k Key) Verifier {
	t.Helper()
	v, err := k.Verifier()
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestToken(t *testing.T) {
	key := NewKey()
	v := verifier(t, key)
	id := identity()
	token, err := key.Sign(id)
	if err != nil {
		t.Fatal(err)
	}
	got, err := v.Verify(string(token), now, nil)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(id, got); diff != "" {
		t.Error(diff)
	}
	if got.Actor() != "operator:ann" {
		t.Errorf("actor %s", got.Actor())
	}

	forged := []byte(token)
	if at := &forged[len(forged)-20]; *at == 'A' { // in the signature; still base64
		*at = 'B'
	} else {
		*at = 'A'
	}
	for name, c := range map[string]struct {
		v       Verifier
		token   string
		at      time.Time
		revoked bool
		want    error
	}{
		"another fleet's":   {verifier(t, NewKey()), string(token), now, false, ErrSignature},
		"expired":           {v, string(token), now.Add(time.Hour + time.Minute), false, ErrExpired},
		"revoked":           {v, string(token), now, true, ErrRevoked},
		"changed":           {v, string(forged), now, false, ErrSignature},
		"without prefix":    {v, strings.TrimPrefix(string(token), tokenPrefix), now, false, ErrMalformed},
		"empty":             {v, "", now, false, ErrMalformed},
		"cut off":           {v, string(token[:len(token)-10]), now, false, ErrSignature},
		"two parts only":    {v, string(token[:strings.LastIndex(string(token), ".")]), now, false, ErrMalformed},
		"far too long":      {v, tokenPrefix + strings.Repeat("a", 1<<20), now, false, ErrMalformed},
		"no key to check":   {Verifier{}, string(token), now, false, ErrKey},
		"not even a token":  {v, "Bearer", now, false, ErrMalformed},
		"a line end behind": {v, string(token) + "\n", now, false, ErrMalformed},
	} {
		t.Run(name, func(t *testing.T) {
			asked := ""
			_, err := c.v.Verify(c.token, c.at, func(token string) bool { asked = token; return c.revoked })
			if !errors.Is(err, c.want) {
				t.Errorf("%v, want %v", err, c.want)
			}
			if c.revoked && asked != id.ID {
				t.Errorf("asked whether %q is revoked, want %q", asked, id.ID)
			}
		})
	}
}

// Tokens that other algorithms made, with what the public knows as their key.
func TestTokenAlgorithms(t *testing.T) {
	key := NewKey()
	v := verifier(t, key)
	c := claims{Role: Admin, RegisteredClaims: registered("1", "eve", now, now.Add(time.Hour))}
	none, err := jwt.NewWithClaims(jwt.SigningMethodNone, c).SignedString(jwt.UnsafeAllowNoneSignatureType)
	if err != nil {
		t.Fatal(err)
	}
	hmac, err := jwt.NewWithClaims(jwt.SigningMethodHS256, c).SignedString([]byte(v.token))
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"none": none, "HS256 with the public key": hmac} {
		if id, err := v.Verify(tokenPrefix+text, now, nil); !errors.Is(err, ErrSignature) {
			t.Errorf("%s: %+v, %v", name, id, err)
		}
	}
}

func TestSignRefusesHalfAnIdentity(t *testing.T) {
	for name, change := range map[string]func(*Identity){
		"no id":        func(i *Identity) { i.ID = "" },
		"no subject":   func(i *Identity) { i.Subject = "" },
		"no expiry":    func(i *Identity) { i.ExpiresAt = time.Time{} },
		"unknown role": func(i *Identity) { i.Role = "root" },
	} {
		id := identity()
		change(&id)
		if token, err := NewKey().Sign(id); err == nil || token != "" {
			t.Errorf("%s: signed", name)
		}
	}
	if _, err := (Key{}).Sign(identity()); !errors.Is(err, ErrKey) {
		t.Errorf("without a key: %v", err)
	}
	if _, err := (Key{}).Verifier(); !errors.Is(err, ErrKey) {
		t.Errorf("without a key: %v", err)
	}
}

func TestJoin(t *testing.T) {
	key := NewKey()
	v := verifier(t, key)
	join := Join{ID: NewID(), Node: "mac1", URL: "https://paddock.example:7443", ExpiresAt: now.Add(JoinLife), Certificate: strings.Repeat("ab", 32)}
	token, err := key.SignJoin(join)
	if err != nil {
		t.Fatal(err)
	}
	got, err := v.VerifyJoin(string(token), now)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(join, got); diff != "" {
		t.Error(diff)
	}
	unverified, err := ReadJoin(string(token) + "\n")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(join, unverified); diff != "" {
		t.Error(diff)
	}
	if _, err := v.VerifyJoin(string(token), now.Add(JoinLife+time.Minute)); !errors.Is(err, ErrExpired) {
		t.Errorf("too late: %v", err)
	}
	if _, err := verifier(t, NewKey()).VerifyJoin(string(token), now); !errors.Is(err, ErrSignature) {
		t.Errorf("another fleet: %v", err)
	}
	// Neither kind of token passes for the other, whatever its prefix says.
	if _, err := v.Verify(tokenPrefix+strings.TrimPrefix(string(token), joinPrefix), now, nil); !errors.Is(err, ErrSignature) {
		t.Errorf("a join token passed for a credential: %v", err)
	}
	credential, err := key.Sign(identity())
	if err != nil {
		t.Fatal(err)
	}
	// Who holds a credential may read it without the fleet's key.
	if got, err := ReadToken(string(credential) + "\n"); err != nil || !got.ExpiresAt.Equal(identity().ExpiresAt.Truncate(time.Second)) || got.Subject != identity().Subject {
		t.Errorf("read as %+v (%v)", got, err)
	}
	for _, text := range []string{"", "pdk_", string(token), "pdk_a.b.c", strings.Repeat("x", 1<<20)} {
		if _, err := ReadToken(text); !errors.Is(err, ErrMalformed) {
			t.Errorf("%.20q is read as a token: %v", text, err)
		}
	}
	if _, err := v.VerifyJoin(joinPrefix+strings.TrimPrefix(string(credential), tokenPrefix), now); !errors.Is(err, ErrSignature) {
		t.Errorf("a credential passed for a join token: %v", err)
	}
	if _, err := key.SignJoin(Join{ID: "1", Node: "Not A Node", ExpiresAt: now}); err == nil {
		t.Error("a join token for no node")
	}
}

func TestKeyText(t *testing.T) {
	key := NewKey()
	for name, text := range map[string]string{
		"hex":            key.Text(),
		"without end":    strings.TrimSpace(key.Text()),
		"base64":         base64.StdEncoding.EncodeToString(key.secret[:]),
		"upper-case hex": strings.ToUpper(key.Text()),
	} {
		if got, err := ParseKey(text); err != nil || got != key {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, text := range map[string]string{
		"empty": "", "short": "abcd", "zero": strings.Repeat("0", 64), "words": "correct horse battery staple", "long": key.Text() + key.Text(),
	} {
		if _, err := ParseKey(text); !errors.Is(err, ErrKey) {
			t.Errorf("%s: %v, want ErrKey", name, err)
		}
	}
}

func TestSeal(t *testing.T) {
	key := NewKey()
	const jit, runner = "eyJqaXQiOiJzZWNyZXQifQ==", "paddock-f-vmaaaaaa-1"
	sealed, err := key.Seal(jit, "vmaaaaaa", runner)
	if err != nil {
		t.Fatal(err)
	}
	if again, _ := key.Seal(jit, "vmaaaaaa", runner); again == sealed {
		t.Error("sealed twice to the same text: the nonce is not random")
	}
	if plain, err := key.Open(sealed, "vmaaaaaa", runner); err != nil || plain != jit {
		t.Fatalf("%q, %v", plain, err)
	}
	flipped := []byte(sealed)
	flipped[20] ^= 1
	for name, open := range map[string]func() (string, error){
		"another key":    func() (string, error) { return NewKey().Open(sealed, "vmaaaaaa", runner) },
		"another VM":     func() (string, error) { return key.Open(sealed, "vmbbbbbb", runner) },
		"another runner": func() (string, error) { return key.Open(sealed, "vmaaaaaa", "paddock-f-vmaaaaaa-2") },
		"changed":        func() (string, error) { return key.Open(string(flipped), "vmaaaaaa", runner) },
		"cut off":        func() (string, error) { return key.Open(sealed[:12], "vmaaaaaa", runner) },
		"empty":          func() (string, error) { return key.Open("", "vmaaaaaa", runner) },
	} {
		if plain, err := open(); !errors.Is(err, ErrSealed) || plain != "" {
			t.Errorf("%s: %q, %v", name, plain, err)
		}
	}
	if _, err := (Key{}).Open(sealed, "vmaaaaaa", runner); !errors.Is(err, ErrKey) {
		t.Errorf("without a key: %v", err)
	}
}

// Whatever prints a key or a token prints no secret.
func TestSecretsDoNotPrint(t *testing.T) {
	key := NewKey()
	token, err := key.Sign(identity())
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	type holder struct {
		Key   Key
		Token Token
	}
	h := holder{key, token}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		fmt.Fprintf(&out, verb+verb+verb+verb+"\n", key, token, h, &h)
	}
	log := slog.New(slog.NewJSONHandler(&out, nil))
	log.Info("key", "key", key, "it", token)
	slog.New(slog.NewTextHandler(&out, nil)).Info("key", "key", key, "it", token)
	if err := json.NewEncoder(&out).Encode(key); err != nil {
		t.Fatal(err)
	}
	secret := strings.TrimSpace(key.Text())
	for _, leak := range []string{secret, string(token), fmt.Sprintf("%x", string(token)), string(token[len(token)-20:]), fmt.Sprint(key.secret)} {
		if strings.Contains(out.String(), leak) {
			t.Errorf("%.12s… leaked:\n%s", leak, out.String())
		}
	}
	if !strings.Contains(out.String(), tokenPrefix+redacted) {
		t.Errorf("a token leaves no trace at all:\n%s", out.String())
	}
}

// FuzzVerify: nothing that this key did not sign is believed, and nothing panics.
func FuzzVerify(f *testing.F) {
	key := Key{[keySize]byte{1, 2, 3}}
	v, err := key.Verifier()
	if err != nil {
		f.Fatal(err)
	}
	id := Identity{ID: "1", Role: Admin, Subject: "ann", ExpiresAt: now.Add(time.Hour)}
	good, err := key.Sign(id)
	if err != nil {
		f.Fatal(err)
	}
	join, err := key.SignJoin(Join{ID: "1", Node: "mac1", ExpiresAt: now.Add(time.Hour)})
	if err != nil {
		f.Fatal(err)
	}
	for _, seed := range []string{string(good), string(join), string(good[:60]), "pdk_", "pdk_a.b.c", "pdkjoin_..", "pdk_e30.e30.", ""} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		got, err := v.Verify(text, now, nil)
		if (err == nil) != (text == string(good)) {
			t.Fatalf("%q: %+v, %v", text, got, err)
		}
		j, err := ReadJoin(text)
		if err == nil && (j.Node == "" || j.ID == "") {
			t.Fatalf("%q: half a join token: %+v", text, j)
		}
		if _, err := v.VerifyJoin(text, now); (err == nil) != (text == string(join)) {
			t.Fatalf("%q: %v", text, err)
		}
	})
}

// FuzzParseKey: what parses is written back to a text that parses to the same.
func FuzzParseKey(f *testing.F) {
	f.Add(strings.Repeat("ab", 32))
	f.Add(" AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n")
	f.Add("")
	f.Fuzz(func(t *testing.T, text string) {
		key, err := ParseKey(text)
		if err != nil {
			return
		}
		if again, err := ParseKey(key.Text()); err != nil || again != key {
			t.Fatalf("%q: %v", text, err)
		}
	})
}

// FuzzOpen: nothing opens but what was sealed.
func FuzzOpen(f *testing.F) {
	key := Key{[keySize]byte{1, 2, 3}}
	sealed, err := key.Seal("secret", "vmaaaaaa", "r")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(sealed)
	f.Add("AAAA")
	f.Fuzz(func(t *testing.T, text string) {
		if plain, err := key.Open(text, "vmaaaaaa", "r"); err == nil && plain != "secret" {
			t.Fatalf("%q opened to %q", text, plain)
		}
	})
}
