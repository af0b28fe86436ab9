// Package registry asks OCI registries: which image a tag is, and for the bytes of
// manifests and blobs.
//
// It keeps nothing on disk and verifies only what it decides by (a manifest asked for by
// digest); package cache verifies the rest. Names, credentials and tokens are
// go-containerregistry's; requests are made here, so that a blob can be resumed in the
// middle, a stall is noticed and Retry-After is honoured. Called by controller
// (Resolve) and, as cache.Source, by cache.
package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// Config says how to reach registries.
type Config struct {
	// Keychain has the credentials; nil: the Docker config's and its helpers'.
	Keychain authn.Keychain
	// Token gives a token for pulls from a repository (host/name). It is asked before the
	// Keychain, and again after a 401; an empty token leaves it to the Keychain. nil: there
	// is none.
	Token func(ctx context.Context, repository string) (token string, err error)
	// Allow refuses repositories (host/name), before any request; nil: none.
	Allow func(repository string) error
	// Mirror is a registry nearby that has what others have, host or host/prefix; ref
	// host/name is then asked for as mirror/name. Empty: each registry is asked itself.
	Mirror string
	// For is the registry that Mirror mirrors; empty: any.
	For string
	// Transport is what requests go out by; nil: one of our own, on HTTP/1.1 so that each
	// stream has a connection to itself.
	Transport http.RoundTripper
	// Codecs are the image formats that Resolve can read; nil: cache.Formats.
	Codecs []image.Codec
	// Tries is how often in a row a request may fail without one byte gained; 0: 5.
	Tries int
	// Pause is the wait before the second try, doubled for each further one, with
	// jitter; a registry's Retry-After goes before it. 0: 500 ms.
	Pause time.Duration
	// Stall is how long no byte may move before a connection is given up, and how long a
	// login may take in all; 0: 30 s.
	Stall time.Duration
	// Floor is the least that must move in that time, in bytes per second: a connection
	// that trickles is given up too. 0: 1024; negative: any byte will do.
	Floor int64
	// Log gets retries; nil: none.
	Log *slog.Logger
}

// Client asks registries. It is safe for concurrent use.
type Client struct {
	keychain authn.Keychain
	token    func(ctx context.Context, repository string) (string, error)
	allow    func(repository string) error
	mirror   string // host or host/prefix; empty: none
	only     string // the registry host that is mirrored; empty: any
	base     http.RoundTripper
	outward  http.RoundTripper // of pushes: registries think long over what they are given
	codecs   []image.Codec
	tries    int
	pause    time.Duration
	stall    time.Duration
	floor    int64
	log      *slog.Logger
	last     atomic.Pointer[placed]

	mu    sync.Mutex
	ports map[string]*port // by repository
	hosts map[string]*host
}

var _ cache.Source = (*Client)(nil)

// New makes a client; it makes no request.
func New(cfg Config) (*Client, error) {
	if cfg.Tries < 0 || cfg.Pause < 0 || cfg.Stall < 0 {
		return nil, fmt.Errorf("registry client: tries %d, pause %s and stall %s must not be negative", cfg.Tries, cfg.Pause, cfg.Stall)
	}
	c := &Client{
		keychain: cfg.Keychain, token: cfg.Token, allow: cfg.Allow, codecs: cfg.Codecs,
		tries: cfg.Tries, pause: cfg.Pause, stall: cfg.Stall, floor: cfg.Floor, log: cfg.Log,
		ports: make(map[string]*port), hosts: make(map[string]*host),
	}
	if err := c.setMirror(cfg.Mirror, cfg.For); err != nil {
		return nil, err
	}
	if c.keychain == nil {
		c.keychain = authn.DefaultKeychain
	}
	if c.codecs == nil {
		c.codecs = cache.Formats()
	}
	if c.tries == 0 {
		c.tries = 5
	}
	if c.pause == 0 {
		c.pause = 500 * time.Millisecond
	}
	if c.stall == 0 {
		c.stall = 30 * time.Second
	}
	if c.floor == 0 {
		c.floor = 1024
	}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	base, outward := cfg.Transport, cfg.Transport
	if base == nil {
		base, outward = newTransport(30*time.Second), newTransport(settleTime)
	}
	c.base, c.outward = plainOnlyHere{base}, plainOnlyHere{outward}
	return c, nil
}

// Resolve asks what image ref is now. A tag that is an index of one image is followed.
// Errors are *cache.Error.
func (c *Client) Resolve(ctx context.Context, ref string) (fleet.Image, error) {
	r, err := c.place(ref)
	if err != nil {
		return fleet.Image{}, err
	}
	raw, err := c.manifest(ctx, r)
	if err == nil {
		raw, err = c.follow(ctx, r, raw)
	}
	if err != nil {
		return fleet.Image{}, fmt.Errorf("resolving %s: %w", ref, err)
	}
	m, _, err := image.Parse(raw, c.codecs)
	if err != nil {
		return fleet.Image{}, &cache.Error{Class: cache.ClassFormat, Err: fmt.Errorf("resolving %s: %w", ref, err)}
	}
	return fleet.Image{
		Ref: ref, Digest: m.Digest, Bytes: m.Bytes(), DiskBytes: m.DiskSize, ResolvedAt: time.Now(),
	}, nil
}

// follow goes from an index to its single entry, one step far.
func (c *Client) follow(ctx context.Context, r image.Reference, raw []byte) ([]byte, error) {
	entry, isIndex, err := image.IndexEntry(raw)
	if err != nil {
		return nil, &cache.Error{Class: cache.ClassFormat, Err: err}
	}
	if !isIndex {
		return raw, nil
	}
	return c.manifest(ctx, r.At(entry))
}

// manifest fetches a manifest by tag or digest; a digest is verified. One that is cut off
// in the middle is fetched again: it is small.
func (c *Client) manifest(ctx context.Context, r image.Reference) (raw []byte, err error) {
	for try := 1; ; try++ {
		body, err := c.open(ctx, r.Repository(), "manifests/"+r.Identifier(), 0, -1, func(req *http.Request) {
			req.Header.Set("Accept", strings.Join(image.AcceptedTypes, ", "))
		})
		if err != nil {
			return nil, err
		}
		raw, err = io.ReadAll(io.LimitReader(body, image.MaxManifestBytes+1))
		_ = body.Close() // it was only read
		if err == nil {
			break
		}
		if try >= c.tries || ctx.Err() != nil {
			return nil, err
		}
		c.log.Info("a manifest will be fetched again", "host", r.Host(), "error", err)
		if err := sleep(ctx, c.pause<<(try-1)); err != nil {
			return nil, err
		}
	}
	if len(raw) > image.MaxManifestBytes {
		return nil, &cache.Error{Class: cache.ClassFormat, Err: fmt.Errorf("%w: the manifest has more than %d bytes", image.ErrTooLarge, image.MaxManifestBytes)}
	}
	if got := image.DigestOf(raw); r.Digest() != "" && got != r.Digest() {
		return nil, &cache.Error{Class: cache.ClassDigest, Err: fmt.Errorf("asked for manifest %s, the registry sent %s", r.Digest(), got)}
	}
	return raw, nil
}

// checkRedirect follows a few redirects, and never carries credentials to another host:
// what net/http would copy to a subdomain goes too, and the transport adds them for the
// registry's own host only.
func checkRedirect(req *http.Request, via []*http.Request) error {
	if len(via) >= 5 {
		return errors.New("stopped after 5 redirects")
	}
	if image.Loopback(req.URL.Host) && !image.Loopback(via[0].URL.Host) {
		return fmt.Errorf("%s redirects to this machine: refused", via[0].URL.Host)
	}
	if req.URL.Host != via[0].URL.Host {
		req.Header.Del("Authorization")
		req.Header.Del("Cookie")
	}
	return nil
}

// plainOnlyHere refuses plain HTTP to any host but this machine, wherever a redirect or
// a fallback would lead.
type plainOnlyHere struct{ inner http.RoundTripper }

func (t plainOnlyHere) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Scheme != "https" && !image.Loopback(req.URL.Host) {
		return nil, fmt.Errorf("%w to %s: only localhost is spoken to without TLS", errPlain, req.URL.Host)
	}
	return t.inner.RoundTrip(req)
}

// progress is how many bytes make a try worth it, so that the count of tries begins
// anew: what has to move in the time of a stall.
func (c *Client) progress() int64 {
	return max(1, int64(float64(c.floor)*c.stall.Seconds()))
}

var errPlain = errors.New("refusing plain HTTP")

// newTransport is net/http's, without HTTP/2 (whose streams would share one connection,
// and so one loss of a packet) and with as many idle connections as there are streams. An answer has to begin within a time.
func newTransport(begin time.Duration) http.RoundTripper {
	// net/http documents the type behind the interface.
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.ForceAttemptHTTP2 = false
	t.Protocols = new(http.Protocols)
	t.Protocols.SetHTTP1(true)
	t.MaxIdleConnsPerHost = 32
	t.ResponseHeaderTimeout = begin
	t.DisableCompression = true // blobs are bytes, whatever they look like
	return t
}
