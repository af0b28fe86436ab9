package registrytest_test

import (
	"bytes"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/cache/registrytest"
)

// request makes a request and returns the answer with its body.
func request(t *testing.T, method, url, body string, header ...string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(text)
}

// The limit is for all connections together: four of them move 400 KB at 400 KB/s.
func TestLimit(t *testing.T) {
	reg := registrytest.New()
	server := httptest.NewServer(reg)
	defer server.Close()
	d, err := reg.PutBlob(t.Context(), bytes.Repeat([]byte("x"), 100_000))
	if err != nil {
		t.Fatal(err)
	}
	reg.Limit(400_000)
	began := time.Now()
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			if _, text := request(t, http.MethodGet, server.URL+"/v2/a/b/blobs/"+string(d), ""); len(text) != 100_000 {
				t.Errorf("%d bytes came", len(text))
			}
		})
	}
	all.Wait()
	if took := time.Since(began); took < 900*time.Millisecond {
		t.Errorf("400 KB came in %s; the limit is 400 KB/s", took)
	}
	if requests, sent := reg.Counts().Total(); requests != 4 || sent != 400_000 {
		t.Errorf("%d requests, %d bytes", requests, sent)
	}
	reg.Limit(0)
	began = time.Now()
	for range 4 {
		request(t, http.MethodGet, server.URL+"/v2/a/b/blobs/"+string(d), "")
	}
	if took := time.Since(began); took > 800*time.Millisecond {
		t.Errorf("without a limit, 400 KB took %s", took)
	}
}

// Uploads come whole or in pieces, each piece at the place that the last answer named;
// what does not follow, or has another digest, is refused. What is pushed to one
// repository is in no other before it is mounted there.
func TestUploads(t *testing.T) {
	reg := registrytest.New()
	server := httptest.NewServer(reg)
	defer server.Close()
	digest := "sha256:b5d4045c3f466fa91fe2cc6abe79232a1a57cdf104f7a26e716e0a1e2789df78" // of ABC
	start, _ := request(t, http.MethodPost, server.URL+"/v2/a/b/blobs/uploads/", "")
	first, _ := request(t, http.MethodPatch, server.URL+start.Header.Get("Location"), "A", "Content-Range", "0-0")
	if first.StatusCode != http.StatusAccepted || first.Header.Get("Location") == start.Header.Get("Location") {
		t.Errorf("the first piece: %s, next at %s", first.Status, first.Header.Get("Location"))
	}
	if gap, _ := request(t, http.MethodPatch, server.URL+first.Header.Get("Location"), "C", "Content-Range", "2-2"); gap.StatusCode != http.StatusRequestedRangeNotSatisfiable {
		t.Errorf("a piece that does not follow: %s", gap.Status)
	}
	if end, _ := request(t, http.MethodPut, server.URL+first.Header.Get("Location")+"?digest="+digest, "BC"); end.StatusCode != http.StatusCreated {
		t.Errorf("the last piece: %s", end.Status)
	}
	if wrong, _ := request(t, http.MethodPost, server.URL+"/v2/a/b/blobs/uploads/?digest="+digest, "ABD"); wrong.StatusCode != http.StatusBadRequest {
		t.Errorf("a wrong digest: %s", wrong.Status)
	}
	for repository, want := range map[string]int{"a/b": http.StatusOK, "c/d": http.StatusNotFound} {
		if got, _ := request(t, http.MethodHead, server.URL+"/v2/"+repository+"/blobs/"+digest, ""); got.StatusCode != want {
			t.Errorf("%s: %s; want %d", repository, got.Status, want)
		}
	}
	manifest := `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"digest":"` + digest + `","size":3},"layers":[{"digest":"` + digest + `","size":3}]}`
	put := func() int {
		resp, _ := request(t, http.MethodPut, server.URL+"/v2/c/d/manifests/v1", manifest, "Content-Type", "application/vnd.oci.image.manifest.v1+json")
		return resp.StatusCode
	}
	if got := put(); got != http.StatusBadRequest {
		t.Errorf("a manifest of blobs that are not there: %d", got)
	}
	if mounted, _ := request(t, http.MethodPost, server.URL+"/v2/c/d/blobs/uploads/?mount="+digest+"&from=a/b", ""); mounted.StatusCode != http.StatusCreated {
		t.Errorf("mounting: %s", mounted.Status)
	}
	if got := put(); got != http.StatusCreated {
		t.Errorf("a manifest of mounted blobs: %d", got)
	}
	if got := reg.Pushed(); got.Mounts != 1 || got.Blobs != 1 || got.Bytes != 6 || got.Known != 1 || got.Manifests != 1 {
		t.Errorf("counted %+v", got)
	}
}
