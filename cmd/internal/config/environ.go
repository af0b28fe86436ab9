package config

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// variables are the environment's overlays: PADDOCK_ and the key's path. Secrets are
// named by file, so that none of them stands in an environment.
func (c *Config) variables() map[string]func(string) error {
	text := func(field *string) func(string) error {
		return func(v string) error { *field = v; return nil }
	}
	number := func(set func(int64)) func(string) error {
		return func(v string) error {
			n, err := strconv.ParseInt(v, 10, 64)
			if err != nil {
				return fmt.Errorf("%q is not a whole number", v)
			}
			set(n)
			return nil
		}
	}
	return map[string]func(string) error{
		"PADDOCK_FLEET":                       text(&c.Fleet),
		"PADDOCK_LISTEN":                      text(&c.Listen),
		"PADDOCK_URL":                         text(&c.URL),
		"PADDOCK_DATA":                        text(&c.Data),
		"PADDOCK_REDIS":                       text(&c.Redis),
		"PADDOCK_TLS_CERT":                    text(&c.TLS.Cert),
		"PADDOCK_TLS_KEY":                     text(&c.TLS.Key),
		"PADDOCK_GITHUB_APP_ID":               number(func(n int64) { c.GitHub.AppID = n }),
		"PADDOCK_GITHUB_PRIVATE_KEY_FILE":     text(&c.GitHub.PrivateKeyFile),
		"PADDOCK_GITHUB_API":                  text(&c.GitHub.API),
		"PADDOCK_GITHUB_WEBHOOK_SECRET_FILES": func(v string) error { c.GitHub.WebhookSecretFiles = strings.Split(v, ","); return nil },
		"PADDOCK_NODE_NAME":                   text(&c.Node.Name),
		"PADDOCK_NODE_DIR":                    text(&c.Node.Dir),
		"PADDOCK_NODE_DRIVER":                 text(&c.Node.Driver),
		"PADDOCK_NODE_SLOTS":                  number(func(n int64) { c.Node.Slots = int(n) }),
	}
}

// notKeys are variables of the command line's client, not of the file.
var notKeys = map[string]bool{"PADDOCK_CONFIG": true, "PADDOCK_TOKEN": true, "PADDOCK_CERTIFICATE": true}

// notOurs says that a variable was not written for the configuration: this project's
// tests, the process driver's marks of a guest (a job may run Paddock), and what
// Kubernetes puts into every container beside a Service called paddock.
func notOurs(key string) bool {
	rest := strings.TrimPrefix(key, "PADDOCK_")
	switch rest {
	case "MACHINE", "GUEST_SOCKET", "PORT":
		return true
	}
	for _, prefix := range []string{"TEST_", "PORT_", "SERVICE_"} {
		if strings.HasPrefix(rest, prefix) {
			return true
		}
	}
	return false
}

// overlay applies the environment; an unknown PADDOCK_ variable is a mistake, since it
// would otherwise be silently without effect.
func (c *Config) overlay(environ []string) error {
	known, given := c.variables(), map[string]string{}
	for _, entry := range environ { // of two entries the later counts
		key, value, _ := strings.Cut(entry, "=")
		if strings.HasPrefix(key, "PADDOCK_") && !notKeys[key] && !notOurs(key) {
			given[key] = value
		}
	}
	for _, key := range slices.Sorted(maps.Keys(given)) {
		set, found := known[key]
		if !found {
			return &Problem{Path: key, What: "unknown variable", Hint: "the head of docs/paddock.example.yaml names those that exist"}
		}
		if err := set(given[key]); err != nil {
			return &Problem{Path: key, What: err.Error(), Hint: "the variable overlays the key of the same name"}
		}
	}
	return nil
}
