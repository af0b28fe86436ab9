package config

import (
	"fmt"
	"os"
	"strings"
)

// Notes names what is no mistake in the file but to be known, each in one line: keys that
// the controller needs, files that this host does not have or that others may read, a
// network in which jobs reach more than most people think. It opens the files and keeps
// nothing of them.
func (c *Config) Notes() []string {
	var notes, missing []string
	g := c.GitHub
	for _, need := range []struct {
		key   string
		there bool
	}{
		{"github.app_id", g.AppID != 0}, {"github.private_key_file", g.PrivateKeyFile != ""}, {"github.webhook_secret_files", len(g.WebhookSecretFiles) > 0},
	} {
		if !need.there {
			missing = append(missing, need.key)
		}
	}
	if len(missing) > 0 {
		notes = append(notes, fmt.Sprintf("paddock up and paddock controller also need %s (see docs/github-app.md)", strings.Join(missing, ", ")))
	}
	if len(c.Pools) == 0 {
		notes = append(notes, "there are no pools: jobs are taken in, but none runs (see docs/paddock.example.yaml)")
	}
	if c.Node.Driver == DriverQEMU && c.Node.QEMU.Network == NetworkUser {
		notes = append(notes, "node.qemu.network: with user, jobs reach whatever listens on this host's loopback; with passt they do not (see docs/machines.md)")
	}
	secrets := map[string][]string{
		"github.private_key_file": {g.PrivateKeyFile}, "github.webhook_secret_files": g.WebhookSecretFiles, "tls.key": {c.TLS.Key},
	}
	for _, p := range c.Pools {
		secrets["pools.ssh"] = append(secrets["pools.ssh"], p.SSH.PasswordFile, p.SSH.KeyFile)
	}
	for _, key := range []string{"github.private_key_file", "github.webhook_secret_files", "tls.key", "pools.ssh"} {
		for _, path := range secrets[key] {
			if note := lookAt(path); note != "" {
				notes = append(notes, key+": "+note)
			}
		}
	}
	return notes
}

// lookAt says what is wrong with a secret's file; "" also for no file.
func lookAt(path string) string {
	if path == "" {
		return ""
	}
	f, err := os.Open(path)
	if err != nil {
		return err.Error()
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	switch {
	case err != nil:
		return err.Error()
	case info.IsDir():
		return path + " is a directory"
	case info.Size() == 0:
		return path + " is empty"
	case info.Mode().Perm()&0o077 != 0:
		return fmt.Sprintf("%s may be read by other users of this host (chmod 600 %s)", path, path)
	}
	return ""
}
