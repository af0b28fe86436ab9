package server

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
	"github.com/paddock-ci/paddock/store/storetest"
)

// BenchmarkChunkWords is 200 and 1,000 nodes of one site that pull an image of 94 pieces and say a
// word each second, 1,000 of them five times as often as they are asked to, over TLS connections that
// each of them keeps, on a real redis-server; nodes, server and Redis share the machine.
// Each begins with a random half of the pieces and has one more at each word, so that its
// peers differ from word to word. p50-ms and p99-ms are what the nodes see, cpu-µs/word is
// what server and nodes burn for one word together, TLS and JSON of both ends included.
func BenchmarkChunkWords(b *testing.B) {
	for _, nodes := range []int{200, 1000} {
		b.Run(fmt.Sprint(nodes, "-nodes"), func(b *testing.B) { benchChunkWords(b, nodes) })
	}
}

func benchChunkWords(b *testing.B, nodes int) {
	const pieces, lasts = 94, 10 * time.Second
	url, _ := storetest.StartRedis(b)
	s, err := store.Open(b.Context(), store.Config{URL: url})
	if err != nil {
		b.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.WithoutCancel(b.Context()))
	var running sync.WaitGroup
	running.Go(func() { _ = s.Run(ctx) })
	defer func() { stop(); running.Wait(); _ = s.Close() }()
	if err := s.Commit(b.Context(), store.Txn{Images: []fleet.Image{{Ref: ref, Digest: digest}}}); err != nil {
		b.Fatal(err)
	}
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
		macs, words := make([]*benchMac, nodes), make([]*benchWord, nodes)
		for i := range macs {
			macs[i] = newBenchMac(b, fmt.Sprintf("mac-%d", i), h.URL, hex.EncodeToString(hash[:]), key)
			n := &macs[i].request.Node
			n.Peer = fleet.NodePeer{Address: string(n.ID) + ":7843", Certificate: strings.Repeat("a", 64)}
			n.Images = append(n.Images, fleet.NodeImage{Digest: digest, Ref: ref, State: fleet.ImageCaching})
			if _, err := macs[i].say(b.Context(), 0); err != nil {
				b.Fatal(err)
			}
			words[i] = newBenchWord(pieces)
		}
		b.StartTimer()
		burned := cpuTime(b)
		speaking, end := context.WithTimeout(b.Context(), lasts)
		took := make([][]time.Duration, nodes)
		var all sync.WaitGroup
		for i, m := range macs {
			all.Go(func() { took[i] = m.speak(speaking, b, words[i]) })
		}
		all.Wait()
		end()
		whole := slices.Concat(took...)
		b.ReportMetric(float64((cpuTime(b)-burned).Microseconds())/float64(len(whole)), "cpu-µs/word")
		b.ReportMetric(float64(len(whole))/lasts.Seconds(), "words/s")
		b.ReportMetric(percentile(whole, 50), "p50-ms")
		b.ReportMetric(percentile(whole, 99), "p99-ms")
	}
}

// cpuTime is what this process has burned.
func cpuTime(b *testing.B) time.Duration {
	var usage unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &usage); err != nil {
		b.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// benchWord is what a node of the benchmark has.
type benchWord struct {
	pieces int
	have   []byte
}

func newBenchWord(pieces int) *benchWord {
	w := &benchWord{pieces, make([]byte, (pieces+7)/8)}
	for range pieces / 2 {
		w.add()
	}
	return w
}

func (w *benchWord) add() {
	p := rand.IntN(w.pieces)
	w.have[p/8] |= 1 << (p % 8)
}

func (w *benchWord) request() api.ChunksRequest {
	q := api.ChunksRequest{Image: digest, Ref: ref, Pieces: w.pieces, Have: base64.StdEncoding.EncodeToString(w.have)}
	for p := range w.pieces {
		if w.have[p/8]>>(p%8)&1 == 0 {
			q.Want = append(q.Want, p)
		}
	}
	return q
}

// speak says a word each second, from a random moment on, until ctx ends.
func (m *benchMac) speak(ctx context.Context, b *testing.B, w *benchWord) (took []time.Duration) {
	next := time.NewTimer(rand.N(time.Second))
	defer next.Stop()
	for {
		select {
		case <-ctx.Done():
			return took
		case <-next.C:
		}
		began := time.Now()
		if _, err := m.client.Chunks(b.Context(), m.request.Node.ID, w.request()); err != nil {
			b.Error(err)
			return took
		}
		took = append(took, time.Since(began))
		w.add()
		next.Reset(time.Second)
	}
}
