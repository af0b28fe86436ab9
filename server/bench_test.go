package server

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
	"github.com/paddock-ci/paddock/store/storetest"
)

// BenchmarkSync1000 is a fleet of 1,000 nodes with two busy VMs and eight images each.
// "paced" sends 100 syncs a second, twice what such a fleet sends when nothing happens
// (one per node and 20 s), each 50th with news that others are woken by; "flat-out" has
// 16 nodes sync as fast as they can. p99-ms is what a node waits for its answer; it
// wants -benchtime 2000x.
func BenchmarkSync1000(b *testing.B) {
	stores := map[string]func(*testing.B) *store.Store{
		"embedded": func(b *testing.B) *store.Store {
			return opened(b)(store.OpenEmbedded(b.Context(), store.EmbeddedConfig{}))
		},
		"redis": func(b *testing.B) *store.Store {
			url, _ := storetest.StartRedis(b)
			return opened(b)(store.Open(b.Context(), store.Config{URL: url}))
		},
	}
	for _, kind := range []string{"redis", "embedded"} {
		b.Run(kind, func(b *testing.B) {
			h := newHouseOn(b, stores[kind](b))
			nodes := manyNodes(h, 1000)
			b.Run("paced", func(b *testing.B) { paced(b, nodes, 10*time.Millisecond) })
			b.Run("flat-out", func(b *testing.B) { flatOut(b, nodes, 16) })
		})
	}
}

func opened(b *testing.B) func(*store.Store, error) *store.Store {
	return func(s *store.Store, err error) *store.Store {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
		return s
	}
}

// benchNode is a node that syncs through the handler, without a socket.
type benchNode struct {
	handler http.Handler
	path    string
	token   string
	mu      sync.Mutex
	request api.SyncRequest
}

func manyNodes(h *house, n int) []*benchNode {
	h.t.Helper()
	nodes := make([]*benchNode, n)
	for i := range nodes {
		id := fleet.NodeID(fmt.Sprintf("mac%d", i))
		node := &benchNode{handler: h.server.Handler(), path: fmt.Sprintf("/v1/nodes/%s/sync", id), token: h.token(access.Node, string(id))}
		r := api.SyncRequest{Protocol: api.Protocol, Session: "s1", Node: fleet.Node{ID: id, Arch: "arm64", OS: "darwin", Driver: "vz", Slots: 2}}
		for k := range 8 {
			r.Node.Images = append(r.Node.Images, fleet.NodeImage{
				Digest: fleet.Digest(fmt.Sprintf("sha256:%064x", k)), Ref: fmt.Sprintf("%s-%d", ref, k), State: fleet.ImageReady, DiskBytes: 60 << 30, UsedAt: h.now,
			})
		}
		for k := range 2 {
			vm := fleet.VMID(fmt.Sprintf("v%06d%d", i, k))
			report := api.VMReport{ID: vm, State: fleet.VMBusy, Order: api.VMOrder{ID: vm, Pool: "small", Image: digest, Ref: ref, PlacedAt: h.now}}
			r.VMs = append(r.VMs, ran(report))
		}
		node.request = r
		nodes[i] = node
		if _, err := node.sync(h.t.Context(), false); err != nil {
			h.t.Fatal(err)
		}
	}
	return nodes
}

// sync makes one exchange and tells how long it took; news wakes others.
func (n *benchNode) sync(ctx context.Context, news bool) (time.Duration, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.request.Sequence++
	n.request.Node.DiskFree++
	if news {
		n.request.Node.Slots = 5 - n.request.Node.Slots // 2, 3, 2, …
	}
	body, err := json.Marshal(n.request)
	if err != nil {
		return 0, err
	}
	r := httptest.NewRequestWithContext(ctx, http.MethodPost, n.path, bytes.NewReader(body))
	r.Header.Set("Authorization", "Bearer "+n.token)
	w := httptest.NewRecorder()
	began := time.Now()
	n.handler.ServeHTTP(w, r)
	took := time.Since(began)
	if w.Code != http.StatusOK {
		return took, fmt.Errorf("%d %s", w.Code, w.Body)
	}
	return took, nil
}

// paced sends one sync every pause, whether the ones before were answered or not.
func paced(b *testing.B, nodes []*benchNode, pause time.Duration) {
	var all latencies
	var flying sync.WaitGroup
	tick := time.NewTicker(pause)
	defer tick.Stop()
	for i := range b.N {
		<-tick.C
		flying.Go(func() { all.add(nodes[i%len(nodes)].sync(b.Context(), i%50 == 0)) })
	}
	flying.Wait()
	all.report(b)
}

func flatOut(b *testing.B, nodes []*benchNode, at int) {
	var all latencies
	var workers sync.WaitGroup
	for w := range at {
		workers.Go(func() {
			for i := w; i < b.N; i += at {
				all.add(nodes[i%len(nodes)].sync(b.Context(), false))
			}
		})
	}
	workers.Wait()
	all.report(b)
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "syncs/s")
}

type latencies struct {
	mu  sync.Mutex
	all []time.Duration
	err error
}

func (l *latencies) add(took time.Duration, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = append(l.all, took)
	if err != nil {
		l.err = err
	}
}

func (l *latencies) report(b *testing.B) {
	b.Helper()
	if l.err != nil {
		b.Fatal(l.err)
	}
	slices.Sort(l.all)
	at := func(q float64) float64 { return float64(l.all[int(q*float64(len(l.all)-1))].Microseconds()) / 1000 }
	b.ReportMetric(at(0.5), "p50-ms")
	b.ReportMetric(at(0.99), "p99-ms")
}
