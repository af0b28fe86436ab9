package api

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/paddock-ci/paddock/fleet"
)

// controllerDouble answers every call with status and body, and keeps the last request.
type controllerDouble struct {
	*httptest.Server
	status int
	body   string
	method string
	path   string
	auth   string
	sent   string
}

func newDouble(t *testing.T, status int, body string) *controllerDouble {
	t.Helper()
	d := &controllerDouble{status: status, body: body}
	d.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		content, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		d.method, d.path, d.auth, d.sent = r.Method, r.URL.RequestURI(), r.Header.Get("Authorization"), string(content)
		if d.status == http.StatusFound {
			w.Header().Set("Location", "/elsewhere")
		}
		w.WriteHeader(d.status)
		_, _ = io.WriteString(w, d.body)
	}))
	d.EnableHTTP2 = true
	d.StartTLS()
	t.Cleanup(d.Close)
	return d
}

func (d *controllerDouble) hash() string {
	sum := sha256.Sum256(d.Certificate().Raw)
	return hex.EncodeToString(sum[:])
}

func (d *controllerDouble) client(t *testing.T) *Client {
	t.Helper()
	c, err := New(Config{URL: d.URL, Token: "pdk_one", CertificateHash: d.hash()})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// Every method makes the call that its route says, with the token.
func TestCalls(t *testing.T) {
	for name, c := range map[string]struct {
		call   func(context.Context, *Client) error
		method string
		path   string
	}{
		"nodes":    {func(ctx context.Context, c *Client) error { _, err := c.Nodes(ctx); return err }, "GET", "/v1/nodes"},
		"cordon":   {func(ctx context.Context, c *Client) error { _, err := c.Cordon(ctx, "mac1"); return err }, "POST", "/v1/nodes/mac1/cordon"},
		"uncordon": {func(ctx context.Context, c *Client) error { _, err := c.Uncordon(ctx, "a/b"); return err }, "POST", "/v1/nodes/a%2Fb/uncordon"},
		"chunks": {func(ctx context.Context, c *Client) error {
			_, err := c.Chunks(ctx, "mac1", ChunksRequest{Pieces: 3})
			return err
		}, "POST", "/v1/nodes/mac1/chunks"},
		"pull token": {func(ctx context.Context, c *Client) error {
			_, err := c.PullToken(ctx, "mac1", PullTokenRequest{Repository: "ghcr.io/acme/macos"})
			return err
		}, "POST", "/v1/nodes/mac1/pull-token"},
		"vms":     {func(ctx context.Context, c *Client) error { _, err := c.VMs(ctx); return err }, "GET", "/v1/vms"},
		"images":  {func(ctx context.Context, c *Client) error { _, err := c.Images(ctx); return err }, "GET", "/v1/images"},
		"jobs":    {func(ctx context.Context, c *Client) error { _, err := c.Jobs(ctx, ""); return err }, "GET", "/v1/jobs"},
		"queued":  {func(ctx context.Context, c *Client) error { _, err := c.Jobs(ctx, fleet.JobQueued); return err }, "GET", "/v1/jobs?status=queued"},
		"explain": {func(ctx context.Context, c *Client) error { _, err := c.Explain(ctx, 7); return err }, "GET", "/v1/jobs/7/explain"},
		"events": {func(ctx context.Context, c *Client) error {
			_, err := c.Events(ctx, EventFilter{Job: 7, VM: "vmaaaaaa", Node: "mac1", Limit: 5})
			return err
		}, "GET", "/v1/events?job=7&limit=5&node=mac1&vm=vmaaaaaa"},
		"tokens": {func(ctx context.Context, c *Client) error { _, err := c.Tokens(ctx); return err }, "GET", "/v1/tokens"},
		"create": {func(ctx context.Context, c *Client) error {
			_, err := c.CreateToken(ctx, TokenRequest{Name: "ci", Role: "viewer"})
			return err
		}, "POST", "/v1/tokens"},
		"revoke": {func(ctx context.Context, c *Client) error { _, err := c.RevokeToken(ctx, "00ff"); return err }, "DELETE", "/v1/tokens/00ff"},
		"join":   {func(ctx context.Context, c *Client) error { _, err := c.Join(ctx, "pdkjoin_x"); return err }, "POST", "/v1/join"},
		"sync": {func(ctx context.Context, c *Client) error {
			_, err := c.Sync(ctx, SyncRequest{Node: fleet.Node{ID: "mac1"}})
			return err
		}, "POST", "/v1/nodes/mac1/sync"},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDouble(t, http.StatusOK, "null")
			if err := c.call(t.Context(), d.client(t)); err != nil {
				t.Fatal(err)
			}
			if d.method != c.method || d.path != c.path || d.auth != "Bearer pdk_one" {
				t.Errorf("%s %s as %q, want %s %s", d.method, d.path, d.auth, c.method, c.path)
			}
			if (c.method == "GET" || c.method == "DELETE") && d.sent != "" {
				t.Errorf("a %s with the body %q", c.method, d.sent)
			}
		})
	}
}

// A renewed credential is not used before its caller has kept it: its use ends the old
// one, and an agent that had kept only that would be locked out at its next start.
func TestRenewedCredentialUsedBeforeItIsKept(t *testing.T) {
	d := newDouble(t, http.StatusOK, `{"revision":"r1","credential":"pdk_two"}`)
	c := d.client(t)
	reply, err := c.Sync(t.Context(), SyncRequest{Node: fleet.Node{ID: "mac1"}, Sequence: 3})
	if err != nil || reply.Revision != "r1" {
		t.Fatalf("%+v, %v", reply, err)
	}
	var sent SyncRequest
	if err := json.Unmarshal([]byte(d.sent), &sent); err != nil || sent.Sequence != 3 {
		t.Fatalf("sent %s: %v", d.sent, err)
	}
	if _, err := c.Sync(t.Context(), SyncRequest{Node: fleet.Node{ID: "mac1"}}); err != nil {
		t.Fatal(err)
	}
	if d.auth != "Bearer pdk_one" {
		t.Errorf("used already: %s", d.auth)
	}
	c.SetToken(reply.Credential)
	if _, err := c.Sync(t.Context(), SyncRequest{Node: fleet.Node{ID: "mac1"}}); err != nil {
		t.Fatal(err)
	}
	if d.auth != "Bearer pdk_two" {
		t.Errorf("still %s", d.auth)
	}
}

func TestErrors(t *testing.T) {
	for name, c := range map[string]struct {
		status int
		body   string
		want   Error
	}{
		"ours": {403, `{"error":"no","hint":"ask"}`, Error{Status: 403, Message: "no", Hint: "ask"}},
		"a proxy's": {502, "<html>Bad\nGateway", Error{Status: 502, Message: "the controller answered 502 Bad Gateway <html>Bad",
			Hint: "if this is not a Paddock controller's answer, check the URL and any proxy in between"}},
		"empty": {404, "", Error{Status: 404, Message: "the controller answered 404 Not Found",
			Hint: "if this is not a Paddock controller's answer, check the URL and any proxy in between"}},
		"a redirect is not followed": {302, "", Error{Status: 302, Message: "the controller answered 302 Found",
			Hint: "if this is not a Paddock controller's answer, check the URL and any proxy in between"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := newDouble(t, c.status, c.body).client(t).Nodes(t.Context())
			var got *Error
			if !errors.As(err, &got) {
				t.Fatalf("%v, want an *Error", err)
			}
			if diff := cmp.Diff(c.want, *got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestPinnedCertificate(t *testing.T) {
	d := newDouble(t, http.StatusOK, "[]")
	pool := x509.NewCertPool()
	pool.AddCert(d.Certificate())
	for name, c := range map[string]struct {
		config Config
		ok     bool
	}{
		"pinned":         {Config{CertificateHash: d.hash()}, true},
		"by its issuer":  {Config{CA: pool}, true},
		"another's hash": {Config{CertificateHash: strings.Repeat("0", 64)}, false},
		"unknown":        {Config{}, false},
	} {
		d.method = ""
		c.config.URL, c.config.Token = d.URL, "pdk_secret"
		client, err := New(c.config)
		if err != nil {
			t.Fatal(err)
		}
		_, err = client.Nodes(t.Context())
		if (err == nil) != c.ok || (d.method != "") != c.ok {
			t.Errorf("%s: %v, reached: %t", name, err, d.method != "")
		}
		var hinted *Error
		if name == "another's hash" && (!errors.As(err, &hinted) || hinted.Hint == "") {
			t.Errorf("%s: %v, want a hint", name, err)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	for _, c := range []Config{
		{}, {URL: "paddock.example"}, {URL: "ftp://paddock.example"}, {URL: "https://"},
		{URL: "http://paddock.example:7443"}, // in the clear over a network
		{URL: "https://paddock.example", CertificateHash: "abc"},
	} {
		var hinted *Error
		if _, err := New(c); !errors.As(err, &hinted) || hinted.Hint == "" {
			t.Errorf("%+v: %v, want an error with a hint", c, err)
		}
	}
	if _, err := New(Config{URL: "http://127.0.0.1:7443"}); err != nil {
		t.Errorf("plain http on this host: %v", err)
	}
}

func TestUnreachable(t *testing.T) {
	d := newDouble(t, http.StatusOK, "[]")
	c := d.client(t)
	d.Close()
	_, err := c.Nodes(t.Context())
	if err == nil || !strings.Contains(err.Error(), "reach the controller at "+d.URL) || strings.Count(err.Error(), d.URL) != 1 {
		t.Errorf("%v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Nodes(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want the context's error to be found", err)
	}
}

// endless is a reply that never ends.
type endless struct{ n int }

func (e *endless) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = ' '
	}
	e.n += len(p)
	return len(p), nil
}

func TestReplyIsLimited(t *testing.T) {
	body := &endless{}
	if err := decode(body, &[]NodeRow{}); err == nil || !strings.Contains(err.Error(), "larger") {
		t.Errorf("%v", err)
	}
	if body.n > maxReply+1<<20 {
		t.Errorf("%d bytes were read", body.n)
	}
}

// FuzzReadError: whatever answers, the error says something, and not too much.
func FuzzReadError(f *testing.F) {
	f.Add(403, []byte(`{"error":"no","hint":"ask"}`))
	f.Add(502, []byte("<html>\xff"))
	f.Add(0, []byte(`{"error":7}`))
	f.Fuzz(func(t *testing.T, status int, body []byte) {
		var e *Error
		err := readError(&http.Response{StatusCode: status, Body: io.NopCloser(bytes.NewReader(body))})
		if !errors.As(err, &e) || e.Message == "" || e.Status != status {
			t.Fatalf("%#v", err)
		}
	})
}

// FuzzSyncReply: what a node decodes from a reply, it can encode to the same again.
func FuzzSyncReply(f *testing.F) {
	reply := SyncReply{
		Revision: "r", Incarnation: "i", Applied: 4,
		Hold: []fleet.Hold{{Digest: "sha256:00", Ref: "r/i:t", Demand: true}},
		Run:  []VMOrder{{ID: "vmaaaaaa", Env: map[string]string{"A": "b"}, PlacedAt: time.Unix(1e9, 5).UTC()}},
	}
	seed, err := json.Marshal(reply)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Add([]byte("{}"))
	f.Add([]byte(`{"run":[{"deadlines":{"boot":1e300}}]}`))
	f.Fuzz(func(t *testing.T, body []byte) {
		var first, second SyncReply
		if decode(bytes.NewReader(body), &first) != nil {
			return
		}
		text, err := json.Marshal(first)
		if err != nil {
			t.Fatal(err)
		}
		if err := decode(bytes.NewReader(text), &second); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		again, err := json.Marshal(second)
		if err != nil || !bytes.Equal(text, again) {
			t.Fatal(fmt.Sprintf("%s\n%s", text, again), err)
		}
	})
}
