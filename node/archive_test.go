package node

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// depot serves one archive, the way that serve says.
type depot struct {
	*httptest.Server
	mu    sync.Mutex
	calls int
}

var theArchive = []byte(strings.Repeat("a runner ", 1000))

func sumOf(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

func newDepot(t *testing.T, serve http.HandlerFunc) *depot {
	t.Helper()
	d := &depot{}
	if serve == nil {
		serve = func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(theArchive) }
	}
	d.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		d.mu.Lock()
		d.calls++
		d.mu.Unlock()
		serve(w, r)
	}))
	t.Cleanup(d.Close)
	return d
}

func (d *depot) archive() fleet.Archive {
	return fleet.Archive{Name: "actions-runner-osx-arm64-2.330.0.tar.gz", URL: d.URL + "/2.330.0.tar.gz", SHA256: sumOf(theArchive)}
}

func (d *depot) count() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.calls
}

func testArchives(t *testing.T) *archives {
	return newArchives(filepath.Join(t.TempDir(), "runners"), time.Now, newStand(t).log)
}

func (s *archives) read(ctx context.Context, want fleet.Archive) (string, error) {
	f, err := s.open(ctx, want)
	if err != nil {
		return "", err
	}
	data, err := io.ReadAll(f)
	return string(data), errors.Join(err, f.Close())
}

// TestArchiveOnce: eight VMs want one archive at once, and it is downloaded once; a later
// one, also of another agent on this host, finds it.
func TestArchiveOnce(t *testing.T) {
	gate := make(chan struct{})
	d := newDepot(t, func(w http.ResponseWriter, _ *http.Request) {
		<-gate
		_, _ = w.Write(theArchive)
	})
	s := testArchives(t)
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			if got, err := s.read(t.Context(), d.archive()); err != nil || got != string(theArchive) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
		})
	}
	close(gate)
	all.Wait()
	again := newArchives(s.dir, time.Now, s.log)
	if got, err := again.read(t.Context(), d.archive()); err != nil || got != string(theArchive) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	if n := d.count(); n != 1 {
		t.Errorf("downloaded %d times", n)
	}
}

// TestArchiveTakenOver: the VM whose call downloads is destroyed; another that waits for
// the same archive downloads it then.
func TestArchiveTakenOver(t *testing.T) {
	first := make(chan struct{})
	var once sync.Once
	d := newDepot(t, func(w http.ResponseWriter, r *http.Request) {
		begun := false
		once.Do(func() { begun = true })
		if begun {
			close(first)
			<-r.Context().Done()
			return
		}
		_, _ = w.Write(theArchive)
	})
	s := testArchives(t)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 2)
	go func() {
		_, err := s.read(ctx, d.archive())
		ended <- err
	}()
	<-first
	got := make(chan error, 1)
	go func() {
		_, err := s.read(t.Context(), d.archive())
		got <- err
	}()
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("the cancelled one: %v", err)
	}
	if err := <-got; err != nil {
		t.Errorf("the other: %v", err)
	}
}

// TestArchiveRefusals: nothing but the archive that GitHub means gets a name, and a
// failure leaves nothing.
func TestArchiveRefusals(t *testing.T) {
	elsewhere := newDepot(t, nil)
	for _, tt := range []struct {
		name   string
		serve  http.HandlerFunc
		change func(*fleet.Archive)
		want   string
	}{
		{name: "other bytes", want: "and GitHub says", serve: func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("a trojan")) }},
		{name: "cut short", want: "unexpected EOF", serve: func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", strconv.Itoa(len(theArchive)))
			_, _ = w.Write(theArchive[:100])
		}},
		{name: "huge, and it says so", want: "at most", serve: func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", strconv.Itoa(1<<20+1))
		}},
		{name: "huge, and it does not say so", want: "more than 1048576 bytes", serve: func(w http.ResponseWriter, _ *http.Request) {
			for range 100 {
				if _, err := w.Write(make([]byte, 64<<10)); err != nil {
					return
				}
			}
		}},
		{name: "not there", want: "404", serve: http.NotFound},
		{name: "a redirect to what is not encrypted", want: "only https", serve: func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://runners.example/secret?signature=s3cr3t", http.StatusFound)
		}},
		{name: "redirects without end", want: "redirects", serve: func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, r.URL.Path, http.StatusFound) }},
		{name: "not encrypted", want: "only https", change: func(a *fleet.Archive) { a.URL = "http://runners.example/r.tar.gz" }},
		{name: "a file of this host", want: "only https", change: func(a *fleet.Archive) { a.URL = "file:///etc/passwd" }},
		{name: "no URL", want: "parse", change: func(a *fleet.Archive) { a.URL = "http://[::1" }},
		{name: "no SHA-256", want: "which is none", change: func(a *fleet.Archive) { a.SHA256 = "../../../etc/passwd" }},
		{name: "an upper-case SHA-256", want: "which is none", change: func(a *fleet.Archive) { a.SHA256 = strings.ToUpper(a.SHA256) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := newDepot(t, tt.serve)
			s := testArchives(t)
			s.most = 1 << 20
			want := d.archive()
			if tt.change != nil {
				tt.change(&want)
			}
			_, err := s.read(t.Context(), want)
			if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "s3cr3t") {
				t.Errorf("%v; want %q", err, tt.want)
			}
			if left, _ := filepath.Glob(filepath.Join(s.dir, "*")); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
			if _, err := s.read(t.Context(), elsewhere.archive()); err != nil {
				t.Errorf("and then from elsewhere: %v", err)
			}
		})
	}
}

// TestArchiveSlow: a download that brings nothing blocks neither its own VM beyond its
// context nor the archives of others.
func TestArchiveSlow(t *testing.T) {
	begun := make(chan struct{}, 2)
	d := newDepot(t, func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "slow") {
			_, _ = w.Write(theArchive[:10])
			_ = http.NewResponseController(w).Flush()
			begun <- struct{}{}
			<-r.Context().Done()
			return
		}
		_, _ = w.Write(theArchive)
	})
	s := testArchives(t)
	slow := d.archive()
	slow.URL, slow.SHA256 = d.URL+"/slow", sumOf([]byte("slow"))
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		_, err := s.read(ctx, slow)
		ended <- err
	}()
	<-begun
	if _, err := s.read(t.Context(), d.archive()); err != nil {
		t.Errorf("another archive meanwhile: %v", err)
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("the slow one: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(s.dir, "*.part")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// stalled is a server whose answer brings some bytes and then no more.
type stalled struct{ ctx context.Context }

func (s stalled) RoundTrip(r *http.Request) (*http.Response, error) {
	return &http.Response{StatusCode: http.StatusOK, ContentLength: -1, Request: r, Body: io.NopCloser(io.MultiReader(strings.NewReader("some"), stalled{r.Context()}))}, nil
}

func (s stalled) Read([]byte) (int, error) {
	<-s.ctx.Done()
	return 0, s.ctx.Err()
}

// TestArchiveStalls: a download from which nothing comes is given up.
func TestArchiveStalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, begun := testArchives(t), time.Now()
		s.client.Transport = stalled{}
		_, err := s.read(t.Context(), fleet.Archive{Name: "r", URL: "https://runners.example/r.tar.gz", SHA256: sumOf(theArchive)})
		if !errors.Is(err, errStalled) || time.Since(begun) != archiveStall {
			t.Errorf("after %v: %v", time.Since(begun), err)
		}
	})
}

// TestArchiveEviction: what was not used for two weeks goes when another one comes, and
// what a crash left of a download goes at once.
func TestArchiveEviction(t *testing.T) {
	d := newDepot(t, nil)
	s := testArchives(t)
	must(t, os.MkdirAll(s.dir, 0o700))
	for name, age := range map[string]time.Duration{
		sumOf([]byte("old")) + ".tar.gz": archiveAge + time.Hour, sumOf([]byte("used")) + ".tar.gz": archiveAge - time.Hour,
		sumOf([]byte("cut")) + ".tar.gz.part": 0,
	} {
		path := filepath.Join(s.dir, name)
		must(t, os.WriteFile(path, []byte("x"), 0o600))
		must(t, os.Chtimes(path, time.Now().Add(-age), time.Now().Add(-age)))
	}
	if _, err := s.read(t.Context(), d.archive()); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(s.dir)
	must(t, err)
	got := map[string]bool{}
	for _, e := range entries {
		got[e.Name()] = true
	}
	if want := fmt.Sprint(map[string]bool{sumOf([]byte("used")) + ".tar.gz": true, sumOf(theArchive) + ".tar.gz": true}); fmt.Sprint(got) != want {
		t.Errorf("left: %v", got)
	}
}
