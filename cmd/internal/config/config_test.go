package config

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
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
		{"not YAML", "pools: [", "", ":1:", ""},
		{"unknown variable", good, "PADDOCK_LISTN=:1", "", "unknown variable"},
		{"variable that is no number", good, "PADDOCK_NODE_SLOTS=two", "", "whole number"},
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
			if strings.Contains(message, "\n") {
				t.Errorf("message of several lines: %q", message)
			}
		})
	}
}

func FuzzLoad(f *testing.F) {
	f.Add(good)
	f.Add("pools:\n - name: x\n   memory: 99999999999TiB")
	f.Add("a: &a [*a]")
	f.Fuzz(func(t *testing.T, text string) {
		c := &Config{}
		if err := c.load("fuzz.yaml", []byte(text), nil); err == nil && c.check() != nil {
			t.Fatal("accepted, but does not pass the check")
		}
	})
}
