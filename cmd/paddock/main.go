// Command paddock is Paddock: the controller, the node's agent and the command line
// that asks them. It reads the configuration, builds the parts, and runs them; every
// decision is in the packages below.
//
// It does not carry the simulated GitHub or the test registry (those are in
// paddock-demo). People call it, service managers do, and it calls itself: as the
// helper that keeps a VM, and as the guest in a machine of the process driver.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/paddock-ci/paddock/cmd/internal/config"
	"github.com/paddock-ci/paddock/cmd/internal/parts"
)

// version is set by the release build; a build from source says its revision.
var version = ""

func main() {
	if err := newRoot().ExecuteContext(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, "paddock:", err)
		os.Exit(1)
	}
}

// globals are the flags that all commands share.
type globals struct {
	config string // path
	output string // table, wide or json
	url    string
	debug  bool
}

func newRoot() *cobra.Command {
	g := &globals{}
	root := &cobra.Command{
		Use:   "paddock",
		Short: "Warm macOS runners for GitHub Actions, on the Mac where the job can start soonest",
		Long: `Paddock takes queued GitHub Actions jobs by webhook, picks the Mac on which each can start
soonest, starts an ephemeral VM with a just-in-time runner there, and destroys it after the job.

  paddock up          everything in one process: a single Mac, nothing to install
  paddock controller  the controller alone; nodes join it
  paddock node        this machine's agent`,
		SilenceUsage: true, SilenceErrors: true,
	}
	flags := root.PersistentFlags()
	flags.StringVar(&g.config, "config", os.Getenv("PADDOCK_CONFIG"), "configuration file (or PADDOCK_CONFIG)")
	flags.StringVarP(&g.output, "output", "o", "table", "table, wide or json")
	flags.StringVar(&g.url, "url", "", "the controller's URL, if the command line is on another machine (with PADDOCK_TOKEN)")
	flags.BoolVar(&g.debug, "debug", false, "log more")
	root.AddCommand(
		upCommand(g), controllerCommand(g), nodeCommand(g), configCommand(g),
		nodesCommand(g), vmCommand(g), imageCacheCommand(g), jobCommand(g), tokenCommand(g),
		versionCommand(), roleCommand(parts.HelperRole), roleCommand(parts.GuestRole),
	)
	return root
}

func (g *globals) load() (*config.Config, error) { return config.Load(g.config, os.Environ()) }

func (g *globals) log() *slog.Logger {
	level := slog.LevelInfo
	if g.debug {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), "paddock", versionText())
			return err
		},
	}
}

func versionText() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				return "devel-" + s.Value[:min(12, len(s.Value))]
			}
		}
	}
	return "devel"
}

func configCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{Use: "config", Short: "The configuration"}
	cmd.AddCommand(&cobra.Command{
		Use: "check [FILE]", Short: "Read the configuration and say what is wrong with it; starts nothing", Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				g.config = args[0]
			}
			c, err := g.load()
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s is good: fleet %s, %d pools\n", or(g.config, "the environment"), c.Fleet, len(c.Pools))
			return err
		},
	})
	return cmd
}

func or(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

// roleCommand is a hidden command by which Paddock starts itself.
func roleCommand(name string) *cobra.Command {
	return &cobra.Command{
		Use: name, Hidden: true, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGTERM)
			defer stop()
			if name == parts.HelperRole {
				return parts.Helper(ctx, os.Stdin)
			}
			return parts.Guest(ctx)
		},
	}
}

// stopped tells how this process was asked to stop.
type stopped struct{ bySignal os.Signal }

// keepVMs: a service manager's SIGTERM is a restart or an upgrade, and VMs go on; a
// person's Ctrl-C tears down.
func (s *stopped) keepVMs() bool { return s.bySignal == syscall.SIGTERM }

// untilSignal returns a context that ends at Ctrl-C or SIGTERM. A second signal ends the
// process at once.
func untilSignal(ctx context.Context) (context.Context, *stopped, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	s := &stopped{}
	done := make(chan struct{})
	go func() {
		defer close(done)
		select {
		case s.bySignal = <-signals:
			signal.Stop(signals) // the next one has its usual effect
			cancel(errors.New("asked to stop by " + s.bySignal.String()))
		case <-ctx.Done():
		}
	}()
	return ctx, s, func() { cancel(nil); <-done; signal.Stop(signals) }
}
