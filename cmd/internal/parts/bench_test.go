package parts

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/cache/registrytest"
	"github.com/paddock-ci/paddock/cmd/internal/config"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github/githubtest"
	"github.com/paddock-ci/paddock/github/githubtest/testrunner"
	"github.com/paddock-ci/paddock/image/tart"
	"github.com/paddock-ci/paddock/store/storetest"
)

// The benchmarks of this package measure a whole Paddock: a Control, a Node with machines
// of the process driver, the simulated GitHub, which posts its webhooks over HTTPS on
// loopback, and a real redis-server where it is named. All of them share the machine.
// What runs as processes of its own is the product's binary, built for the purpose: a
// test's carries the simulated GitHub, and takes twice as long to start.

// runnerRole is the role of this test's binary as a runner.
const runnerRole = "runner"

// TestMain lets the test's binary play the runner.
func TestMain(m *testing.M) {
	if len(os.Args) < 2 || os.Args[1] != runnerRole {
		code := m.Run()
		_ = os.RemoveAll(programDir)
		os.Exit(code)
	}
	if _, err := testrunner.Run(context.Background(), os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// programDir holds the built binary; removed at the end.
var programDir string

// program is the product's binary.
var program = sync.OnceValues(func() (_ string, err error) {
	if programDir, err = os.MkdirTemp("", "paddock-program-"); err != nil {
		return "", err
	}
	path := filepath.Join(programDir, "paddock")
	out, err := exec.Command("go", "build", "-buildvcs=false", "-o", path, "github.com/paddock-ci/paddock/cmd/paddock").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("build the program: %w: %s", err, out)
	}
	return path, nil
})

// runnerScript is a runner as GitHub's is: a shell script. Its first act says when it
// has started, by the name of a file: seconds and microseconds of Unix time.
const runnerScript = `#!/bin/bash
: > "$(dirname "$0")/stamps/$EPOCHREALTIME"
exec %s ` + runnerRole + "\n"

// poster sends webhooks and notes when each job's "queued" was begun to be sent to
// Paddock's port and when Paddock had answered it.
type poster struct {
	to http.RoundTripper

	mu   sync.Mutex
	last posted
}

type posted struct{ sent, answered time.Time }

func (p *poster) RoundTrip(r *http.Request) (*http.Response, error) {
	body, err := r.GetBody()
	if err != nil {
		return nil, err
	}
	defer func() { _ = body.Close() }()
	head := make([]byte, 40) // {"action":"queued", …
	if _, err := body.Read(head); err != nil {
		return nil, err
	}
	sent := time.Now()
	answer, err := p.to.RoundTrip(r)
	if bytes.Contains(head, []byte(`"queued"`)) {
		p.mu.Lock()
		p.last = posted{sent, time.Now()}
		p.mu.Unlock()
	}
	return answer, err
}

func (p *poster) queued() posted {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.last
}

// stage is what the benchmarks play on.
type stage struct {
	b      *testing.B
	dir    string // short, since unix sockets are made in it
	self   string // the product's binary
	github *githubtest.GitHub
	poster *poster
	config *config.Config
}

// newStage makes a GitHub, a registry with one image, and a configuration.
func newStage(b *testing.B, redis bool, minIdle int, weather githubtest.Faults) *stage {
	b.Helper()
	dir, err := os.MkdirTemp("", "bench")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = os.RemoveAll(dir) })
	s := &stage{b: b, dir: dir, poster: &poster{to: Trusting()}}
	if s.self, err = program(); err != nil {
		b.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	script := filepath.Join(dir, "run.sh")
	if err := os.WriteFile(script, fmt.Appendf(nil, runnerScript, self), 0o700); err != nil {
		b.Fatal(err)
	}
	s.github, err = githubtest.New(githubtest.Config{
		Secret: []byte("hush"), Repositories: []githubtest.Repository{{Name: "acme/app"}}, Transport: s.poster, Faults: weather,
		Limit: 1_000_000, // no benchmark is about GitHub's
	})
	if err != nil {
		b.Fatal(err)
	}
	s.run(s.github.Run)
	githubURL, registry := s.serve(s.github), registrytest.New()
	registryHost := strings.TrimPrefix(s.serve(registry), "http://")
	disk := bytes.NewReader(append(make([]byte, 1<<20), bytes.Repeat([]byte("disk"), 1<<18)...))
	if _, err := registry.Push(b.Context(), "acme/mac", "1", tart.Source{
		Config: &tart.Config{Version: 1, OS: "linux", Arch: "arm64"}, NVRAM: []byte("nvram"), Disk: disk, ChunkSize: 1 << 20,
	}); err != nil {
		b.Fatal(err)
	}
	for name, content := range map[string][]byte{"app.pem": s.github.PrivateKey(), "hook": []byte("hush\n")} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			b.Fatal(err)
		}
	}
	if err := os.Mkdir(s.stamps(), 0o700); err != nil {
		b.Fatal(err)
	}
	s.config = &config.Config{
		Fleet: "bench", Data: filepath.Join(dir, "data"), Listen: "127.0.0.1:0",
		GitHub: config.GitHub{
			AppID: s.github.AppID(), PrivateKeyFile: filepath.Join(dir, "app.pem"),
			WebhookSecretFiles: []string{filepath.Join(dir, "hook")}, API: githubURL + "/",
		},
		Pools: []config.Pool{{
			Name: "mac", Scopes: []string{"acme"}, Labels: []string{"self-hosted", "macOS"}, Image: registryHost + "/acme/mac:1",
			Bootstrap: string(fleet.BootstrapAgent), Runner: []string{script}, Growth: 1 << 20, MinIdle: minIdle,
		}},
	}
	if redis {
		s.config.Redis, _ = storetest.StartRedis(b)
	}
	return s
}

// run runs a part until the benchmark has ended.
func (s *stage) run(part func(context.Context) error) {
	ctx, stop := context.WithCancel(context.WithoutCancel(s.b.Context()))
	done := make(chan struct{})
	go func() { defer close(done); _ = part(ctx) }()
	s.b.Cleanup(func() { stop(); <-done })
}

func (s *stage) serve(h http.Handler) string {
	server := httptest.NewServer(h)
	s.b.Cleanup(server.Close)
	return server.URL
}

// control starts a Control in this process, to which GitHub posts its webhooks.
func (s *stage) control() *Control {
	s.b.Helper()
	c, err := NewControl(ControlConfig{Config: s.config})
	if err != nil {
		s.b.Fatal(err)
	}
	if err := c.Open(s.b.Context()); err != nil {
		s.b.Fatal(err)
	}
	s.run(c.Run)
	s.github.SetWebhook(c.URL() + WebhookPath)
	return c
}

// node joins a node with two slots and starts it.
func (s *stage) node(c *Control, name string) {
	s.b.Helper()
	ctx := s.b.Context()
	token, err := c.JoinToken(ctx, fleet.NodeID(name))
	if err != nil {
		s.b.Fatal(err)
	}
	n := config.Node{Name: name, Slots: 2, Driver: "process", Dir: filepath.Join(s.dir, name), Streams: 4}
	if err := Join(ctx, n, token, c.URL()); err != nil {
		s.b.Fatal(err)
	}
	node, err := NewNode(ctx, NodeConfig{Node: n, Self: []string{s.self}})
	if err != nil {
		s.b.Fatal(err)
	}
	s.run(node.Run)
}

// queue queues one run of n jobs that end at once.
func (s *stage) queue(n int) []fleet.JobID {
	s.b.Helper()
	_, ids, err := s.github.QueueRun(githubtest.Run{Repository: "acme/app", Jobs: []githubtest.JobSpec{{
		Name: "build", Labels: []string{"self-hosted", "macOS"}, Steps: []string{"true"}, Matrix: n,
	}}})
	if err != nil {
		s.b.Fatal(err)
	}
	return ids
}

// stamps is the directory in which runners say when their process had started.
func (s *stage) stamps() string { return filepath.Join(s.dir, "stamps") }

// stamp takes the one runner's stamp.
func (s *stage) stamp() time.Time {
	s.b.Helper()
	entries, err := os.ReadDir(s.stamps())
	if err != nil || len(entries) != 1 {
		s.b.Fatalf("%d runners have started, want 1 (%v)", len(entries), err)
	}
	// Seconds and six digits, with a point or, in some languages, a comma between.
	digits := strings.NewReplacer(".", "", ",", "").Replace(entries[0].Name())
	micros, err := strconv.ParseInt(digits, 10, 64)
	if err != nil {
		s.b.Fatal(err)
	}
	if err := os.Remove(filepath.Join(s.stamps(), entries[0].Name())); err != nil {
		s.b.Fatal(err)
	}
	return time.UnixMicro(micros)
}

// until waits until a condition holds, looking every few milliseconds.
func (s *stage) until(what string, within time.Duration, holds func() bool) {
	s.b.Helper()
	ctx, cancel := context.WithTimeout(s.b.Context(), within)
	defer cancel()
	again := time.NewTicker(5 * time.Millisecond)
	defer again.Stop()
	for !holds() {
		select {
		case <-ctx.Done():
			s.b.Fatalf("not within %s: %s", within, what)
		case <-again.C:
		}
	}
}

// spread reports a sample's median and 99th percentile.
func spread(b *testing.B, sample []time.Duration) {
	b.Helper()
	b.ReportMetric(quantile(sample, 50), "p50-ms")
	b.ReportMetric(quantile(sample, 99), "p99-ms")
}

// quantile is a percentile of a sample in milliseconds.
func quantile(sample []time.Duration, percent int) float64 {
	slices.Sort(sample)
	return float64(sample[len(sample)*percent/100].Microseconds()) / 1000
}
