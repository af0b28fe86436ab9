package server

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
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

// BenchmarkFleet is 1,000 nodes at one server, over TLS connections that each of them
// keeps, on a real redis-server; nodes, server and Redis share the machine. Each node has
// two VMs and five images, beats every 20 s, and twice in that time has news, so that the
// server takes 150 calls a second. A call that would park is asked not to, so that its
// latency is work alone; p50-ms and p99-ms are what the nodes see. Meanwhile the leader
// writes 20 orders a second, each of which wakes a call that a node has parked: wake-p99-ms
// is from the beginning of the write to the node's having its reply.
func BenchmarkFleet(b *testing.B) {
	const nodes, lasts, beat, calls = 1000, 30 * time.Second, 20 * time.Second, 3
	url, _ := storetest.StartRedis(b)
	s, err := store.Open(b.Context(), store.Config{URL: url})
	if err != nil {
		b.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.WithoutCancel(b.Context()))
	var running sync.WaitGroup
	running.Go(func() { _ = s.Run(ctx) })
	defer func() { stop(); running.Wait(); _ = s.Close() }()
	key := access.NewKey()
	server, err := New(Config{Store: s, Key: key, Fleet: "f", Pools: func() []fleet.Pool { return []fleet.Pool{pool} }})
	if err != nil {
		b.Fatal(err)
	}
	h := httptest.NewUnstartedServer(server.Handler())
	h.EnableHTTP2 = true
	h.TLS = &tls.Config{MinVersion: tls.VersionTLS12}
	h.StartTLS()
	defer h.Close()
	hash := sha256.Sum256(h.Certificate().Raw)

	for b.Loop() {
		b.StopTimer()
		macs := make([]*benchMac, nodes)
		for i := range macs {
			macs[i] = newBenchMac(b, fmt.Sprintf("mac-%d", i), h.URL, hex.EncodeToString(hash[:]), key)
			if _, err := macs[i].say(b.Context(), 0); err != nil { // it connects, and is made known
				b.Fatal(err)
			}
		}
		b.StartTimer()
		beating, end := context.WithTimeout(b.Context(), lasts)
		took, woken := make([][]time.Duration, nodes), make([][]time.Duration, 20)
		var all sync.WaitGroup
		for i, m := range macs[len(woken):] {
			all.Go(func() { took[i] = m.beat(beating, b, beat/calls) })
		}
		for i := range woken {
			all.Go(func() { woken[i] = macs[i].obey(beating, b, s) })
		}
		all.Wait()
		end()
		whole, wakes := slices.Concat(took...), slices.Concat(woken...)
		b.ReportMetric(float64(len(whole))/lasts.Seconds(), "syncs/s")
		b.ReportMetric(percentile(whole, 50), "p50-ms")
		b.ReportMetric(percentile(whole, 99), "p99-ms")
		b.ReportMetric(percentile(wakes, 50), "wake-p50-ms")
		b.ReportMetric(percentile(wakes, 99), "wake-p99-ms")
	}
}

func percentile(sample []time.Duration, percent int) float64 {
	slices.Sort(sample)
	return float64(sample[len(sample)*percent/100].Microseconds()) / 1000
}

// benchMac is a node of the benchmark.
type benchMac struct {
	client  *api.Client
	request api.SyncRequest
}

func newBenchMac(b *testing.B, name, url, hash string, key access.Key) *benchMac {
	now := time.Now()
	token, err := key.Sign(access.Identity{ID: access.NewID(), Role: access.Node, Subject: name, IssuedAt: now, ExpiresAt: now.Add(access.NodeLife)})
	if err != nil {
		b.Fatal(err)
	}
	client, err := api.New(api.Config{URL: url, Token: string(token), CertificateHash: hash})
	if err != nil {
		b.Fatal(err)
	}
	m := &benchMac{client: client, request: api.SyncRequest{
		Protocol: api.Protocol, Session: name + fmt.Sprint(now.UnixNano()),
		Node: fleet.Node{ID: fleet.NodeID(name), Arch: "arm64", OS: "darwin", Driver: "vz", Version: "1.0.0", Slots: 2, CPU: 10, Memory: 32 << 30, DiskFree: 200e9},
	}}
	for i := range 5 {
		image := sha256.Sum256([]byte{byte(i)})
		m.request.Node.Images = append(m.request.Node.Images, fleet.NodeImage{
			Digest: fleet.Digest("sha256:" + hex.EncodeToString(image[:])), Ref: fmt.Sprintf("registry.example/macos/image:%d", i), State: fleet.ImageReady, DiskBytes: 60e9,
		})
	}
	for range 2 {
		id := fleet.NewVMID()
		m.request.VMs = append(m.request.VMs, api.VMReport{ID: id, State: fleet.VMWarm, BootingAt: now, WarmAt: now,
			Order: api.VMOrder{ID: id, Pool: pool.Name, Image: digest, Ref: ref, Bootstrap: fleet.BootstrapAgent, PlacedAt: now}})
	}
	return m
}

// say makes one call, parked for at most wait.
func (m *benchMac) say(ctx context.Context, wait time.Duration) (api.SyncReply, error) {
	m.request.Sequence++
	m.request.Wait = wait
	reply, err := m.client.Sync(ctx, m.request)
	if err == nil {
		m.request.Have = reply.Revision
	}
	return reply, err
}

// beat calls at random moments, every so often on the average, until ctx ends.
func (m *benchMac) beat(ctx context.Context, b *testing.B, every time.Duration) (took []time.Duration) {
	next := time.NewTimer(rand.N(every))
	defer next.Stop()
	for {
		select {
		case <-ctx.Done():
			return took
		case <-next.C:
		}
		m.request.Node.DiskFree -= rand.N(int64(1e6)) // something is new each time
		began := time.Now()
		if _, err := m.say(b.Context(), 0); err != nil {
			b.Error(err)
			return took
		}
		took = append(took, time.Since(began))
		next.Reset(every/2 + rand.N(every))
	}
}

// obey parks calls and measures how soon an order of the leader ends them: one a second.
func (m *benchMac) obey(ctx context.Context, b *testing.B, s *store.Store) (took []time.Duration) {
	next := time.NewTimer(rand.N(time.Second))
	defer next.Stop()
	for priority := 1; ; priority++ {
		answered := make(chan error, 1)
		go func() {
			_, err := m.say(b.Context(), maxWait)
			answered <- err
		}()
		select {
		case <-ctx.Done():
			// The last call is answered by the last order.
		case <-next.C:
		}
		next.Reset(time.Second/2 + rand.N(time.Second))
		began := time.Now()
		if err := m.order(b.Context(), s, priority); err != nil {
			b.Error(err)
			return took
		}
		if err := <-answered; err != nil {
			b.Error(err)
			return took
		}
		if ctx.Err() != nil {
			return took
		}
		took = append(took, time.Since(began))
	}
}

// order writes orders for the node that differ from those before.
func (m *benchMac) order(ctx context.Context, s *store.Store, priority int) error {
	for {
		view, err := s.View(ctx)
		if err != nil {
			return err
		}
		orders := fleet.Orders{Node: m.request.Node.ID, Hold: []fleet.Hold{{Digest: digest, Ref: ref, Priority: priority}}}
		if before := view.Orders[orders.Node]; before != nil {
			orders.Rev = before.Rev
		}
		if err := s.Commit(ctx, store.Txn{Orders: []fleet.Orders{orders}}); !errors.Is(err, store.ErrConflict) {
			return err
		}
	}
}
