package github_test

import (
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/paddock-ci/paddock/github"
	"github.com/paddock-ci/paddock/github/githubtest"
)

// silent is a connection on which no answer ever comes.
type silent struct{}

func (silent) RoundTrip(r *http.Request) (*http.Response, error) {
	<-r.Context().Done()
	return nil, r.Context().Err()
}

// A connection falls silent: the request fails after a minute although its caller would
// wait for ever.
func TestASilentConnection(t *testing.T) {
	gh, err := githubtest.New(githubtest.Config{})
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		client, err := github.New(github.Config{AppID: gh.AppID(), PrivateKey: gh.PrivateKey(), Transport: silent{}})
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		if _, err := client.Runners(t.Context(), "acme"); err == nil {
			t.Error("a silent GitHub has runners")
		}
		if took := time.Since(began); took > time.Minute {
			t.Errorf("given up after %s, want a minute", took)
		}
	})
}
