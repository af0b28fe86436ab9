package registry_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/fleet"
)

// A registry whose token server begins an answer and never ends it fails its own pull,
// after its tries of a stall time each; the pull that waits for its turn behind it goes on.
func TestHangingTokenServerStoppedEveryPull(t *testing.T) {
	asked := make(chan struct{}, 100)
	hanging := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/token" {
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="x"`, r.Host))
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		_, _ = w.Write([]byte(`{"token":"`))
		_ = http.NewResponseController(w).Flush()
		asked <- struct{}{}
		<-r.Context().Done()
	}))
	defer hanging.Close()
	reg, host := serve(t)
	d := push(t, reg, "fleet/base")
	store, err := cache.Open(cache.Config{Dir: t.TempDir(), Sources: []cache.Source{newClient(t, nil)}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = store.Close() }()
	hung := make(chan error, 1)
	go func() {
		hung <- store.Pull(t.Context(), fleet.Hold{Digest: fleet.Digest("sha256:" + strings.Repeat("ab", 32)), Ref: strings.TrimPrefix(hanging.URL, "http://") + "/a/b:1", Demand: true})
	}()
	<-asked
	if err := store.Pull(t.Context(), fleet.Hold{Digest: d, Ref: host + "/fleet/base:v1", Demand: true}); err != nil {
		t.Errorf("the pull from the other registry: %v", err)
	}
	if err := <-hung; cache.ClassOf(err) != cache.ClassNetwork || err == nil {
		t.Errorf("the pull from the hanging one: %v; want class network", err)
	}
}

// hangingHelper is a keychain whose credential helper does not answer before it is let go.
type hangingHelper chan struct{}

func (h hangingHelper) Resolve(authn.Resource) (authn.Authenticator, error) {
	<-h
	return authn.Anonymous, nil
}

// A credential helper that hangs is waited for as long as a stall, not for ever; when it
// answers after all, what it said counts.
func TestHangingCredentialHelperHeldThePull(t *testing.T) {
	reg, host := serve(t)
	push(t, reg, "fleet/base")
	helper := make(hangingHelper)
	client := newClient(t, helper)
	began := time.Now()
	_, err := client.Resolve(t.Context(), host+"/fleet/base:v1")
	if cache.ClassOf(err) != cache.ClassNetwork || err == nil || !strings.Contains(err.Error(), "credential helper") {
		t.Errorf("after %s: %v; want class network that names the helper", time.Since(began), err)
	}
	close(helper)
	if _, err := client.Resolve(t.Context(), host+"/fleet/base:v1"); err != nil {
		t.Errorf("after the helper answered: %v", err)
	}
}

// rotating is a keychain whose password is changed while the client lives.
type rotating struct{ now *keychain }

func (r rotating) Resolve(a authn.Resource) (authn.Authenticator, error) { return r.now.Resolve(a) }

// Credentials are replaced, at the registry and in the keychain, as a "docker login" or
// a token of twelve hours does: the client takes the new ones, and wrong ones are still
// refused.
func TestReplacedCredentialsWereNotRead(t *testing.T) {
	for name, bearer := range map[string]bool{"basic": false, "bearer": true} {
		t.Run(name, func(t *testing.T) {
			reg, host := serve(t)
			push(t, reg, "fleet/base")
			require := func(password string) {
				if bearer {
					reg.RequireToken("user", password, 2)
				} else {
					reg.RequireBasic("user", password)
				}
			}
			require("one")
			keys := &keychain{"user", "one"}
			client := newClient(t, rotating{keys})
			resolve := func() error {
				_, err := client.Resolve(t.Context(), host+"/fleet/base:v1")
				return err
			}
			if err := resolve(); err != nil {
				t.Fatal(err)
			}
			require("two")
			if err := resolve(); cache.ClassOf(err) != cache.ClassAuth || err == nil {
				t.Errorf("with the old password: %v; want class auth", err)
			}
			keys.password = "two"
			if err := resolve(); err != nil {
				t.Errorf("with the new password after a refusal: %v", err)
			}
			require("three")
			keys.password = "three"
			if err := resolve(); err != nil {
				t.Errorf("with the new password at once: %v", err)
			}
		})
	}
}
