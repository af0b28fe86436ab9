package github_test

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github"
	"github.com/paddock-ci/paddock/github/githubtest"
)

// The list in Go's words for platforms; what no guest could use is left out.
func TestApplications(t *testing.T) {
	sum := strings.Repeat("ab", 32)
	_, client, _ := setup(t, githubtest.Config{Applications: []githubtest.Application{
		{OS: "osx", Arch: "arm64", File: "actions-runner-osx-arm64-2.330.0.tar.gz", URL: "https://example.com/a.tar.gz", SHA256: strings.ToUpper(sum)},
		{OS: "linux", Arch: "x64", File: "actions-runner-linux-x64-2.330.0.tar.gz", URL: "https://example.com/b.tar.gz", SHA256: sum},
		{OS: "win", Arch: "x64", File: "actions-runner-win-x64-2.330.0.zip", URL: "https://example.com/c.zip", SHA256: sum},
		{OS: "linux", Arch: "arm", File: "actions-runner-linux-arm-2.330.0.tar.gz", URL: "https://example.com/d.tar.gz", SHA256: sum},
		{OS: "osx", Arch: "x64", File: "no-checksum.tar.gz", URL: "https://example.com/e.tar.gz"},
		{OS: "osx", Arch: "x64", File: "../up.tar.gz", URL: "https://example.com/f.tar.gz", SHA256: sum},
	}})
	for _, scope := range []fleet.Scope{"acme", "acme/app"} {
		list, err := client.Applications(t.Context(), scope)
		if err != nil {
			t.Fatal(err)
		}
		want := []fleet.Archive{
			{OS: "darwin", Arch: "arm64", Name: "actions-runner-osx-arm64-2.330.0.tar.gz", URL: "https://example.com/a.tar.gz", SHA256: sum},
			{OS: "linux", Arch: "amd64", Name: "actions-runner-linux-x64-2.330.0.tar.gz", URL: "https://example.com/b.tar.gz", SHA256: sum},
		}
		if len(list) != 2 || list[0] != want[0] || list[1] != want[1] {
			t.Errorf("%s: %+v\nwant %+v", scope, list, want)
		}
	}
	if _, err := client.Applications(t.Context(), "stranger"); err == nil {
		t.Error("an account without the App has a list")
	}
}

// Latest has the list once it was read from the first scope that answers.
func TestApplicationsAtHand(t *testing.T) {
	_, client, _ := setup(t, githubtest.Config{})
	a := github.NewApplications(client, []fleet.Scope{"stranger", "acme"}, nil)
	if a.Latest() != nil {
		t.Error("a list before it was read")
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	deadline := time.After(30 * time.Second)
	for tick := time.NewTicker(time.Millisecond); len(a.Latest()) == 0; {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatal("the list was not read")
		}
	}
	stop()
	if err := <-done; err != nil {
		t.Errorf("run: %v", err)
	}
}

// Without a pool there is no scope to ask, and nothing to end but the waiting.
func TestApplicationsOfNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, stop := context.WithTimeout(t.Context(), 48*time.Hour)
		defer stop()
		if err := github.NewApplications(nil, nil, nil).Run(ctx); err != nil {
			t.Error(err)
		}
	})
}
