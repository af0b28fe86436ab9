package e2e

import (
	"bytes"
	"context"
	"crypto/tls"
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
	"github.com/paddock-ci/paddock/image/tart"
)

// The whole of Paddock with a real runner: a signed webhook, an image from a registry, a
// machine of the process driver, a JIT config, and github-act-runner in it, which runs a
// shell step. Its output and conclusion reach GitHub, and nothing is left.
func TestPaddockRunsRealSteps(t *testing.T) {
	runner := build(t, "actrunner", "github.com/ChristopherHX/github-act-runner")
	unpack := build(t, ".", "./stdinrunner")
	paddock := build(t, "..", "./cmd/paddock")
	gh := newGitHub(t)
	dir := configure(t, gh, []string{unpack, runner, "run", "--once"})
	up(t, paddock, dir)

	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	labels := []string{"self-hosted", "macOS"}
	_, jobs, err := gh.QueueRun(githubtest.Run{Repository: "acme/app", Jobs: []githubtest.JobSpec{
		{Name: "good", Labels: labels, Steps: []string{"echo hello from $((6 * 7)) in $PWD"}},
		{Name: "bad", Labels: labels, Steps: []string{"echo about to fail; exit 3"}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []struct{ conclusion, says string }{{"success", "hello from 42"}, {"failure", "about to fail"}} {
		job, err := gh.WaitJob(ctx, jobs[i], fleet.JobCompleted)
		if err != nil {
			t.Fatal(err)
		}
		if job.Conclusion != want.conclusion || job.Starts != 1 || !strings.Contains(job.Log, want.says) || !strings.HasPrefix(job.RunnerName, "paddock-e2e-") {
			t.Errorf("job %+v\nwant conclusion %s and %q in its log", job, want.conclusion, want.says)
		}
	}
	waitGone(ctx, t, paddock, dir, gh)
	if v := gh.Violations(); len(v) != 0 {
		t.Errorf("violations: %q", v)
	}
}

func newGitHub(t *testing.T) *githubtest.GitHub {
	t.Helper()
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.TLSClientConfig = &tls.Config{InsecureSkipVerify: true} // the self-made certificate
	gh, err := githubtest.New(githubtest.Config{
		Secret: []byte("hush"), Repositories: []githubtest.Repository{{Name: "acme/app"}}, Transport: transport,
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan struct{})
	go func() { defer close(done); _ = gh.Run(ctx) }()
	t.Cleanup(func() { stop(); <-done })
	return gh
}

// configure writes paddock.yaml and what it names into a directory.
func configure(t *testing.T, gh *githubtest.GitHub, runner []string) string {
	t.Helper()
	// Not t.TempDir: unix sockets have short paths.
	dir, err := os.MkdirTemp("", "e2e")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	api, registry := httptest.NewServer(gh), registrytest.New()
	images := httptest.NewServer(registry)
	t.Cleanup(func() { api.Close(); images.Close() })
	if _, err := registry.Push(t.Context(), "acme/mac", "1", tart.Source{
		Config: &tart.Config{Version: 1, OS: "linux", Arch: "arm64"}, NVRAM: []byte("nvram"),
		Disk: bytes.NewReader(bytes.Repeat([]byte("disk"), 1<<20)), ChunkSize: 1 << 20,
	}); err != nil {
		t.Fatal(err)
	}
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	_ = l.Close()
	gh.SetWebhook("https://" + address + "/webhook")
	command, err := json.Marshal(runner)
	if err != nil {
		t.Fatal(err)
	}
	config := fmt.Sprintf(`
fleet: e2e
listen: %[1]s
url: https://%[1]s
data: %[2]s/data
github: {app_id: %[3]d, private_key_file: %[2]s/app.pem, webhook_secret_files: [%[2]s/hook], api: %[4]s/, sweep_every: 2s}
pools:
  - {name: mac, scopes: [acme], labels: [self-hosted, macOS], image: "%[5]s/acme/mac:1", growth: 1MiB, runner: %[6]s}
node: {name: mac-1}
`, address, dir, gh.AppID(), api.URL, strings.TrimPrefix(images.URL, "http://"), command)
	for name, content := range map[string]string{"app.pem": string(gh.PrivateKey()), "hook": "hush", "paddock.yaml": config} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// up runs "paddock up" until the test ends, then stops it as Ctrl-C does.
func up(t *testing.T, paddock, dir string) {
	t.Helper()
	var log bytes.Buffer
	cmd := exec.CommandContext(context.WithoutCancel(t.Context()), paddock, "up", "--config", filepath.Join(dir, "paddock.yaml"))
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stopped := cmd.Process.Signal(syscall.SIGINT)
		if err := errors.Join(stopped, cmd.Wait()); err != nil {
			t.Errorf("paddock up: %v", err)
		}
		if t.Failed() {
			t.Logf("paddock's log:\n%s", log.String())
		}
	})
}

// waitGone waits until no runner is left at GitHub and no VM and clone here.
func waitGone(ctx context.Context, t *testing.T, paddock, dir string, gh *githubtest.GitHub) {
	t.Helper()
	again := time.NewTicker(100 * time.Millisecond)
	defer again.Stop()
	for {
		var vms []struct{ State string }
		list := exec.CommandContext(ctx, paddock, "vm", "list", "-o", "json", "--config", filepath.Join(dir, "paddock.yaml"))
		out, err := list.Output()
		if err == nil {
			err = json.Unmarshal(out, &vms)
		}
		if err != nil {
			t.Fatalf("paddock vm list: %v", err)
		}
		left := len(gh.Runners())
		for _, vm := range vms {
			if vm.State != "done" {
				left++
			}
		}
		clones, err := filepath.Glob(filepath.Join(dir, "data", "node", "clones", "*"))
		if err != nil {
			t.Fatal(err)
		}
		if left+len(clones) == 0 {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("left behind: runners %v, VMs %v, clones %v", gh.Runners(), vms, clones)
		case <-again.C:
		}
	}
}
