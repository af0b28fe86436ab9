package e2e

import (
	"bytes"
	"context"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github"
	"github.com/paddock-ci/paddock/github/githubtest"
)

// build builds a command of the module in dir and returns its path.
func build(t *testing.T, dir, pkg string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), filepath.Base(pkg))
	command := exec.CommandContext(t.Context(), "go", "build", "-C", dir, "-buildvcs=false", "-o", path, pkg)
	if out, err := command.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", pkg, err, out)
	}
	return path
}

// A real runner, started from a JIT config, runs real steps: their output and their
// exit status reach the simulated GitHub, and the runner is gone afterwards.
func TestRealRunnerRunsRealSteps(t *testing.T) {
	runner := build(t, "actrunner", "github.com/ChristopherHX/github-act-runner") // the version that its go.mod pins
	unpack := build(t, ".", "./stdinrunner")
	for _, c := range []struct {
		name, step, conclusion, says string
	}{
		{"a step that succeeds", "echo hello from $((6 * 7))", "success", "hello from 42"},
		{"a step that fails", "echo about to fail; exit 3", "failure", "about to fail"},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			gh, client := simulatedGitHub(t)
			_, jobs, err := gh.QueueRun(githubtest.Run{Repository: "acme/app", Jobs: []githubtest.JobSpec{
				{Name: "build", Labels: []string{"self-hosted", "macOS"}, Steps: []string{c.step}},
			}})
			if err != nil {
				t.Fatal(err)
			}
			minted, err := client.MintRunner(ctx, "acme", "paddock-e2e-1", 1, fleet.NewLabels("self-hosted", "macOS"))
			if err != nil {
				t.Fatal(err)
			}
			output := runOnce(ctx, t, []string{unpack, runner, "run", "--once"}, minted.JIT)

			job, err := gh.WaitJob(ctx, jobs[0], fleet.JobCompleted)
			if err != nil {
				t.Fatalf("%v\n%s", err, output)
			}
			if job.Conclusion != c.conclusion || job.Starts != 1 || job.RunnerName != "paddock-e2e-1" || !strings.Contains(job.Log, c.says) {
				t.Errorf("job %+v\nwant conclusion %s and %q in its log; the runner said\n%s", job, c.conclusion, c.says, output)
			}
			if left := gh.Runners(); len(left) != 0 {
				t.Errorf("left behind: %+v", left)
			}
			if v := gh.Violations(); len(v) != 0 {
				t.Errorf("violations: %q", v)
			}
		})
	}
}

// runOnce runs the runner until it has run one job. The JIT config goes by its standard
// input: neither command line nor environment show it.
func runOnce(ctx context.Context, t *testing.T, command []string, jit string) string {
	t.Helper()
	var output bytes.Buffer
	run := exec.CommandContext(ctx, command[0], command[1:]...)
	run.Dir, run.Stdin, run.Stdout, run.Stderr = t.TempDir(), strings.NewReader(jit), &output, &output
	run.Env = append(os.Environ(), "XDG_CACHE_HOME="+t.TempDir())
	if err := run.Run(); err != nil {
		t.Fatalf("github-act-runner: %v\n%s", err, output.String())
	}
	return output.String()
}

// simulatedGitHub serves a GitHub with one repository, and a client of it.
func simulatedGitHub(t *testing.T) (*githubtest.GitHub, *github.Client) {
	t.Helper()
	gh, err := githubtest.New(githubtest.Config{Repositories: []githubtest.Repository{{Name: "acme/app"}}})
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(gh)
	t.Cleanup(server.Close)
	client, err := github.New(github.Config{AppID: gh.AppID(), PrivateKey: gh.PrivateKey(), BaseURL: server.URL})
	if err != nil {
		t.Fatal(err)
	}
	return gh, client
}
