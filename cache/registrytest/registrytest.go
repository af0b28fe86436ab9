// Package registrytest is a real OCI registry in memory that counts what it is asked for
// and can misbehave: wrong bytes, cut connections, 429s, expiring tokens.
//
// It is no mock: below the counting and the faults, go-containerregistry's own registry
// answers. Called by tests of cache and cache/registry, and by cmd/paddock-demo, which
// pulls its two images from it. Serve it with net/http.
package registrytest

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/url"
	"strings"
	"sync"

	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
	"github.com/paddock-ci/paddock/image/tart"
)

// Registry is the registry. It is safe for concurrent use.
type Registry struct {
	inner http.Handler
	blobs store

	mu     sync.Mutex
	counts Counts
	faults map[fleet.Digest][]*Fault // "" is any blob
	healed chan struct{}             // closed by Heal, to let hanging requests go
	auth   auth
}

// store is what go-containerregistry's memory store can do, of which its own
// interfaces each name a part.
type store interface {
	registry.BlobHandler
	registry.BlobPutHandler
}

// Counts is what has been asked for, by digest; a manifest asked for by tag is counted
// under its digest all the same.
type Counts struct {
	Requests map[fleet.Digest]int   // GETs of a blob or manifest, failed ones too
	Bytes    map[fleet.Digest]int64 // bytes of body sent
}

// Total is the sum over all digests.
func (c Counts) Total() (requests int, bytes int64) {
	for d, n := range c.Requests {
		requests += n
		bytes += c.Bytes[d]
	}
	return requests, bytes
}

// auth is who may read; the zero value is everyone.
type auth struct {
	user, password string
	bearer         bool           // tokens from /token, rather than Basic
	uses           int            // requests that one token is good for; 0: no limit
	tokens         map[string]int // uses left; unlimited ones count down from 0
	issued         int
}

// New returns an empty registry that anyone may read and write.
func New() *Registry {
	blobs, ok := registry.NewInMemoryBlobHandler().(store)
	if !ok {
		panic("registrytest: go-containerregistry's memory store no longer takes blobs")
	}
	r := &Registry{blobs: blobs, faults: make(map[fleet.Digest][]*Fault), healed: make(chan struct{})}
	r.inner = registry.New(registry.WithBlobHandler(blobs), registry.Logger(slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)))
	r.Reset()
	return r
}

// Reset forgets all counts.
func (r *Registry) Reset() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.counts = Counts{Requests: make(map[fleet.Digest]int), Bytes: make(map[fleet.Digest]int64)}
}

// Counts returns a copy of what was asked for since New or Reset.
func (r *Registry) Counts() Counts {
	r.mu.Lock()
	defer r.mu.Unlock()
	return Counts{Requests: maps.Clone(r.counts.Requests), Bytes: maps.Clone(r.counts.Bytes)}
}

// RequireBasic lets in only who has these credentials.
func (r *Registry) RequireBasic(user, password string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.auth = auth{user: user, password: password}
}

// RequireToken lets in only tokens that the credentials buy at /token; each is good for
// uses requests (0: for ever).
func (r *Registry) RequireToken(user, password string, uses int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.auth = auth{user: user, password: password, bearer: true, uses: uses, tokens: make(map[string]int)}
}

// Tokens is how many tokens have been bought since RequireToken.
func (r *Registry) Tokens() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.auth.issued
}

// Push makes a Tart image and stores it under repository:tag, without going through
// HTTP. It returns the image's digest.
func (r *Registry) Push(ctx context.Context, repository, tag string, src tart.Source) (fleet.Digest, error) {
	raw, err := tart.Build(src, func(l tart.Layer) error {
		_, err := r.PutBlob(ctx, l.Data)
		return err
	})
	if err != nil {
		return "", fmt.Errorf("making %s:%s: %w", repository, tag, err)
	}
	return r.PutManifest(ctx, repository, tag, image.MediaTypeManifest, raw)
}

// PutBlob stores a blob, for every repository.
func (r *Registry) PutBlob(ctx context.Context, data []byte) (fleet.Digest, error) {
	digest := image.DigestOf(data)
	hash, err := v1.NewHash(string(digest))
	if err != nil {
		return "", err
	}
	// The store keeps what it is given: a copy, since the caller may reuse data.
	body := io.NopCloser(bytes.NewReader(bytes.Clone(data)))
	if err := r.blobs.Put(ctx, "", hash, body); err != nil {
		return "", fmt.Errorf("storing blob %s: %w", digest, err)
	}
	return digest, nil
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
	if !r.admit(w, req) {
		return
	}
	_, name, isBlob := strings.Cut(req.URL.Path, "/blobs/sha256:")
	_, _, isManifest := strings.Cut(req.URL.Path, "/manifests/")
	switch {
	case req.Method == http.MethodGet && isBlob:
		r.blob(w, req, fleet.Digest("sha256:"+name))
	case req.Method == http.MethodGet && isManifest:
		r.manifest(w, req)
	default:
		r.inner.ServeHTTP(w, req)
	}
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
	_, _ = w.Write(body) // the client may have gone
}

// content reads a blob.
func (r *Registry) content(ctx context.Context, d fleet.Digest) ([]byte, error) {
	hash, err := v1.NewHash(string(d))
	if err != nil {
		return nil, err
	}
	body, err := r.blobs.Get(ctx, "", hash)
	if err != nil {
		return nil, err
	}
	defer func() { _ = body.Close() }()
	return io.ReadAll(body)
}

// admit checks credentials, and answers for itself if they do not do.
func (r *Registry) admit(w http.ResponseWriter, req *http.Request) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	challenge := `Basic realm="registrytest"`
	switch {
	case r.auth.user == "":
		return true
	case r.auth.bearer:
		token, _ := strings.CutPrefix(req.Header.Get("Authorization"), "Bearer ")
		left, known := r.auth.tokens[token]
		if known && (r.auth.uses == 0 || left > 0) {
			if req.URL.Path != "/v2/" {
				r.auth.tokens[token]--
			}
			return true
		}
		challenge = fmt.Sprintf(`Bearer realm="http://%s/token",service="registrytest"`, req.Host)
	default:
		if user, password, _ := req.BasicAuth(); user == r.auth.user && password == r.auth.password {
			return true
		}
	}
	w.Header().Set("WWW-Authenticate", challenge)
	http.Error(w, `{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}`, http.StatusUnauthorized)
	return false
}

// token sells a token for credentials.
func (r *Registry) token(w http.ResponseWriter, req *http.Request) {
	r.mu.Lock()
	defer r.mu.Unlock()
	user, password, _ := req.BasicAuth()
	if !r.auth.bearer || user != r.auth.user || password != r.auth.password {
		http.Error(w, `{"errors":[{"code":"UNAUTHORIZED"}]}`, http.StatusUnauthorized)
		return
	}
	r.auth.issued++
	token := base64.RawURLEncoding.EncodeToString(fmt.Appendf(nil, "token %d", r.auth.issued))
	r.auth.tokens[token] = r.auth.uses
	w.Header().Set("Content-Type", "application/json")
	_, _ = fmt.Fprintf(w, `{"token":%q,"expires_in":300}`, token)
}

// notFound reports whether an error of the store means that there is no such blob.
func notFound(err error) bool { return errors.Is(err, registry.ErrNotFound) }
