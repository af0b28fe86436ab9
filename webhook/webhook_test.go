package webhook_test

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
	"github.com/paddock-ci/paddock/webhook"
)

var secret = []byte("it is a secret to everybody")

const guid = "72d3162e-cc78-11e3-81ab-4c9367dc0958"

// examples are GitHub's own: queued, queued while waiting for a gate, waiting,
// completed, in progress.
func examples(tb testing.TB) [][]byte {
	tb.Helper()
	raw, err := os.ReadFile("../github/testdata/workflow_job-examples.json")
	if err != nil {
		tb.Fatal(err)
	}
	var list []json.RawMessage
	if err := json.Unmarshal(raw, &list); err != nil {
		tb.Fatal(err)
	}
	var bodies [][]byte
	for _, each := range list {
		var b bytes.Buffer
		if err := json.Compact(&b, each); err != nil {
			tb.Fatal(err)
		}
		bodies = append(bodies, b.Bytes())
	}
	return bodies
}

func sign(algorithm func() hash.Hash, key, body []byte) string {
	h := hmac.New(algorithm, key)
	h.Write(body)
	return hex.EncodeToString(h.Sum(nil))
}

// delivery makes a request as GitHub does.
func delivery(ctx context.Context, url string, body io.Reader, signature string) *http.Request {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, url, body)
	if err != nil {
		panic(err) // only a malformed URL, and those are constants
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("X-GitHub-Event", "workflow_job")
	r.Header.Set("X-GitHub-Delivery", guid)
	r.Header.Set("X-Hub-Signature-256", signature)
	return r
}

func signed(ctx context.Context, url string, body []byte) *http.Request {
	return delivery(ctx, url, bytes.NewReader(body), "sha256="+sign(sha256.New, secret, body))
}

// book is a Merge that writes down what it gets.
type book struct {
	mu         sync.Mutex
	deliveries []store.Delivery
	err        error
}

func (b *book) merge(_ context.Context, d store.Delivery) (store.Merged, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.err != nil {
		return store.Merged{}, b.err
	}
	b.deliveries = append(b.deliveries, d)
	return store.Merged{Now: d.Job.Status, Changed: true}, nil
}

func handler(tb testing.TB, c webhook.Config) *webhook.Handler {
	tb.Helper()
	if c.Secrets == nil {
		c.Secrets = [][]byte{secret}
	}
	h, err := webhook.New(c)
	if err != nil {
		tb.Fatal(err)
	}
	return h
}

func serve(h http.Handler, r *http.Request) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

// One delivery at a time, status by status: GitHub's example of a queued job, changed
// in one respect.
func TestStatuses(t *testing.T) {
	body := examples(t)[0]
	tests := []struct {
		name    string
		change  func(r *http.Request)
		body    []byte // nil: the example, signed
		status  int
		outcome string
		merges  int
	}{
		{name: "as GitHub sends it", status: 202, outcome: "accepted", merges: 1},
		{name: "wrong secret", change: func(r *http.Request) {
			r.Header.Set("X-Hub-Signature-256", "sha256="+sign(sha256.New, []byte("another"), body))
		}, status: 401, outcome: "unsigned"},
		{name: "no signature", change: func(r *http.Request) { r.Header.Del("X-Hub-Signature-256") }, status: 401, outcome: "unsigned"},
		{name: "only the old SHA-1 signature", change: func(r *http.Request) {
			r.Header.Del("X-Hub-Signature-256")
			r.Header.Set("X-Hub-Signature", "sha1="+sign(sha1.New, secret, body))
		}, status: 401, outcome: "unsigned"},
		{name: "signature of the wrong length", change: func(r *http.Request) { r.Header.Set("X-Hub-Signature-256", "sha256=00") }, status: 401, outcome: "unsigned"},
		{name: "signature that is not hex", change: func(r *http.Request) {
			r.Header.Set("X-Hub-Signature-256", "sha256="+strings.Repeat("zz", 32))
		}, status: 401, outcome: "unsigned"},
		{name: "ping", change: func(r *http.Request) { r.Header.Set("X-GitHub-Event", "ping") }, status: 202, outcome: "ignored"},
		{name: "an event of the future", change: func(r *http.Request) { r.Header.Set("X-GitHub-Event", "workflow_weather") }, status: 202, outcome: "ignored"},
		{name: "no event", change: func(r *http.Request) { r.Header.Del("X-GitHub-Event") }, status: 202, outcome: "ignored"},
		{name: "not JSON", body: []byte("payload=%7B%7D"), status: 400, outcome: "malformed"},
		{name: "cut off JSON", body: body[:len(body)/2], status: 400, outcome: "malformed"},
		{name: "no job in it", body: []byte(`{"action":"queued"}`), status: 400, outcome: "malformed"},
		{name: "null", body: []byte("null"), status: 400, outcome: "malformed"},
		{name: "empty", body: []byte{}, status: 400, outcome: "malformed"},
		{name: "1 MB", body: append(bytes.Clone(body), bytes.Repeat([]byte(" "), 1<<20)...), status: 202, outcome: "accepted", merges: 1},
		{name: "announced too large", change: func(r *http.Request) { r.ContentLength = 26 << 20 }, status: 413, outcome: "too_large"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			var b book
			metrics := prometheus.NewRegistry()
			h := handler(t, webhook.Config{Merge: b.merge, Metrics: metrics})
			sent := test.body
			if sent == nil {
				sent = body
			}
			r := signed(t.Context(), "/webhook", sent)
			if test.change != nil {
				test.change(r)
			}
			w := serve(h, r)
			if w.Code != test.status {
				t.Errorf("answered %d %q, want %d", w.Code, w.Body, test.status)
			}
			if len(b.deliveries) != test.merges {
				t.Errorf("%d merges, want %d", len(b.deliveries), test.merges)
			}
			if n := count(t, metrics, test.outcome); n != 1 {
				t.Errorf("outcome %s counted %v times, want once", test.outcome, n)
			}
		})
	}
}

// count reads one outcome's counter.
func count(t *testing.T, metrics *prometheus.Registry, outcome string) float64 {
	t.Helper()
	families, err := metrics.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if l.GetName() == "outcome" && l.GetValue() == outcome {
					return m.GetCounter().GetValue()
				}
			}
		}
	}
	return 0
}

func TestWhatIsMerged(t *testing.T) {
	var b book
	at := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	h := handler(t, webhook.Config{Merge: b.merge, Now: func() time.Time { return at }})
	serve(h, signed(t.Context(), "/", examples(t)[0]))
	if len(b.deliveries) != 1 {
		t.Fatalf("%d merges, want 1", len(b.deliveries))
	}
	d := b.deliveries[0]
	if d.ID != guid || !d.At.Equal(at) || !d.Job.SeenAt.Equal(at) || d.Job.Feed != fleet.FeedWebhook {
		t.Errorf("delivery %q at %v, seen %v by %q", d.ID, d.At, d.Job.SeenAt, d.Job.Feed)
	}
	if d.Job.ID != 289782451 || d.Job.Status != fleet.JobQueued || d.Job.Repository != "Codertocat/Hello-World" {
		t.Errorf("job %d %s of %s", d.Job.ID, d.Job.Status, d.Job.Repository)
	}
}

func TestMetricsAreRegisteredAndMoved(t *testing.T) {
	metrics := prometheus.NewRegistry()
	h := handler(t, webhook.Config{Merge: new(book).merge, Metrics: metrics})
	serve(h, signed(t.Context(), "/", examples(t)[0]))
	problems, err := testutil.GatherAndLint(metrics)
	if err != nil || len(problems) > 0 {
		t.Errorf("metrics: %v %v", problems, err)
	}
	n, err := testutil.GatherAndCount(metrics, "paddock_webhook_seconds")
	if err != nil || n != 1 {
		t.Errorf("%d latency histograms (%v), want 1", n, err)
	}
	if _, err := webhook.New(webhook.Config{Secrets: [][]byte{secret}, Merge: new(book).merge, Metrics: metrics}); err == nil {
		t.Error("registered twice: want an error")
	}
}

// While a secret is being changed, GitHub signs with the new one and redelivers with
// the old one.
func TestEachSecretIsGood(t *testing.T) {
	secrets := [][]byte{[]byte("new"), []byte("old")}
	h := handler(t, webhook.Config{Secrets: secrets, Merge: new(book).merge})
	body := examples(t)[0]
	for _, key := range append(secrets, []byte("older")) {
		want := 202
		if string(key) == "older" {
			want = 401
		}
		w := serve(h, delivery(t.Context(), "/", bytes.NewReader(body), "sha256="+sign(sha256.New, key, body)))
		if w.Code != want {
			t.Errorf("signed with %s: answered %d, want %d", key, w.Code, want)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	merge := new(book).merge
	for name, c := range map[string]webhook.Config{
		"no secret":     {Merge: merge},
		"empty secret":  {Secrets: [][]byte{secret, {}}, Merge: merge},
		"nowhere to go": {Secrets: [][]byte{secret}},
	} {
		if _, err := webhook.New(c); err == nil {
			t.Errorf("%s: want an error", name)
		}
	}
}

func TestOnlyPost(t *testing.T) {
	h := handler(t, webhook.Config{Merge: new(book).merge})
	if w := serve(h, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/webhook", nil)); w.Code != http.StatusMethodNotAllowed {
		t.Errorf("GET answered %d", w.Code)
	}
}

// Over real HTTP, since the limit also has to end the connection.
func TestTooLargeOverHTTP(t *testing.T) {
	var b book
	server := httptest.NewServer(handler(t, webhook.Config{Merge: b.merge}))
	defer server.Close()
	huge := bytes.Repeat([]byte("x"), 26<<20)
	for name, body := range map[string]io.Reader{
		"announced": bytes.NewReader(huge),
		"chunked":   io.MultiReader(bytes.NewReader(huge)),
	} {
		r := delivery(t.Context(), server.URL, body, "sha256="+sign(sha256.New, secret, huge))
		response, err := server.Client().Do(r)
		if err != nil {
			// The server may hang up before everything is sent; the answer is then lost
			// to some clients. What counts is that nothing was merged.
			t.Logf("%s: %v", name, err)
			continue
		}
		_ = response.Body.Close()
		if response.StatusCode != http.StatusRequestEntityTooLarge {
			t.Errorf("%s: answered %d, want 413", name, response.StatusCode)
		}
	}
	if len(b.deliveries) != 0 {
		t.Errorf("%d merges of bodies that are too large", len(b.deliveries))
	}
}

func TestStoreDown(t *testing.T) {
	var logged bytes.Buffer
	b := book{err: fmt.Errorf("merge job: %w", store.ErrDown)}
	h := handler(t, webhook.Config{Merge: b.merge, Log: slog.New(slog.NewTextHandler(&logged, nil))})
	body := examples(t)[0]
	for range 10 {
		w := serve(h, signed(t.Context(), "/", body))
		if w.Code != http.StatusServiceUnavailable || w.Header().Get("Retry-After") == "" {
			t.Errorf("answered %d with Retry-After %q, want 503 with one", w.Code, w.Header().Get("Retry-After"))
		}
	}
	b.err = nil
	if w := serve(h, signed(t.Context(), "/", body)); w.Code != http.StatusAccepted {
		t.Errorf("answered %d after the store is back, want 202", w.Code)
	}
	if lines := strings.Count(logged.String(), "\n"); lines != 2 {
		t.Errorf("%d lines logged, want one for the failures and one for their end:\n%s", lines, logged.String())
	}
	if strings.Contains(logged.String(), string(secret)) {
		t.Error("the secret is in the log")
	}
}

// A store that neither answers nor refuses: the answer comes after 5 s all the same.
func TestStoreHangs(t *testing.T) {
	body := examples(t)[0]
	synctest.Test(t, func(t *testing.T) {
		h := handler(t, webhook.Config{Merge: func(ctx context.Context, _ store.Delivery) (store.Merged, error) {
			<-ctx.Done()
			return store.Merged{}, ctx.Err()
		}})
		start := time.Now()
		w := serve(h, signed(t.Context(), "/", body))
		if took := time.Since(start); w.Code != http.StatusServiceUnavailable || took > 5*time.Second {
			t.Errorf("answered %d after %v, want 503 within 5 s", w.Code, took)
		}
	})
}

// Four senders of large bodies stop in the middle. A fifth is refused in time, jobs of
// usual size are taken all the while, and when the four give up there is room again.
func TestLargeBodiesAreBounded(t *testing.T) {
	small := examples(t)[0]
	large := append(bytes.Clone(small), bytes.Repeat([]byte(" "), 100<<10)...)
	synctest.Test(t, func(t *testing.T) {
		h := handler(t, webhook.Config{Merge: new(book).merge})
		var stuck sync.WaitGroup
		var ends []*io.PipeWriter
		for range 4 {
			read, write := io.Pipe()
			ends = append(ends, write)
			stuck.Go(func() {
				r := delivery(t.Context(), "/", read, "")
				r.ContentLength = -1
				if w := serve(h, r); w.Code != http.StatusBadRequest {
					t.Errorf("cut off: answered %d, want 400", w.Code)
				}
			})
		}
		synctest.Wait()
		start := time.Now()
		if w := serve(h, signed(t.Context(), "/", large)); w.Code != http.StatusServiceUnavailable || time.Since(start) > 5*time.Second {
			t.Errorf("fifth large body: answered %d after %v, want 503 within 5 s", w.Code, time.Since(start))
		}
		if w := serve(h, signed(t.Context(), "/", small)); w.Code != http.StatusAccepted {
			t.Errorf("usual body meanwhile: answered %d, want 202", w.Code)
		}
		for _, end := range ends {
			_ = end.CloseWithError(errors.New("the sender gave up"))
		}
		stuck.Wait()
		if w := serve(h, signed(t.Context(), "/", large)); w.Code != http.StatusAccepted {
			t.Errorf("large body afterwards: answered %d, want 202", w.Code)
		}
	})
}

// Whatever arrives gets an answer from the list, nothing unsigned is merged, and
// nothing panics.
func FuzzDelivery(f *testing.F) {
	for _, body := range examples(f) {
		f.Add(body, "workflow_job", guid, "", true)
	}
	f.Add([]byte(`{"action":"queued","workflow_job":{"id":-1,"labels":null,"status":"waiting"}}`), "workflow_job", "", "", true)
	f.Add([]byte(`{"workflow_job":{"id":1e99,"labels":[[],{}]}}`), "workflow_job", "\xff", "", true)
	f.Add([]byte("{}"), "ping", guid, "sha256=", false)
	f.Add([]byte{}, "", "", "sha256="+strings.Repeat("0", 64), false)
	var b book
	h := handler(f, webhook.Config{Merge: b.merge, MaxBody: 64 << 10})
	f.Fuzz(func(t *testing.T, body []byte, event, id, signature string, sign256 bool) {
		b.deliveries = nil
		if sign256 {
			signature = "sha256=" + sign(sha256.New, secret, body)
		}
		genuine := strings.EqualFold(signature, "sha256="+sign(sha256.New, secret, body))
		r := delivery(t.Context(), "/", bytes.NewReader(body), signature)
		r.Header.Set("X-GitHub-Event", event)
		r.Header.Set("X-GitHub-Delivery", id)
		w := serve(h, r)
		switch {
		case len(body) > 64<<10:
			if w.Code != 413 {
				t.Errorf("too large: answered %d", w.Code)
			}
		case !genuine:
			if w.Code != 401 {
				t.Errorf("not signed: answered %d", w.Code)
			}
		case event != "workflow_job":
			if w.Code != 202 {
				t.Errorf("another event: answered %d", w.Code)
			}
		case w.Code != 202 && w.Code != 400:
			t.Errorf("signed: answered %d", w.Code)
		}
		if merged := w.Code == 202 && event == "workflow_job"; merged != (len(b.deliveries) == 1) {
			t.Errorf("answered %d after %d merges", w.Code, len(b.deliveries))
		}
	})
}
