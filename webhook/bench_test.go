package webhook_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
	"github.com/paddock-ci/paddock/store/storetest"
	"github.com/paddock-ci/paddock/webhook"
)

// connections is how many senders there are at once.
const connections = 32

// BenchmarkIntake sends signed deliveries of about 7 KB, each for another job, over 32
// connections to the webhook on a real redis-server, and to a bare handler (HMAC,
// parse, one script) in the same run. Everything shares the machine: senders, handler
// and Redis. It reports requests per second, latencies and, for the webhook, the part
// of the bare handler's rate that it reaches ("of-bare").
func BenchmarkIntake(b *testing.B) {
	url, _ := storetest.StartRedis(b)
	var bare float64
	b.Run("bare", func(b *testing.B) {
		bare = load(b, newBare(b, url))
	})
	b.Run("webhook", func(b *testing.B) {
		s, err := store.Open(b.Context(), store.Config{URL: url, Prefix: "bench"})
		if err != nil {
			b.Fatal(err)
		}
		defer func() { _ = s.Close() }()
		rate := load(b, handler(b, webhook.Config{Merge: s.MergeJob}))
		b.ReportMetric(rate/bare, "of-bare")
	})
	b.Run("nowhere", func(b *testing.B) { // the intake alone: what HTTP, HMAC and parsing cost
		load(b, handler(b, webhook.Config{Merge: func(context.Context, store.Delivery) (store.Merged, error) {
			return store.Merged{Changed: true}, nil
		}}))
	})
}

// lastJob numbers the jobs of all runs.
var lastJob atomic.Int64

// load sends b.N deliveries to a handler over HTTP on loopback and returns the rate.
func load(b *testing.B, h http.Handler) float64 {
	listener, err := new(net.ListenConfig).Listen(b.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	server := &http.Server{Handler: h, ReadHeaderTimeout: time.Minute}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	defer func() {
		_ = server.Close()
		if err := <-served; !errors.Is(err, http.ErrServerClosed) {
			b.Error(err)
		}
	}()

	lastJob.CompareAndSwap(0, 30_000_000_000)
	body := numbered(b, examples(b)[0], 30_000_000_000)
	latencies := make([][]time.Duration, connections)
	var left atomic.Int64
	left.Store(int64(b.N))
	var senders sync.WaitGroup
	b.ResetTimer()
	for i := range connections {
		senders.Go(func() {
			var err error
			if latencies[i], err = send(b.Context(), listener.Addr().String(), body, &left); err != nil {
				b.Error(err)
			}
		})
	}
	senders.Wait()
	b.StopTimer()
	all := slices.Concat(latencies...)
	if len(all) == 0 {
		return 0
	}
	slices.Sort(all)
	rate := float64(len(all)) / b.Elapsed().Seconds()
	b.ReportMetric(rate, "req/s")
	b.ReportMetric(float64(all[len(all)/2].Microseconds())/1000, "p50-ms")
	b.ReportMetric(float64(all[len(all)*99/100].Microseconds())/1000, "p99-ms")
	b.ReportMetric(float64(len(body)), "body-B")
	return rate
}

// send is one connection: it writes whole requests and reads the answers, with as little
// work of its own as possible, since it shares the machine with what is measured.
func send(ctx context.Context, address string, body []byte, left *atomic.Int64) (latencies []time.Duration, err error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.Close() }()
	const zeroes = "0000000000000000000000000000000000000000000000000000000000000000"
	head := "POST /webhook HTTP/1.1\r\nHost: bench\r\nUser-Agent: GitHub-Hookshot/bench\r\nContent-Type: application/json\r\n" +
		"X-GitHub-Event: workflow_job\r\nX-GitHub-Delivery: " + guid + "\r\nX-Hub-Signature-256: sha256=" + zeroes + "\r\n" +
		"Content-Length: " + strconv.Itoa(len(body)) + "\r\n\r\n"
	request := append([]byte(head), body...)
	own := request[len(head):]
	number := bytes.Index(own, []byte("30000000000"))
	digits := strings.Index(head, zeroes)
	mac, sum := hmac.New(sha256.New, secret), make([]byte, 0, sha256.Size)
	answers := bufio.NewReader(conn)
	for left.Add(-1) >= 0 {
		strconv.AppendInt(own[number:number:number+11], lastJob.Add(1), 10)
		mac.Reset()
		mac.Write(own)
		hex.Encode(request[digits:], mac.Sum(sum))
		start := time.Now()
		if _, err := conn.Write(request); err != nil {
			return nil, err
		}
		answer, err := http.ReadResponse(answers, nil)
		if err != nil {
			return nil, err
		}
		if _, err := io.Copy(io.Discard, answer.Body); err != nil {
			return nil, err
		}
		latencies = append(latencies, time.Since(start))
		if answer.StatusCode != http.StatusAccepted {
			return nil, fmt.Errorf("answered %s", answer.Status)
		}
	}
	return latencies, nil
}

// bareScript writes a job, indexes it and tells others: the least that a store does.
var bareScript = redis.NewScript(`
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[2], ARGV[3], ARGV[1])
redis.call('PUBLISH', KEYS[3], ARGV[1])
return 1`)

// newBare makes the handler that anybody would write first.
func newBare(b *testing.B, url string) http.Handler {
	options, err := redis.ParseURL(url)
	if err != nil {
		b.Fatal(err)
	}
	options.PoolSize = connections
	client := redis.NewClient(options)
	b.Cleanup(func() { _ = client.Close() })
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 25<<20))
		if err != nil {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		mac := hmac.New(sha256.New, secret)
		mac.Write(body)
		want := "sha256=" + hex.EncodeToString(mac.Sum(nil))
		if !hmac.Equal([]byte(want), []byte(r.Header.Get("X-Hub-Signature-256"))) {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		var event struct {
			Action string    `json:"action"`
			Job    fleet.Job `json:"workflow_job"`
		}
		if err := json.Unmarshal(body, &event); err != nil {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		record, err := json.Marshal(event.Job)
		if err == nil {
			err = bareScript.Run(r.Context(), client, []string{"bare:jobs", "bare:open", "bare:news"},
				int64(event.Job.ID), record, event.Job.CreatedAt.Unix()).Err()
		}
		if err != nil {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		w.WriteHeader(http.StatusAccepted)
	})
}
