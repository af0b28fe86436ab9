package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/term"

	"github.com/paddock-ci/paddock/access"
	"github.com/paddock-ci/paddock/cache/registrytest"
	"github.com/paddock-ci/paddock/cmd/internal/config"
	"github.com/paddock-ci/paddock/cmd/internal/parts"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github/githubtest"
)

const (
	nodes = 3
	slots = 2
	jobs  = 12

	withdrawal = 15 * time.Second // after an interrupt; a teardown takes a second or two
)

// demo is one showing.
type demo struct {
	out, errOut io.Writer
	json        bool
	verbose     bool
	kind        *kind

	dir      string
	github   *githubtest.GitHub
	registry *registrytest.Registry
	control  *parts.Control
}

// play sets the scene, runs the jobs, tears everything down and looks at what is left.
// The result is nil only if the scene could not be set.
func (d *demo) play(ctx context.Context) (*result, error) {
	dir, err := os.MkdirTemp("", "paddock-demo-")
	if err != nil {
		return nil, err
	}
	d.dir = dir
	defer func() { _ = os.RemoveAll(dir) }()

	// What GitHub and the registry do goes on while the fleet is torn down, as in life.
	outside, stopOutside := context.WithCancel(context.WithoutCancel(ctx))
	world, outside := errgroup.WithContext(outside)
	defer func() { stopOutside(); _ = world.Wait() }()
	if err := d.openWorld(outside, world); err != nil {
		return nil, fmt.Errorf("set the scene: %w", err)
	}
	r, err := d.playInside(ctx, outside)
	if r == nil && ctx.Err() != nil {
		r = &result{Jobs: jobs} // interrupted before the first job
	}
	if r != nil {
		r.measure()
		d.inspect(outside, r)
	}
	if ctx.Err() != nil {
		return r, r.interrupted(err)
	}
	return r, err
}

// playInside opens the fleet and runs the jobs. When it returns, nodes have destroyed
// what they had, and then the controller has stopped.
func (d *demo) playInside(ctx, outside context.Context) (r *result, err error) {
	above, stopControl := context.WithCancel(outside)
	control, above := errgroup.WithContext(above)
	defer func() { stopControl(); err = errors.Join(err, control.Wait()) }()
	// Not ended by an interrupt: the nodes are stopped in their turn.
	below, stopNodes := context.WithCancel(outside)
	nodes, below := errgroup.WithContext(below)
	defer func() { stopNodes(); err = errors.Join(err, nodes.Wait()) }()

	if err := d.openControl(above, control); err != nil {
		return nil, fmt.Errorf("start the controller: %w", err)
	}
	if err := d.openNodes(below, nodes); err != nil {
		return nil, fmt.Errorf("start the nodes: %w", err)
	}
	watching, cancel := context.WithTimeout(ctx, d.kind.timeout)
	defer cancel()
	defer context.AfterFunc(below, cancel)() // a node that fails ends the showing
	if r, err = d.perform(watching); err == nil {
		err = d.settle(watching, r)
	}
	if ctx.Err() != nil {
		err = d.withdraw(outside, r, func() error { stopNodes(); return nodes.Wait() })
	}
	return r, err
}

// withdraw ends an interrupted showing: nothing new is placed, the jobs are cancelled, the
// nodes destroy their VMs and say so, and the controller runs on until it has taken their runners from
// GitHub, for withdrawal at most. A second interrupt ends the waiting at once.
func (d *demo) withdraw(ctx context.Context, r *result, stopNodes func() error) error {
	ctx, cancel := context.WithTimeout(ctx, withdrawal)
	defer cancel()
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	client, err := d.control.Client(access.Operator)
	if err != nil {
		return errors.Join(err, stopNodes())
	}
	for i := range nodes {
		_, cordoned := client.Cordon(ctx, nodeName(i))
		err = errors.Join(err, cordoned)
	}
	err = errors.Join(err, d.cancelJobs(ctx))
	return errors.Join(err, stopNodes(), d.settle(ctx, r))
}

// cancelJobs cancels at GitHub what has not ended, and waits until it has: GitHub does
// not let go of a runner whose job is under way.
func (d *demo) cancelJobs(ctx context.Context) error {
	for _, job := range d.github.Jobs() {
		if job.Status != fleet.JobCompleted {
			_ = d.github.Cancel(job.ID) // refused if it has just ended by itself
		}
	}
	if err := d.github.WaitIdle(ctx); err != nil {
		return fmt.Errorf("wait for cancelled jobs to end: %w", err)
	}
	return nil
}

func nodeName(i int) fleet.NodeID { return fleet.NodeID(fmt.Sprintf("mac-%d", i+1)) }

// openWorld starts what is not ours: GitHub and a registry with two images.
func (d *demo) openWorld(ctx context.Context, world *errgroup.Group) error {
	secret := []byte("a secret of the demo")
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	gh, err := githubtest.New(githubtest.Config{
		Secret: secret, URL: d.kind.outside(l.Addr()),
		Repositories: []githubtest.Repository{{Name: "acme/app"}, {Name: "acme/site"}, {Name: "acme/tools"}},
		Transport:    parts.Trusting(),
	})
	if err != nil {
		return errors.Join(err, l.Close())
	}
	d.github, d.registry = gh, registrytest.New()
	githubURL := serveOn(ctx, world, l, gh)
	registryURL, err := serve(ctx, world, d.registry)
	if err != nil {
		return err
	}
	world.Go(func() error { return gh.Run(ctx) })
	return d.prepare(ctx, githubURL, registryURL, secret)
}

// serve runs a handler on a free loopback port until ctx ends and returns its URL.
func serve(ctx context.Context, group *errgroup.Group, h http.Handler) (string, error) {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return serveOn(ctx, group, l, h), nil
}

func serveOn(ctx context.Context, group *errgroup.Group, l net.Listener, h http.Handler) (url string) {
	server := &http.Server{Handler: h, ReadHeaderTimeout: 10 * time.Second}
	group.Go(func() error {
		if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})
	group.Go(func() error { <-ctx.Done(); return server.Close() })
	return "http://" + l.Addr().String()
}

// prepare pushes the images and writes the configuration, as an operator would.
func (d *demo) prepare(ctx context.Context, githubURL, registryURL string, secret []byte) error {
	key, hook := filepath.Join(d.dir, "app.pem"), filepath.Join(d.dir, "webhook.secret")
	err := errors.Join(os.WriteFile(key, d.github.PrivateKey(), 0o600), os.WriteFile(hook, secret, 0o600))
	if err != nil {
		return err
	}
	c := &config.Config{
		Fleet: "demo", Data: filepath.Join(d.dir, "controller"), Listen: "127.0.0.1:0",
		GitHub: config.GitHub{AppID: d.github.AppID(), PrivateKeyFile: key, WebhookSecretFiles: []string{hook}, API: githubURL + "/"},
	}
	pool, err := d.kind.prepare(ctx)
	if err != nil {
		return err
	}
	for i, name := range imageNames {
		ref, err := d.pushImage(ctx, registryURL, name, uint64(i))
		if err != nil {
			return fmt.Errorf("push image %s: %w", name, err)
		}
		pool.Name, pool.Labels, pool.Image = name, []string{"self-hosted", "macOS", name}, ref
		c.Pools = append(c.Pools, pool)
	}
	d.control, err = parts.NewControl(parts.ControlConfig{Config: c, Log: d.log("controller")})
	return err
}

func (d *demo) log(part string) *slog.Logger {
	if !d.verbose {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(slog.NewTextHandler(d.errOut, nil)).With("part", part)
}

// openControl starts the controller, with GitHub's webhooks pointed at it.
func (d *demo) openControl(ctx context.Context, running *errgroup.Group) error {
	if err := d.control.Open(ctx); err != nil {
		return err
	}
	running.Go(func() error { return d.control.Run(ctx) })
	d.github.SetWebhook(d.control.URL() + parts.WebhookPath)
	return nil
}

// openNodes starts the nodes, which join with one-time tokens.
func (d *demo) openNodes(ctx context.Context, running *errgroup.Group) error {
	for i := range nodes {
		name := string(nodeName(i))
		token, err := d.control.JoinToken(ctx, nodeName(i))
		if err != nil {
			return err
		}
		c := config.Node{Name: name, Slots: slots, Driver: d.kind.driver, QEMU: d.kind.qemu, Dir: filepath.Join(d.dir, name), Streams: 4}
		if err := parts.Join(ctx, c, token, d.control.URL()); err != nil {
			return err
		}
		self, err := os.Executable()
		if err != nil {
			return err
		}
		node, err := parts.NewNode(ctx, parts.NodeConfig{Node: c, Self: []string{self}, Log: d.log(name)})
		if err != nil {
			return err
		}
		running.Go(func() error { return node.Run(ctx) })
	}
	return nil
}

// workflows are three runs of four jobs, on both images.
func workflows() []githubtest.Run {
	run := func(repository, workflow string, names ...string) githubtest.Run {
		r := githubtest.Run{Repository: repository, Workflow: workflow}
		for i, name := range names {
			r.Jobs = append(r.Jobs, githubtest.JobSpec{
				Name:   workflow + "/" + name,
				Labels: []string{"self-hosted", "macOS", imageNames[i%len(imageNames)]},
				Steps:  []string{"echo building " + name},
				// Long enough that six slots are not free again at once: some jobs wait.
				Seconds: 0.5 + 0.25*float64(i),
			})
		}
		return r
	}
	return []githubtest.Run{
		run("acme/app", "build", "debug", "release", "archive", "symbols"),
		run("acme/site", "test", "unit", "ui", "snapshot", "e2e"),
		run("acme/tools", "lint", "swift", "format", "docs", "licences"),
	}
}

// perform queues the jobs and follows them to their end, drawing the table as it goes.
func (d *demo) perform(ctx context.Context) (*result, error) {
	r := &result{Jobs: jobs}
	for _, run := range workflows() {
		if _, _, err := d.github.QueueRun(run); err != nil {
			return r, err
		}
	}
	images := map[string]string{}
	for _, name := range imageNames {
		images[name] = name
	}
	b := newBoard(d.control.Store(), images)
	live := !d.json && isTerminal(d.out)
	frame := time.NewTicker(100 * time.Millisecond)
	defer frame.Stop()
	drawn := 0
	for {
		rows, err := b.look(ctx, time.Now())
		if err != nil {
			return r, err
		}
		r.Rows = rows
		if live {
			if drawn > 0 {
				_, _ = fmt.Fprintf(d.out, "\x1b[%dA", drawn)
			}
			drawn = draw(d.out, rows, clearRight+"\n")
		}
		if r.seen() == jobs {
			if !live && !d.json {
				draw(d.out, rows, "\n")
			}
			return r, nil
		}
		select {
		case <-ctx.Done():
			return r, fmt.Errorf("%d of %d jobs are done: %w", r.seen(), jobs, ctx.Err())
		case <-frame.C:
		}
	}
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}
