package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/cmd/internal/config"
	"github.com/paddock-ci/paddock/vm"
	"github.com/paddock-ci/paddock/vm/vz"
)

// onMacs is what people can do about a command for Macs on another host.
const onMacs = "run it on an Apple Silicon Mac, with a program built there: make build sign"

func imageCommand(g *globals) *cobra.Command {
	cmd := &cobra.Command{Use: "image", Short: "Images of machines on this host"}
	cmd.AddCommand(
		imagePullCommand(g), imageListCommand(g), imageInspectCommand(g), imageVerifyCommand(g), imageRemoveCommand(g),
		imagePushCommand(g), imageImportCommand(g), imageCreateCommand(g, vz.Install),
	)
	for _, c := range cmd.Commands() {
		tellFailure(g, c)
	}
	return cmd
}

// aboutFailure is what the commands' help says of that object.
const aboutFailure = `That of a failure has state failed or interrupted, error, and class if there is one: auth,
not-found, network, disk, digest or format.`

// ending is the last line of --json of a command that failed.
type ending struct {
	State string      `json:"state"`
	Class cache.Class `json:"class,omitempty"`
	Error string      `json:"error,omitempty"`
}

func endingOf(err error) ending {
	if i := (*interruptedError)(nil); errors.As(err, &i) {
		return ending{State: "interrupted", Error: advise(err)}
	}
	return ending{State: "failed", Class: classOf(err), Error: advise(err)}
}

// tellFailure makes a command's --json say on standard output that it failed, too, unless
// the command line is wrong or the command has said so itself.
func tellFailure(g *globals, c *cobra.Command) {
	run := c.RunE
	c.RunE = func(cmd *cobra.Command, args []string) error {
		err := run(cmd, args)
		said, wrong := (*toldError)(nil), (*usageError)(nil)
		if err == nil || g.output != "json" || errors.As(err, &said) || errors.As(err, &wrong) {
			return err
		}
		return errors.Join(err, writeLine(cmd, endingOf(err)))
	}
}

// toldError is one of which standard output has all that programs need.
type toldError struct{ error }

func (e *toldError) Unwrap() error { return e.error }

// writeLine writes an object on a line of its own.
func writeLine(cmd *cobra.Command, value any) error {
	return json.NewEncoder(cmd.OutOrStdout()).Encode(value)
}

// latest is the value of --ipsw that stands for no file.
const latest = "latest"

// imageCreateCommand makes images by install, which is vz's but for tests.
func imageCreateCommand(g *globals, install func(context.Context, vz.InstallConfig) error) *cobra.Command {
	var (
		c            vz.InstallConfig
		disk, memory config.Size
	)
	cmd := &cobra.Command{
		Use: "create DIR", Short: "Install macOS into a new image", Args: cobra.ExactArgs(1),
		Long: `Install macOS from one of Apple's restore images (IPSW) into DIR, which is made: disk.img,
nvram.bin and config.json. It runs on an Apple Silicon Mac only, takes 10 to 30 minutes, and
needs a free machine slot. With --ipsw latest the newest restore image that this Mac can run is
fetched first, about 15 GB, and removed afterwards.

The system is as Apple ships it: its first boot asks for language and account. A stock image
from a registry has that behind it, and an account that lets Paddock in.`,
		Example: "paddock image create --ipsw latest --disk 80GB ~/images/macos",
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case c.IPSW == "":
				return usage("--ipsw latest, or the path of a restore image", "%s needs --ipsw", cmd.CommandPath())
			case c.CPU < 0:
				return usage("leave it out for what macOS needs", "%d cores", c.CPU)
			}
			dir, err := filepath.Abs(args[0])
			if err != nil {
				return err
			}
			c.Dir, c.DiskSize, c.Memory = dir, int64(disk), int64(memory)
			if c.IPSW == latest {
				c.IPSW = ""
			} else if _, err := os.Stat(c.IPSW); err != nil {
				return usage("the path of a restore image, or latest", "no restore image: %v", err)
			}
			ctx, _, end := untilSignal(cmd.Context())
			defer end()
			return createImage(ctx, cmd, g, install, c)
		},
	}
	cmd.Flags().StringVar(&c.IPSW, "ipsw", "", "restore image: a file, or latest (needed)")
	cmd.Flags().Var(&disk, "disk", "size of the image's disk, of which only what is written takes room (default 64GB)")
	cmd.Flags().IntVar(&c.CPU, "cpu", 0, "cores of the image's machines (default 4, or what the system needs)")
	cmd.Flags().Var(&memory, "memory", "memory of the image's machines (default 8GiB, or what the system needs)")
	jsonFlag(cmd, g)
	return cmd
}

// createImage shows how an installation goes, on standard error, and what it made.
func createImage(ctx context.Context, cmd *cobra.Command, g *globals, install func(context.Context, vz.InstallConfig) error, c vz.InstallConfig) error {
	start := time.Now()
	bar := g.progress(cmd, filepath.Base(c.Dir), inParts)
	const whole = 1000 // the installer tells of parts of one
	c.Progress = func(done float64) { bar.tell(int64(done*whole), whole) }
	err := install(ctx, c)
	bar.end()
	switch {
	case errors.Is(err, vz.ErrPlatform):
		return usage(onMacs, "%s needs an Apple Silicon Mac", cmd.CommandPath())
	case err != nil && ctx.Err() != nil:
		return fmt.Errorf("interrupted: %w", err)
	case err != nil:
		return err
	}
	info, err := os.Stat(filepath.Join(c.Dir, vm.DiskFile))
	if err != nil {
		return fmt.Errorf("looking at what was made: %w", err)
	}
	made, err := vm.ReadConfig(c.Dir)
	if err != nil {
		return fmt.Errorf("looking at what was made: %w", err)
	}
	if g.output == "json" {
		return writeJSON(cmd.OutOrStdout(), map[string]any{
			"dir": c.Dir, "disk": info.Size(), "cpu": made.CPUCount, "memory": made.MemorySize, "seconds": time.Since(start).Round(time.Second).Seconds(),
		})
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: a disk of %s, %s, %s of memory, made in %s\n",
		c.Dir, size(info.Size()), count(made.CPUCount, "core"), size(made.MemorySize), short(time.Since(start)))
	return err
}
