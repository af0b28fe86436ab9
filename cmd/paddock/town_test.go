package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/paddock-ci/paddock/cache/registrytest"
	"github.com/paddock-ci/paddock/cmd/internal/parts"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github/githubtest"
	"github.com/paddock-ci/paddock/github/githubtest/testrunner"
	"github.com/paddock-ci/paddock/image/tart"
	"github.com/paddock-ci/paddock/store/storetest"
)

// TestMain lets the test's binary play every role of the program, and the runner's: it
// is what the town's controller, agents, helpers, guests and runners are started from.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && !strings.HasPrefix(os.Args[1], "-test.") {
		if os.Args[1] != "runner" {
			main()
			return
		}
		code, err := testrunner.Run(context.Background(), os.Stdin, os.Stdout)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
		os.Exit(code)
	}
	// Stories mostly wait, so more of them run at once than there are processors, unless the
	// command line says otherwise.
	_ = flag.Set("test.parallel", "6")
	// Scripts call this binary as "paddock", which is what Main arranges; it exits.
	testscript.Main(m, map[string]func(){"paddock": main})
}

// town is a fleet of real processes: a controller and agents of this program, a real
// redis-server, and beside them the simulated GitHub and a registry in the test.
type town struct {
	t        testing.TB
	dir      string
	self     string
	config   string
	github   *githubtest.GitHub
	registry *registrytest.Registry
	redis    *storetest.Redis
	env      []string // added to the environment of what is started from now on
	control  *program
	nodes    map[string]*program
}

// openTown starts a controller and the named nodes, which have joined.
func openTown(t *testing.T, slots int, names ...string) *town {
	t.Helper()
	// Stories wait for real deadlines most of their time, and share nothing.
	t.Parallel()
	return newTown(t, fmt.Sprintf("slots: %d", slots), "", names...)
}

// newTown is openTown with a node's configuration, and with pools beside the first.
func newTown(t testing.TB, node, pools string, names ...string) *town {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// Unix sockets have short paths, which t.TempDir's are not.
	dir, err := os.MkdirTemp("", "town")
	if err != nil {
		t.Fatal(err)
	}
	tw := &town{t: t, dir: dir, self: self, registry: registrytest.New(), nodes: map[string]*program{}}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	tw.openGitHub()
	var redisURL string
	redisURL, tw.redis = storetest.StartRedis(t)
	tw.configure(redisURL, node, pools)
	tw.control = tw.start("controller", "controller")
	tw.waitReady()
	for _, name := range names {
		token := tw.run("token", "create", "--node", name)
		tw.run("node", "join", strings.TrimSpace(token), "--name", name, "--dir", filepath.Join(dir, name))
		tw.startNode(name)
	}
	return tw
}

func (tw *town) openGitHub() {
	gh, err := githubtest.New(githubtest.Config{
		Secret: []byte("hush"), Repositories: []githubtest.Repository{{Name: "acme/app"}}, Transport: parts.Trusting(),
	})
	if err != nil {
		tw.t.Fatal(err)
	}
	tw.github = gh
	ctx, stop := context.WithCancel(context.WithoutCancel(tw.t.Context()))
	done := make(chan struct{})
	go func() { defer close(done); _ = gh.Run(ctx) }()
	tw.t.Cleanup(func() { stop(); <-done })
}

// serve runs a handler on loopback until the test's processes are gone.
func (tw *town) serve(h http.Handler) string {
	s := httptest.NewServer(h)
	tw.t.Cleanup(s.Close)
	return s.URL
}

// configure writes the configuration file, as an operator would.
func (tw *town) configure(redisURL, node, pools string) {
	t := tw.t
	githubURL := tw.serve(tw.github)
	registryHost := strings.TrimPrefix(tw.serve(tw.registry), "http://")
	disk := bytes.NewReader(append(make([]byte, 1<<20), bytes.Repeat([]byte("disk"), 1<<18)...))
	if _, err := tw.registry.Push(t.Context(), "acme/mac", "1", tart.Source{
		Config: &tart.Config{Version: 1, OS: "linux", Arch: "arm64"}, NVRAM: []byte("nvram"), Disk: disk, ChunkSize: 1 << 20,
	}); err != nil {
		t.Fatal(err)
	}
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	_ = l.Close()
	tw.github.SetWebhook("https://" + address + parts.WebhookPath)
	files := map[string]string{
		"app.pem": string(tw.github.PrivateKey()), "hook": "hush\n",
		"paddock.yaml": fmt.Sprintf(`
fleet: town
listen: %[1]s
url: https://%[1]s
data: %[2]s/data
redis: %[3]s
github: {app_id: %[4]d, private_key_file: %[2]s/app.pem, webhook_secret_files: [%[2]s/hook], api: %[5]s/, sweep_every: 1s}
pools:
  - name: mac
    scopes: [acme]
    labels: [self-hosted, macOS]
    image: %[6]s/acme/mac:1
    growth: 1MiB
    runner: [%[7]s, runner]
%[8]s
images: {resolve_every: 1s}
node: {%[9]s}
`, address, tw.dir, redisURL, tw.github.AppID(), githubURL, registryHost, tw.self, strings.ReplaceAll(pools, "REGISTRY", registryHost), node),
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(tw.dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	tw.config = filepath.Join(tw.dir, "paddock.yaml")
}

// program is a running process of this binary.
type program struct {
	cmd    *exec.Cmd
	log    string
	exited chan struct{}
}

// start runs a long-lived command; its log is shown if the test fails.
func (tw *town) start(name string, args ...string) *program {
	tw.t.Helper()
	p := &program{log: filepath.Join(tw.dir, name+".log"), exited: make(chan struct{})}
	log, err := os.OpenFile(p.log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		tw.t.Fatal(err)
	}
	// Not ended by the test's context: the story says when, and Cleanup how.
	p.cmd = exec.CommandContext(context.WithoutCancel(tw.t.Context()), tw.self, append(args, "--config", tw.config)...)
	p.cmd.Env = append(os.Environ(), tw.env...)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	if err := p.cmd.Start(); err != nil {
		tw.t.Fatal(err)
	}
	_ = log.Close()
	go func() { defer close(p.exited); _ = p.cmd.Wait() }()
	tw.t.Cleanup(func() {
		p.signal(syscall.SIGINT) // a node destroys what it has
		select {
		case <-p.exited:
		case <-time.After(20 * time.Second):
			tw.t.Errorf("%s does not end", name)
			p.signal(syscall.SIGKILL)
		}
		if text, err := os.ReadFile(p.log); err == nil && tw.t.Failed() {
			tw.t.Logf("log of %s:\n%s", name, tail(string(text), 60))
		}
	})
	return p
}

func (p *program) signal(s syscall.Signal) { _ = p.cmd.Process.Signal(s) }

// kill is kill -9.
func (p *program) kill() { p.signal(syscall.SIGKILL); <-p.exited }

func (tw *town) startNode(name string) {
	tw.t.Helper()
	tw.nodes[name] = tw.start(name, "node", "--name", name, "--dir", filepath.Join(tw.dir, name))
}

func tail(text string, lines int) string {
	all := strings.Split(text, "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// run runs a short command and returns its standard output.
func (tw *town) run(args ...string) string {
	tw.t.Helper()
	var out, errOut bytes.Buffer
	cmd := exec.CommandContext(tw.t.Context(), tw.self, append(args, "--config", tw.config)...)
	cmd.Env = append(os.Environ(), tw.env...)
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		tw.t.Fatalf("paddock %s: %v: %s", strings.Join(args[:2], " "), err, errOut.String())
	}
	return out.String()
}

// waitReady waits until the controller has left its token for the command line and
// answers it.
func (tw *town) waitReady() {
	tw.t.Helper()
	tw.eventually(30*time.Second, func() error {
		e, err := parts.ReadEndpoint(filepath.Join(tw.dir, "data", parts.CLIFile))
		if err != nil {
			return err
		}
		client, err := e.Client()
		if err != nil {
			return err
		}
		_, err = client.Nodes(tw.t.Context())
		return err
	})
}

// eventually repeats a check until it is content.
func (tw *town) eventually(within time.Duration, check func() error) {
	tw.t.Helper()
	ctx, cancel := context.WithTimeout(tw.t.Context(), within)
	defer cancel()
	again := time.NewTicker(50 * time.Millisecond)
	defer again.Stop()
	for {
		err := check()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			tw.t.Fatalf("not within %s: %v", within, err)
		case <-again.C:
		}
	}
}

// queue queues jobs of one run.
func (tw *town) queue(n int, seconds float64) []fleet.JobID {
	tw.t.Helper()
	run := githubtest.Run{Repository: "acme/app", Jobs: []githubtest.JobSpec{{
		Name: "build", Labels: []string{"self-hosted", "macOS"}, Steps: []string{"echo hello from the guest"}, Seconds: seconds, Matrix: n,
	}}}
	_, ids, err := tw.github.QueueRun(run)
	if err != nil {
		tw.t.Fatal(err)
	}
	return ids
}

// done counts jobs that succeeded.
func (tw *town) done() int {
	n := 0
	for _, job := range tw.github.Jobs() {
		if job.Status == fleet.JobCompleted && job.Conclusion == "success" {
			n++
		}
	}
	return n
}

// waitDone waits until at least so many jobs have succeeded.
func (tw *town) waitDone(want int, within time.Duration) {
	tw.t.Helper()
	tw.eventually(within, func() error {
		if n := tw.done(); n < want {
			return fmt.Errorf("%d of %d jobs have succeeded", n, want)
		}
		return nil
	})
}

// cleanHouse asserts what holds after every story: no job ran twice, every request
// was as GitHub describes it, and nothing is left: no runner at GitHub, no clone, no
// helper or guest process.
func (tw *town) cleanHouse() {
	tw.t.Helper()
	for _, job := range tw.github.Jobs() {
		if job.Starts > 1 {
			tw.t.Errorf("job %d was started %d times", job.ID, job.Starts)
		}
	}
	for _, v := range tw.github.Violations() {
		tw.t.Error("against GitHub's API description:", v)
	}
	tw.eventually(60*time.Second, func() error {
		var left []error
		if runners := tw.github.Runners(); len(runners) > 0 {
			left = append(left, fmt.Errorf("%d runners at GitHub, the first %+v", len(runners), runners[0]))
		}
		for name := range tw.nodes {
			clones, err := filepath.Glob(filepath.Join(tw.dir, name, "clones", "*"))
			if err != nil || len(clones) > 0 {
				left = append(left, fmt.Errorf("clones %v", clones))
			}
		}
		if p := tw.machines(); len(p) > 0 {
			left = append(left, fmt.Errorf("processes %v", p))
		}
		return errors.Join(left...)
	})
}

// machines lists the processes of this town's VMs: guests and runners work in its
// directory, helpers write there what goes wrong, and what has left all that still has
// the mark of its machine in its environment.
func (tw *town) machines() []string {
	var found []string
	all, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range all {
		cwd, _ := os.Readlink(filepath.Join(p, "cwd"))
		stderr, _ := os.Readlink(filepath.Join(p, "fd/2"))
		command, _ := os.ReadFile(filepath.Join(p, "cmdline"))
		environ, _ := os.ReadFile(filepath.Join(p, "environ"))
		marked := strings.Contains(string(environ), "PADDOCK_MACHINE="+tw.dir+"/")
		helper := strings.HasPrefix(stderr, tw.dir+"/") && strings.Contains(string(command), parts.HelperRole)
		if helper || marked || strings.HasPrefix(cwd, tw.dir+"/") {
			found = append(found, strings.ReplaceAll(string(command), "\x00", " "))
		}
	}
	return found
}
