// Package registrytest is a real OCI registry in memory that counts what it is asked for
// and can misbehave: wrong bytes, cut connections, 429s, expiring tokens, links to a
// second host that go stale.
//
// It is no mock: manifests and tags are go-containerregistry's own registry; blobs and
// uploads are answered here, so that they can be spoilt, paced and counted. Called by
// tests and benchmarks of cache and what is below it, and by cmd/paddock-demo, which
// pulls its two images from it. Serve it with net/http.
package registrytest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/url"
	"strings"
	"sync"

	"github.com/google/go-containerregistry/pkg/registry"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
	"github.com/paddock-ci/paddock/image/tart"
)

// Registry is the registry. It is safe for concurrent use.
type Registry struct {
	inner http.Handler // manifests and tags
	pace  pacer

	mu     sync.Mutex
	blobs  map[fleet.Digest]*blob
	counts Counts
	faults map[fleet.Digest][]*Fault // "" is any blob
	healed chan struct{}             // closed by Heal, to let hanging requests go
	auth   auth
	links  links

	pending      map[string]*upload
	lastUpload   int
	pushed       Pushed
	noMounts     bool
	uploadFaults []*Fault
}

// Counts is what has been asked for, by digest; a manifest asked for by tag is counted
// under its digest all the same.
type Counts struct {
	Requests map[fleet.Digest]int   // GETs of a blob or manifest, failed ones too
	Bytes    map[fleet.Digest]int64 // bytes of body sent, from whichever host
}

// Total is the sum over all digests: what a bill for egress would say.
func (c Counts) Total() (requests int, bytes int64) {
	for d, n := range c.Requests {
		requests += n
		bytes += c.Bytes[d]
	}
	return requests, bytes
}

// New returns an empty registry that anyone may read and write.
func New() *Registry {
	r := &Registry{
		blobs: make(map[fleet.Digest]*blob), faults: make(map[fleet.Digest][]*Fault), healed: make(chan struct{}),
		pending: make(map[string]*upload),
	}
	r.inner = registry.New(registry.Logger(slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)))
	r.Reset()
	return r
}

// Reset forgets all counts.
func (r *Registry) Reset() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.counts = Counts{Requests: make(map[fleet.Digest]int), Bytes: make(map[fleet.Digest]int64)}
	r.pushed = Pushed{}
}

// Counts returns a copy of what was asked for since New or Reset.
func (r *Registry) Counts() Counts {
	r.mu.Lock()
	defer r.mu.Unlock()
	return Counts{Requests: maps.Clone(r.counts.Requests), Bytes: maps.Clone(r.counts.Bytes)}
}

// Limit bounds what the registry sends of blobs, over all connections together, in bytes
// per second; 0: no limit, as at first.
func (r *Registry) Limit(bytesPerSecond int64) { r.pace.set(bytesPerSecond) }

// Push makes a Tart image and stores it under repository:tag, without going through
// HTTP. It returns the image's digest.
func (r *Registry) Push(ctx context.Context, repository, tag string, src tart.Source) (fleet.Digest, error) {
	raw, err := tart.Build(ctx, src, func(ctx context.Context, l tart.Layer) error {
		data, err := l.Bytes()
		if err == nil {
			_, err = r.PutBlob(ctx, data)
		}
		return err
	})
	if err != nil {
		return "", fmt.Errorf("making %s:%s: %w", repository, tag, err)
	}
	return r.PutManifest(ctx, repository, tag, image.MediaTypeManifest, raw)
}

// PutManifest stores any manifest as it stands, good or bad.
func (r *Registry) PutManifest(ctx context.Context, repository, tag, mediaType string, raw []byte) (fleet.Digest, error) {
	target := (&url.URL{Path: "/v2/" + repository + "/manifests/" + tag}).String()
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, target, bytes.NewReader(raw))
	if err != nil {
		return "", fmt.Errorf("storing %s:%s: %w", repository, tag, err)
	}
	req.Header.Set("Content-Type", mediaType)
	var answer recorder
	r.inner.ServeHTTP(&answer, req)
	if answer.status/100 != 2 {
		return "", fmt.Errorf("storing %s:%s: status %d: %s", repository, tag, answer.status, answer.body.String())
	}
	return image.DigestOf(raw), nil
}

// recorder keeps an answer in memory.
type recorder struct {
	status int
	header http.Header
	body   bytes.Buffer
}

func (r *recorder) Header() http.Header {
	if r.header == nil {
		r.header = make(http.Header)
	}
	return r.header
}
func (r *recorder) WriteHeader(status int) { r.status = status }
func (r *recorder) Write(b []byte) (int, error) {
	if r.status == 0 {
		r.status = http.StatusOK
	}
	return r.body.Write(b)
}

// ServeHTTP is the registry's HTTP interface: OCI distribution v1.1, and /token.
func (r *Registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	if req.URL.Path == "/token" {
		r.token(w, req)
		return
	}
	repository, what, name := split(req.URL.Path)
	if !r.admit(w, req, repository) {
		return
	}
	switch {
	case what == "blobs" && req.Method == http.MethodGet:
		r.blob(w, req, repository, fleet.Digest(name))
	case what == "blobs" && req.Method == http.MethodHead:
		r.stat(w, repository, fleet.Digest(name))
	case what == "uploads":
		r.upload(w, req, repository, name)
	case what == "manifests" && req.Method == http.MethodGet:
		r.manifest(w, req)
	case what == "manifests" && req.Method == http.MethodPut:
		r.write(w, req, repository)
	default:
		r.inner.ServeHTTP(w, req)
	}
}

// split takes /v2/<repository>/(blobs|manifests|blobs/uploads)/<name> apart.
func split(path string) (repository, what, name string) {
	path = strings.TrimPrefix(path, "/v2/")
	for _, what := range []string{"blobs/uploads", "blobs", "manifests"} {
		if repository, name, ok := strings.Cut(path, "/"+what+"/"); ok {
			return repository, strings.TrimPrefix(what, "blobs/"), name
		}
	}
	repository, _ = strings.CutSuffix(path, "/tags/list")
	return repository, "", ""
}

// manifest answers for a manifest and counts it under its digest.
func (r *Registry) manifest(w http.ResponseWriter, req *http.Request) {
	var answer recorder
	r.inner.ServeHTTP(&answer, req)
	body := answer.body.Bytes()
	r.mu.Lock()
	r.counts.Requests[image.DigestOf(body)]++
	r.counts.Bytes[image.DigestOf(body)] += int64(len(body))
	r.mu.Unlock()
	maps.Copy(w.Header(), answer.header)
	w.WriteHeader(answer.status)
	_, _ = io.Copy(w, bytes.NewReader(body)) // the client may have gone
}
