package config

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

const good = `
fleet: acme
listen: 127.0.0.1:9443
github: {app_id: 7, sweep_every: 30s}
pools:
  - name: sequoia
    scopes: [acme, other/repo]
    labels: [self-hosted, macOS, sequoia]
    image: ghcr.io/acme/sequoia:16
    memory: 8GiB
    deadlines: {life: 2h}
  - name: sonoma
    scopes: [acme]
    labels: [self-hosted, macOS]
    image: ghcr.io/acme/sonoma:15
`

func load(t *testing.T, text string, environ ...string) (*Config, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "paddock.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return Load(path, environ)
}

func TestLoad(t *testing.T) {
	c, err := load(t, good, "PADDOCK_LISTEN=127.0.0.1:1", "HOME=/nowhere")
	if err != nil {
		t.Fatal(err)
	}
	if c.Listen != "127.0.0.1:1" || c.GitHub.SweepEvery.Duration() != 30*time.Second {
		t.Errorf("listen %q, sweep %v", c.Listen, c.GitHub.SweepEvery.Duration())
	}
	pools := c.FleetPools()
	if len(pools) != 2 || pools[0].Memory != 8<<30 || pools[0].Deadlines.Life != 2*time.Hour {
		t.Errorf("pools: %+v", pools)
	}
	if pools[0].Labels.Key() != "macos,self-hosted,sequoia" {
		t.Errorf("labels: %v", pools[0].Labels)
	}
}

// Variables that others put into the environment are no mistakes: Kubernetes does beside
// a Service called paddock, and the process driver marks what it runs.
func TestOthersVariables(t *testing.T) {
	c, err := load(t, good,
		"PADDOCK_PORT=tcp://10.0.0.7:8443", "PADDOCK_PORT_8443_TCP=tcp://10.0.0.7:8443", "PADDOCK_PORT_8443_TCP_ADDR=10.0.0.7",
		"PADDOCK_SERVICE_HOST=10.0.0.7", "PADDOCK_SERVICE_PORT=8443", "PADDOCK_SERVICE_PORT_HTTPS=8443",
		"PADDOCK_MACHINE=/clones/aaaaaaaa", "PADDOCK_GUEST_SOCKET=/clones/aaaaaaaa/s")
	if err != nil {
		t.Fatal(err)
	}
	if c.Listen != "127.0.0.1:9443" {
		t.Errorf("listen %q", c.Listen)
	}
}

// Secrets of guests come from their files, and the default driver is the one that runs
// real machines on a Mac.
func TestLoginsAndDrivers(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(secret, []byte("open sesame\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := load(t, good+"    bootstrap: ssh\n    ssh: {user: runner, password_file: "+secret+"}\n")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.ReadLogins(); err != nil {
		t.Fatal(err)
	}
	pools := c.FleetPools()
	if l := pools[1].SSH; l == nil || l.User != "runner" || l.Password != "open sesame" || pools[0].SSH != nil {
		t.Errorf("logins %v and %v", pools[0].SSH, pools[1].SSH)
	}
	if said := fmt.Sprintf("%v %+v %#v", *pools[1].SSH, pools[1].SSH, *pools[1].SSH); strings.Contains(said, "sesame") {
		t.Errorf("printed, a login shows its password: %s", said)
	}
	if err := os.Remove(secret); err != nil {
		t.Fatal(err)
	}
	if err := c.ReadLogins(); err == nil || !strings.Contains(err.Error(), `pool "sonoma"`) {
		t.Errorf("without its file: %v", err)
	}
	for platform, want := range map[[2]string]string{
		{"darwin", "arm64"}: DriverVZ, {"darwin", "amd64"}: DriverProcess, {"linux", "arm64"}: DriverProcess,
	} {
		if got := defaultDriver(platform[0], platform[1]); got != want {
			t.Errorf("on %v: %s, want %s", platform, got, want)
		}
	}
	off := false
	for _, n := range []struct {
		node Node
		want bool
	}{{Node{Driver: DriverQEMU}, true}, {Node{Driver: DriverVZ}, false}, {Node{Driver: DriverQEMU, SavedStates: &off}, false}} {
		if n.node.States() != n.want {
			t.Errorf("saved states with %s: %v", n.node.Driver, n.node.States())
		}
	}
}

func TestDefaultHost(t *testing.T) {
	name, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	for listen, want := range map[string]string{
		":8443": name + ":8443", "0.0.0.0:8443": name + ":8443", "[::]:8443": name + ":8443",
		"[::1]:8443": "[::1]:8443", "10.0.0.7:1": "10.0.0.7:1", "mac.example.com:8443": "mac.example.com:8443",
	} {
		if got := defaultHost(listen); got != want {
			t.Errorf("listen %s: %s, want %s", listen, got, want)
		}
	}
}

func TestFitName(t *testing.T) {
	long := strings.Repeat("x", 62)
	for host, want := range map[string]string{
		"Mac-1.example.com": "mac-1", "Anna's Mac": "anna-s-mac", "--": "node", "": "node",
		long + "-yy": long, // cut at 63, which is the hyphen
	} {
		got := fitName(host)
		if got != want {
			t.Errorf("host %q: %q, want %q", host, got, want)
		}
		if err := fleet.CheckName("node", got); err != nil {
			t.Error(err)
		}
	}
}

// Each mistake gives one message with the line it is on and a hint.
func TestMistakes(t *testing.T) {
	tests := []struct{ name, text, environ, line, want string }{
		{"unknown key", strings.Replace(good, "listen:", "lisen:", 1), "", ":3:", "unknown key"},
		{"unknown key in a pool", strings.Replace(good, "    memory:", "    memry:", 1), "", ":10:", "unknown key"},
		{"bad duration", strings.Replace(good, "2h", "2 hours", 1), "", ":11:", "not a duration"},
		{"bare number as duration", strings.Replace(good, "30s", "30", 1), "", ":4:", "not a duration"},
		{"bad size", strings.Replace(good, "8GiB", "lots", 1), "", ":10:", "not a size"},
		{"pool without an image", strings.Replace(good, "    image: ghcr.io/acme/sonoma:15\n", "", 1), "", ":12:", `pool "sonoma" has no image`},
		{"two pools of one name", strings.Replace(good, "name: sonoma", "name: sequoia", 1), "", ":12:", "is called"},
		{"bad scope", strings.Replace(good, "other/repo", "a/b/c", 1), "", ":7:", "no scope"},
		{"bad bootstrap", good + "    bootstrap: magic\n", "", ":16:", "unknown bootstrap"},
		{"unknown driver", good + "node: {driver: vmware}\n", "", ":16: node.driver", "unknown driver"},
		{"unknown accelerator", good + "node: {driver: qemu, qemu: {accel: warp}}\n", "", ":16: node.qemu.accel", "unknown accelerator"},
		{"unknown network", good + "node: {driver: qemu, qemu: {network: wifi}}\n", "", ":16: node.qemu.network", "unknown network"},
		{"states of processes", good + "node: {driver: process, saved_states: true}\n", "", ":16: node.saved_states", "no state"},
		{"a login that is not used", good + "    ssh: {user: admin}\n", "", ":16: pools[1].ssh", "does not log in"},
		{"a login without a secret", good + "    bootstrap: ssh\n    ssh: {user: admin}\n", "", ":17: pools[1].ssh", "a password or a key"},
		{"not YAML", "pools: [", "", ":1:", ""},
		{"bytes that are no text", "\x00\xff: [\n" + strings.Repeat("x", 5000), "", ":", ""},
		{"a key twice", good + "fleet: other\n", "", ":16:", "already defined"},
		{"two documents", good + "---\nfleet: other\n", "", ":16:", "more than one document"},
		{"text for a number", strings.Replace(good, "app_id: 7", "app_id: seven", 1), "", ":4: app_id", `"seven" is not a whole number`},
		{"number that does not fit", good + "    cpu: 99999999999999999999\n", "", ":16: cpu", "too large"},
		{"text for a list", strings.Replace(good, "[self-hosted, macOS]", "macOS", 1), "", ":14: labels", "wants a list, not a text"},
		{"text for a truth", good + "    match_hosted: perhaps\n", "", ":16: match_hosted", "true or false"},
		{"a tag before nothing", "pools:\n  - scopes: !odd\n      a: 1\n    labels: !odd\n", "", ":", ""},
		{"list for everything", "- a\n", "", ":1:", "wants a mapping, not a list"},
		{"variable that begins like another's", good, "PADDOCK_PORTS=1", "", "unknown variable"},
		{"unknown variable", good, "PADDOCK_LISTN=:1", "", "unknown variable"},
		{"variable that is no number", good, "PADDOCK_NODE_SLOTS=two", "", "whole number"},
		{"a registry that is none", good + "images: {registries: [\"https://ghcr.io\"]}\n", "", ":16: images.registries[0]", "no registry"},
		{"an image from elsewhere", good + "images: {registries: [ghcr.io/other, docker.io]}\n", "", "pools[0].image", "not in an allowed registry"},
		{"a mirror with a scheme", good + "node: {mirrors: {ghcr.io: \"http://mirror\"}}\n", "", ":16: node.mirrors", "as the mirror of"},
		{"a port for peers that is none", good + "node: {peer: {listen: 8444}}\n", "", ":16: node.peer.listen", "not host:port"},
		{"an address where nothing listens", good + "node: {peer: {address: \"mac-1:8444\"}}\n", "", ":16: node.peer.address", "nothing listens"},
		{"a site in words", good + "node: {site: Berlin West}\n", "", ":16: node.site", "site"},
		{"too many streams", good + "node: {streams: 1000}\n", "", ":16: node.streams", "1000 streams"},
		{"half a certificate", good + "tls: {cert: a.pem}\n", "", ":16:", "go together"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := load(t, tt.text, tt.environ)
			if !errors.Is(err, ErrInvalid) {
				t.Fatalf("error %v, want one that is ErrInvalid", err)
			}
			message := err.Error()
			for _, part := range []string{tt.line, tt.want, "hint: "} {
				if !strings.Contains(message, part) {
					t.Errorf("message %q lacks %q", message, part)
				}
			}
			if strings.Contains(message, "\n") || len(message) > 400 || strings.Contains(message, "Go ") {
				t.Errorf("message that is not for people: %q", message)
			}
		})
	}
}

// Notes name what a command would stumble over on this host, and nothing when all is there.
func TestAllowed(t *testing.T) {
	images := Images{Registries: []string{"ghcr.io/acme/", "localhost:5000", "docker.io"}}
	for ref, want := range map[string]bool{
		"ghcr.io/acme/macos:15": true, "ghcr.io/acme/deep/er@sha256:" + strings.Repeat("ab", 32): true,
		"ghcr.io/acmex/macos:15": false, "ghcr.io/acme": true, "localhost:5000/a:b": true, "localhost:50001/a:b": false,
		"ubuntu": true, "docker.io/library/ubuntu": true, "not a reference": false,
	} {
		if err := images.Allowed(ref); (err == nil) != want {
			t.Errorf("%s: %v, want allowed %t", ref, err, want)
		}
	}
	if err := (&Images{}).Allowed("anything.example.com/a:b"); err != nil {
		t.Error(err)
	}
}

func TestNotes(t *testing.T) {
	dir := t.TempDir()
	path := func(name, content string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	whole := strings.Replace(good, "{app_id: 7,", "{app_id: 7, private_key_file: "+path("app.pem", "key", 0o600)+
		", webhook_secret_files: ["+path("hook", "secret", 0o600)+"],", 1)
	tests := []struct {
		name, text string
		want       []string
	}{
		{"all is there", whole, nil},
		{"nothing is there", "", []string{"github.app_id, github.private_key_file, github.webhook_secret_files", "no pools"}},
		{"no key file", strings.Replace(whole, "app.pem", "none.pem", 1), []string{"github.private_key_file: open "}},
		{"an empty secret", strings.Replace(whole, dir+"/hook", path("empty", "", 0o600), 1), []string{"empty is empty"}},
		{"a directory", strings.Replace(whole, dir+"/hook", dir, 1), []string{"is a directory"}},
		{"a network for all", whole + "node: {driver: qemu}\n", []string{"this host's loopback"}},
		{"a network for strangers", whole + "node: {driver: qemu, qemu: {network: passt}}\n", nil},
		{"a network of another driver's", whole + "node: {driver: process, qemu: {network: user}}\n", nil},
		{"a secret for all", strings.Replace(whole, dir+"/hook", path("open", "secret", 0o644), 1), []string{"chmod 600"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c, err := load(t, tt.text)
			if err != nil {
				t.Fatal(err)
			}
			notes := c.Notes()
			if len(notes) != len(tt.want) {
				t.Fatalf("notes %q, want %d", notes, len(tt.want))
			}
			for i, want := range tt.want {
				if !strings.Contains(notes[i], want) {
					t.Errorf("note %q lacks %q", notes[i], want)
				}
			}
		})
	}
}

func FuzzLoad(f *testing.F) {
	f.Add(good)
	f.Add("pools:\n - name: x\n   memory: 99999999999TiB")
	f.Add("a: &a [*a]")
	f.Add("{0\n\n0:\"0")
	f.Add("pools:\n  - scopes: !odd\n      a\n    labels: !odd\n")
	f.Fuzz(func(t *testing.T, text string) {
		c := &Config{}
		err := c.load("fuzz.yaml", []byte(text), nil)
		if err == nil && c.check() != nil {
			t.Fatal("accepted, but does not pass the check")
		}
		if err != nil && strings.Contains(err.Error(), "\n") {
			t.Fatalf("message of several lines: %q", err)
		}
	})
}
