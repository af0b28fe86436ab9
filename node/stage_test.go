package node

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
)

// The cast: GitHub's runner is a script that wants its files as the real one does, and
// prints its version and that it has a job.
const credentials = "the-credentials-of-a-runner"

func runScript(version string) string {
	return `#!/bin/sh
test "$(cat .credentials)" = ` + credentials + ` && test "$(cat .runner)" = who || exit 8
test "$(ls -l .credentials | cut -c1-10)" = -rw------- || exit 7
test -z "$(cat)" || exit 6
test ! -e ` + stagedArchive + ` || exit 5
echo "Running job: build with ` + version + `"
test "` + version + `" = "$WANT" || exit 4
`
}

func githubJIT(t *testing.T) string {
	t.Helper()
	data, err := json.Marshal(map[string][]byte{".runner": []byte("who"), ".credentials": []byte(credentials)})
	must(t, err)
	return base64.StdEncoding.EncodeToString(data)
}

// runnerArchive is GitHub's archive of a version.
func runnerArchive(t *testing.T, version string) []byte {
	t.Helper()
	var out bytes.Buffer
	zip := gzip.NewWriter(&out)
	w := tar.NewWriter(zip)
	for name, text := range map[string]string{"run.sh": runScript(version), "bin/Runner.Listener": "#!/bin/sh\necho " + version + "\n"} {
		must(t, w.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(text))}))
		_, err := w.Write([]byte(text))
		must(t, err)
	}
	must(t, w.Close())
	must(t, zip.Close())
	return out.Bytes()
}

// TestGitHubsRunner: where the pool names no command, GitHub's runner runs, with its
// files in its directory and nothing on its standard input; it is put into guests that
// have none of its version.
func TestGitHubsRunner(t *testing.T) {
	baked := func(version string) map[string]string {
		return map[string]string{"run.sh": runScript(version), "bin/Runner.Listener": "#!/bin/sh\necho " + version + "\n"}
	}
	for _, tt := range []struct {
		name   string
		baked  map[string]string // in the image
		offers bool              // the order has the archive of 2.330.0
		broken bool              // which cannot be had
		jit    string
		want   string // the version that runs
		calls  int    // downloads
		reason string
		failed bool
	}{
		{name: "put in", offers: true, want: "2.330.0", calls: 1, reason: "runner exited 0"},
		{name: "newer than the image's", baked: baked("2.311.0"), offers: true, want: "2.330.0", calls: 1, reason: "runner exited 0"},
		{name: "the image has it", baked: baked("2.330.0"), offers: true, want: "2.330.0", reason: "runner exited 0"},
		{name: "none offered", baked: baked("2.311.0"), want: "2.311.0", reason: "runner exited 0"},
		{name: "cannot be had, and the image's serves", baked: baked("2.311.0"), offers: true, broken: true, want: "2.311.0", calls: 1, reason: "runner exited 0"},
		{name: "nowhere", reason: "this image has no GitHub runner in", failed: true},
		{name: "cannot be had at all", offers: true, broken: true, calls: 1, reason: "bake one in", failed: true},
		{name: "a JIT config that is none", baked: baked("2.311.0"), jit: "c2VjcmV0", reason: "the JIT config is not what GitHub's runner takes", failed: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			data := runnerArchive(t, "2.330.0")
			d := newDepot(t, func(w http.ResponseWriter, _ *http.Request) {
				if tt.broken {
					http.Error(w, "no", http.StatusServiceUnavailable)
					return
				}
				_, _ = w.Write(data)
			})
			s := newStand(t)
			s.shelf.files = tt.baked
			order := s.order("aaaaaaaa", "")
			order.Runner, order.Env = nil, map[string]string{"WANT": tt.want}
			runner := runnerOrder(order.ID)
			if runner.JIT = tt.jit; tt.jit == "" {
				runner.JIT = githubJIT(t)
			}
			if tt.offers {
				runner.Archives = []fleet.Archive{
					{OS: "darwin", Arch: "arm64", Name: "actions-runner-osx-arm64-2.330.0.tar.gz", URL: d.URL + "/other.tar.gz", SHA256: sumOf([]byte("another"))},
					{OS: "linux", Arch: "amd64", Name: "actions-runner-linux-x64-2.330.0.tar.gz", URL: d.URL + "/r.tar.gz", SHA256: sumOf(data)},
				}
			}
			s.office.start[order.ID] = runner
			s.office.place(order)
			stop := s.agent(t)
			r := s.office.awaitState(t, order.ID, fleet.VMDone)
			if !strings.Contains(r.Reason, tt.reason) || r.Failed != tt.failed || r.BusyAt.IsZero() != tt.failed {
				t.Errorf("%+v", r)
			}
			if d.count() != tt.calls {
				t.Errorf("%d downloads, want %d", d.count(), tt.calls)
			}
			stop()
			s.checkEmpty(t)
			noSecrets(t, s.dir, r.Reason, credentials, runner.JIT)
			if kept, _ := filepath.Glob(filepath.Join(s.dir, "runners", "*")); len(kept) != map[bool]int{true: tt.calls}[!tt.broken] {
				t.Errorf("kept: %v", kept)
			}
		})
	}
}

// TestGitHubsRunnerBySSH: the same in a stock guest, whose own runner is older.
func TestGitHubsRunnerBySSH(t *testing.T) {
	data := runnerArchive(t, "2.330.0")
	d := newDepot(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(data) })
	s, guest := newStand(t), newSSHD(t)
	home := filepath.Join(guest.home, "actions-runner")
	must(t, os.Mkdir(home, 0o700))
	must(t, os.WriteFile(filepath.Join(home, "run.sh"), []byte(runScript("2.311.0")), 0o700))
	s.yard.port, s.office.logins = guest.serve, []api.PoolLogin{guest.login}
	order := s.order("aaaaaaaa", "")
	order.Runner, order.Env, order.Bootstrap = nil, map[string]string{"WANT": "2.330.0"}, fleet.BootstrapSSH
	runner := runnerOrder(order.ID)
	runner.JIT = githubJIT(t)
	runner.Archives = []fleet.Archive{{OS: "linux", Arch: "amd64", Name: "actions-runner-linux-x64-2.330.0.tar.gz", URL: d.URL + "/r.tar.gz", SHA256: sumOf(data)}}
	s.office.start[order.ID] = runner
	s.office.place(order)
	stop := s.agent(t)
	if r := s.office.awaitState(t, order.ID, fleet.VMDone); r.Reason != "runner exited 0" || r.BusyAt.IsZero() {
		t.Errorf("%+v", r)
	}
	stop()
	s.checkEmpty(t)
	guest.check(t)
	noSecrets(t, s.dir, "", credentials, runner.JIT)
}
