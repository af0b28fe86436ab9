package node

import (
	"context"
	"encoding/base64"
	"log/slog"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/cache/peer"
	"github.com/paddock-ci/paddock/cache/registry"
	"github.com/paddock-ci/paddock/cache/registrytest"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

// clerk is the part of a controller that knows who has which pieces: it goes by what the
// nodes last said of themselves in sync, and signs for them with the fleet's key.
type clerk struct {
	key access.Key

	mu      sync.Mutex
	offices map[fleet.NodeID]*office
	have    map[fleet.NodeID][]byte
	claims  map[int]fleet.NodeID
}

// Chunks is what nodes ask.
func (d *clerk) Chunks(_ context.Context, id fleet.NodeID, r api.ChunksRequest) (api.ChunksReply, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.have[id], _ = base64.StdEncoding.DecodeString(r.Have)
	reply := api.ChunksReply{Again: 50 * time.Millisecond}
	receiver := d.offices[id].latest().Node
	held := func(n int) (held bool) {
		for other, bits := range d.have {
			held = held || other != id && hasBit(bits, n)
		}
		return held
	}
	for n, by := range d.claims {
		if by == id && (r.Leave || hasBit(d.have[id], n)) {
			delete(d.claims, n)
		}
	}
	for _, n := range slices.Concat(r.Want, r.Insist) {
		if by := d.claims[n]; (by == "" || by == id) && (!held(n) || slices.Contains(r.Insist, n)) {
			d.claims[n] = id
			reply.Grant = append(reply.Grant, n)
		}
	}
	for other, office := range d.offices {
		node := office.latest().Node
		if other == id || node.Peer.Address == "" || len(d.have[other]) == 0 {
			continue
		}
		token, err := d.key.SignPeer(access.PeerGrant{
			Receiver: id, Server: other, Image: r.Image, ExpiresAt: time.Now().Add(access.PeerLife),
			ReceiverCertificate: receiver.Peer.Certificate,
		})
		if err != nil {
			return api.ChunksReply{}, err
		}
		reply.Peers = append(reply.Peers, api.Peer{Node: other, NodePeer: node.Peer, Have: base64.StdEncoding.EncodeToString(d.have[other]), Token: string(token)})
	}
	return reply, nil
}

// Two agents with real stores and ports hold one image: it leaves the registry once.
func TestNeighbours(t *testing.T) {
	outside := registrytest.New()
	server := httptest.NewServer(outside)
	defer server.Close()
	digest, err := outside.Push(t.Context(), "base", "1", registrytest.Source("abcdefgh0ij", 256<<10))
	if err != nil {
		t.Fatal(err)
	}
	hold := fleet.Hold{Digest: digest, Ref: server.Listener.Addr().String() + "/base:1", Demand: true}
	d := &clerk{key: access.NewKey(), offices: map[fleet.NodeID]*office{}, have: map[fleet.NodeID][]byte{}, claims: map[int]fleet.NodeID{}}
	stores := map[fleet.NodeID]*cache.Store{}
	var stops []func()
	for _, id := range []fleet.NodeID{"mac-1", "mac-2"} {
		store, stop := d.node(t, id)
		stores[id], stops = store, append(stops, stop)
	}
	for id, office := range d.offices {
		office.await(t, "the port is reported", func() bool { return office.last.Node.Peer.Address != "" })
		if at := office.latest().Node.Peer; len(at.Certificate) != 64 {
			t.Errorf("%s is at %+v", id, at)
		}
	}
	for _, office := range d.offices {
		office.order(func() { office.hold = []fleet.Hold{hold} })
	}
	for _, office := range d.offices {
		office.await(t, "the image is ready", func() bool {
			i, ok := office.last.Node.Image(digest)
			return ok && i.State == fleet.ImageReady
		})
	}
	raw, err := stores["mac-1"].ServeManifest(digest)
	if err != nil {
		t.Fatal(err)
	}
	doc, err := image.ParseDocument(raw)
	if err != nil {
		t.Fatal(err)
	}
	counts := outside.Counts()
	for _, l := range doc.Layers[1:] { // the first is the config, smaller than the question
		if n := counts.Requests[l.Digest]; n > 1 {
			t.Errorf("a layer of %d bytes was asked for %d times", l.Size, n)
		}
	}
	var shared int64
	for _, store := range stores {
		for name, n := range store.Moved() {
			if strings.HasPrefix(name, "peer ") {
				shared += n
			}
		}
	}
	if shared < 10*256<<10 {
		t.Errorf("%d bytes came from the other node, want the whole image", shared)
	}
	for _, stop := range stops {
		stop()
	}
	for id, store := range stores {
		if left := store.List()[0].Leases; left != 0 {
			t.Errorf("%s: %d leases are left", id, left)
		}
	}
}

// node starts a node of real parts, without VMs; stop ends it.
func (d *clerk) node(t *testing.T, id fleet.NodeID) (store *cache.Store, stop func()) {
	t.Helper()
	dir, office := t.TempDir(), newOffice()
	log := slog.New(slog.NewTextHandler(t.Output(), nil)).With("node", id)
	key, err := d.key.PeerKey()
	if err != nil {
		t.Fatal(err)
	}
	office.more = func(r *api.SyncReply) { r.PeerKey = key }
	d.offices[id] = office
	identity, err := peer.OpenIdentity(dir, id, nil)
	if err != nil {
		t.Fatal(err)
	}
	client, err := peer.NewClient(peer.ClientConfig{Identity: identity})
	if err != nil {
		t.Fatal(err)
	}
	site, err := NewSite(SiteConfig{Node: id, Chunks: d.Chunks, Source: client.Source})
	if err != nil {
		t.Fatal(err)
	}
	outside, err := registry.New(registry.Config{Log: log})
	if err != nil {
		t.Fatal(err)
	}
	store, err = cache.Open(cache.Config{Dir: dir + "/images", Sources: []cache.Source{outside}, Site: site, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	port, err := peer.NewServer(peer.Config{Node: id, Identity: identity, Pieces: store, Listen: "127.0.0.1:0", Log: log})
	if err != nil {
		t.Fatal(err)
	}
	agent, err := New(Config{
		ID: id, Dir: dir, Machines: newYard(), Images: store, Sync: office.Sync, Peer: port, Site: "hall", Limit: store.Limit,
		Rate: store.Rate, Free: store.Free, Wait: 100 * time.Millisecond, Log: log,
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- agent.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		client.Close()
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return store, stop
}
