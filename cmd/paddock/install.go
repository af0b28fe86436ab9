package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/paddock-ci/paddock/cmd/internal/config"
	"github.com/paddock-ci/paddock/cmd/internal/parts"
	"github.com/paddock-ci/paddock/cmd/internal/service"
)

func installCommand(g *globals) *cobra.Command {
	printOnly := false
	cmd := &cobra.Command{
		Use: "install", Short: "Have this machine's agent run now and at every login", Args: cobra.NoArgs,
		Long: `Have this machine's agent run now and at every login: as a LaunchAgent on macOS, as a systemd
user unit on Linux, both of the user who runs this. It must have joined a controller before.

The agent gets this configuration and these flags, the name that it joined under, and what this
environment says of the node (PADDOCK_NODE_…) and of the proxy. Run it again with others to change
them. Restarts and upgrades of the agent leave its VMs running.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := g.loadFor(cmd)
			if err != nil {
				return err
			}
			s, err := agentService(g, cmd, c, os.Environ())
			if err != nil {
				return err
			}
			if program := s.Program(); strings.Contains(program, "/go-build") && filepath.Base(filepath.Dir(program)) == "exe" {
				return errors.New("this program is go run's and gone when it ends (hint: go install it, and run that)")
			}
			if printOnly {
				return told(cmd, g, installation{Path: s.Path(), Text: s.Text()}, s.Text())
			}
			if _, err := os.Stat(parts.CredentialPath(c.Node)); errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("node %s has not joined, so that its agent would only fail (hint: on the controller: paddock token create --node %s; here: paddock node join TOKEN)", c.Node.Name, c.Node.Name)
			}
			outcome, err := s.Install(cmd.Context())
			if err != nil {
				return fmt.Errorf("install the agent: %w", err)
			}
			return told(cmd, g, installation{Outcome: string(outcome), Path: s.Path(), Notes: s.Notes()}, "")
		},
	}
	cmd.Flags().BoolVar(&printOnly, "print", false, "only show the file that would be installed")
	addOverlays(cmd, agentOverlays...)
	return cmd
}

func uninstallCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use: "uninstall", Short: "Stop this machine's agent and have it start no more", Args: cobra.NoArgs,
		Long: `Stop this machine's agent and have it start no more. What "install" made is removed, and its
log on macOS with it; images, credential and the VMs that run stay. To have none run, cordon
the node first, and wait until "paddock vm list" shows none.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, unread := g.load() // only to look for VMs: a broken one must not keep the agent installed
			if unread != nil {
				c = &config.Config{}
			}
			s, err := agentService(g, cmd, c, nil) // nothing of it is started
			if err != nil {
				return err
			}
			found, err := s.Uninstall(cmd.Context())
			if err != nil {
				return fmt.Errorf("uninstall the agent: %w", err)
			}
			done := installation{Outcome: "there was nothing installed"}
			if found {
				done = installation{Outcome: "removed", Path: s.Path()}
			}
			if n := folders(parts.HelpersDir(c.Node)); n > 0 {
				done.Notes = append(done.Notes, fmt.Sprintf("%s of this node may still run; to end what runs: paddock node, and Ctrl-C once it is up", count(n, "VM")))
			}
			return told(cmd, g, done, "")
		},
	}
}

// installation is what -o json says of one.
type installation struct {
	Outcome string   `json:"outcome,omitempty"` // as for people; "": it was only shown
	Path    string   `json:"path,omitempty"`    // of the service manager's file
	Notes   []string `json:"notes,omitempty"`
	Text    string   `json:"text,omitempty"` // of the file, where it was only shown
}

// told says what was done, for people in a text of its own, if there is one.
func told(cmd *cobra.Command, g *globals, done installation, text string) error {
	if g.output == "json" {
		return writeJSON(cmd.OutOrStdout(), done)
	}
	if text == "" {
		text = done.Outcome
		if done.Path != "" {
			text += ": " + done.Path
		}
		text += "\n"
		for _, note := range done.Notes {
			text += "note: " + note + "\n"
		}
	}
	_, err := fmt.Fprint(cmd.OutOrStdout(), text)
	return err
}

// folders counts those in a directory; one that is not there has none.
func folders(dir string) int {
	entries, _ := os.ReadDir(dir)
	n := 0
	for _, e := range entries {
		if e.IsDir() {
			n++
		}
	}
	return n
}

// agentOverlays are the flags of the agent that "install" hands on.
var agentOverlays = []string{"data", "name", "dir", "slots"}

// agentService is the agent as it is started here, in this environment, for the service
// manager: which has another working directory and another environment.
func agentService(g *globals, cmd *cobra.Command, c *config.Config, environ []string) (*service.Service, error) {
	program, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find this program: %w", err)
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return nil, fmt.Errorf("find the home directory: %w", err)
	}
	s := service.Config{OS: runtime.GOOS, Home: home, ConfigHome: os.Getenv("XDG_CONFIG_HOME"), UID: os.Getuid(), Program: program, Args: []string{"node"}}
	if file := g.file(); file != "" {
		if file, err = filepath.Abs(file); err != nil {
			return nil, fmt.Errorf("find the configuration: %w", err)
		}
		s.Env = append(s.Env, service.Variable{Name: "PADDOCK_CONFIG", Value: file})
	}
	handed, err := handedOn(environ)
	if err != nil {
		return nil, err
	}
	s.Env = append(s.Env, handed...)
	// A host's name may change with its network; the credential is for the name it had.
	values := map[string]string{"name": c.Node.Name}
	for _, o := range overlays {
		if value := os.Getenv(o.variable); value != "" {
			values[o.flag] = value
		}
		if f := cmd.Flags().Lookup(o.flag); f != nil && f.Changed {
			values[o.flag] = f.Value.String()
		}
	}
	if c.Node.Dir != "" && !filepath.IsAbs(c.Node.Dir) {
		values["dir"] = c.Node.Dir
	}
	for _, flag := range agentOverlays {
		value := values[flag]
		if value == "" {
			continue
		}
		if flag == "data" || flag == "dir" {
			if value, err = filepath.Abs(value); err != nil {
				return nil, fmt.Errorf("find %s: %w", flag, err)
			}
		}
		s.Args = append(s.Args, "--"+flag, value)
	}
	return service.New(s)
}

// proxies are the variables by which Go's HTTP clients find a proxy, in capitals; each is
// known in small letters, too.
var proxies = []string{"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"}

// handedOn is what of an environment the agent needs as well, in a fixed order. What is a
// flag of the agent is handed on as that.
func handedOn(environ []string) (handed []service.Variable, err error) {
	isFlag := func(name string) bool {
		return slices.ContainsFunc(overlays, func(o overlay) bool { return o.variable == name })
	}
	for _, entry := range slices.Sorted(slices.Values(environ)) {
		name, value, _ := strings.Cut(entry, "=")
		proxy := slices.Contains(proxies, strings.ToUpper(name))
		switch {
		case value == "":
		case proxy && hasPassword(value):
			return nil, fmt.Errorf("%s has a password, which others on this host could read in the service manager's file (hint: install with a proxy that asks for none, or with NO_PROXY and without %s)", name, name)
		case proxy, name == "XDG_STATE_HOME", strings.HasPrefix(name, "PADDOCK_NODE_") && !isFlag(name):
			handed = append(handed, service.Variable{Name: name, Value: value})
		}
	}
	return handed, nil
}

// hasPassword reports whether a proxy's address names who asks; one without a scheme is
// understood as well.
func hasPassword(proxy string) bool {
	_, rest, found := strings.Cut(proxy, "://")
	if !found {
		rest = proxy
	}
	authority, _, _ := strings.Cut(rest, "/")
	return strings.Contains(authority, "@")
}
