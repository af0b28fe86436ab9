package registry_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/cache/registry"
	"github.com/paddock-ci/paddock/cache/registrytest"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
	"github.com/paddock-ci/paddock/image/tart"
)

// misbehaviour is one way of a registry to fail while a store pulls from it. The cast: an
// image of chunks a, zeros and b; what is spoilt are the requests for the blob of a.
type misbehaviour struct {
	name   string
	faults []registrytest.Fault
	token  bool // the registry wants tokens
	away   bool // blobs are on a second host
	uses   int  // of each link there; 0: no limit

	class    cache.Class // of the pull's error; empty: it succeeds
	text     string      // in the error
	requests int         // for the blob of a; negative: not said
	again    int64       // bytes of it that came more than once; negative: not said
	atLeast  time.Duration
}

const at = 30_000 // where connections break, in the middle of a blob of some 66,000 bytes

var misbehaviours = []misbehaviour{
	{name: "none", requests: 1},
	{name: "cut in the middle", faults: []registrytest.Fault{{Kind: registrytest.Drop, At: at, Times: 1}}, requests: 2},
	{name: "cut at every request", faults: []registrytest.Fault{{Kind: registrytest.Drop, At: at}}, class: cache.ClassNetwork, text: fmt.Sprint("after ", at), requests: 3},
	{name: "cut before the first byte", faults: []registrytest.Fault{{Kind: registrytest.Drop, Times: 2}}, requests: 3},
	{name: "429 without Retry-After", faults: []registrytest.Fault{{Kind: registrytest.Refuse, Status: 429, Times: 2}}, requests: 3},
	{name: "429 with a second", faults: []registrytest.Fault{{Kind: registrytest.Refuse, Status: 429, RetryAfter: "1", Times: 1}}, requests: 2, atLeast: time.Second},
	{name: "429 with a date", faults: []registrytest.Fault{{Kind: registrytest.Refuse, Status: 429, RetryAfter: "date", Times: 1}}, requests: 2, atLeast: time.Second},
	{name: "429 with an hour", faults: []registrytest.Fault{{Kind: registrytest.Refuse, Status: 429, RetryAfter: "3600"}}, class: cache.ClassNetwork, text: "asked again in 1h0m0s", requests: 1},
	{name: "503", faults: []registrytest.Fault{{Kind: registrytest.Refuse, Status: 503, Times: 2}}, requests: 3},
	{name: "503 at every request", faults: []registrytest.Fault{{Kind: registrytest.Refuse, Status: 503}}, class: cache.ClassNetwork, text: "status 503", requests: 3},
	{name: "the token expires", token: true, faults: []registrytest.Fault{{Kind: registrytest.Expire, Times: 1}}, requests: 2},
	{name: "the token expires in the middle", token: true, faults: []registrytest.Fault{{Kind: registrytest.Drop, At: at, Times: 1}, {Kind: registrytest.Expire, Times: 1}}, requests: 3},
	{name: "forbidden", faults: []registrytest.Fault{{Kind: registrytest.Refuse, Status: 403}}, class: cache.ClassAuth, text: "docker login", requests: -1},
	{name: "gone", faults: []registrytest.Fault{{Kind: registrytest.Refuse, Status: 404}}, class: cache.ClassNotFound, text: "check the name", requests: -1},
	{name: "200 instead of 206", faults: []registrytest.Fault{{Kind: registrytest.Drop, At: at, Times: 1}, {Kind: registrytest.IgnoreRange, Times: 1}}, requests: 2, again: at},
	{name: "200, and cut again and again", faults: []registrytest.Fault{{Kind: registrytest.Drop, At: 50_000, Whole: true}}, class: cache.ClassNetwork, text: "no ranges", requests: 2, again: -1},
	{name: "416", faults: []registrytest.Fault{{Kind: registrytest.RefuseRange}}, requests: 2},
	{name: "416 in the middle", faults: []registrytest.Fault{{Kind: registrytest.Drop, At: at, Times: 1}, {Kind: registrytest.RefuseRange}}, requests: 3, again: at},
	{name: "ranges shorter than asked for", faults: []registrytest.Fault{{Kind: registrytest.Short, At: 20_000}}, requests: 4},
	{name: "another range than asked for", faults: []registrytest.Fault{{Kind: registrytest.WrongRange}}, class: cache.ClassDigest, text: "asked for bytes 0-", requests: -1, again: -1},
	{name: "a wrong byte", faults: []registrytest.Fault{{Kind: registrytest.WrongByte, At: at}}, class: cache.ClassDigest, text: "digest", requests: -1, again: -1},
	{name: "too short", faults: []registrytest.Fault{{Kind: registrytest.Truncate, At: at}}, class: cache.ClassDigest, text: "wrong layer", requests: -1, again: -1},
	{name: "too short, without saying so", faults: []registrytest.Fault{{Kind: registrytest.Truncate, At: at, Whole: true, Unsized: true}}, class: cache.ClassNetwork, text: fmt.Sprint("after ", at), requests: -1, again: -1},
	{name: "too long", faults: []registrytest.Fault{{Kind: registrytest.Overlong, At: 10, Whole: true}}, class: cache.ClassDigest, text: "wrong layer", requests: -1, again: -1},
	{name: "silence in the middle", faults: []registrytest.Fault{{Kind: registrytest.Hang, At: at, Times: 1}}, requests: 2},
	{name: "a trickle", faults: []registrytest.Fault{{Kind: registrytest.Slow, Rate: 40, Times: 1}}, requests: 2, again: -1},
	{name: "nothing but a trickle", faults: []registrytest.Fault{{Kind: registrytest.Slow, Rate: 40}}, class: cache.ClassNetwork, text: "less than 1024 bytes per second", requests: 3, again: -1},
	{name: "a second host", away: true, token: true, requests: 1},
	{name: "stale links", away: true, token: true, faults: []registrytest.Fault{{Kind: registrytest.Stale, Times: 2}}, requests: 1},
	{name: "nothing but stale links", away: true, faults: []registrytest.Fault{{Kind: registrytest.Stale}}, class: cache.ClassNetwork, text: "compare the clocks", requests: 0},
	{name: "a link that expires in the middle", away: true, uses: 1, faults: []registrytest.Fault{{Kind: registrytest.Drop, At: at, Times: 1}}, requests: 2},
	{name: "429 from the second host", away: true, faults: []registrytest.Fault{{Kind: registrytest.Refuse, Status: 429, RetryAfter: "0", Times: 1}}, requests: 2},
}

// A store pulls through each misbehaviour, with exactly the requests and the bytes that
// it takes, or fails with an error that says what to do; once the registry is well again,
// the same store pulls the image.
func TestStorePullsThrough(t *testing.T) {
	for _, m := range misbehaviours {
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			m.run(t)
		})
	}
}

func (m misbehaviour) run(t *testing.T) {
	reg, host := serve(t)
	d, err := reg.Push(t.Context(), "fleet/base", "v1", registrytest.Source("a0b", 128<<10))
	if err != nil {
		t.Fatal(err)
	}
	storage := httptest.NewServer(reg.Storage())
	t.Cleanup(storage.Close)
	t.Cleanup(reg.Heal) // before Close, which waits for hanging requests
	ref := host + "/fleet/base:v1"
	blob := chunkOf(t, newClient(t, nil), ref, d)
	if m.token {
		reg.RequireToken("user", "right", 0)
	}
	if m.away {
		reg.Elsewhere(storage.URL, m.uses)
	}
	for _, f := range m.faults {
		if f.RetryAfter == "date" {
			f.RetryAfter = time.Now().Add(2 * time.Second).UTC().Format(http.TimeFormat)
		}
		reg.Break(blob.Digest, f)
	}
	reg.Reset()
	asks := registry.Config{Keychain: keychain{"user", "right"}, Tries: 3, Pause: time.Millisecond, Stall: 500 * time.Millisecond}
	client, err := registry.New(asks)
	if err != nil {
		t.Fatal(err)
	}
	cfg := cache.Config{Dir: t.TempDir(), Sources: []cache.Source{client}, Backoff: time.Nanosecond}
	store, err := cache.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = store.Close() }()
	began := time.Now()
	hold := fleet.Hold{Digest: d, Ref: ref, Demand: true}
	err = store.Pull(t.Context(), hold)
	if took := time.Since(began); took < m.atLeast {
		t.Errorf("it took %s; want %s at least", took, m.atLeast)
	}
	m.check(t, reg, blob, err)
	if _, leaked := reg.Links(); leaked != 0 {
		t.Errorf("%d requests to the second host had credentials or cookies", leaked)
	}
	if m.class == "" {
		return
	}
	reg.Heal()
	if failure := (*cache.Error)(nil); errors.As(err, &failure) && time.Until(failure.RetryAt) > time.Minute {
		// Store and client wait as they were asked to, until they are made anew.
		if again := store.Pull(t.Context(), hold); !errors.Is(again, failure) {
			t.Errorf("before its time: %v", again)
		}
		if err := store.Close(); err != nil {
			t.Fatal(err)
		}
		if client, err = registry.New(asks); err != nil {
			t.Fatal(err)
		}
		cfg.Sources = []cache.Source{client}
		if store, err = cache.Open(cfg); err != nil {
			t.Fatal(err)
		}
	} else if strings.Contains(m.name, "hour") {
		t.Errorf("it may be tried again before: %v", err)
	}
	pullAgain(t, store, hold)
}

// check compares what the pull came to, and what it cost.
func (m misbehaviour) check(t *testing.T, reg *registrytest.Registry, blob image.Blob, err error) {
	t.Helper()
	if m.class == "" && err != nil || m.class != "" && (err == nil || cache.ClassOf(err) != m.class || !strings.Contains(err.Error(), m.text)) {
		t.Errorf("the pull: %v; want class %q with %q", err, m.class, m.text)
	}
	if err != nil && (strings.Contains(err.Error(), "right") || strings.Contains(err.Error(), "secret-")) {
		t.Errorf("a password or a signature is in the error: %v", err)
	}
	counts := reg.Counts()
	if got := counts.Requests[blob.Digest]; m.requests >= 0 && got != m.requests {
		t.Errorf("%d requests for the blob; want %d", got, m.requests)
	}
	if got := counts.Bytes[blob.Digest] - blob.Size; m.class == "" && m.again >= 0 && got != m.again {
		t.Errorf("%d bytes of %d came more than once; want %d", got, blob.Size, m.again)
	}
	if got := counts.Bytes[blob.Digest] - blob.Size; m.class == "" && m.again < 0 && got > 1000 {
		t.Errorf("%d bytes of %d came more than once", got, blob.Size)
	}
}

// pullAgain pulls what failed before. The last failure is given back for as long as the
// store wants to wait after it, or the registry.
func pullAgain(t *testing.T, store *cache.Store, hold fleet.Hold) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for {
		err := store.Pull(ctx, hold)
		if err == nil || ctx.Err() != nil {
			if err != nil {
				t.Errorf("the pull after all is well: %v", err)
			}
			return
		}
	}
}

// chunkOf is the blob of an image's first disk chunk.
func chunkOf(t *testing.T, client *registry.Client, ref string, d fleet.Digest) image.Blob {
	t.Helper()
	raw, err := client.Manifest(t.Context(), ref, d)
	if err != nil {
		t.Fatal(err)
	}
	m, _, err := image.Parse(raw, []image.Codec{tart.Codec{}})
	if err != nil {
		t.Fatal(err)
	}
	return image.Blob{Digest: m.Chunks[0].Blob, Size: m.Chunks[0].BlobSize}
}
