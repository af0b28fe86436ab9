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
	"slices"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/paddock-ci/paddock/cmd/internal/config"
	"github.com/paddock-ci/paddock/cmd/internal/parts"
)

// version is set by the release build; a build from source says its revision.
var version = ""

func main() {
	if err := newRoot().ExecuteContext(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, "paddock:", advise(err))
		os.Exit(exitStatus(err))
	}
}

// globals are the flags that all commands share.
type globals struct {
	config string // path; "": PADDOCK_CONFIG's
	output string // table, wide or json
	url    string // "": PADDOCK_URL's, if there is a PADDOCK_TOKEN
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
		Version: versionText(), SilenceUsage: true, SilenceErrors: true,
		PersistentPreRunE: func(*cobra.Command, []string) error {
			if !slices.Contains(outputs, g.output) {
				return usage("-o table, wide or json", "unknown output %q", g.output)
			}
			return nil
		},
	}
	root.SetVersionTemplate("paddock {{.Version}}\n")
	flags := root.PersistentFlags()
	flags.StringVar(&g.config, "config", "", "configuration file (or PADDOCK_CONFIG)")
	flags.StringVarP(&g.output, "output", "o", "table", "table, wide or json")
	flags.StringVar(&g.url, "url", "", "the controller's URL, if it is on another machine (with PADDOCK_TOKEN)")
	flags.BoolVar(&g.debug, "debug", false, "log more")
	root.AddCommand(
		upCommand(g), controllerCommand(g), nodeCommand(g), configCommand(g),
		nodesCommand(g), vmCommand(g), imageCacheCommand(g), imageCommand(g), jobCommand(g), tokenCommand(g), macsmokeCommand(g),
		versionCommand(), roleCommand(parts.HelperRole), roleCommand(parts.GuestRole),
	)
	complete(root, "output", outputs...)
	root.InitDefaultCompletionCmd() // now, so that it is as strict as the others
	strict(root)
	return root
}

// outputs are the values of --output.
var outputs = []string{"table", "wide", "json"}

// complete gives the shell the values of a flag.
func complete(cmd *cobra.Command, flag string, values ...string) {
	if err := cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp)); err != nil {
		panic(err) // the flag is not there: a slip in this package
	}
}

// file is the configuration's path; "": there is none.
func (g *globals) file() string { return or(g.config, os.Getenv("PADDOCK_CONFIG")) }

func (g *globals) load() (*config.Config, error) { return config.Load(g.file(), os.Environ()) }

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
		Long: `Read the configuration (FILE, or what --config or PADDOCK_CONFIG name, and the environment)
and say what is wrong with it. It starts nothing and asks nobody. Notes name what is allowed
but stands in the way of a command: a key that it needs, a file that this host does not have.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				g.config = args[0]
			}
			c, err := g.load()
			if err != nil {
				return err
			}
			text := fmt.Sprintf("%s is good: fleet %s, %s\n", or(g.file(), "the environment"), c.Fleet, count(len(c.Pools), "pool"))
			for _, note := range c.Notes() {
				text += "note: " + note + "\n"
			}
			_, err = fmt.Fprint(cmd.OutOrStdout(), text)
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
		// The arguments are not for people: parts reads them.
		Use: name, Hidden: true, DisableFlagParsing: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGTERM)
			defer stop()
			if name == parts.HelperRole {
				return parts.Helper(ctx, args, os.Stdin)
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
