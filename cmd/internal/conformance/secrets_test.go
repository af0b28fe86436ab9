package conformance

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/cmd/internal/parts"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/github/githubtest"
	"github.com/paddock-ci/paddock/store"
	"github.com/paddock-ci/paddock/store/storetest"
)

// spy reads, between a Control and GitHub, the secrets that they exchange.
type spy struct {
	mu    sync.Mutex
	found map[string]string // secret: what it is
}

func (s *spy) add(what, secret string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.found[secret] == "" { // else its first name is the better one
		s.found[secret] = what
	}
}

// secrets are those found so far.
func (s *spy) secrets() map[string]string {
	s.mu.Lock()
	defer s.mu.Unlock()
	copied := map[string]string{}
	for secret, what := range s.found {
		copied[secret] = what
	}
	return copied
}

func (s *spy) RoundTrip(r *http.Request) (*http.Response, error) {
	if _, token, found := strings.Cut(r.Header.Get("Authorization"), " "); found {
		s.add("a token of the App or an installation", token)
	}
	answer, err := http.DefaultTransport.RoundTrip(r)
	if err != nil {
		return answer, err
	}
	body, err := io.ReadAll(answer.Body)
	if err != nil {
		return nil, err
	}
	_ = answer.Body.Close()
	answer.Body = io.NopCloser(bytes.NewReader(body))
	var fields struct {
		JIT   string `json:"encoded_jit_config"`
		Token string `json:"token"`
	}
	if json.Unmarshal(body, &fields) != nil {
		return answer, nil // a list
	}
	if fields.Token != "" {
		s.add("an installation token", fields.Token)
	}
	if fields.JIT != "" {
		s.addJIT(fields.JIT)
	}
	return answer, nil
}

// addJIT adds a JIT config and the private key in it, as the config has it.
func (s *spy) addJIT(config string) {
	s.add("a JIT config", config)
	var files map[string]string
	text, err := base64.StdEncoding.DecodeString(config)
	if err != nil || json.Unmarshal(text, &files) != nil {
		return
	}
	s.add("a runner's private key", files[".credentials_rsaparams"])
}

// leaks lists the secrets that are in text.
func leaks(secrets map[string]string, text string) (found []string) {
	for secret, what := range secrets {
		if strings.Contains(text, secret) {
			found = append(found, what)
		}
	}
	slices.Sort(found)
	return slices.Compact(found)
}

// With everything logged, a job runs on a controller with a real Redis. No secret is in a
// log, an event, an answer of the API, the arguments or environment of a process, what is
// stored in Redis, or a file that is not meant for it.
func TestNoSecretLeaks(t *testing.T) {
	url, redis := storetest.StartRedis(t)
	s := &spy{found: map[string]string{}}
	h := open(t, plan{redis: url, transport: s})
	client := h.admin()
	service, err := client.CreateToken(t.Context(), api.TokenRequest{Name: "ci", Role: "viewer"})
	if err != nil {
		t.Fatal(err)
	}
	join, err := client.CreateToken(t.Context(), api.TokenRequest{Node: "mac-2"})
	if err != nil {
		t.Fatal(err)
	}
	s.add("a service token", service.Token)
	s.add("a join token", join.Token)
	h.own(s, redis.Password())

	// A job that fails and one that lasts, and a registration whose answer is lost: errors
	// quote what they can.
	h.github.SetFaults(githubtest.Once(1, isMint, githubtest.RequestFault{Lose: true}))
	ids := append(h.run("acme/app", githubtest.JobSpec{Name: "bad", Labels: mac, Steps: []string{"exit 1"}}),
		h.run("acme/app", githubtest.JobSpec{Name: "good", Labels: mac, Seconds: 1.5})...)
	h.waitJob(ids[1], fleet.JobInProgress)
	h.checkProcesses(s.secrets())
	h.waitJob(ids[0], fleet.JobCompleted)
	h.succeeded(ids[1])
	h.checkAnswers(client, s.secrets())
	h.empty()

	secrets := s.secrets()
	for _, what := range []string{"a JIT config", "a runner's private key", "an installation token", "the fleet key", "a node's credential"} {
		if !slices.Contains(values(secrets), what) {
			t.Errorf("the test never saw %s: it shows nothing of it", what)
		}
	}
	if found := leaks(secrets, h.log.String()); len(found) > 0 {
		t.Errorf("the log shows %v", found)
	}
	if log := h.log.String(); !strings.Contains(log, "runner.claimed") || !strings.Contains(log, "part=mac-1") {
		t.Error("the log is not there: the test shows nothing of it")
	}
	h.checkFiles(h.dir, keepers, secrets)
	// What Redis was told is in its append-only file, also what was erased since.
	h.checkFiles(filepath.Dir(redis.Socket()), nil, secrets)
}

func values(m map[string]string) (all []string) {
	for _, v := range m {
		all = append(all, v)
	}
	return all
}

// own adds the secrets of the house itself.
func (h *house) own(s *spy, redisPassword string) {
	h.t.Helper()
	s.add("the webhook secret", webhookSecret)
	s.add("the Redis password", redisPassword)
	s.add("the App's private key", keyLine(h.t, h.github.PrivateKey()))
	for what, path := range map[string]string{"the fleet key": "data/fleet.key", "the certificate's key": "data/tls.key"} {
		text, err := os.ReadFile(filepath.Join(h.dir, path))
		if err != nil {
			h.t.Fatal(err)
		}
		if strings.HasPrefix(string(text), "-----") {
			text = []byte(keyLine(h.t, text))
		}
		s.add(what, strings.TrimSpace(string(text)))
	}
	for what, path := range map[string]string{"the admin's token": "data/" + parts.CLIFile, "a node's credential": "mac-1/credential.json"} {
		e, err := parts.ReadEndpoint(filepath.Join(h.dir, path))
		if err != nil {
			h.t.Fatal(err)
		}
		s.add(what, e.Token)
	}
}

// keyLine is a line from the middle of a PEM file, by which a copy of it is recognized.
func keyLine(t *testing.T, text []byte) string {
	t.Helper()
	block, _ := pem.Decode(text)
	if block == nil {
		t.Fatal("no PEM")
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return lines[len(lines)/2]
}

// checkProcesses looks at the arguments and environments of this house's processes, and
// of this one, while jobs run.
func (h *house) checkProcesses(secrets map[string]string) {
	h.t.Helper()
	processes := offspring(machines(h.dir))
	for _, role := range []string{parts.HelperRole, parts.GuestRole, runnerRole} {
		if !slices.ContainsFunc(values(processes), func(command string) bool { return slices.Contains(strings.Fields(command), role) }) {
			h.t.Errorf("no process is a %s: the test shows nothing of it", role)
		}
	}
	processes["/proc/self"] = "the test itself"
	for p, command := range processes {
		for _, file := range []string{"cmdline", "environ"} {
			text, err := os.ReadFile(filepath.Join(p, file))
			if err != nil {
				continue // it has just ended
			}
			if found := leaks(secrets, string(text)); len(found) > 0 {
				h.t.Errorf("%s of %s shows %v", file, command, found)
			}
		}
	}
}

// offspring adds the children of processes, and theirs.
func offspring(processes map[string]string) map[string]string {
	for grown := true; grown; {
		grown = false
		all, _ := filepath.Glob("/proc/[0-9]*")
		for _, p := range all {
			text, err := os.ReadFile(filepath.Join(p, "stat")) // pid (name) state ppid …
			if err != nil || processes[p] != "" {
				continue
			}
			fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
			if parent := "/proc/" + fields[1]; processes[parent] != "" {
				command, _ := os.ReadFile(filepath.Join(p, "cmdline"))
				processes[p] = strings.ReplaceAll(string(command), "\x00", " ") + " child of " + parent
				grown = true
			}
		}
	}
	return processes
}

// checkAnswers looks at what the API and the store say.
func (h *house) checkAnswers(client *api.Client, secrets map[string]string) {
	h.t.Helper()
	ctx := h.t.Context()
	said := map[string]func() (any, error){
		"nodes":  func() (any, error) { return client.Nodes(ctx) },
		"VMs":    func() (any, error) { return client.VMs(ctx) },
		"images": func() (any, error) { return client.Images(ctx) },
		"jobs":   func() (any, error) { return client.Jobs(ctx, "") },
		"tokens": func() (any, error) { return client.Tokens(ctx) },
		"events": func() (any, error) { return client.Events(ctx, api.EventFilter{Limit: 1000}) },
		"view":   func() (any, error) { return h.control.part.Store().View(ctx) },
		"ledger": func() (any, error) { return h.control.part.Store().ReadLedger(ctx) },
		"log of events": func() (any, error) {
			return h.control.part.Store().Events(ctx, store.EventFilter{Limit: 10_000})
		},
	}
	for what, ask := range said {
		answer, err := ask()
		if err != nil {
			h.t.Errorf("%s: %v", what, err)
			continue
		}
		text, err := json.Marshal(answer)
		if err != nil {
			h.t.Fatal(err)
		}
		if len(text) < len("[{}]") {
			h.t.Errorf("%s are %s: the test shows nothing of them", what, text)
		}
		if found := leaks(secrets, string(text)+fmt.Sprintf("%+v", answer)); len(found) > 0 {
			h.t.Errorf("%s show %v", what, found)
		}
	}
}

// keepers are the files that are meant to hold a secret.
var keepers = map[string][]string{
	"app.pem":               {"the App's private key"},
	"hook":                  {"the webhook secret"},
	"data/fleet.key":        {"the fleet key"},
	"data/tls.key":          {"the certificate's key"},
	"data/" + parts.CLIFile: {"the admin's token"},
	"mac-1/credential.json": {"a node's credential"},
}

// checkFiles looks at every file below dir.
func (h *house) checkFiles(dir string, keepers map[string][]string, secrets map[string]string) {
	h.t.Helper()
	looked := 0
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		looked++
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		found := leaks(secrets, string(text))
		if !slices.Equal(found, keepers[name]) {
			h.t.Errorf("%s holds %v, want %v", name, found, keepers[name])
		}
		info, err := d.Info()
		if err == nil && len(found) > 0 && info.Mode().Perm() != 0o600 {
			h.t.Errorf("%s holds %v and has mode %v, want 0600", name, found, info.Mode().Perm())
		}
		return err
	})
	if err != nil {
		h.t.Error(err)
	}
	if looked < max(len(keepers), 1) {
		h.t.Errorf("%d files in %s: the test shows nothing of them", looked, dir)
	}
}
