package registry

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
)

func TestParseRetryAfter(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	for header, want := range map[string]time.Duration{
		"": 0, "0": 0, "7": 7 * time.Second, "-7": 0, "+7": 0, "1e3": 0, "7.5": 0, " 7": 0,
		"99999999999999999999":          0,
		"2147483647":                    2147483647 * time.Second,
		"Sun, 01 Mar 2026 12:00:30 GMT": 30 * time.Second,
		"Sun, 01 Mar 2026 11:00:00 GMT": 0,
		"tomorrow":                      0,
	} {
		if got := parseRetryAfter(header, now); got != want {
			t.Errorf("%q is %s; want %s", header, got, want)
		}
	}
}

func FuzzParseRetryAfter(f *testing.F) {
	f.Add("7")
	f.Add("Sun, 01 Mar 2026 12:00:30 GMT")
	f.Add("-9223372036854775808")
	f.Fuzz(func(t *testing.T, header string) {
		if got := parseRetryAfter(header, time.Unix(0, 0)); got < 0 {
			t.Errorf("%q is %s", header, got)
		}
	})
}

func TestParseContentRange(t *testing.T) {
	for header, want := range map[string]string{
		"bytes 0-9/10": "0 9 10", "bytes 5-9/*": "5 9 -1", "bytes 0-0/1": "0 0 1",
		"bytes 9-5/10": "", "bytes 0-10/10": "", "bytes */10": "", "bytes -5-9/10": "", "0-9/10": "",
		"bytes 0-9": "", "bytes 0-99999999999999999999/*": "", "items 0-9/10": "", "": "", "bytes 0-9/": "",
	} {
		first, last, total, ok := parseContentRange(header)
		got := ""
		if ok {
			got = fmt.Sprint(first, last, total)
		}
		if got != want {
			t.Errorf("%q is %q; want %q", header, got, want)
		}
	}
}

func FuzzParseContentRange(f *testing.F) {
	f.Add("bytes 0-9/10")
	f.Add("bytes 5-9/*")
	f.Add("bytes 4611686018427387903-4611686018427387903/*")
	f.Fuzz(func(t *testing.T, header string) {
		first, last, total, ok := parseContentRange(header)
		if ok && (first < 0 || last < first || last+1 < 0 || total >= 0 && last >= total) {
			t.Errorf("%q is %d-%d/%d", header, first, last, total)
		}
	})
}

// answers is a registry that is one answer.
type answers func(*http.Request) *http.Response

func (a answers) RoundTrip(req *http.Request) (*http.Response, error) {
	resp := a(req)
	resp.Request = req
	return resp, nil
}

// silent is a keychain that knows the password of every registry.
type silent struct{}

func (silent) Resolve(authn.Resource) (authn.Authenticator, error) {
	return authn.FromConfig(authn.AuthConfig{Username: "user", Password: "hunter2secret"}), nil
}

// FuzzChallenge gives WWW-Authenticate headers and answers of token servers: whatever
// they are, the credentials go to no host over plain HTTP, a token or an error comes
// back, and no secret is in the error.
func FuzzChallenge(f *testing.F) {
	f.Add(`Bearer realm="https://auth.example/token",service="x",scope="repository:a/b:pull"`, `{"token":"t","expires_in":60}`)
	f.Add(`Basic realm="x"`, ``)
	f.Add(`Bearer realm="http://169.254.169.254/",service="x"`, `{"token":"hunter2secret"}`)
	f.Add(`Negotiate, Bearer realm="https://auth.example/?a=b`, `{"access_token":"t","refresh_token":"hunter2secret"}`)
	f.Fuzz(func(t *testing.T, challenge, answer string) {
		transport := answers(func(req *http.Request) *http.Response {
			if req.URL.Scheme != "https" {
				t.Errorf("asked %s in plain HTTP", req.URL)
			}
			resp := &http.Response{StatusCode: http.StatusUnauthorized, Header: http.Header{"Www-Authenticate": {challenge}}, Body: http.NoBody}
			if req.URL.Host != "registry.example" {
				resp = &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(answer))}
			}
			return resp
		})
		client, err := New(Config{Transport: transport, Keychain: silent{}, Tries: 1, Stall: 5 * time.Second})
		if err != nil {
			t.Fatal(err)
		}
		token, _, err := client.PullToken(t.Context(), "registry.example/a/b")
		_, resolve := client.Resolve(t.Context(), "registry.example/a/b:c")
		if resolve == nil {
			t.Error("a registry that refuses everything resolved a tag")
		}
		if strings.Contains(token, "hunter2secret") {
			t.Errorf("the password was given away: %q", token)
		}
		if text := fmt.Sprint(err, resolve); !strings.Contains(challenge, "hunter2") && strings.Contains(text, "hunter2secret") {
			t.Errorf("the password is in an error: %s", text)
		}
	})
}

// FuzzAnswer gives answers to a request for the second half of a blob: what is read is
// never more than that half, and it ends.
func FuzzAnswer(f *testing.F) {
	f.Add(206, "bytes 5-9/10", "56789")
	f.Add(200, "", "0123456789")
	f.Add(206, "bytes 5-6/10", "56")
	f.Add(416, "", "")
	f.Add(206, "bytes 0-9/10", "0123456789")
	f.Fuzz(func(t *testing.T, status int, contentRange, content string) {
		if status < 100 || status > 999 {
			return
		}
		transport := answers(func(req *http.Request) *http.Response {
			resp := &http.Response{StatusCode: status, Header: http.Header{"Content-Range": {contentRange}}, Body: io.NopCloser(strings.NewReader(content)), ContentLength: -1}
			if !strings.Contains(req.URL.Path, "/blobs/") {
				resp.StatusCode = http.StatusOK
			}
			return resp
		})
		client, err := New(Config{Transport: transport, Keychain: silent{}, Tries: 2, Pause: 1, Stall: 5 * time.Second})
		if err != nil {
			t.Fatal(err)
		}
		w := cache.Want{Ref: "registry.example/a/b:c", Chunk: image.Chunk{Blob: fleet.Digest(image.DigestOf(nil)), BlobSize: 10}}
		body, err := client.Open(t.Context(), w, 5)
		if err != nil {
			return
		}
		defer func() { _ = body.Close() }()
		data, err := io.ReadAll(body)
		if len(data) > 5 || err == nil && len(data) != 5 {
			t.Errorf("%d bytes, %v; want 5 or an error", len(data), err)
		}
		var typed *cache.Error
		if err != nil && !errors.As(err, &typed) {
			t.Errorf("%v has no class", err)
		}
	})
}
