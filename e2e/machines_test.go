package e2e

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
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

	"github.com/paddock-ci/paddock/cache/registrytest"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github/githubtest"
	"github.com/paddock-ci/paddock/vm/qemu/qemutest"
)

// stable is a fleet of real machines: a controller and agents as processes of the built
// program, whose VMs are booted by QEMU from an image of Debian's packages, beside the
// simulated GitHub, a registry, and a server with the runner that guests are given.
type stable struct {
	t        *testing.T
	dir      string
	program  string
	config   string // path of paddock.yaml
	github   *githubtest.GitHub
	api      string // its URL, as this host reaches it
	registry *registrytest.Registry
	nodes    map[string]*process
	env      []string // added to the environment of what is started from now on
}

// pool is how a stable's one pool differs from test to test.
type pool struct {
	guest qemutest.Guest
	yaml  string // further keys of the pool, one to a line
}

// openStable starts a controller with one pool and two nodes with one slot each.
func openStable(t *testing.T, p pool) *stable {
	t.Helper()
	s := newStable(t)
	s.open(1, fmt.Sprintf(`
  - name: linux
    scopes: [acme]
    labels: [self-hosted, linux]
    image: %s
    cpu: 1
    growth: 1MiB
%s
`, s.push("acme/linux", p.guest), p.yaml), "mac-1", "mac-2")
	return s
}

// newStable has all but Paddock itself.
func newStable(t *testing.T) *stable {
	t.Helper()
	t.Parallel()                        // they share nothing, and wait for jobs most of their time
	dir, err := os.MkdirTemp("", "e2e") // short: unix sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	s := &stable{t: t, dir: dir, program: build(t, "..", "./cmd/paddock"), registry: registrytest.New(), nodes: map[string]*process{}}
	s.openGitHub()
	return s
}

// open starts a controller with the pools, a list in YAML, and nodes with some slots each.
func (s *stable) open(slots int, pools string, nodes ...string) {
	t := s.t
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	_ = l.Close()
	s.github.SetWebhook("https://" + address + "/webhook")
	s.write("app.pem", string(s.github.PrivateKey()))
	s.write("hook", "hush")
	s.config = s.write("paddock.yaml", fmt.Sprintf(`
fleet: e2e
listen: %[1]s
url: https://%[1]s
data: %[2]s/data
github: {app_id: %[3]d, private_key_file: %[2]s/app.pem, webhook_secret_files: [%[2]s/hook], api: %[4]s/, sweep_every: 2s}
node: {driver: qemu, slots: %[5]d}
pools:%[6]s
`, address, s.dir, s.github.AppID(), s.api, slots, pools))
	s.start("controller")
	s.await("the controller", 30*time.Second, func() error { _, err := s.try("nodes", "list"); return err })
	for _, name := range nodes {
		s.join(name)
	}
}

// join has a new node join, and starts it.
func (s *stable) join(name string) {
	s.t.Helper()
	token := s.run("token", "create", "--node", name)
	s.run("node", "join", strings.TrimSpace(token), "--name", name, "--dir", filepath.Join(s.dir, name))
	s.startNode(name)
}

// write writes a file that only its owner reads, and returns its path.
func (s *stable) write(name, content string) (path string) {
	s.t.Helper()
	path = filepath.Join(s.dir, name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		s.t.Fatal(err)
	}
	return path
}

// openGitHub starts the simulated GitHub, which guests reach as QEMU shows it to them, and
// the server with the runner.
func (s *stable) openGitHub() {
	t := s.t
	t.Helper()
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.TLSClientConfig = &tls.Config{InsecureSkipVerify: true} // the self-made certificate
	server := httptest.NewUnstartedServer(nil)
	_, port, err := net.SplitHostPort(server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	gh, err := githubtest.New(githubtest.Config{
		Secret: []byte("hush"), URL: "http://" + net.JoinHostPort("10.0.2.2", port), Transport: transport,
		Repositories: []githubtest.Repository{{Name: "acme/app"}}, Applications: []githubtest.Application{serveRunner(t)},
	})
	if err != nil {
		t.Fatal(err)
	}
	server.Config.Handler = gh
	server.Start()
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan struct{})
	go func() { defer close(done); _ = gh.Run(ctx) }()
	t.Cleanup(func() { stop(); <-done; server.Close() })
	s.github, s.api = gh, server.URL
}

// runScript is what GitHub's run.sh is to its runner: it finds the JIT config's files in
// its own directory.
const runScript = "#!/bin/sh\nexec ./github-act-runner run --once\n"

// serveRunner offers a real runner for download, as GitHub offers its own.
func serveRunner(t *testing.T) githubtest.Application {
	t.Helper()
	binary := filepath.Join(t.TempDir(), "github-act-runner")
	compile := exec.CommandContext(t.Context(), "go", "build", "-C", "actrunner", "-buildvcs=false", "-trimpath", "-ldflags", "-s -w", "-o", binary, "github.com/ChristopherHX/github-act-runner")
	compile.Env = append(os.Environ(), "GOOS=linux", "GOARCH=arm64", "CGO_ENABLED=0")
	if out, err := compile.CombinedOutput(); err != nil {
		t.Fatalf("build the runner for the guest: %v\n%s", err, out)
	}
	const name = "actions-runner-linux-arm64-9.9.9.tar.gz"
	path := filepath.Join(t.TempDir(), name)
	if err := pack(path, map[string]string{"github-act-runner": binary}, map[string]string{"run.sh": runScript}); err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(content)
	server := httptest.NewServer(http.FileServer(http.Dir(filepath.Dir(path))))
	t.Cleanup(server.Close)
	return githubtest.Application{OS: "linux", Arch: "arm64", File: name, URL: server.URL + "/" + name, SHA256: hex.EncodeToString(sum[:])}
}

// pack makes a .tar.gz of executable files, by their paths and by their contents.
func pack(path string, paths, contents map[string]string) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	compressed, err := gzip.NewWriterLevel(f, gzip.BestSpeed)
	if err != nil {
		return err
	}
	archive := tar.NewWriter(compressed)
	defer func() { err = errors.Join(err, archive.Close(), compressed.Close(), f.Close()) }()
	add := func(name string, content []byte) error {
		if err := archive.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(content))}); err != nil {
			return err
		}
		_, err := archive.Write(content)
		return err
	}
	for name, from := range paths {
		content, err := os.ReadFile(from)
		if err == nil {
			err = add(name, content)
		}
		if err != nil {
			return err
		}
	}
	for name, content := range contents {
		if err := add(name, []byte(content)); err != nil {
			return err
		}
	}
	return nil
}

// push builds the guest and pushes it; it returns the image's reference.
func (s *stable) push(repository string, g qemutest.Guest) string {
	t := s.t
	t.Helper()
	image, err := qemutest.Build(t.Context(), g)
	if err != nil {
		t.Fatal(err)
	}
	source, disk, err := image.Source()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = disk.Close() }()
	if _, err := s.registry.Push(t.Context(), repository, "1", source); err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(s.registry)
	t.Cleanup(server.Close)
	return strings.TrimPrefix(server.URL, "http://") + "/" + repository + ":1"
}

// process is the program in one of its roles.
type process struct {
	cmd  *exec.Cmd
	gone chan struct{}
	log  string
}

// start starts the program; it is stopped as Ctrl-C does at the end of the test, the one
// that was started last first.
func (s *stable) start(args ...string) *process {
	t := s.t
	t.Helper()
	p := &process{gone: make(chan struct{}), log: filepath.Join(s.dir, fmt.Sprintf("log-%s-%d", args[0], time.Now().UnixNano()))}
	log, err := os.Create(p.log)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = log.Close() }() // the process has its own
	p.cmd = exec.CommandContext(context.WithoutCancel(t.Context()), s.program, append(args, "--config", s.config)...)
	p.cmd.Env = append(os.Environ(), s.env...)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { defer close(p.gone); _ = p.cmd.Wait() }()
	t.Cleanup(func() {
		_ = p.cmd.Process.Signal(syscall.SIGINT)
		select {
		case <-p.gone:
		case <-time.After(time.Minute):
			t.Errorf("%s does not stop", args[0])
			_ = p.cmd.Process.Kill()
			<-p.gone
		}
		if text, err := os.ReadFile(p.log); t.Failed() && err == nil {
			t.Logf("log of %v:\n%s", args, text)
		}
	})
	return p
}

func (s *stable) startNode(name string) {
	s.nodes[name] = s.start("node", "--name", name, "--dir", filepath.Join(s.dir, name))
}

// killNode kills an agent as a power failure of its process would, and waits until it is
// gone; its VMs' helpers are processes of their own.
func (s *stable) killNode(name string) {
	s.t.Helper()
	if err := s.nodes[name].cmd.Process.Kill(); err != nil {
		s.t.Fatal(err)
	}
	<-s.nodes[name].gone
}

func (s *stable) run(args ...string) string {
	s.t.Helper()
	out, err := s.try(args...)
	if err != nil {
		s.t.Fatal(err)
	}
	return out
}

func (s *stable) try(args ...string) (string, error) {
	cmd := exec.CommandContext(s.t.Context(), s.program, append(args, "--config", s.config)...)
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		err = fmt.Errorf("paddock %v: %w: %s", args, err, exit.Stderr)
	}
	return string(out), err
}

// await polls until check succeeds.
func (s *stable) await(what string, limit time.Duration, check func() error) {
	s.t.Helper()
	deadline := time.After(limit)
	again := time.NewTicker(200 * time.Millisecond)
	defer again.Stop()
	for {
		err := check()
		if err == nil {
			return
		}
		select {
		case <-again.C:
		case <-deadline:
			s.t.Fatalf("%s: not within %v: %v", what, limit, err)
		}
	}
}

// vmRow is what the tests read of "paddock vm list -o json".
type vmRow struct {
	ID, Node, Pool, State, Tier, Address, Reason string

	Job          fleet.JobID
	PlacedAt     time.Time `json:"placed_at"`
	BootingAt    time.Time `json:"booting_at"`
	WarmAt       time.Time `json:"warm_at"`
	RegisteredAt time.Time `json:"registered_at"`
}

func (s *stable) vms() []vmRow {
	s.t.Helper()
	var rows []vmRow
	if err := json.Unmarshal([]byte(s.run("vm", "list", "-o", "json")), &rows); err != nil {
		s.t.Fatal(err)
	}
	return rows
}

// logPhases shows each job's way from its webhook to its runner being busy, for who asks
// with -v where the time went.
func (s *stable) logPhases() {
	s.t.Helper()
	var rows []struct {
		Name, Node string
		Phases     *struct{ Queue, Pull, Boot, Register time.Duration }
	}
	if err := json.Unmarshal([]byte(s.run("job", "list", "-o", "json")), &rows); err != nil {
		s.t.Fatal(err)
	}
	for _, r := range rows {
		if r.Phases == nil {
			s.t.Errorf("job %s has no phases", r.Name)
			continue
		}
		p := *r.Phases
		s.t.Logf("%s on %s: queue %.2f s, pull %.2f s, boot %.2f s, register %.2f s", r.Name, r.Node, p.Queue.Seconds(), p.Pull.Seconds(), p.Boot.Seconds(), p.Register.Seconds())
	}
}

// queue queues jobs with one step each.
func (s *stable) queue(steps ...string) []fleet.JobID {
	s.t.Helper()
	return s.queueFor("linux", steps...)
}

// queueFor queues jobs for the pool that has a label.
func (s *stable) queueFor(label string, steps ...string) []fleet.JobID {
	s.t.Helper()
	run := githubtest.Run{Repository: "acme/app"}
	for i, step := range steps {
		run.Jobs = append(run.Jobs, githubtest.JobSpec{Name: fmt.Sprintf("job-%d", i), Labels: []string{"self-hosted", label}, Steps: []string{step}})
	}
	_, jobs, err := s.github.QueueRun(run)
	if err != nil {
		s.t.Fatal(err)
	}
	return jobs
}

// succeeds waits for a job's end and checks that it ran once, well, and in a guest.
func (s *stable) succeeds(job fleet.JobID, says string) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), jobTime)
	defer cancel()
	done, err := s.github.WaitJob(ctx, job, fleet.JobCompleted)
	if err != nil {
		s.t.Fatal(err)
	}
	if done.Conclusion != "success" || done.Starts != 1 || !strings.Contains(done.Log, says) {
		s.t.Errorf("job %+v\nwant success and %q in its log", done, says)
	}
}

// jobTime bounds a job from its being queued to its end: an emulated machine boots in 2 s
// on a quiet host and in 20 s on one with other work, and may fail once.
const jobTime = 4 * time.Minute

// cleanHouse waits until no runner is left at GitHub, and nothing here.
func (s *stable) cleanHouse() {
	s.t.Helper()
	s.cleanHosts()
	s.await("no runner at GitHub", time.Minute, func() error {
		if left := s.github.Runners(); len(left) > 0 {
			return fmt.Errorf("%+v", left)
		}
		return nil
	})
	if v := s.github.Violations(); len(v) != 0 {
		s.t.Errorf("violations: %q", v)
	}
}

// cleanHosts waits until no VM, clone, lease or process is left here.
func (s *stable) cleanHosts() {
	s.t.Helper()
	s.await("clean hosts", time.Minute, func() error {
		var left []string
		for _, vm := range s.vms() {
			if vm.State != "done" && vm.State != "lost" {
				left = append(left, fmt.Sprintf("%+v", vm))
			}
		}
		for _, pattern := range []string{"clones/*", "vms/*", "images/leases/*/*"} {
			found, err := filepath.Glob(filepath.Join(s.dir, "mac-*", pattern))
			if err != nil {
				return err
			}
			left = append(left, found...)
		}
		if left = append(left, s.machines()...); len(left) > 0 {
			return fmt.Errorf("left: %q", left)
		}
		return nil
	})
}

// machines are the processes, other than the agents, that work in the stable's nodes:
// helpers and what they started, zombies too.
func (s *stable) machines() []string {
	s.t.Helper()
	entries, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		s.t.Fatal(err)
	}
	var found []string
	for _, entry := range entries {
		command, _ := os.ReadFile(filepath.Join(entry, "cmdline")) // what cannot be read has ended
		environ, _ := os.ReadFile(filepath.Join(entry, "environ"))
		stderr, _ := os.Readlink(filepath.Join(entry, "fd/2"))
		agent := strings.Contains(string(command), "\x00node\x00") || strings.Contains(string(command), "\x00controller\x00")
		for _, text := range []string{string(command), string(environ), stderr} {
			if !agent && strings.Contains(text, s.dir+"/mac-") {
				found = append(found, filepath.Base(entry)+" "+strings.ReplaceAll(string(command[:min(60, len(command))]), "\x00", " "))
				break
			}
		}
	}
	return found
}

// Four jobs on two nodes with a slot each: a signed webhook, an image from a registry, a
// real machine, the guest's agent, a JIT config, GitHub's way of installing a runner, and
// a shell step inside the guest whose output reaches GitHub. Then the machine is gone. The
// second machine on each node starts from the first one's state.
func TestRealMachines(t *testing.T) {
	s := openStable(t, pool{yaml: "    memory: 384MiB"})
	jobs := s.queue("echo one of $((6 * 7)) on $(uname -m)", "echo two on $(uname -m)", "echo three on $(uname -m)", "echo four on $(uname -m)")
	for i, says := range []string{"one of 42 on aarch64", "two on aarch64", "three on aarch64", "four on aarch64"} {
		s.succeeds(jobs[i], says)
	}
	s.logPhases()
	tiers, nodes := map[string]int{}, map[string]int{}
	for _, vm := range s.vms() {
		tiers[vm.Tier]++
		nodes[vm.Node]++
		if vm.Address == "" {
			t.Errorf("VM %+v has no address", vm)
		}
	}
	if tiers["cold"] < 2 || tiers["saved"] == 0 || nodes["mac-1"] == 0 || nodes["mac-2"] == 0 {
		t.Errorf("starts by tier %v, by node %v; want each node's first to be cold and later ones to be saved", tiers, nodes)
	}
	s.cleanHouse()
}
