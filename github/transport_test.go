package github

import (
	"errors"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// answers is a transport that answers by a function.
type answers func(*http.Request) *http.Response

func (a answers) RoundTrip(r *http.Request) (*http.Response, error) { return a(r), nil }

func answering(status int, body string, header ...string) *http.Response {
	h := http.Header{}
	for i := 0; i < len(header); i += 2 {
		h.Set(header[i], header[i+1])
	}
	return &http.Response{StatusCode: status, Header: h, Body: io.NopCloser(strings.NewReader(body))}
}

func send(t *testing.T, l *limits, method, url string) (string, error) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	response, err := l.RoundTrip(r)
	if err != nil {
		return "", err
	}
	defer func() { _ = response.Body.Close() }()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body), nil
}

var quiet = slog.New(slog.DiscardHandler)

// 600 runners are to be registered at once. However the minute is cut, GitHub sees at
// most 180 writes in it, and the first thirty at once.
func TestWritesAreSpaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var sent []time.Time
		l := newLimits(answers(func(*http.Request) *http.Response {
			sent = append(sent, time.Now())
			return answering(201, "")
		}), 0, quiet)
		began := time.Now()
		for range 600 {
			if _, err := send(t, l, "POST", "https://x/orgs/acme/actions/runners/generate-jitconfig"); err != nil {
				t.Fatal(err)
			}
		}
		if sent[29] != began {
			t.Errorf("the thirtieth was sent after %v", sent[29].Sub(began))
		}
		for i := 180; i < len(sent); i++ {
			if d := sent[i].Sub(sent[i-180]); d < time.Minute {
				t.Fatalf("writes %d to %d within %v", i-180, i, d)
			}
		}
	})
}

// Reads are not spaced, and with a negative number nothing is.
func TestReadsAreNotSpaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		for method, perMinute := range map[string]int{"GET": 0, "POST": -1} {
			l := newLimits(answers(func(*http.Request) *http.Response { return answering(200, "") }), perMinute, quiet)
			for range 500 {
				if _, err := send(t, l, method, "https://x/app"); err != nil {
					t.Fatal(err)
				}
			}
		}
		if d := time.Since(began); d != 0 {
			t.Errorf("it took %v", d)
		}
	})
}

// A secondary limit whose answer has no headers is known by its words; it ends after a
// minute, and the body of a mere refusal can still be read.
func TestLimitByWords(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		body := `{"message":"You have exceeded a secondary rate limit."}`
		l := newLimits(answers(func(*http.Request) *http.Response { return answering(403, body) }), -1, quiet)
		_, err := send(t, l, "GET", "https://x/app")
		var limited *RateLimited
		if !errors.As(err, &limited) || time.Until(limited.Until) != time.Minute {
			t.Fatalf("%v, want RateLimited for a minute", err)
		}
		body = `{"message":"Resource not accessible by integration"}`
		if _, err := send(t, l, "GET", "https://x/app"); !errors.As(err, &limited) {
			t.Errorf("%v, want RateLimited still", err)
		}
		time.Sleep(time.Minute)
		if got, err := send(t, l, "GET", "https://x/app"); err != nil || got != body {
			t.Errorf("%v, body %q", err, got)
		}
	})
}

// Requests of one kind are known by their path without names and numbers.
func TestKindOf(t *testing.T) {
	for url, want := range map[string]string{
		"https://x/orgs/acme/actions/runners/17":                          "GET /orgs/actions/runners/",
		"https://x/orgs/other/actions/runners":                            "GET /orgs/actions/runners",
		"https://x/repos/acme/app/actions/runners/generate-jitconfig?a=b": "GET /repos/actions/runners/generate-jitconfig",
		"https://x/api/v3/repos/acme/17/actions/jobs/5":                   "GET /api/v3/repos/actions/jobs/",
	} {
		r, err := http.NewRequestWithContext(t.Context(), "GET", url, nil)
		if err != nil {
			t.Fatal(err)
		}
		if got := kindOf(r); got != want {
			t.Errorf("%s: %q, want %q", url, got, want)
		}
	}
}

// go-github sees none of the headers that it misreads.
func TestLimitHeadersAreTakenOff(t *testing.T) {
	l := newLimits(answers(func(*http.Request) *http.Response {
		return answering(200, "", "X-RateLimit-Remaining", "0", "X-RateLimit-Limit", "1", "X-RateLimit-Reset", "1", "Link", "kept")
	}), -1, quiet)
	r, err := http.NewRequestWithContext(t.Context(), "GET", "https://x/app", nil)
	if err != nil {
		t.Fatal(err)
	}
	response, err := l.RoundTrip(r)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = response.Body.Close() }()
	for name := range response.Header {
		if name != "Link" {
			t.Errorf("header %s is left", name)
		}
	}
}

// The cache does not grow without bounds: the answer that was not asked for the longest
// goes first, and one that is too large is passed on whole and not kept.
func TestCacheIsBounded(t *testing.T) {
	large := strings.Repeat("x", maxAnswer)
	var conditional []string
	l := newLimits(answers(func(r *http.Request) *http.Response {
		if r.Header.Get("If-None-Match") != "" {
			conditional = append(conditional, r.URL.Path)
			return answering(304, "")
		}
		body := large
		if r.URL.Path == "/too-large" {
			body += "y"
		}
		return answering(200, body, "ETag", `"1"`)
	}), -1, quiet)
	paths := []string{"/a", "/b", "/c", "/d", "/e", "/f", "/g", "/h", "/a", "/i", "/b", "/a", "/too-large", "/too-large"}
	for _, path := range paths {
		want := len(large)
		if path == "/too-large" {
			want++
		}
		if body, err := send(t, l, "GET", "https://x"+path); err != nil || len(body) != want {
			t.Fatalf("%s: %v, %d bytes", path, err, len(body))
		}
	}
	if want := []string{"/a", "/a"}; !slices.Equal(conditional, want) {
		t.Errorf("asked conditionally for %v, want %v: /b had to go for /i", conditional, want)
	}
	if l.seen.bytes > maxCached || l.seen.recent.Len() != len(l.seen.entries) {
		t.Errorf("%d bytes in %d entries, %d listed", l.seen.bytes, len(l.seen.entries), l.seen.recent.Len())
	}
}
