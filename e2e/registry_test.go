package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/cache/registry"
	"github.com/paddock-ci/paddock/cache/registrytest"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image"
	"github.com/paddock-ci/paddock/image/tart"
)

// realRegistry is a process of the distribution project's registry.
type realRegistry struct {
	t       *testing.T
	program string
	host    string
	dir     string
	chunk   int // size of the disk's chunks
	cmd     *exec.Cmd
}

// openRegistry starts an empty registry.
func openRegistry(t *testing.T, program string) *realRegistry {
	t.Helper()
	listener, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0") // for a free port
	if err != nil {
		t.Fatal(err)
	}
	r := &realRegistry{t: t, program: program, host: listener.Addr().String(), dir: t.TempDir(), chunk: 1 << 20}
	if err := listener.Close(); err != nil {
		t.Fatal(err)
	}
	r.start()
	t.Cleanup(r.kill)
	return r
}

// start starts the registry and returns when it answers.
func (r *realRegistry) start() {
	r.t.Helper()
	log, err := os.OpenFile(filepath.Join(r.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		r.t.Fatal(err)
	}
	r.cmd = exec.CommandContext(context.WithoutCancel(r.t.Context()), r.program, r.host, filepath.Join(r.dir, "blobs"))
	r.cmd.Stdout, r.cmd.Stderr = log, log
	if err := r.cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	_ = log.Close() // the process has its own
	look := time.NewTicker(10 * time.Millisecond)
	defer look.Stop()
	for deadline := time.Now().Add(time.Minute); ; <-look.C {
		conn, err := new(net.Dialer).DialContext(r.t.Context(), "tcp", r.host)
		if err == nil {
			_ = conn.Close()
			return
		}
		if time.Now().After(deadline) {
			text, _ := os.ReadFile(filepath.Join(r.dir, "log")) // whatever there is
			r.t.Fatalf("the registry does not listen: %v\n%s", err, text)
		}
	}
}

// kill ends it as a power cut does.
func (r *realRegistry) kill() {
	if r.cmd == nil {
		return
	}
	_ = r.cmd.Process.Signal(syscall.SIGKILL)
	_ = r.cmd.Wait() // "killed" is what it says
	r.cmd = nil
}

// wire is a transport that counts the bytes of bodies, and may do something when so many
// have come.
type wire struct {
	inner *http.Transport
	mu    sync.Mutex
	bytes int64
	when  int64
	then  func() // nil: nothing
	gets  map[string]int
	// refused has a value when a request reached nobody.
	refused chan struct{}
}

func (w *wire) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := w.inner.RoundTrip(req)
	if errors.Is(err, syscall.ECONNREFUSED) {
		select {
		case w.refused <- struct{}{}:
		default:
		}
	}
	if err == nil && strings.Contains(req.URL.Path, "/blobs/sha256:") && req.Method == http.MethodGet {
		w.mu.Lock()
		w.gets[req.URL.Path]++
		w.mu.Unlock()
		resp.Body = &counted{resp.Body, w}
	}
	return resp, err
}

type counted struct {
	io.ReadCloser
	wire *wire
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.ReadCloser.Read(p)
	c.wire.mu.Lock()
	defer c.wire.mu.Unlock()
	c.wire.bytes += int64(n)
	if then := c.wire.then; then != nil && c.wire.bytes >= c.wire.when {
		c.wire.then = nil
		then()
	}
	return n, err
}

// dialSmall makes a connection that holds little of what was sent and not read, so that
// who kills the sender loses something.
func dialSmall(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	return conn, conn.(*net.TCPConn).SetReadBuffer(64 << 10)
}

// client is a registry client whose bytes are counted.
func (r *realRegistry) client() (*registry.Client, *wire) {
	r.t.Helper()
	w := &wire{gets: map[string]int{}, refused: make(chan struct{}, 1), inner: &http.Transport{DialContext: dialSmall}}
	r.t.Cleanup(w.inner.CloseIdleConnections)
	c, err := registry.New(registry.Config{Transport: w, Tries: 8, Pause: 50 * time.Millisecond})
	if err != nil {
		r.t.Fatal(err)
	}
	return c, w
}

// push makes an image of a pattern and pushes it.
func (r *realRegistry) push(c *registry.Client, name, pattern string, parentRef string, parent *image.Manifest) *image.Manifest {
	r.t.Helper()
	u, err := c.Upload(r.t.Context(), r.host+"/"+name, nil)
	if err != nil {
		r.t.Fatal(err)
	}
	src := registrytest.Source(pattern, r.chunk)
	src.Workers = 2
	if parent != nil {
		src.Parent = parent
		src.Reuse = func(ctx context.Context, c image.Chunk) (bool, error) {
			return u.Take(ctx, image.Blob{Digest: c.Blob, Size: c.BlobSize, MediaType: c.MediaType}, parentRef)
		}
	}
	raw, err := tart.Build(r.t.Context(), src, func(ctx context.Context, l tart.Layer) error { return u.Put(ctx, registry.Blob(l)) })
	if err != nil {
		r.t.Fatal(err)
	}
	if _, err := u.Finish(r.t.Context(), raw); err != nil {
		r.t.Fatal(err)
	}
	m, _, err := image.Parse(raw, []image.Codec{tart.Codec{}})
	if err != nil {
		r.t.Fatal(err)
	}
	return m
}

// pull pulls an image into a store of its own, and compares the disk.
func (r *realRegistry) pull(c *registry.Client, name, pattern string, d fleet.Digest) {
	r.t.Helper()
	store, err := cache.Open(cache.Config{Dir: r.t.TempDir(), Sources: []cache.Source{c}, Streams: 2})
	if err != nil {
		r.t.Fatal(err)
	}
	defer func() { _ = store.Close() }()
	if err := store.Pull(r.t.Context(), fleet.Hold{Digest: d, Ref: r.host + "/" + name, Demand: true}); err != nil {
		r.t.Fatal(err)
	}
	path, err := store.Path(d)
	if err != nil {
		r.t.Fatal(err)
	}
	got, err := os.ReadFile(filepath.Join(path, "disk.img"))
	if err != nil {
		r.t.Fatal(err)
	}
	disk := registrytest.Source(pattern, r.chunk).Disk
	want := make([]byte, disk.Size())
	if n, err := disk.ReadAt(want, 0); n < len(want) {
		r.t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		r.t.Error("the disk differs from what was pushed")
	}
}

// TestRealRegistry is what the simulated registry of other tests is held to.
func TestRealRegistry(t *testing.T) {
	program := build(t, ".", "./distribution")
	for name, test := range map[string]func(*testing.T, *realRegistry){
		"push and pull": pushAndPull, "killed in a pull": killedInPull, "tags": listTags,
	} {
		t.Run(name, func(t *testing.T) { test(t, openRegistry(t, program)) })
	}
}

// A real registry takes what is pushed and gives it to a store; a second push sends
// nothing, and the next tag in another repository only what is new: the rest is mounted.
func pushAndPull(t *testing.T, r *realRegistry) {
	c, w := r.client()
	const base, next = "fleet/base:v1", "fleet/next:v2"
	m := r.push(c, base, "a0bc", "", nil)
	r.pull(c, base, "a0bc", m.Digest)
	if got, err := c.Resolve(t.Context(), r.host+"/"+base); err != nil || got.Digest != m.Digest {
		t.Errorf("resolved to %+v, %v", got, err)
	}
	if again := r.push(c, base, "a0bc", "", nil); again.Digest != m.Digest {
		t.Errorf("the second push made %s; want %s", again.Digest, m.Digest)
	}
	w.bytes = 0
	m2 := r.push(c, next, "a0dc", r.host+"/"+base, m)
	if w.bytes != 0 {
		t.Errorf("%d bytes were fetched to push the next tag: the registry mounts", w.bytes)
	}
	r.pull(c, next, "a0dc", m2.Digest)
	if m2.Chunks[0].Blob != m.Chunks[0].Blob {
		t.Error("the shared chunk is another blob")
	}
}

// The registry is killed in the middle of a pull and comes back: the pull goes on at the
// byte, and no byte is fetched twice but what was on its way.
func killedInPull(t *testing.T, r *realRegistry) {
	r.chunk = 16 << 20 // more in a blob than the buffers on the way hold
	c, w := r.client()
	const name, pattern = "fleet/base:v1", "abcd"
	m := r.push(c, name, pattern, "", nil)
	restarted := make(chan struct{})
	w.when, w.then = 1<<20, func() {
		r.kill()
		go func() {
			defer close(restarted)
			select { // a try finds nobody, and another time it goes on
			case <-w.refused:
			case <-time.After(time.Minute):
				t.Error("nobody tries while the registry is gone")
			}
			r.start()
		}()
	}
	r.pull(c, name, pattern, m.Digest)
	<-restarted
	small := m.Config.Size + m.NVRAM.Size
	if w.bytes > m.Bytes()+small {
		t.Errorf("%d bytes came for an image of %d", w.bytes, m.Bytes()+small)
	}
	resumed := 0
	for _, n := range w.gets {
		resumed += n - 1
	}
	if resumed == 0 {
		t.Error("no blob was asked for twice: the kill came too late to show anything")
	}
}

// More tags than a page holds are listed in full.
func listTags(t *testing.T, r *realRegistry) {
	c, _ := r.client()
	m := r.push(c, "fleet/base:v1", "a", "", nil)
	want := []string{"v1"}
	for i := range 1010 {
		tag := fmt.Sprintf("t%04d", i)
		want = append(want, tag)
		// A tag as the registry's own files say it: 1010 pushes would take their time.
		dir := filepath.Join(r.dir, "blobs/docker/registry/v2/repositories/fleet/base/_manifests/tags", tag, "current")
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "link"), []byte(m.Digest), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	got, err := c.Tags(t.Context(), r.host+"/fleet/base")
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("%d tags; want %d", len(got), len(want))
	}
	if _, err := c.Tags(t.Context(), r.host+"/fleet/none"); cache.ClassOf(err) != cache.ClassNotFound {
		t.Errorf("of no repository: %v; want class not-found", err)
	}
}
