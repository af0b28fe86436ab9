package api

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

const (
	// maxReply bounds what is read of an answer, in bytes: a list of 50,000 jobs.
	maxReply = 64 << 20
	// maxError bounds what is read of a refusal.
	maxError = 64 << 10
	// callTime bounds a call other than sync.
	callTime = 30 * time.Second
	// pingAfter and pingTime find a connection that is dead but not closed (a Mac that
	// slept, a network that was cut): without them HTTP/2 would go on using it.
	pingAfter = 15 * time.Second
	pingTime  = 10 * time.Second
)

// Config of a Client. URL is required.
type Config struct {
	// URL of the controller: https://host:port. http:// only to this host itself, since
	// tokens travel in it.
	URL string
	// Token goes with every call; "": none (for join).
	Token string
	// CertificateHash is the hex SHA-256 of the controller's certificate (DER); the
	// controller must show that one, whatever its name and issuer. "": see CA.
	CertificateHash string
	// CA signs the controller's certificate; nil: the system's roots.
	CA *x509.CertPool
	// Transport carries the calls; nil: one made for the above.
	Transport http.RoundTripper
	// Agent names the program in the User-Agent; "": "paddock".
	Agent string
}

// Client calls a controller. It is safe for concurrent use.
type Client struct {
	base  string
	agent string
	token atomic.Pointer[string]
	http  *http.Client
	// streams is for the calls that become raw streams: HTTP/1.1, a connection each.
	streams *http.Client
}

// New checks the configuration; it makes no call.
func New(c Config) (*Client, error) {
	base, err := url.Parse(c.URL)
	if err != nil || base.Host == "" || (base.Scheme != "https" && base.Scheme != "http") {
		return nil, &Error{Message: fmt.Sprintf("%q is not a controller's address", c.URL), Hint: "want https://host:port"}
	}
	if base.Scheme == "http" && !loopback(base.Hostname()) {
		return nil, &Error{Message: fmt.Sprintf("%q would send the token in the clear", c.URL), Hint: "use https://; plain http is for this host only"}
	}
	streams := c.Transport
	if c.Transport == nil {
		t, err := transport(c)
		if err != nil {
			return nil, err
		}
		c.Transport, streams = t, streamTransport(t)
	}
	client := &Client{
		base: strings.TrimSuffix(c.URL, "/"), agent: c.Agent,
		http:    &http.Client{Transport: c.Transport, CheckRedirect: noRedirect},
		streams: &http.Client{Transport: streams, CheckRedirect: noRedirect},
	}
	if client.agent == "" {
		client.agent = "paddock"
	}
	client.token.Store(&c.Token)
	return client, nil
}

// noRedirect keeps tokens from following a redirect to another place.
func noRedirect(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

func loopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || (ip != nil && ip.IsLoopback())
}

// transport trusts what the configuration names.
func transport(c Config) (*http.Transport, error) {
	t := &http.Transport{
		Proxy:               http.ProxyFromEnvironment,
		TLSClientConfig:     &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: c.CA},
		TLSHandshakeTimeout: 10 * time.Second,
		IdleConnTimeout:     90 * time.Second,
		ForceAttemptHTTP2:   true, // so that a sync that is cut short does not cost the connection
		HTTP2:               &http.HTTP2Config{SendPingTimeout: pingAfter, PingTimeout: pingTime},
	}
	if c.CertificateHash == "" {
		return t, nil
	}
	pinned, err := hex.DecodeString(c.CertificateHash)
	if err != nil || len(pinned) != sha256.Size {
		return nil, &Error{Message: "the controller's certificate hash is not one", Hint: "want the hex SHA-256 that the join token or the controller's log shows"}
	}
	// The pin replaces chain and name: VerifyConnection runs at every handshake, also at
	// resumed ones, and nothing is sent before it agrees.
	t.TLSClientConfig.InsecureSkipVerify = true
	t.TLSClientConfig.VerifyConnection = func(s tls.ConnectionState) error {
		if len(s.PeerCertificates) > 0 && sha256.Sum256(s.PeerCertificates[0].Raw) == [sha256.Size]byte(pinned) {
			return nil
		}
		return &Error{Message: "the controller shows another certificate than the pinned one",
			Hint: "if its certificate was replaced, join again with a new token; if not, someone stands in between"}
	}
	return t, nil
}

// Sync makes one exchange for a node; it may be parked for r.Wait. A renewed credential
// in the reply is the caller's to keep, and then to use: see SetToken.
func (c *Client) Sync(ctx context.Context, r SyncRequest) (SyncReply, error) {
	// A parked call answers after Wait; what takes much longer is a lost connection.
	ctx, cancel := context.WithTimeout(ctx, r.Wait+callTime)
	defer cancel()
	var reply SyncReply
	err := c.do(ctx, http.MethodPost, path(RouteSync, string(r.Node.ID)), r, &reply)
	return reply, err
}

// SetToken has further calls go with another token. A node calls it with a renewed
// credential once that is on its disk: its first use ends the old one.
func (c *Client) SetToken(token string) { c.token.Store(&token) }

// Join exchanges a join token for a node's credential.
func (c *Client) Join(ctx context.Context, token string) (JoinReply, error) {
	return call[JoinReply](ctx, c, http.MethodPost, RouteJoin, JoinRequest{Token: token})
}

// Nodes lists the nodes, by id.
func (c *Client) Nodes(ctx context.Context) ([]NodeRow, error) {
	return call[[]NodeRow](ctx, c, http.MethodGet, RouteNodes, nil)
}

// Cordon keeps new work from a node; Uncordon lets it in again.
func (c *Client) Cordon(ctx context.Context, id fleet.NodeID) (NodeRow, error) {
	return call[NodeRow](ctx, c, http.MethodPost, path(RouteCordon, string(id)), nil)
}

// Uncordon is the inverse of Cordon.
func (c *Client) Uncordon(ctx context.Context, id fleet.NodeID) (NodeRow, error) {
	return call[NodeRow](ctx, c, http.MethodPost, path(RouteUncordon, string(id)), nil)
}

// RemoveNode forgets a node and ends its credentials; it is refused (409) while VMs live
// there or the node still takes work. The answer is the node as it was.
func (c *Client) RemoveNode(ctx context.Context, id fleet.NodeID) (NodeRow, error) {
	return call[NodeRow](ctx, c, http.MethodDelete, path(RouteNode, string(id)), nil)
}

// Chunks tells what a node has and fetches of an image that it pulls, and returns what it
// may fetch from outside and who has the rest. It answers at once.
func (c *Client) Chunks(ctx context.Context, node fleet.NodeID, r ChunksRequest) (ChunksReply, error) {
	return call[ChunksReply](ctx, c, http.MethodPost, path(RouteChunks, string(node)), r)
}

// PullToken buys a registry's token for a node with the controller's credentials.
func (c *Client) PullToken(ctx context.Context, node fleet.NodeID, r PullTokenRequest) (PullTokenReply, error) {
	return call[PullTokenReply](ctx, c, http.MethodPost, path(RoutePullToken, string(node)), r)
}

// VMs lists the VMs, by node and id.
func (c *Client) VMs(ctx context.Context) ([]VMRow, error) {
	return call[[]VMRow](ctx, c, http.MethodGet, RouteVMs, nil)
}

// Images lists the images on nodes, by name, tag and digest.
func (c *Client) Images(ctx context.Context) ([]ImageRow, error) {
	return call[[]ImageRow](ctx, c, http.MethodGet, RouteImages, nil)
}

// Jobs lists jobs, oldest first: those of one status, or with "" all that are kept.
func (c *Client) Jobs(ctx context.Context, status fleet.JobStatus) ([]JobRow, error) {
	route := RouteJobs
	if status != "" {
		route += "?" + url.Values{"status": {string(status)}}.Encode()
	}
	return call[[]JobRow](ctx, c, http.MethodGet, route, nil)
}

// Explain says why a job waits, or what serves it.
func (c *Client) Explain(ctx context.Context, id fleet.JobID) (Explanation, error) {
	return call[Explanation](ctx, c, http.MethodGet, path(RouteExplain, strconv.FormatInt(int64(id), 10)), nil)
}

// Events lists what happened, newest first.
func (c *Client) Events(ctx context.Context, f EventFilter) ([]Event, error) {
	query := url.Values{}
	if f.Job != 0 {
		query.Set("job", strconv.FormatInt(int64(f.Job), 10))
	}
	if f.VM != "" {
		query.Set("vm", string(f.VM))
	}
	if f.Node != "" {
		query.Set("node", string(f.Node))
	}
	if f.Limit != 0 {
		query.Set("limit", strconv.Itoa(f.Limit))
	}
	return call[[]Event](ctx, c, http.MethodGet, RouteEvents+"?"+query.Encode(), nil)
}

// Tokens lists the tokens that are in force.
func (c *Client) Tokens(ctx context.Context) ([]TokenRow, error) {
	return call[[]TokenRow](ctx, c, http.MethodGet, RouteTokens, nil)
}

// CreateToken makes a token; the reply is the only time it is shown.
func (c *Client) CreateToken(ctx context.Context, r TokenRequest) (TokenReply, error) {
	return call[TokenReply](ctx, c, http.MethodPost, RouteTokens, r)
}

// RevokeToken ends a token.
func (c *Client) RevokeToken(ctx context.Context, id string) (TokenRow, error) {
	return call[TokenRow](ctx, c, http.MethodDelete, path(RouteToken, id), nil)
}

// call is do with callTime and a typed answer.
func call[T any](ctx context.Context, c *Client, method, path string, body any) (T, error) {
	ctx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	var answer T
	err := c.do(ctx, method, path, body, &answer)
	return answer, err
}

// do sends body as JSON and decodes a 2xx answer; any other is an *Error.
func (c *Client) do(ctx context.Context, method, path string, body, answer any) error {
	return c.doBy(ctx, c.http, method, path, body, answer)
}

// doBy is do by one of the client's ways.
func (c *Client) doBy(ctx context.Context, by *http.Client, method, path string, body, answer any) error {
	var content io.Reader = http.NoBody
	if body != nil {
		text, err := json.Marshal(body)
		if err != nil {
			return fmt.Errorf("encode a request for %s: %w", path, err)
		}
		content = bytes.NewReader(text)
	}
	request, err := c.request(ctx, method, path, content)
	if err != nil {
		return err
	}
	if body != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	response, err := by.Do(request)
	if err != nil {
		return unreachable(c.base, err)
	}
	defer func() { _ = response.Body.Close() }()
	if response.StatusCode < 200 || response.StatusCode > 299 {
		return readError(response)
	}
	return decode(response.Body, answer)
}

// request is one with who we are.
func (c *Client) request(ctx context.Context, method, path string, content io.Reader) (*http.Request, error) {
	request, err := http.NewRequestWithContext(ctx, method, c.base+path, content)
	if err != nil {
		return nil, fmt.Errorf("call %s: %w", path, err)
	}
	if token := *c.token.Load(); token != "" {
		request.Header.Set("Authorization", "Bearer "+token)
	}
	request.Header.Set("User-Agent", c.agent)
	return request, nil
}

// unreachable says in words that the controller was not reached; an *Error inside (a
// wrong certificate) is said as it is.
func unreachable(base string, err error) error {
	var ours *Error
	if errors.As(err, &ours) {
		return ours
	}
	var shell *url.Error // repeats the URL
	if errors.As(err, &shell) {
		err = shell.Err
	}
	return fmt.Errorf("reach the controller at %s: %w", base, err)
}

// decode reads one JSON value of at most maxReply bytes.
func decode(body io.Reader, answer any) error {
	limited := &io.LimitedReader{R: body, N: maxReply + 1}
	err := json.NewDecoder(limited).Decode(answer)
	switch {
	case limited.N <= 0:
		return fmt.Errorf("the controller's answer is larger than %d bytes", maxReply)
	case err != nil:
		return fmt.Errorf("read the controller's answer: %w", err)
	}
	return nil
}
