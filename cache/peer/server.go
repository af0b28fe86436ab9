package peer

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/fleet"
)

const (
	// headTime bounds the time until a request's head is here, the handshake included.
	headTime = 10 * time.Second
	// idleTime is how long a connection waits for its next request.
	idleTime = 30 * time.Second
	// maxHead is the most of a request's head in bytes; a real one has about 1,000.
	maxHead = 8 << 10
	// rebind is the pause after the port could not be had.
	rebind = 5 * time.Second
	// retryAfter is what a peer that finds every place taken is told, in seconds.
	retryAfter = "1"
	// maxShare bounds what one receiver may take of the places: one in so many.
	maxShare = 2
	// placeTime is how long a request waits for a place: less than its sender does.
	placeTime = 2 * time.Second
)

// Pieces is what is served: verified bytes only, each piece leased while it is open.
// *cache.Store is one.
type Pieces interface {
	// Serve opens a piece by the digest of its content; cache.ErrNotReady: it is not here.
	Serve(image, content fleet.Digest) (*cache.Piece, error)
	// ServeManifest is the manifest; cache.ErrNotReady: it is not here.
	ServeManifest(d fleet.Digest) ([]byte, error)
}

// Config of a Server. Node, Identity and Pieces are required.
type Config struct {
	Node     fleet.NodeID // as tokens name this server
	Identity *Identity
	Pieces   Pieces
	// Listen is host:port; "": this node serves nobody, and Run only waits.
	Listen string
	// Address is how other nodes reach the port, host:port; "": where it listens.
	Address string
	// Bandwidth is what is sent in all, in bytes per second; 0: no limit.
	Bandwidth int64
	// Transfers is how many run at once, half of them for one receiver; 0: 32.
	Transfers int
	// Encoders is how many of those compress what they send; 0: half of the cores.
	Encoders int
	// Stall is how long bytes may not move before a transfer is cut; 0: 30 s.
	Stall time.Duration
	// Now is for the tokens' ends, which are by the controller's clock; nil: time.Now.
	Now func() time.Time
	// Log gets what is refused for reasons of ours; nil: none.
	Log *slog.Logger
}

// Server is this node's port for other nodes.
type Server struct {
	c        Config
	log      *slog.Logger
	pace     *rate.Limiter // nil: no limit
	places   *places
	encoders chan struct{}
	verifier atomic.Pointer[access.PeerVerifier]
	bound    atomic.Pointer[string] // the address others are told; nil: not listening
	sent     atomic.Int64
	head     time.Duration // headTime
	door     *door
	running  sync.WaitGroup // requests
	// Said once, since who dials could say it without end.
	expired, foreign sync.Once
}

// NewServer checks the configuration; nothing listens yet.
func NewServer(c Config) (*Server, error) {
	if c.Identity == nil || c.Pieces == nil {
		return nil, errors.New("peer port: Identity and Pieces are needed")
	}
	if err := fleet.CheckName("node", string(c.Node)); err != nil {
		return nil, fmt.Errorf("peer port: %w", err)
	}
	if c.Bandwidth < 0 || c.Transfers < 0 || c.Encoders < 0 || c.Stall < 0 {
		return nil, fmt.Errorf("peer port: bandwidth %d, transfers %d, encoders %d and stall %s must not be negative", c.Bandwidth, c.Transfers, c.Encoders, c.Stall)
	}
	if c.Transfers == 0 {
		c.Transfers = 32
	}
	if c.Encoders == 0 {
		c.Encoders = max(1, runtime.NumCPU()/2)
	}
	if c.Stall == 0 {
		c.Stall = 30 * time.Second
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{c: c, log: c.Log, places: newPlaces(c.Transfers), encoders: make(chan struct{}, c.Encoders), head: headTime, door: newDoor(time.Now, strangeTime)}
	if c.Bandwidth > 0 {
		// The burst is one write: what goes out at once is never more than that.
		s.pace = rate.NewLimiter(rate.Limit(c.Bandwidth), writeSize)
	}
	return s, nil
}

// Trust has tokens checked with this key from now on: api.SyncReply.PeerKey. Before the
// first, all are refused.
func (s *Server) Trust(key string) error {
	v, err := access.ParsePeerKey(key)
	if err != nil {
		return err
	}
	s.verifier.Store(&v)
	return nil
}

// Where is how others reach this node, without an address while it does not listen, and
// the certificate by which they know it, also as a client.
func (s *Server) Where() fleet.NodePeer {
	at := fleet.NodePeer{Certificate: s.c.Identity.Hash()}
	if address := s.bound.Load(); address != nil {
		at.Address = *address
	}
	return at
}

// Sent is how many bytes of content went out, as they were on the wire.
func (s *Server) Sent() int64 { return s.sent.Load() }

// Run serves until ctx ends, and returns when no transfer is left. A port that cannot be
// had is tried again: a node lives well without one.
func (s *Server) Run(ctx context.Context) {
	if s.c.Listen == "" {
		<-ctx.Done()
		return
	}
	for failures := 0; ctx.Err() == nil; failures++ {
		err := s.serve(ctx)
		if ctx.Err() == nil && failures == 0 {
			s.log.Error("the port for other nodes does not serve; it is tried again (hint: see node.peer.listen, and who else has the port)", "error", err)
		}
		pause(ctx, rebind)
	}
}

// serve has the port until ctx ends or it breaks.
func (s *Server) serve(ctx context.Context) error {
	var config net.ListenConfig
	listener, err := config.Listen(ctx, "tcp", s.c.Listen)
	if err != nil {
		return err
	}
	address := s.c.Address
	if address == "" {
		address = listener.Addr().String()
	}
	s.bound.Store(&address)
	defer s.bound.Store(nil)

	ctx, end := context.WithCancel(ctx)
	defer end()
	server := &http.Server{
		Handler:           s,
		ReadHeaderTimeout: s.head,
		IdleTimeout:       idleTime,
		MaxHeaderBytes:    maxHead,
		Protocols:         new(http.Protocols),
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ConnContext:       withVisit,
		// Whoever dials can fill it: it is for who looks, not for who is on duty.
		ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	server.Protocols.SetHTTP1(true)
	closed := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(closed)
		_ = server.Close() // connections too: who fetched goes on elsewhere, at the byte
	})
	s.door.Listener = listener
	err = server.Serve(tls.NewListener(s.door, s.tls()))
	if stop() { // it broke by itself
		_ = server.Close()
	} else {
		<-closed
	}
	end()
	s.running.Wait()
	return err
}

// tls asks for the client's certificate without an authority's word on it: the handshake
// shows that the client has its key, and the grant says which one it must be.
func (s *Server) tls() *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             []string{"http/1.1"},
		ClientAuth:             tls.RequestClientCert,
		SessionTicketsDisabled: true,
		GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return s.c.Identity.show() },
	}
}

// ServeHTTP answers one request. Until admit has agreed, nothing is looked up.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.running.Add(1)
	defer s.running.Done()
	control := http.NewResponseController(w)
	_ = control.SetWriteDeadline(time.Now().Add(s.c.Stall)) // for the answers below; transfers renew it
	if r.ContentLength != 0 {
		_ = control.SetReadDeadline(time.Now()) // nobody waits for a body that is not wanted
	}

	t, known := parseTarget(r.URL.Path)
	receiver, err := s.admit(r, t.image)
	switch {
	case err != nil:
		s.refused(r.RemoteAddr, err)
		refuse(w, http.StatusUnauthorized, "a peer token for this node and image is needed")
	case !stays(r, receiver):
		w.Header().Set("Retry-After", retryAfter)
		refuse(w, http.StatusServiceUnavailable, "every place for connections is taken")
	case !known:
		refuse(w, http.StatusNotFound, "no such place")
	case r.Method != http.MethodGet || r.ContentLength != 0:
		refuse(w, http.StatusMethodNotAllowed, "only GET without a body")
	case t.content == "":
		s.manifest(w, t)
	default:
		s.piece(w, r, t, receiver)
	}
}

// admit finds out who asks, by the token and the certificate shown with it.
func (s *Server) admit(r *http.Request, d fleet.Digest) (fleet.NodeID, error) {
	v := s.verifier.Load()
	if v == nil {
		return "", access.ErrKey
	}
	grant, err := v.Verify(parseToken(r.Header), s.c.Node, d, s.c.Now())
	if err != nil {
		return "", err
	}
	if grant.ReceiverCertificate != "" && grant.ReceiverCertificate != shown(r.TLS) {
		return "", fmt.Errorf("%w: it is not shown with the certificate of node %s", access.ErrPeerElsewhere, grant.Receiver)
	}
	return grant.Receiver, nil
}

// stays has the connection count as the receiver's from now on; false: there is no place.
func stays(r *http.Request, receiver fleet.NodeID) bool {
	v, ok := r.Context().Value(visitKey{}).(*visit)
	return !ok || v.admit(receiver)
}

// refused notes why a request was: what points to a fault of this node, aloud, once.
func (s *Server) refused(from string, err error) {
	s.log.Debug("a request at the port for other nodes was refused", "from", from, "error", err)
	switch {
	case errors.Is(err, access.ErrExpired): // the fleet's signature is good
		s.expired.Do(func() {
			s.log.Warn("another node's token had expired when it came, and nothing is served for such; said once (hint: is this host's clock right? sntp -sS time.apple.com)", "from", from)
		})
	case errors.Is(err, access.ErrSignature):
		s.foreign.Do(func() {
			s.log.Warn("a token that another key signed came to the port for other nodes; said once (hint: a node of another fleet, or one whose controller has another fleet key)", "from", from)
		})
	}
}

// shown is the hash of the client's certificate, whose key the handshake proved; "": none.
func shown(state *tls.ConnectionState) string {
	if state == nil || len(state.PeerCertificates) == 0 {
		return ""
	}
	sum := sha256.Sum256(state.PeerCertificates[0].Raw)
	return hex.EncodeToString(sum[:])
}

// refuse answers with an error, and ends the connection.
func refuse(w http.ResponseWriter, status int, why string) {
	w.Header().Set("Connection", "close")
	http.Error(w, why, status)
}

// places are the transfers that may run at once.
type places struct {
	most, each int // in all, and of one receiver

	mu    sync.Mutex
	taken int
	by    map[fleet.NodeID]int
	freed chan struct{} // closed and replaced when a place is free again
}

func newPlaces(most int) *places {
	return &places{most: most, each: max(1, most/maxShare), by: map[fleet.NodeID]int{}, freed: make(chan struct{})}
}

// wait has a place for a receiver, within placeTime; ok is false if there is none.
func (p *places) wait(ctx context.Context, receiver fleet.NodeID) (release func(), ok bool) {
	ctx, cancel := context.WithTimeout(ctx, placeTime)
	defer cancel()
	for {
		release, freed := p.take(receiver)
		if release != nil {
			return release, true
		}
		select {
		case <-freed:
		case <-ctx.Done():
			return nil, false
		}
	}
}

// take has a place, or says when to look again.
func (p *places) take(receiver fleet.NodeID) (release func(), freed <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.taken >= p.most || p.by[receiver] >= p.each {
		return nil, p.freed
	}
	p.taken++
	p.by[receiver]++
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.taken--
		if p.by[receiver]--; p.by[receiver] == 0 {
			delete(p.by, receiver)
		}
		close(p.freed)
		p.freed = make(chan struct{})
	}, nil
}

// pause waits for d or until ctx ends.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
