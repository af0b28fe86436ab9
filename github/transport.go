package github

import (
	"bytes"
	"container/list"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// gate bounds how many requests are under way at once.
type gate struct {
	next http.RoundTripper
	free chan struct{}
}

func (g *gate) RoundTrip(r *http.Request) (*http.Response, error) {
	select {
	case g.free <- struct{}{}:
	case <-r.Context().Done():
		return nil, r.Context().Err()
	}
	defer func() { <-g.free }()
	return g.next.RoundTrip(r)
}

// limits is the transport of one installation. It spaces writes, remembers per resource
// until when GitHub wants to be left alone and refuses requests until then without
// sending them, and answers what has not changed from memory (a 304 costs nothing).
//
// go-github must not see limits: it does not know 429, takes a registration's limit for
// the core one and then refuses everything. So the headers are taken off here.
type limits struct {
	next   http.RoundTripper
	writes *rate.Limiter
	log    *slog.Logger

	mu       sync.Mutex
	until    map[string]time.Time // by resource
	resource map[string]string    // by kind of request, learned from answers
	seen     cache
}

// Writes: GitHub counts 5 points for each and allows 900 a minute.
const (
	writesPerMinute = 150
	writeBurst      = 30
)

func newLimits(next http.RoundTripper, perMinute int, log *slog.Logger) *limits {
	l := &limits{next: next, log: log, until: map[string]time.Time{}, resource: map[string]string{}, seen: newCache()}
	switch {
	case perMinute == 0:
		l.writes = rate.NewLimiter(rate.Every(time.Minute/writesPerMinute), writeBurst)
	case perMinute > 0:
		l.writes = rate.NewLimiter(rate.Every(time.Minute/time.Duration(perMinute)), 1)
	default:
		l.writes = rate.NewLimiter(rate.Inf, 0)
	}
	return l
}

// RoundTrip sends one request, or fails with *RateLimited.
func (l *limits) RoundTrip(r *http.Request) (*http.Response, error) {
	kind := kindOf(r)
	if err := l.blocked(kind); err != nil {
		return nil, err
	}
	if r.Method == http.MethodGet {
		r = l.seen.condition(r)
	} else if err := l.writes.Wait(r.Context()); err != nil {
		return nil, fmt.Errorf("wait for the next write to GitHub: %w", err)
	}
	response, err := l.next.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	if err := l.learn(kind, response); err != nil {
		_ = response.Body.Close() // it was read as far as it matters
		return nil, err
	}
	for header := range response.Header {
		if strings.HasPrefix(header, "X-Ratelimit-") {
			response.Header.Del(header)
		}
	}
	if r.Method == http.MethodGet {
		return l.seen.answer(r, response)
	}
	return response, nil
}

// ids are the parts of a path that differ between requests of one kind.
var ids = regexp.MustCompile(`/(orgs|users)/[^/]+|/(repos)/[^/]+/[^/]+|/\d+`)

// kindOf is the method and the path without names and numbers.
func kindOf(r *http.Request) string {
	return r.Method + " " + ids.ReplaceAllString(r.URL.Path, "/$1$2")
}

// blocked says whether GitHub is to be left alone for this kind of request.
func (l *limits) blocked(kind string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	resource := l.resourceOf(kind)
	if until := l.until[resource]; time.Now().Before(until) {
		return &RateLimited{Until: until, Resource: resource}
	}
	return nil
}

// resourceOf is what a kind of request was counted as when it was last answered.
func (l *limits) resourceOf(kind string) string {
	if resource := l.resource[kind]; resource != "" {
		return resource
	}
	return "core"
}

// learn reads what an answer says about limits; *RateLimited if it refuses.
func (l *limits) learn(kind string, response *http.Response) error {
	now := time.Now()
	h := response.Header
	l.mu.Lock()
	defer l.mu.Unlock()
	if resource := h.Get("X-Ratelimit-Resource"); resource != "" {
		l.resource[kind] = resource
	}
	resource := l.resourceOf(kind)
	spent := h.Get("X-Ratelimit-Remaining") == "0"
	reset := now.Add(time.Minute)
	if seconds, err := strconv.ParseInt(h.Get("X-Ratelimit-Reset"), 10, 64); err == nil {
		reset = time.Unix(seconds, 0)
	}
	if spent && now.Before(reset) {
		l.until[resource] = reset // the next one would be refused
	}
	if response.StatusCode != http.StatusForbidden && response.StatusCode != http.StatusTooManyRequests {
		return nil
	}
	// GitHub's advice: retry-after if there is one, else the reset if nothing remains,
	// else at least a minute.
	until := now.Add(time.Minute)
	seconds, err := strconv.Atoi(h.Get("Retry-After"))
	switch {
	case err == nil && seconds >= 0:
		until = now.Add(time.Duration(seconds) * time.Second)
	case spent:
		until = reset
	case response.StatusCode == http.StatusForbidden && !secondary(response):
		return nil // a permission is missing: no limit
	}
	l.until[resource] = until
	l.log.Warn("GitHub limits requests", "resource", resource, "until", until, "status", response.StatusCode)
	return &RateLimited{Until: until, Resource: resource}
}

// maxError bounds how much of an error's body is looked at.
const maxError = 64 << 10

// secondary reports whether a 403 without headers speaks of a limit; the body can still
// be read afterwards.
func secondary(response *http.Response) bool {
	start, err := io.ReadAll(io.LimitReader(response.Body, maxError))
	response.Body = &joined{Reader: io.MultiReader(bytes.NewReader(start), response.Body), Closer: response.Body}
	return err == nil && (bytes.Contains(start, []byte("secondary rate limit")) || bytes.Contains(start, []byte("secondary-rate-limits")))
}

type joined struct {
	io.Reader
	io.Closer
}

// cache remembers answers to GET with their ETags, the least used one going first.
type cache struct {
	mu      *sync.Mutex
	entries map[string]*list.Element // by URL and media type
	recent  *list.List               // of entry, latest first
	bytes   int
}

type entry struct {
	key, tag string
	header   http.Header
	body     []byte
}

// Bounds of the cache, per installation: a page of a hundred runners is 40 KB.
const (
	maxCached = 8 << 20
	maxAnswer = 1 << 20
)

func newCache() cache {
	return cache{mu: &sync.Mutex{}, entries: map[string]*list.Element{}, recent: list.New()}
}

func cacheKey(r *http.Request) string { return r.URL.String() + " " + r.Header.Get("Accept") }

// condition asks for news only, if there is an answer to fall back on.
func (c *cache) condition(r *http.Request) *http.Request {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.entries[cacheKey(r)]
	if e == nil {
		return r
	}
	r = r.Clone(r.Context())
	r.Header.Set("If-None-Match", e.Value.(*entry).tag)
	return r
}

// answer replaces a 304 by what was answered before, and keeps new answers.
func (c *cache) answer(r *http.Request, response *http.Response) (*http.Response, error) {
	key := cacheKey(r)
	if response.StatusCode == http.StatusNotModified {
		c.mu.Lock()
		defer c.mu.Unlock()
		element := c.entries[key]
		if element == nil { // dropped meanwhile: as rare as it is harmless
			return response, nil
		}
		_ = response.Body.Close()
		c.recent.MoveToFront(element)
		e := element.Value.(*entry)
		response.StatusCode, response.Status, response.Header = http.StatusOK, "200 OK", e.header.Clone()
		response.Body = io.NopCloser(bytes.NewReader(e.body))
		response.ContentLength = int64(len(e.body))
		return response, nil
	}
	tag := response.Header.Get("Etag")
	if response.StatusCode != http.StatusOK || tag == "" {
		return response, nil
	}
	body, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer+1))
	if err != nil {
		_ = response.Body.Close()
		return nil, fmt.Errorf("read GitHub's answer: %w", err)
	}
	response.Body = &joined{Reader: io.MultiReader(bytes.NewReader(body), response.Body), Closer: response.Body}
	if len(body) <= maxAnswer {
		c.keep(&entry{key: key, tag: tag, header: response.Header.Clone(), body: body})
	}
	return response, nil
}

func (c *cache) keep(e *entry) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if old := c.entries[e.key]; old != nil {
		c.drop(old)
	}
	c.entries[e.key] = c.recent.PushFront(e)
	c.bytes += len(e.body)
	for c.bytes > maxCached {
		c.drop(c.recent.Back())
	}
}

func (c *cache) drop(element *list.Element) {
	e := c.recent.Remove(element).(*entry)
	delete(c.entries, e.key)
	c.bytes -= len(e.body)
}
