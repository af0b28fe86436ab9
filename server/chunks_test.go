package server

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
)

// puller is a mac with a port for others that pulls the image of the cast, which is the
// pool's.
func (h *house) puller(id fleet.NodeID, state fleet.ImageState) *mac {
	h.t.Helper()
	h.commit(store.Txn{Images: []fleet.Image{{Ref: ref, Digest: digest}}})
	m := h.mac(id)
	m.peer = fleet.NodePeer{Address: string(id) + ".example:7843", Certificate: fmt.Sprintf("%064x", []byte(id))}
	m.reports(state)
	return m
}

// reports says what state the image of the cast is in.
func (m *mac) reports(state fleet.ImageState) api.SyncReply {
	m.h.t.Helper()
	m.images = []fleet.NodeImage{{Digest: digest, Ref: ref, State: state}}
	return m.say()
}

// lacks is a node's word: it has these of 10 pieces and wants the others.
func lacks(have ...int) api.ChunksRequest {
	q := api.ChunksRequest{Image: digest, Ref: ref, Pieces: 10}
	bits := make([]byte, 2)
	for p := range q.Pieces {
		if slices.Contains(have, p) {
			bits[p/8] |= 1 << (p % 8)
		} else {
			q.Want = append(q.Want, p)
		}
	}
	if len(have) > 0 {
		q.Have = base64.StdEncoding.EncodeToString(bits)
	}
	return q
}

// asks says a word that must be answered, in its time.
func (m *mac) asks(q api.ChunksRequest) api.ChunksReply {
	m.h.t.Helper()
	m.h.advance(wordGap)
	reply, err := m.client.Chunks(m.h.t.Context(), m.id, q)
	if err != nil {
		m.h.t.Fatal(err)
	}
	return reply
}

func peerNames(r api.ChunksReply) []fleet.NodeID {
	var ids []fleet.NodeID
	for _, p := range r.Peers {
		ids = append(ids, p.Node)
	}
	slices.Sort(ids)
	return ids
}

// mac1 and mac2 pull, mac3 elsewhere, mac4 without a port: each piece is fetched from
// outside once per site, and what one has the others are sent to it for.
func TestChunks(t *testing.T) {
	h := newHouse(t)
	one, two := h.puller("mac1", fleet.ImageCaching), h.puller("mac2", fleet.ImageQueued)
	three, four := h.mac("mac3"), h.mac("mac4")
	three.site = "elsewhere"
	three.peer = fleet.NodePeer{Address: "[fd00::3]:7843", Certificate: strings.Repeat("3", 64)}
	three.reports(fleet.ImageCaching)
	four.reports(fleet.ImageVerifying)
	h.advance(sitesAge)

	if r := one.asks(lacks(0, 1)); !slices.Equal(r.Grant, []int{2, 3, 4, 5, 6, 7, 8, 9}) || len(r.Peers) != 0 || r.Again != againSoon {
		t.Errorf("alone: %+v", r)
	}
	r := two.asks(lacks(9))
	if len(r.Grant) != 0 || len(r.Peers) != 1 {
		t.Fatalf("%+v", r)
	}
	want := api.Peer{Node: "mac1", NodePeer: one.peer, Have: base64.StdEncoding.EncodeToString([]byte{3}), Token: r.Peers[0].Token}
	if diff := cmp.Diff(want, r.Peers[0]); diff != "" {
		t.Error(diff)
	}
	verifier, err := access.ParsePeerKey(two.say().PeerKey)
	if err != nil {
		t.Fatal(err)
	}
	grant, err := verifier.Verify(r.Peers[0].Token, "mac1", digest, h.clock())
	if err != nil || grant.Receiver != "mac2" || grant.ReceiverCertificate != two.peer.Certificate || grant.ExpiresAt.Sub(h.clock()).Round(time.Second) != access.PeerLife {
		t.Errorf("%+v, %v", grant, err)
	}
	if r := three.asks(lacks()); len(r.Grant) != 10 || len(r.Peers) != 0 {
		t.Errorf("another site: %+v", r)
	}
	if r := four.asks(lacks(2, 3)); len(r.Grant) != 0 || !slices.Equal(peerNames(r), []fleet.NodeID{"mac1", "mac2"}) {
		t.Errorf("without a port: %+v", r)
	}
	if r := two.asks(lacks(9)); !slices.Equal(peerNames(r), []fleet.NodeID{"mac1"}) {
		t.Errorf("mac4 serves nobody: %+v", r)
	}
	insisting := lacks(9)
	insisting.Insist = []int{0, 2}
	if r := two.asks(insisting); !slices.Equal(r.Grant, []int{0}) {
		t.Errorf("insisting on what mac1 has and on what it fetches: %+v", r)
	}
}

// Who reports the image ready has all of it, and then nothing comes from outside.
func TestReadyPeers(t *testing.T) {
	h := newHouse(t)
	m := h.puller("mac1", fleet.ImageCaching)
	for i := range 30 {
		h.puller(fleet.NodeID(fmt.Sprint("mac", 100+i)), fleet.ImageReady)
	}
	h.advance(sitesAge)
	r := m.asks(lacks())
	if len(r.Grant) != 0 || len(r.Peers) != maxPeers || r.Peers[0].Have != "" {
		t.Errorf("granted %v, %d peers", r.Grant, len(r.Peers))
	}
	if diff := cmp.Diff(r.Peers, m.asks(lacks()).Peers); diff != "" {
		t.Errorf("others a moment later: %s", diff)
	}
	// Those that have parts are told of, too.
	h.puller("mac2", fleet.ImageCaching).asks(lacks(4))
	if r := m.asks(lacks()); len(r.Peers) != maxPeers || !slices.Contains(peerNames(r), "mac2") {
		t.Errorf("peers %v", peerNames(r))
	}
	// A ready node that is silent is none.
	h.advance(peerSilent)
	m.say()
	h.advance(sitesAge)
	if r := m.asks(lacks()); len(r.Grant) == 0 || slices.ContainsFunc(r.Peers, func(p api.Peer) bool { return p.Have == "" }) {
		t.Errorf("everybody else is silent: %+v", r)
	}
}

// A node that has not got the manifest yet is told who has it: who has the image, and who
// has bytes of it. It is no puller of pieces by that, and nothing is granted.
func TestManifestPeers(t *testing.T) {
	h := newHouse(t)
	m := h.puller("mac1", fleet.ImageCaching)
	h.puller("mac2", fleet.ImageCaching) // has nothing yet
	three := h.puller("mac3", fleet.ImagePaused)
	three.images[0].Done = 1
	three.say()
	h.puller("mac4", fleet.ImageReady)
	far := h.puller("mac5", fleet.ImageReady)
	far.site = "elsewhere"
	far.say()
	h.advance(sitesAge)
	r := m.asks(api.ChunksRequest{Image: digest, Ref: ref})
	if !slices.Equal(peerNames(r), []fleet.NodeID{"mac3", "mac4"}) || len(r.Grant) != 0 || r.Again != againSoon {
		t.Fatalf("%+v", r)
	}
	verifier, err := access.ParsePeerKey(m.say().PeerKey)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range r.Peers {
		if _, err := verifier.Verify(p.Token, p.Node, digest, h.clock()); err != nil || p.Have != "" || p.Address == "" {
			t.Errorf("%+v, %v", p, err)
		}
	}
	for i := range 40 {
		h.puller(fleet.NodeID(fmt.Sprint("mac", 100+i)), fleet.ImageReady)
	}
	h.advance(sitesAge)
	if r := m.asks(api.ChunksRequest{Image: digest, Ref: ref}); len(r.Peers) != readyPeers+1 || !slices.Contains(peerNames(r), "mac3") {
		t.Errorf("of many are told %v", peerNames(r))
	}
}

// mac1 leaves with parts: it is a peer while it reports the image, and is forgotten after.
func TestLeftPeers(t *testing.T) {
	h := newHouse(t)
	one, two := h.puller("mac1", fleet.ImageCaching), h.puller("mac2", fleet.ImageCaching)
	h.advance(sitesAge)
	if r := one.asks(lacks(0)); len(r.Grant) != 9 {
		t.Fatalf("%+v", r)
	}
	leaving := lacks(0, 1)
	leaving.Leave = true
	one.reports(fleet.ImagePaused)
	if r := one.asks(leaving); len(r.Grant)+len(r.Peers) != 0 {
		t.Errorf("%+v", r)
	}
	if r := two.asks(lacks(5)); !slices.Equal(r.Grant, []int{2, 3, 4, 6, 7, 8, 9}) || !slices.Equal(peerNames(r), []fleet.NodeID{"mac1"}) {
		t.Errorf("%+v", r)
	}
	one.reports(fleet.ImageFailed)
	h.advance(sitesAge)
	if r := two.asks(lacks(5)); len(r.Peers) != 0 {
		t.Errorf("mac1 has it no more: %+v", r)
	}
	if r := two.asks(lacks(5)); !slices.Contains(r.Grant, 0) {
		t.Errorf("what only mac1 had is not granted: %+v", r)
	}
}

// Tokens are signed once in five minutes, and last five minutes at least.
func TestPeerTokensAreKept(t *testing.T) {
	h := newHouse(t)
	m := h.puller("mac1", fleet.ImageCaching)
	h.puller("mac2", fleet.ImageReady)
	h.advance(sitesAge)
	first := m.asks(lacks()).Peers[0].Token
	h.advance(time.Minute)
	if again := m.asks(lacks()).Peers[0].Token; again != first {
		t.Error("signed anew after a minute")
	}
	m.peer.Certificate = strings.Repeat("b", 64)
	m.say()
	h.advance(sitesAge)
	if again := m.asks(lacks()).Peers[0].Token; again == first {
		t.Error("the token is bound to a certificate that the node has no more")
	}
	signer, err := h.key.PeerSigner()
	if err != nil {
		t.Fatal(err)
	}
	p := newPeerTokens(signer)
	now := h.clock()
	receiver, server := &fleet.Node{ID: "mac1"}, &fleet.Node{ID: "mac2"}
	token := func(d fleet.Digest) string {
		t.Helper()
		text, err := p.token(receiver, server, d, now)
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	one := token(digest)
	now = now.Add(peerTokenAge - time.Second)
	if token(digest) != one {
		t.Error("not kept")
	}
	now = now.Add(time.Second)
	if token(digest) == one {
		t.Error("kept for longer than half its life")
	}
}

func TestChunksRefused(t *testing.T) {
	h := newHouse(t)
	one := h.puller("mac1", fleet.ImageCaching)
	h.advance(sitesAge)
	good, err := json.Marshal(lacks(0))
	if err != nil {
		t.Fatal(err)
	}
	with := func(change func(*api.ChunksRequest)) string {
		q := lacks(0)
		change(&q)
		text, err := json.Marshal(q)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	mac1 := h.token(access.Node, "mac1")
	for name, c := range map[string]struct {
		node, token, body string
		status            int
	}{
		"good":              {"mac1", mac1, string(good), 200},
		"another's word":    {"mac1", h.token(access.Node, "mac2"), string(good), 403},
		"not ordered":       {"mac1", mac1, with(func(q *api.ChunksRequest) { q.Image = "sha256:" + fleet.Digest(strings.Repeat("9", 64)) }), 403},
		"an unknown node":   {"mac7", h.token(access.Node, "mac7"), string(good), 503},
		"no digest":         {"mac1", mac1, with(func(q *api.ChunksRequest) { q.Image = "../x" }), 400},
		"lists of no piece": {"mac1", mac1, with(func(q *api.ChunksRequest) { q.Pieces = 0 }), 400},
		"fewer than none":   {"mac1", mac1, with(func(q *api.ChunksRequest) { q.Pieces = -1 }), 400},
		"too many pieces":   {"mac1", mac1, with(func(q *api.ChunksRequest) { q.Pieces = maxPieces + 1 }), 400},
		"a piece too many":  {"mac1", mac1, with(func(q *api.ChunksRequest) { q.Want = []int{10} }), 400},
		"a piece below":     {"mac1", mac1, with(func(q *api.ChunksRequest) { q.Fetching = []int{-1} }), 400},
		"more than all":     {"mac1", mac1, with(func(q *api.ChunksRequest) { q.Insist = make([]int, 11) }), 400},
		"too many bits":     {"mac1", mac1, with(func(q *api.ChunksRequest) { q.Have = "AAAA" }), 400},
		"no base64":         {"mac1", mac1, with(func(q *api.ChunksRequest) { q.Have = "!" }), 400},
		"an overlong name":  {"mac1", mac1, with(func(q *api.ChunksRequest) { q.Ref = strings.Repeat("a", maxText+1) }), 400},
		"an endless body":   {"mac1", mac1, `{"ref":"` + strings.Repeat("a", maxWordBody) + `"}`, 413},
		"numbers too large": {"mac1", mac1, `{"pieces":1e99}`, 400},
	} {
		code, body := h.request("POST", "/v1/nodes/"+c.node+"/chunks", c.token, c.body)
		if code != c.status || code != 200 && !strings.Contains(body, `"hint"`) {
			t.Errorf("%s: %d %s, want %d with a hint", name, code, body, c.status)
		}
	}
	// Twice at once costs nothing the second time; the last word has not to wait.
	if code, body := h.request("POST", "/v1/nodes/mac1/chunks", mac1, string(good)); code != http.StatusTooManyRequests || !strings.Contains(body, fmt.Sprintf(`"again":%d`, wordGap)) {
		t.Errorf("twice at once: %d %s", code, body)
	}
	if code, body := h.request("POST", "/v1/nodes/mac1/chunks", mac1, with(func(q *api.ChunksRequest) { q.Leave = true })); code != http.StatusOK {
		t.Errorf("the last word: %d %s", code, body)
	}
	// What was ordered a moment ago may be asked for at once, and so may what a VM needs.
	other := fleet.Digest("sha256:" + strings.Repeat("8", 64))
	h.commit(store.Txn{Orders: []fleet.Orders{{Node: "mac1", Hold: []fleet.Hold{{Digest: other, Ref: ref}}}}})
	q := lacks()
	q.Image = other
	if r := one.asks(q); len(r.Grant) != 10 {
		t.Errorf("%+v", r)
	}
	two := h.mac("mac2")
	two.say()
	third := fleet.Digest("sha256:" + strings.Repeat("7", 64))
	h.commit(store.Txn{VMs: []fleet.VM{{ID: "vmaaaaaa", Node: "mac2", Pool: "gone", Image: third, State: fleet.VMPlaced, PlacedAt: h.clock()}}})
	q.Image = third
	if r := two.asks(q); len(r.Grant) != 10 {
		t.Errorf("%+v", r)
	}
}

func TestAgain(t *testing.T) {
	for pulling, want := range map[int]time.Duration{
		0: againSoon, 1: againSoon, 20: againSoon, 40: time.Second, 200: againAtMost, 1000: againAtMost,
	} {
		if got := again(pulling); got != want {
			t.Errorf("%d nodes: again after %s, want %s", pulling, got, want)
		}
	}
}

// A node says where it is and where others reach it; nonsense is refused.
func TestPlaceOfANode(t *testing.T) {
	h := newHouse(t)
	m := h.mac("mac1")
	hash := strings.Repeat("0a", 32)
	for name, c := range map[string]struct {
		site string
		peer fleet.NodePeer
		good bool
	}{
		"neither":           {"", fleet.NodePeer{}, true},
		"both":              {"lab-2", fleet.NodePeer{Address: "10.0.0.7:7843", Certificate: hash}, true},
		"loopback":          {"", fleet.NodePeer{Address: "127.0.0.1:1", Certificate: hash}, true},
		"IPv6":              {"", fleet.NodePeer{Address: "[fd00::1]:65535", Certificate: hash}, true},
		"a site with space": {"the lab", fleet.NodePeer{}, false},
		"no port":           {"", fleet.NodePeer{Address: "10.0.0.7", Certificate: hash}, false},
		"port 0":            {"", fleet.NodePeer{Address: "10.0.0.7:0", Certificate: hash}, false},
		"a large port":      {"", fleet.NodePeer{Address: "10.0.0.7:65536", Certificate: hash}, false},
		"no host":           {"", fleet.NodePeer{Address: ":7843", Certificate: hash}, false},
		"a path":            {"", fleet.NodePeer{Address: "a/b:7843", Certificate: hash}, false},
		"no certificate":    {"", fleet.NodePeer{Address: "10.0.0.7:7843"}, false},
		"half a one":        {"", fleet.NodePeer{Address: "10.0.0.7:7843", Certificate: hash[2:]}, false},
		"no port, a client": {"", fleet.NodePeer{Certificate: hash}, true},
	} {
		m.site, m.peer = c.site, c.peer
		_, err := m.try(0)
		if (err == nil) != c.good || err != nil && status(t, err) != http.StatusBadRequest {
			t.Errorf("%s: %v", name, err)
		}
	}
	m.site, m.peer = "lab-2", fleet.NodePeer{Address: "10.0.0.7:7843", Certificate: hash}
	m.say()
	rows, err := h.client(access.Viewer, "ann").Nodes(t.Context())
	if err != nil || rows[0].Site != "lab-2" || rows[0].Peer != "10.0.0.7:7843" {
		t.Errorf("%+v, %v", rows, err)
	}
}

// FuzzChunks: no word of a node makes the server fail, or grants what there is not.
func FuzzChunks(f *testing.F) {
	h := newHouse(f)
	h.puller("mac1", fleet.ImageCaching)
	h.advance(sitesAge)
	token := h.token(access.Node, "mac1")
	for _, q := range []api.ChunksRequest{lacks(), lacks(0, 9), {}} {
		text, err := json.Marshal(q)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		r := httptest.NewRequestWithContext(t.Context(), "POST", "/v1/nodes/mac1/chunks", strings.NewReader(string(body)))
		r.Header.Set("Authorization", "Bearer "+token)
		w := httptest.NewRecorder()
		h.server.Handler().ServeHTTP(w, r)
		if w.Code >= 500 {
			t.Fatalf("%d %s", w.Code, w.Body)
		}
		var q api.ChunksRequest
		var reply api.ChunksReply
		if w.Code != http.StatusOK {
			return
		}
		if json.Unmarshal(body, &q) != nil || json.Unmarshal(w.Body.Bytes(), &reply) != nil {
			t.Fatalf("%s: %s", body, w.Body)
		}
		for _, p := range reply.Grant {
			if p < 0 || p >= q.Pieces || !slices.Contains(q.Want, p) && !slices.Contains(q.Insist, p) {
				t.Fatalf("%s: granted %d", body, p)
			}
		}
	})
}
