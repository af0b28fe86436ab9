package github

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"path"
	"strings"
	"sync/atomic"
	"time"

	gh "github.com/google/go-github/v62/github"

	"github.com/paddock-ci/paddock/fleet"
)

// How often GitHub's list of runner applications is read: a version lives for weeks.
const (
	applicationsEvery = time.Hour
	applicationsAgain = time.Minute // after a failure
)

// Applications keeps GitHub's list of runner applications at hand: Run reads it now and
// then, and Latest never waits.
type Applications struct {
	client *Client
	scopes []fleet.Scope
	log    *slog.Logger
	latest atomic.Pointer[[]fleet.Archive]
}

// NewApplications asks in the scopes' order; the first that answers is enough, since the
// list is the same everywhere. A nil log is allowed.
func NewApplications(client *Client, scopes []fleet.Scope, log *slog.Logger) *Applications {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Applications{client: client, scopes: scopes, log: log}
}

// Latest is what was last read, none before that.
func (a *Applications) Latest() []fleet.Archive {
	if list := a.latest.Load(); list != nil {
		return *list
	}
	return nil
}

// Run reads the list until ctx ends; without scopes there is nobody to ask.
func (a *Applications) Run(ctx context.Context) error {
	for len(a.scopes) > 0 {
		wait := applicationsEvery
		if err := a.read(ctx); err != nil && ctx.Err() == nil {
			a.log.Warn("the list of runner applications was not read; it is tried again", "error", err)
			wait = applicationsAgain
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil
		}
	}
	<-ctx.Done()
	return nil
}

func (a *Applications) read(ctx context.Context) error {
	var failed error
	for _, scope := range a.scopes {
		list, err := a.client.Applications(ctx, scope)
		if err == nil {
			a.latest.Store(&list)
			return nil
		}
		failed = errors.Join(failed, err)
	}
	return failed
}

// Applications lists the runners that GitHub offers for download, for the guests that
// there are (macOS and Linux); those without a checksum are left out.
//
// GET /orgs/{org}/actions/runners/downloads, or …/repos/{owner}/{repo}/….
func (c *Client) Applications(ctx context.Context, scope fleet.Scope) ([]fleet.Archive, error) {
	var offered []*gh.RunnerApplicationDownload
	err := c.as(ctx, scope, func(client *gh.Client) (err error) {
		if owner, repository, is := strings.Cut(string(scope), "/"); is {
			offered, _, err = client.Actions.ListRunnerApplicationDownloads(ctx, owner, repository)
		} else {
			offered, _, err = client.Actions.ListOrganizationRunnerApplicationDownloads(ctx, owner)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list runner applications in %s: %w", scope, clean(err))
	}
	var list []fleet.Archive
	for _, o := range offered {
		if archive, ok := archive(o); ok {
			list = append(list, archive)
		}
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("list runner applications in %s: none of %d has a checksum and fits a guest", scope, len(offered))
	}
	return list, nil
}

// GitHub's words for platforms, and Go's.
var (
	systems       = map[string]string{"osx": "darwin", "linux": "linux"}
	architectures = map[string]string{"arm64": "arm64", "x64": "amd64", "x86_64": "amd64"}
)

// archive reads one entry of GitHub's list; ok is false if no guest of ours could use it.
func archive(o *gh.RunnerApplicationDownload) (_ fleet.Archive, ok bool) {
	a := fleet.Archive{
		OS: systems[o.GetOS()], Arch: architectures[o.GetArchitecture()],
		Name: o.GetFilename(), URL: o.GetDownloadURL(), SHA256: strings.ToLower(o.GetSHA256Checksum()),
	}
	sum, err := hex.DecodeString(a.SHA256)
	if a.OS == "" || a.Arch == "" || err != nil || len(sum) != 32 {
		return fleet.Archive{}, false
	}
	u, err := url.Parse(a.URL)
	return a, err == nil && u.Host != "" && a.Name != "" && a.Name == path.Base(a.Name) && strings.HasSuffix(a.Name, ".tar.gz")
}
