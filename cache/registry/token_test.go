package registry_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/cache/registry"
	"github.com/paddock-ci/paddock/cache/registrytest"
	"github.com/paddock-ci/paddock/image"
)

// A node without credentials pulls by tokens that the controller buys with its own: for
// one repository, for pulls, for as long as the token server says.
func TestPullToken(t *testing.T) {
	reg, host := serve(t)
	d := push(t, reg, "fleet/base")
	push(t, reg, "fleet/secret")
	reg.RequireToken("user", "right", 2)
	controller := newClient(t, keychain{"user", "right"})
	began := time.Now()
	token, expires, err := controller.PullToken(t.Context(), host+"/fleet/base")
	if err != nil || token == "" {
		t.Fatalf("%q, %v", token, err)
	}
	if life := expires.Sub(began); life < 299*time.Second || life > 330*time.Second {
		t.Errorf("it is good for %s; the server said 300 s", life)
	}
	reg.TokenLife(0)
	began = time.Now()
	if _, expires, err := controller.PullToken(t.Context(), host+"/fleet/base"); err != nil || expires.Sub(began) > 90*time.Second || expires.Sub(began) < 59*time.Second {
		t.Errorf("without a word it is good for %s, %v; want a minute", expires.Sub(began), err)
	}

	asked := 0
	node, err := registry.New(registry.Config{Keychain: noKeys{}, Tries: 3, Pause: time.Millisecond, Token: func(ctx context.Context, repository string) (string, error) {
		if asked++; repository != host+"/fleet/base" {
			t.Errorf("asked for %q", repository)
		}
		token, _, err := controller.PullToken(ctx, repository)
		return token, err
	}})
	if err != nil {
		t.Fatal(err)
	}
	for range 5 {
		if _, err := node.Manifest(t.Context(), host+"/fleet/base:v1", d); err != nil {
			t.Fatal(err)
		}
	}
	if asked != 3 {
		t.Errorf("the controller was asked %d times for 5 requests at 2 a token; want 3", asked)
	}

	// The token opens nothing else.
	stolen, _, err := controller.PullToken(t.Context(), host+"/fleet/base")
	if err != nil {
		t.Fatal(err)
	}
	thief, err := registry.New(registry.Config{Keychain: noKeys{}, Token: func(context.Context, string) (string, error) { return stolen, nil }})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := thief.Resolve(t.Context(), host+"/fleet/secret:v1"); cache.ClassOf(err) != cache.ClassAuth {
		t.Errorf("another repository: %v; want class auth", err)
	}
	if u, err := thief.Upload(t.Context(), host+"/fleet/base:v2", nil); err == nil {
		data := []byte("x")
		b := image.Blob{Digest: image.DigestOf(data), Size: 1, MediaType: "x/y"}
		if err := u.Put(t.Context(), registry.Blob{Blob: b, Open: opener(data)}); cache.ClassOf(err) != cache.ClassAuth {
			t.Errorf("pushing: %v; want class auth", err)
		}
	}
}

// noKeys is the keychain of a node without credentials.
type noKeys struct{}

func (noKeys) Resolve(authn.Resource) (authn.Authenticator, error) { return authn.Anonymous, nil }

// config is a keychain of one set of credentials of any kind.
type config authn.AuthConfig

func (c config) Resolve(authn.Resource) (authn.Authenticator, error) {
	return authn.FromConfig(authn.AuthConfig(c)), nil
}

// Where no token of use is to be had, there is none or an error for people; credentials
// are never handed on, in no dress.
func TestPullTokenRefusals(t *testing.T) {
	open, openHost := serve(t)
	push(t, open, "fleet/base")
	anyone, anyoneHost := serve(t)
	anyone.RequireAnyToken()
	basic, basicHost := serve(t)
	basic.RequireBasic("user", "hunter2secret")
	bearer, bearerHost := serve(t)
	bearer.RequireToken("user", "hunter2secret", 0)
	answer := func(format string) string {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			if req.URL.Path == "/token" {
				_, _ = fmt.Fprint(w, format)
				return
			}
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="x"`, req.Host))
			w.WriteHeader(http.StatusUnauthorized)
		}))
		t.Cleanup(server.Close)
		return strings.TrimPrefix(server.URL, "http://")
	}
	own := config{Username: "user", Password: "hunter2secret"}
	tests := []struct {
		name  string
		host  string
		keys  authn.Keychain
		class cache.Class // empty: an empty token, no error
		text  string
	}{
		{"open to everyone", openHost, own, "", ""},
		{"tokens for everyone", anyoneHost, noKeys{}, "", ""},
		{"basic, no credentials", basicHost, noKeys{}, "", ""},
		{"basic", basicHost, own, cache.ClassAuth, "credentials of their own"},
		{"a ready token", bearerHost, config{RegistryToken: "hunter2secret"}, cache.ClassAuth, "ready token"},
		{"wrong password", bearerHost, config{Username: "user", Password: "hunter2secretx"}, cache.ClassAuth, "docker login"},
		{"gives the password back", answer(`{"token":"hunter2secret"}`), own, cache.ClassAuth, "password itself"},
		{"gives the password back encoded", answer(`{"token":"` + base64.StdEncoding.EncodeToString([]byte("v1:user:hunter2secret")) + `"}`), own, cache.ClassAuth, "password itself"},
		{"gives no token", answer(`{"refresh_token":"hunter2secret"}`), own, cache.ClassNetwork, "holds no token"},
		{"gives no JSON", answer(`<html>`), own, cache.ClassNetwork, ""},
		{"no repository", "", own, cache.ClassFormat, "names no registry host"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			token, _, err := newClient(t, test.keys).PullToken(t.Context(), test.host+"/fleet/base")
			if token != "" {
				t.Errorf("a token came: %q", token)
			}
			if test.class == "" && err != nil || test.class != "" && (err == nil || cache.ClassOf(err) != test.class || !strings.Contains(err.Error(), test.text)) {
				t.Errorf("got %v; want class %q with %q", err, test.class, test.text)
			}
			if err != nil && strings.Contains(err.Error(), "hunter2") {
				t.Errorf("a secret is in the error: %v", err)
			}
		})
	}
	if _, _, err := newClient(t, make(hangingHelper)).PullToken(t.Context(), bearerHost+"/a/b"); cache.ClassOf(err) != cache.ClassNetwork || err == nil || !strings.Contains(err.Error(), "helper does not answer") {
		t.Errorf("a helper that hangs: %v; want class network", err)
	}
}

// Neither tokens nor passwords nor signed links are in the log or in errors, whatever
// goes wrong.
func TestNoSecretsInLog(t *testing.T) {
	reg, host := serve(t)
	d := push(t, reg, "fleet/base")
	reg.RequireToken("user", "hunter2secret", 0)
	var log bytes.Buffer
	client, err := registry.New(registry.Config{
		Keychain: keychain{"user", "hunter2secret"}, Tries: 2, Pause: time.Millisecond,
		Log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	if err != nil {
		t.Fatal(err)
	}
	ref := host + "/fleet/base:v1"
	b := blobOf(t, client, ref, d)
	token, _, err := client.PullToken(t.Context(), host+"/fleet/base")
	if err != nil {
		t.Fatal(err)
	}
	closed := httptest.NewServer(http.NotFoundHandler())
	closed.Close()
	var errs []error
	for _, elsewhere := range []string{closed.URL, "http://" + host + ".invalid", "https://" + host} {
		reg.Elsewhere(elsewhere, 0)
		_, err := client.Open(t.Context(), wantOf(ref, b), 0)
		if err == nil {
			t.Errorf("%s gave the blob", elsewhere)
		}
		errs = append(errs, err)
	}
	text := log.String() + errors.Join(errs...).Error()
	for _, secret := range []string{token, "hunter2secret", "secret-", "X-Signature"} {
		if strings.Contains(text, secret) {
			t.Errorf("%q is in the log or an error:\n%s", secret, text)
		}
	}
	if !strings.Contains(log.String(), "will be tried again") {
		t.Error("nothing was logged: the test shows nothing")
	}
}

// A mirror is asked instead of the registry it is for, below its prefix, and for nothing
// else.
func TestMirror(t *testing.T) {
	reg, host := serve(t)
	d := push(t, reg, "copies/fleet/base")
	mirror, err := registry.New(registry.Config{Keychain: noKeys{}, Mirror: host + "/copies/", For: "ghcr.io"})
	if err != nil {
		t.Fatal(err)
	}
	ref := "ghcr.io/fleet/base:v1"
	if mirror.Kind() != cache.KindMirror || mirror.Name() != "mirror "+host+"/copies for ghcr.io" {
		t.Errorf("the mirror is %s %q", mirror.Kind(), mirror.Name())
	}
	if _, ok := mirror.Has(cache.Want{Ref: ref}); !ok {
		t.Error("it does not have what it mirrors")
	}
	pulls(t, mirror, ref, d)
	if got, err := mirror.Resolve(t.Context(), ref); err != nil || got.Digest != d || got.Ref != ref {
		t.Errorf("resolved to %+v, %v", got, err)
	}
	other := "quay.io/fleet/base:v1"
	if _, ok := mirror.Has(cache.Want{Ref: other}); ok {
		t.Error("it has what it does not mirror")
	}
	if _, err := mirror.Manifest(t.Context(), other, d); cache.ClassOf(err) != cache.ClassNotFound || err == nil || !strings.Contains(err.Error(), "for ghcr.io only") {
		t.Errorf("another registry's: %v", err)
	}
	for _, cfg := range []registry.Config{{Mirror: "nohost"}, {Mirror: host + "/UPPER"}, {Mirror: host, For: "x/y"}, {For: "ghcr.io"}} {
		if _, err := registry.New(cfg); err == nil {
			t.Errorf("mirror %q for %q was accepted", cfg.Mirror, cfg.For)
		}
	}
}

// What the allow-list refuses is asked for nowhere.
func TestAllow(t *testing.T) {
	var requests atomic.Int32
	transport := roundTrip(func(*http.Request) (*http.Response, error) {
		requests.Add(1)
		return nil, errors.New("no")
	})
	refused := errors.New("evil.example is not allowed")
	client, err := registry.New(registry.Config{Transport: transport, Tries: 1, Allow: func(repository string) error {
		if strings.HasPrefix(repository, "evil.example/") {
			return refused
		}
		return nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	w := wantOf("evil.example/a/b:c", image.Blob{Digest: image.DigestOf(nil), Size: 1})
	_, errResolve := client.Resolve(t.Context(), w.Ref)
	_, errManifest := client.Manifest(t.Context(), w.Ref, image.DigestOf(nil))
	_, errOpen := client.Open(t.Context(), w, 0)
	_, _, errToken := client.PullToken(t.Context(), "evil.example/a/b")
	_, errTags := client.Tags(t.Context(), "evil.example/a/b")
	_, errPush := client.Upload(t.Context(), w.Ref, nil)
	for what, err := range map[string]error{"Resolve": errResolve, "Manifest": errManifest, "Open": errOpen, "PullToken": errToken, "Tags": errTags, "Upload": errPush} {
		if !errors.Is(err, refused) || cache.ClassOf(err) != cache.ClassAuth {
			t.Errorf("%s: %v; want %v of class auth", what, err, refused)
		}
	}
	if _, ok := client.Has(w); ok {
		t.Error("it says that it has what it must not ask for")
	}
	if n := requests.Load(); n != 0 {
		t.Errorf("%d requests were made", n)
	}
	if _, err := client.Resolve(t.Context(), "good.example/a/b:c"); err == nil || requests.Load() == 0 {
		t.Errorf("another registry was not asked: %v", err)
	}
}

// A host that sends its image's blobs to this machine is refused: what listens here is
// for this machine.
func TestRedirectToLoopbackRefused(t *testing.T) {
	var asked []string
	transport := roundTrip(func(req *http.Request) (*http.Response, error) {
		asked = append(asked, req.URL.Host)
		w := httptest.NewRecorder()
		if strings.Contains(req.URL.Path, "/blobs/") {
			w.Header().Set("Location", "http://127.0.0.1:9/")
			w.WriteHeader(http.StatusTemporaryRedirect)
		}
		resp := w.Result()
		resp.Request = req
		return resp, nil
	})
	client, err := registry.New(registry.Config{Transport: transport, Tries: 1, Keychain: noKeys{}})
	if err != nil {
		t.Fatal(err)
	}
	_, err = client.Open(t.Context(), wantOf("far.example/a/b:c", image.Blob{Digest: image.DigestOf(nil), Size: 1}), 0)
	if err == nil || !strings.Contains(err.Error(), "redirects to this machine") {
		t.Errorf("got %v", err)
	}
	for _, host := range asked {
		if host != "far.example" {
			t.Errorf("%s was asked", host)
		}
	}
}

// One stream is told to wait; the others of the same registry wait too.
func TestRetryAfterIsForAllStreams(t *testing.T) {
	reg, host := serve(t)
	d := push(t, reg, "fleet/base")
	client := newClient(t, nil)
	ref := host + "/fleet/base:v1"
	b := blobOf(t, client, ref, d)
	reg.Break(b.Digest, registrytest.Fault{Kind: registrytest.Refuse, Status: 429, RetryAfter: "1", Times: 1})
	began := time.Now()
	first := make(chan error, 1)
	go func() {
		body, err := client.Open(t.Context(), wantOf(ref, b), 0)
		if err == nil {
			err = body.Close()
		}
		first <- err
	}()
	eventually(t, "the refusal is on its way", func() bool { return reg.Counts().Requests[b.Digest] > 0 })
	deadline := time.Now().Add(10 * time.Second)
	for time.Since(began) < time.Second {
		// A manifest asked for after the refusal has come is answered after the second.
		asked := time.Now()
		if _, err := client.Manifest(t.Context(), ref, d); err != nil {
			t.Fatal(err)
		}
		if time.Since(asked) > 500*time.Millisecond || time.Now().After(deadline) {
			break
		}
	}
	if took := time.Since(began); took < time.Second {
		t.Errorf("another request was made after %s", took)
	}
	if err := <-first; err != nil {
		t.Error(err)
	}
}
