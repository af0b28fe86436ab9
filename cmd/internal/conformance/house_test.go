package conformance

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/cache/registrytest"
	"github.com/paddock-ci/paddock/cmd/internal/config"
	"github.com/paddock-ci/paddock/cmd/internal/parts"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github"
	"github.com/paddock-ci/paddock/github/githubtest"
	"github.com/paddock-ci/paddock/github/githubtest/testrunner"
	"github.com/paddock-ci/paddock/image/tart"
)

// The whole of Paddock in one process: the simulated GitHub and a registry over real
// HTTP, a Control on the embedded store (or a real Redis), and Nodes whose machines are
// processes of this binary. Webhooks come over TLS.

// The roles of the test's binary besides those of the product.
const (
	runnerRole = "runner"       // runs one job, as the real runner does
	muteRole   = "mute-runner"  // the same, but its output says nothing, so that the guest cannot see a job begin
	gatedRole  = "gated-helper" // gated-helper FILE vm-helper: is no helper before FILE exists
)

func TestMain(m *testing.M) {
	if len(os.Args) < 2 || strings.HasPrefix(os.Args[1], "-test.") {
		// Scenarios mostly wait, so more of them run at once than there are processors, unless
		// the command line says otherwise.
		_ = flag.Set("test.parallel", "6")
		os.Exit(m.Run())
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	code, err := play(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = max(code, 1)
	}
	os.Exit(code)
}

// play is the binary in one of its roles.
func play(ctx context.Context, args []string) (code int, err error) {
	switch args[0] {
	case parts.HelperRole:
		return 0, parts.Helper(ctx, args[1:], os.Stdin)
	case parts.GuestRole:
		return 0, parts.Guest(ctx)
	case runnerRole:
		return testrunner.Run(ctx, os.Stdin, os.Stdout)
	case muteRole:
		return testrunner.Run(ctx, os.Stdin, io.Discard)
	case gatedRole:
		for again := time.NewTicker(5 * time.Millisecond); ; {
			if _, err := os.Stat(args[1]); err == nil {
				return play(ctx, args[2:])
			}
			select {
			case <-again.C:
			case <-ctx.Done():
				return 1, ctx.Err()
			}
		}
	}
	return 1, fmt.Errorf("no role %q", args[0])
}

// patience bounds every wait: a scenario takes a second or two, and ten times that on a
// machine with other work.
const patience = time.Minute

// plan is how a house differs from the usual one: one node, mac-1, with two slots, and
// one pool for [self-hosted, macOS] of acme.
type plan struct {
	nodes  []string // nil: mac-1
	none   bool     // no node at all
	slots  int      // of each node; 0: 2
	redis  string   // URL; "": the embedded store
	github githubtest.Config
	// sweep of the delivery log; 0: every hour, so that it mends nothing in the test.
	sweep     time.Duration
	ghosts    time.Duration // between looks for ghosts; 0: the product's 5 min
	deadlines config.Deadlines
	pool      func(*config.Pool) // changes the pool; nil: as it is
	self      []string           // the nodes' own argv; nil: this binary
	// transport carries the first Control's calls of GitHub; nil: a plain one.
	transport http.RoundTripper
}

// house is a running Paddock with its world.
type house struct {
	t        *testing.T
	plan     plan
	dir      string
	log      *record
	github   *githubtest.GitHub
	api      string // URL of the simulated GitHub
	registry *registrytest.Registry
	config   *config.Config
	control  *running[*parts.Control]
	nodes    map[string]*running[*parts.Node]
}

// running is a part in its goroutine.
type running[T any] struct {
	part T
	stop context.CancelFunc
	done chan struct{}
	err  error // once done is closed
	keep bool  // of a node: its VMs live on when it is stopped
}

type runner interface{ Run(context.Context) error }

func start[T runner](ctx context.Context, part T) *running[T] {
	ctx, stop := context.WithCancel(context.WithoutCancel(ctx))
	r := &running[T]{part: part, stop: stop, done: make(chan struct{})}
	go func() { defer close(r.done); r.err = part.Run(ctx) }()
	return r
}

// end stops a part and waits until it has ended.
func (r *running[T]) end(t *testing.T) {
	t.Helper()
	r.stop()
	select {
	case <-r.done:
		if r.err != nil {
			t.Errorf("%T: %v", r.part, r.err)
		}
	case <-time.After(patience):
		t.Fatalf("%T does not end", r.part)
	}
}

// open opens a house, which runs until the test ends.
func open(t *testing.T, p plan) *house {
	t.Helper()
	t.Parallel()
	// Unix sockets have short paths, which t.TempDir's are not.
	dir, err := os.MkdirTemp("", "house")
	if err != nil {
		t.Fatal(err)
	}
	h := &house{t: t, plan: p, dir: dir, log: &record{}, registry: registrytest.New(), nodes: map[string]*running[*parts.Node]{}}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the last of the log:\n%s", h.log.tail(80))
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	h.openGitHub()
	h.configure()
	h.startControl(p.transport)
	t.Cleanup(func() { h.control.end(t) })
	if p.sweep == 0 {
		// The first sweep follows the start; what is lost after it stays lost.
		h.until(func() error {
			if h.requests("/app/hook/deliveries") == 0 {
				return errors.New("the delivery log is not swept")
			}
			return nil
		})
	}
	if p.nodes == nil && !p.none {
		p.nodes = []string{"mac-1"}
	}
	for _, name := range p.nodes {
		h.join(name)
		h.startNode(name)
	}
	return h
}

func (h *house) openGitHub() {
	c := h.plan.github
	c.Secret, c.Transport = []byte(webhookSecret), parts.Trusting()
	if c.Repositories == nil {
		c.Repositories = []githubtest.Repository{{Name: "acme/app"}}
	}
	gh, err := githubtest.New(c)
	if err != nil {
		h.t.Fatal(err)
	}
	h.github = gh
	ctx, stop := context.WithCancel(context.WithoutCancel(h.t.Context()))
	done := make(chan struct{})
	go func() { defer close(done); _ = gh.Run(ctx) }() // its error is ctx's
	h.t.Cleanup(func() { stop(); <-done })
	h.api = h.serve(gh)
}

// serve runs a handler on loopback until the house is empty.
func (h *house) serve(handler http.Handler) string {
	s := httptest.NewServer(handler)
	h.t.Cleanup(s.Close)
	return s.URL
}

// webhookSecret signs the deliveries.
const webhookSecret = "the-secret-of-the-webhooks"

// configure pushes the image and makes the configuration, as an operator would.
func (h *house) configure() {
	t := h.t
	host := strings.TrimPrefix(h.serve(h.registry), "http://")
	disk := bytes.NewReader(append(make([]byte, 1<<20), bytes.Repeat([]byte("disk"), 1<<18)...))
	if _, err := h.registry.Push(t.Context(), "acme/mac", "1", tart.Source{
		Config: &tart.Config{Version: 1, OS: "linux", Arch: "arm64"}, NVRAM: []byte("nvram"), Disk: disk, ChunkSize: 1 << 20,
	}); err != nil {
		t.Fatal(err)
	}
	key, hook := filepath.Join(h.dir, "app.pem"), filepath.Join(h.dir, "hook")
	if err := errors.Join(os.WriteFile(key, h.github.PrivateKey(), 0o600), os.WriteFile(hook, []byte(webhookSecret), 0o600)); err != nil {
		t.Fatal(err)
	}
	sweep := h.plan.sweep
	if sweep == 0 {
		sweep = time.Hour
	}
	pool := config.Pool{
		Name: "mac", Scopes: []string{"acme"}, Labels: []string{"self-hosted", "macOS"},
		Image: host + "/acme/mac:1", Growth: 1 << 20, Bootstrap: string(fleet.BootstrapAgent),
		Runner: []string{self(t), runnerRole}, Deadlines: h.plan.deadlines,
	}
	if h.plan.pool != nil {
		h.plan.pool(&pool)
	}
	h.config = &config.Config{
		Fleet: "house", Listen: "127.0.0.1:0", Data: filepath.Join(h.dir, "data"), Redis: h.plan.redis,
		GitHub: config.GitHub{
			AppID: h.github.AppID(), PrivateKeyFile: key, WebhookSecretFiles: []string{hook}, API: h.api + "/",
			SweepEvery: config.Duration(sweep),
		},
		Pools: []config.Pool{pool},
	}
}

func self(t *testing.T) string {
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// startControl starts a Control, after the first at the first's address.
func (h *house) startControl(transport http.RoundTripper) {
	h.t.Helper()
	h.control = h.another(transport)
	h.config.Listen = strings.TrimPrefix(h.control.part.URL(), "https://")
	h.github.SetWebhook(h.control.part.URL() + parts.WebhookPath)
}

// another starts a Control beside those that run.
func (h *house) another(transport http.RoundTripper) *running[*parts.Control] {
	h.t.Helper()
	control, err := parts.NewControl(parts.ControlConfig{
		Config: h.config, Version: "test", Log: h.log.logger("control"), Transport: transport,
		GhostsEvery: h.plan.ghosts, WritesPerMinute: -1,
	})
	if err != nil {
		h.t.Fatal(err)
	}
	if err := control.Open(h.t.Context()); err != nil {
		h.t.Fatal(err)
	}
	return start(h.t.Context(), control)
}

// node is the configuration of a node.
func (h *house) node(name string) config.Node {
	slots := h.plan.slots
	if slots == 0 {
		slots = 2
	}
	return config.Node{Name: name, Slots: slots, Driver: "process", Dir: filepath.Join(h.dir, name), Streams: 4}
}

// join lets a node join with a one-time token.
func (h *house) join(name string) {
	h.t.Helper()
	token, err := h.control.part.JoinToken(h.t.Context(), fleet.NodeID(name))
	if err != nil {
		h.t.Fatal(err)
	}
	if err := parts.Join(h.t.Context(), h.node(name), token, h.control.part.URL()); err != nil {
		h.t.Fatal(err)
	}
}

// startNode starts a node that has joined; it is stopped with the test at the latest,
// and destroys its VMs then.
func (h *house) startNode(name string) {
	h.t.Helper()
	argv := h.plan.self
	if argv == nil {
		argv = []string{self(h.t)}
	}
	var r *running[*parts.Node]
	node, err := parts.NewNode(h.t.Context(), parts.NodeConfig{
		Node: h.node(name), Self: argv, Version: "test", Log: h.log.logger(name), Keep: func() bool { return r.keep },
	})
	if err != nil {
		h.t.Fatal(err)
	}
	r = start(h.t.Context(), node)
	h.nodes[name] = r
	h.t.Cleanup(func() { r.end(h.t) })
}

// client calls the simulated GitHub as the App, for what the test itself does there.
func (h *house) client() *github.Client {
	h.t.Helper()
	c, err := github.New(github.Config{AppID: h.github.AppID(), PrivateKey: h.github.PrivateKey(), BaseURL: h.api, WritesPerMinute: -1})
	if err != nil {
		h.t.Fatal(err)
	}
	return c
}

// record keeps what all parts log, at debug.
type record struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (r *record) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.text.Write(p)
}

func (r *record) logger(part string) *slog.Logger {
	return slog.New(slog.NewTextHandler(r, &slog.HandlerOptions{Level: slog.LevelDebug})).With("part", part)
}

func (r *record) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.text.String()
}

func (r *record) tail(lines int) string {
	all := strings.Split(r.String(), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
