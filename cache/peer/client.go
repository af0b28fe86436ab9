package peer

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/fleet"
)

const (
	// dialTime bounds a connection to a node of the same site, and its handshake again:
	// there, an answer takes milliseconds.
	dialTime = 5 * time.Second
	// maxIdle are the connections kept to one peer: a pull's streams.
	maxIdle = 16
	// lineLife is how long an unused peer is remembered.
	lineLife = 5 * time.Minute
	// slowLink is the rate in bytes per second below which encoded pieces are asked for.
	// Encoding halves what has to go over 1 GbE (118 MB/s); where raw content comes faster
	// than this, an encoder (0.4 GB/s on a core) costs more than it saves.
	slowLink = 150 << 20
)

// ClientConfig of a Client; its zero value is a client that shows no certificate.
type ClientConfig struct {
	// Identity is shown to peers; nil: none, which grants for one refuse.
	Identity *Identity
	// Slow is the rate in bytes per second, over all peers, below which encoded pieces are
	// asked for; 0: 150 MiB/s. Negative: they never are.
	Slow int64
	// Stall is how long no byte may come before a transfer is given up; 0: 15 s.
	Stall time.Duration
	// Floor is the least that must come in that time, in bytes per second: a transfer that
	// trickles is given up too. 0: 64 KiB/s, a two-thousandth of 1 GbE; negative: any byte
	// will do.
	Floor int64
}

// Client fetches from other nodes. It is safe for concurrent use.
type Client struct {
	c     ClientConfig
	meter meter

	mu    sync.Mutex
	lines map[fleet.NodePeer]*line
}

// line is the connections to one peer, known by its address and certificate.
type line struct {
	transport *http.Transport
	used      time.Time
}

// NewClient makes a client; it makes no request.
func NewClient(c ClientConfig) (*Client, error) {
	if c.Stall < 0 {
		return nil, fmt.Errorf("peers' client: stall %s must not be negative", c.Stall)
	}
	if c.Stall == 0 {
		c.Stall = 15 * time.Second
	}
	if c.Floor == 0 {
		c.Floor = 64 << 10
	}
	if c.Slow == 0 {
		c.Slow = slowLink
	}
	return &Client{c: c, lines: map[fleet.NodePeer]*line{}}, nil
}

// Close drops idle connections. Transfers under way go on.
func (c *Client) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for at, l := range c.lines {
		l.transport.CloseIdleConnections()
		delete(c.lines, at)
	}
}

// Source is one peer, as far as one image goes: where it is, the token for it, and which
// pieces it is said to have.
func (c *Client) Source(id fleet.NodeID, at fleet.NodePeer, token access.Token, has func(cache.Want) bool) cache.Source {
	return &source{client: c, id: id, at: at, token: token, has: has}
}

// encoded reports whether to ask for encoded pieces: the links are known to be slow.
func (c *Client) encoded() bool {
	rate := c.meter.value()
	return rate > 0 && rate < c.c.Slow
}

// line returns the connections to a peer, and forgets those that nobody uses.
func (c *Client) line(at fleet.NodePeer) (*http.Transport, error) {
	pin, err := hex.DecodeString(at.Certificate)
	if err != nil || len(pin) != sha256.Size {
		return nil, fmt.Errorf("the peer's certificate hash %.80q is not one", at.Certificate)
	}
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	for other, l := range c.lines {
		if other != at && now.Sub(l.used) > lineLife {
			l.transport.CloseIdleConnections()
			delete(c.lines, other)
		}
	}
	l := c.lines[at]
	if l == nil {
		l = &line{transport: c.transport([sha256.Size]byte(pin))}
		c.lines[at] = l
	}
	l.used = now
	return l.transport, nil
}

// transport speaks to the holder of one certificate and to nobody else.
func (c *Client) transport(pin [sha256.Size]byte) *http.Transport {
	dialer := &net.Dialer{Timeout: dialTime}
	t := &http.Transport{
		DialContext:            dialer.DialContext, // no proxy: peers are on the same network
		Protocols:              new(http.Protocols),
		TLSHandshakeTimeout:    dialTime,
		ResponseHeaderTimeout:  c.c.Stall,
		MaxIdleConnsPerHost:    maxIdle,
		IdleConnTimeout:        idleTime / 2, // before the server closes them
		DisableCompression:     true,
		ReadBufferSize:         64 << 10,
		MaxResponseHeaderBytes: maxHead,
		TLSClientConfig: &tls.Config{
			MinVersion: tls.VersionTLS13,
			// The pin replaces chain and name: VerifyConnection runs at every handshake, and
			// nothing, the token least of all, is sent before it agrees.
			InsecureSkipVerify: true,
			VerifyConnection: func(s tls.ConnectionState) error {
				if len(s.PeerCertificates) > 0 && sha256.Sum256(s.PeerCertificates[0].Raw) == pin {
					return nil
				}
				return errPin
			},
		},
	}
	t.Protocols.SetHTTP1(true)
	if id := c.c.Identity; id != nil {
		t.TLSClientConfig.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return id.show() }
	}
	return t
}

// errPin: whoever answers is not the node that the controller named.
var errPin = errors.New("another certificate than the one that the controller named (hint: the node's certificate was renewed a moment ago, or someone stands in between)")

// meter measures what comes from all peers together, in bytes per second of the time in
// which at least one transfer waits for bytes: so a store that is slow to write does not
// make a link look slow.
type meter struct {
	mu      sync.Mutex
	waiting int // reads under way
	since   time.Time
	spent   time.Duration
	bytes   int64
	rate    float64 // smoothed; 0: not known yet
}

// A sample has this many bytes at least, and counts for so much.
const (
	sampleBytes  = 16 << 20
	sampleWeight = 0.3
)

// begin is before a read.
func (m *meter) begin() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.waiting++; m.waiting == 1 {
		m.since = time.Now()
	}
}

// end is after it; n bytes came.
func (m *meter) end(n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	m.spent += now.Sub(m.since)
	m.since = now
	m.waiting--
	m.bytes += int64(n)
	if m.bytes < sampleBytes || m.spent <= 0 {
		return
	}
	sample := float64(m.bytes) / m.spent.Seconds()
	if m.rate == 0 {
		m.rate = sample
	} else {
		m.rate += sampleWeight * (sample - m.rate)
	}
	m.bytes, m.spent = 0, 0
}

func (m *meter) value() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return int64(m.rate)
}

// ended is what a request of ours ended with, as a class that the store can decide by.
func ended(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var known *cache.Error
	if errors.As(err, &known) {
		return err
	}
	return &cache.Error{Class: cache.ClassNetwork, Err: err}
}
