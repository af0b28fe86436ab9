package registry_test

import (
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/cache/registry"
	"github.com/paddock-ci/paddock/image"
)

// A registry that wants to be left alone for longer than a stream waits is: every request,
// for whatever image, fails at once and says when, and none is made before. In virtual
// time, on a registry without a network.
func TestLongRetryAfterIsForAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		requests, refuse := 0, true
		client, err := registry.New(registry.Config{Transport: roundTrip(func(req *http.Request) (*http.Response, error) {
			answer := &http.Response{StatusCode: http.StatusOK, Request: req, Header: http.Header{}}
			text := ""
			if req.URL.Path != "/v2/" { // the question whether it wants a login
				requests++
				text = strings.Repeat("x", 1000)
			}
			if req.URL.Path != "/v2/" && refuse {
				answer.StatusCode, text = http.StatusTooManyRequests, ""
				answer.Header.Set("Retry-After", "600")
			}
			answer.Body, answer.ContentLength = io.NopCloser(strings.NewReader(text)), int64(len(text))
			return answer, nil
		})})
		if err != nil {
			t.Fatal(err)
		}
		const host = "localhost:5000"
		until := time.Now().Add(10 * time.Minute)
		blob := image.Blob{Digest: image.DigestOf(nil), Size: 1000}
		read := func() error {
			body, err := client.Open(t.Context(), wantOf(host+"/fleet/base:v1", blob), 0)
			if err != nil {
				return err
			}
			_, err = io.ReadAll(body)
			return errors.Join(err, body.Close())
		}
		resolve := func() error { _, err := client.Resolve(t.Context(), host+"/other/image:v1"); return err }
		for name, ask := range map[string]func() error{"the same blob": read, "another repository": resolve} {
			for range 3 {
				began := time.Now()
				err := ask()
				var typed *cache.Error
				if !errors.As(err, &typed) || typed.Class != cache.ClassNetwork || !typed.RetryAt.Equal(until) || !strings.Contains(err.Error(), "asked again in") {
					t.Errorf("%s: %v; want class network, and to be tried at %s", name, err, until)
				}
				if took := time.Since(began); took > time.Second {
					t.Errorf("%s: it took %s to say so", name, took)
				}
			}
		}
		if requests != 1 {
			t.Errorf("%d requests; want the one that was refused", requests)
		}
		refuse = false
		time.Sleep(time.Until(until) + time.Second)
		if err := read(); err != nil || requests != 2 {
			t.Errorf("afterwards: %v, %d requests in all; want 2", err, requests)
		}
	})
}
