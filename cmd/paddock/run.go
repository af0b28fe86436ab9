package main

import (
	"context"
	"fmt"
	"os"
	"slices"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/paddock-ci/paddock/cmd/internal/config"
	"github.com/paddock-ci/paddock/cmd/internal/parts"
)

func upCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use: "up", Short: "Run controller and node in one process, on the embedded store", Args: cobra.NoArgs,
		Long: `Run controller and node in one process. Without redis in the configuration the store is
embedded, and there is nothing else to install. This machine joins by itself.

Ctrl-C tears its VMs down; SIGTERM, which service managers send, leaves them running for
the next start to take over.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := g.loadFor(cmd)
			if err != nil {
				return err
			}
			ctx, stop, end := untilSignal(cmd.Context())
			defer end()
			control, err := openControl(ctx, g, c)
			if err != nil {
				return err
			}
			group, ctx := errgroup.WithContext(ctx)
			// The controller ends after the node, which tells it what was torn down.
			serving, stopServing := context.WithCancel(context.WithoutCancel(ctx))
			group.Go(func() error { return control.Run(serving) })
			group.Go(func() error {
				defer stopServing()
				return runOwnNode(ctx, g, c, control, stop)
			})
			return group.Wait()
		},
	}
	addOverlays(cmd, "listen", "data", "redis", "name", "dir", "slots")
	return cmd
}

// runOwnNode joins this machine to the controller in the same process and runs it.
func runOwnNode(ctx context.Context, g *globals, c *config.Config, control *parts.Control, stop *stopped) error {
	err := control.JoinOwn(ctx, c.Node)
	if ctx.Err() != nil {
		return nil // asked to stop meanwhile
	}
	if err != nil {
		return fmt.Errorf("join this machine: %w", err)
	}
	return runNode(ctx, g, c, stop)
}

func runNode(ctx context.Context, g *globals, c *config.Config, stop *stopped) error {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program: %w", err)
	}
	n, err := parts.NewNode(ctx, parts.NodeConfig{Node: c.Node, Self: []string{self}, Version: versionText(), Keep: stop.keepVMs, Log: g.log()})
	if err != nil {
		return err
	}
	return n.Run(ctx)
}

func openControl(ctx context.Context, g *globals, c *config.Config) (*parts.Control, error) {
	control, err := parts.NewControl(parts.ControlConfig{Config: c, Version: versionText(), Log: g.log()})
	if err != nil {
		return nil, err
	}
	if err := control.Open(ctx); err != nil {
		return nil, err
	}
	g.log().Info("ready for GitHub", "webhook", control.URL()+parts.WebhookPath, "pools", len(c.Pools))
	if len(c.Pools) == 0 {
		g.log().Warn("there are no pools: jobs are taken in, but none runs (see docs/paddock.example.yaml)")
	}
	return control, nil
}

func controllerCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use: "controller", Short: "Run the controller; nodes join it", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := g.loadFor(cmd)
			if err != nil {
				return err
			}
			ctx, _, end := untilSignal(cmd.Context())
			defer end()
			control, err := openControl(ctx, g, c)
			if err != nil {
				return err
			}
			return control.Run(ctx)
		},
	}
	addOverlays(cmd, "listen", "data", "redis")
	return cmd
}

func nodeCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{
		Use: "node", Short: "Run this machine's agent", Args: cobra.NoArgs,
		Long: `Run this machine's agent. It must have joined a controller before.

Ctrl-C tears its VMs down; SIGTERM, which service managers send, leaves them running for
the next start to take over.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := g.loadFor(cmd)
			if err != nil {
				return err
			}
			ctx, stop, end := untilSignal(cmd.Context())
			defer end()
			return runNode(ctx, g, c, stop)
		},
	}
	addOverlays(cmd, "data", "name", "dir", "slots")
	var url string
	join := &cobra.Command{
		Use: "join TOKEN", Short: "Join a controller with a one-time token; - reads it from standard input", Args: cobra.ExactArgs(1),
		Long: `Join a controller with a one-time token from: paddock token create --node NAME

A token on the command line can be seen by this host's other users for a moment; "-" reads
it from standard input.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := g.loadFor(cmd)
			if err != nil {
				return err
			}
			token := args[0]
			if token == "-" {
				if _, err := fmt.Fscan(cmd.InOrStdin(), &token); err != nil {
					return fmt.Errorf("read the token from standard input: %w (hint: paddock token create --node NAME | paddock node join -)", err)
				}
			}
			if err := parts.Join(cmd.Context(), c.Node, token, or(url, g.url)); err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "node %s has joined; start it with: paddock node\n", c.Node.Name)
			return err
		},
	}
	join.Flags().StringVar(&url, "controller", "", "the controller's `URL` as seen from here, if the token's is another")
	addOverlays(join, "data", "name", "dir")
	cmd.AddCommand(join, installCommand(g), uninstallCommand(g), doctorCommand(g))
	return cmd
}

// overlay is a flag that overlays the configuration, and the variable that does the same.
type overlay struct{ flag, variable, usage string }

var overlays = []overlay{
	{"listen", "PADDOCK_LISTEN", "where the controller listens, `host:port` (key listen)"},
	{"data", "PADDOCK_DATA", "`directory` of ledger, fleet key and embedded store (key data)"},
	{"redis", "PADDOCK_REDIS", "`URL` of Redis (key redis; prefer PADDOCK_REDIS if it has a password)"},
	{"name", "PADDOCK_NODE_NAME", "the node's `name` (key node.name)"},
	{"dir", "PADDOCK_NODE_DIR", "`directory` of images, clones and journal (key node.dir)"},
	{"slots", "PADDOCK_NODE_SLOTS", "`number` of VMs at once (key node.slots)"},
}

// addOverlays adds the named ones.
func addOverlays(cmd *cobra.Command, flags ...string) {
	for _, o := range overlays {
		switch {
		case !slices.Contains(flags, o.flag):
		case o.flag == "slots":
			cmd.Flags().Int(o.flag, 0, o.usage)
		default:
			cmd.Flags().String(o.flag, "", o.usage)
		}
	}
}

// loadFor reads the configuration with the command's flags as the last overlay.
func (g *globals) loadFor(cmd *cobra.Command) (*config.Config, error) {
	environ := os.Environ()
	for _, o := range overlays {
		if f := cmd.Flags().Lookup(o.flag); f != nil && f.Changed {
			environ = append(environ, o.variable+"="+f.Value.String())
		}
	}
	return config.Load(g.file(), environ)
}
