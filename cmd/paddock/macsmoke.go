package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/paddock-ci/paddock/cmd/internal/config"
	"github.com/paddock-ci/paddock/cmd/internal/host"
	"github.com/paddock-ci/paddock/cmd/internal/parts"
	"github.com/paddock-ci/paddock/cmd/internal/smoke"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/vm"
	"github.com/paddock-ci/paddock/vm/helper"
)

// macGuests is how many macOS guests one Mac runs at once, by Apple's licence and code.
const macGuests = 2

// smokeFlags are what a person says of a trial.
type smokeFlags struct {
	image     string // directory
	linux     string // KERNEL,INITRD
	bootstrap string // "": agent for --linux, ssh else
	user      string
	password  string // a file that holds it
	dir       string // "": beside the image
	cpu       int
	memory    config.Size
}

func macsmokeCommand(g *globals) *cobra.Command {
	f := &smokeFlags{}
	cmd := &cobra.Command{
		Use: "macsmoke", Short: "Try the driver for Macs on this Mac, and report", Args: cobra.NoArgs,
		Long: `Try everything that Paddock does with machines on this Mac, one step after another, and print a
report: the host, then boot, answer, command, clock, addresses, as many machines as fit and one
more, save, resume, destroy, and what is left over. Each step is ok, failed (with what to do)
or skipped (with the reason). The exit status is 0 if nothing failed.

--image names a directory with disk.img, nvram.bin and config.json: what "paddock image create"
makes, or one of those in a node's directory. It is cloned, not changed. By default the guest is
reached by SSH, as a stock image's admin. --linux boots a Linux kernel and an initial RAM disk
with Paddock's agent instead. Without either, only the host is looked at.

Stop a node on this host first: its machines take the slots. docs/first-mac.md says what
comes before and what each failure means.`,
		Example: "paddock macsmoke --image ~/images/macos -o json >report.json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := f.check(runtime.GOOS, runtime.GOARCH); err != nil {
				return err
			}
			ctx, _, end := untilSignal(cmd.Context())
			defer end()
			return macsmoke(ctx, cmd, g, f)
		},
	}
	cmd.Flags().StringVar(&f.image, "image", "", "directory of the image to boot")
	cmd.Flags().StringVar(&f.linux, "linux", "", "KERNEL,INITRD: files of a Linux guest to boot instead")
	cmd.Flags().StringVar(&f.bootstrap, "bootstrap", "", "how the guest is reached: agent or ssh (default ssh; agent for --linux)")
	cmd.Flags().StringVar(&f.user, "user", fleet.StockLogin.User, "the guest's account for SSH")
	cmd.Flags().StringVar(&f.password, "password-file", "", "file with its password (default: that of stock images)")
	cmd.Flags().StringVar(&f.dir, "dir", "", "where to put clones, on the image's volume (default: beside the image)")
	cmd.Flags().IntVar(&f.cpu, "cpu", 0, "cores per machine (default: what the image says)")
	cmd.Flags().Var(&f.memory, "memory", "memory per machine (default: what the image says)")
	complete(cmd, "bootstrap", string(fleet.BootstrapAgent), string(fleet.BootstrapSSH))
	return cmd
}

// check finds what is wrong with the flags, and settles what they leave open.
func (f *smokeFlags) check(system, arch string) error {
	switch {
	case system != "darwin" || arch != "arm64":
		return usage(onMacs, "paddock macsmoke needs an Apple Silicon Mac, this is %s/%s", system, arch)
	case f.image != "" && f.linux != "":
		return usage("give one of them", "--image and --linux are two guests")
	case f.linux != "" && strings.Count(f.linux, ",") != 1:
		return usage("--linux KERNEL,INITRD", "%q does not name two files", f.linux)
	}
	if f.bootstrap == "" {
		f.bootstrap = string(fleet.BootstrapSSH)
		if f.linux != "" {
			f.bootstrap = string(fleet.BootstrapAgent)
		}
	}
	if f.bootstrap != string(fleet.BootstrapSSH) && f.bootstrap != string(fleet.BootstrapAgent) {
		return usage("agent or ssh", "unknown bootstrap %q", f.bootstrap)
	}
	return nil
}

// smokeReport is what is printed.
type smokeReport struct {
	Version string         `json:"version"`
	At      time.Time      `json:"at"`
	Image   string         `json:"image,omitempty"` // its directory, or the kernel's file
	Host    []host.Finding `json:"host"`
	Steps   []smoke.Result `json:"steps"`
}

// failed counts what failed, of the host and of the steps.
func (r smokeReport) failed() (n int) {
	for _, f := range r.Host {
		if f.Result == host.Fail {
			n++
		}
	}
	for _, s := range r.Steps {
		if s.Outcome == smoke.Failed {
			n++
		}
	}
	return n
}

// macsmoke looks at the host and tries the driver in helpers, as a node would.
func macsmoke(ctx context.Context, cmd *cobra.Command, g *globals, f *smokeFlags) (err error) {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program: %w", err)
	}
	// Short, since sockets are made in it: TMPDIR of macOS alone has half of a path's room.
	runtimeDir, err := os.MkdirTemp("/tmp", "paddock-smoke-")
	if err != nil {
		return fmt.Errorf("make a directory for the helpers: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(runtimeDir)) }()
	driver, err := helper.New(helper.Config{Command: []string{self, parts.HelperRole, "-driver", config.DriverVZ}, Dir: runtimeDir, Log: g.log()})
	if err != nil {
		return err
	}
	here := host.This()
	here.Memory = parts.HostMemory()
	return trySmoke(ctx, cmd, g, f, smokeParts{
		driver: driver, host: here, self: self, dir: runtimeDir,
		left: func(ctx context.Context) ([]string, error) { return machinesHere(ctx, here, driver) },
	})
}

// smokeParts are what a trial is made with; tests give others.
type smokeParts struct {
	driver vm.Driver
	host   host.Machine
	self   string                                      // this program's path
	dir    string                                      // the helpers', also for guests' host keys
	left   func(ctx context.Context) ([]string, error) // what there is of machines
}

// parent is where the directory of clones is made.
func (f *smokeFlags) parent() string {
	kernel, _, _ := strings.Cut(f.linux, ",")
	switch {
	case f.dir != "":
		return f.dir
	case or(f.image, kernel) != "":
		return filepath.Dir(filepath.Clean(or(f.image, kernel)))
	}
	return "."
}

// trySmoke makes the report and prints it.
func trySmoke(ctx context.Context, cmd *cobra.Command, g *globals, f *smokeFlags, p smokeParts) (err error) {
	report := smokeReport{Version: versionText(), At: time.Now().UTC().Truncate(time.Second), Image: or(f.image, f.linux), Steps: []smoke.Result{}}
	report.Host = examine(ctx, p.host, p.self, f.parent(), p.dir)
	if report.Image == "" {
		report.Steps = append(report.Steps, smoke.Result{
			Step: "all", Outcome: smoke.Skipped, Detail: "no guest to boot: give --image or --linux; paddock image create makes an image",
		})
		return printSmoke(cmd, g, report)
	}
	// The host's part of the report is what says why nothing could be tried.
	begin := func(err error) error {
		report.Steps = append(report.Steps, smoke.NotBegun(err))
		return printSmoke(cmd, g, report)
	}
	c, remove, err := f.trial(p)
	if err != nil {
		return begin(err)
	}
	defer func() { err = errors.Join(err, remove()) }()
	if g.output != "json" {
		c.Told = func(r smoke.Result) { fmt.Fprintf(cmd.ErrOrStderr(), "%s: %s\n", r.Step, r.Outcome) }
	}
	if report.Steps, err = smoke.Run(ctx, c); err != nil {
		return begin(err)
	}
	return printSmoke(cmd, g, report)
}

// printSmoke prints the report; the error counts what failed.
func printSmoke(cmd *cobra.Command, g *globals, r smokeReport) error {
	if err := writeSmoke(cmd, g, r); err != nil {
		return err
	}
	if n := r.failed(); n > 0 {
		return fmt.Errorf("%s failed (hint: the report says what to do about each; docs/first-mac.md says more)", count(n, "check"))
	}
	return nil
}

func writeSmoke(cmd *cobra.Command, g *globals, r smokeReport) error {
	if g.output == "json" {
		return writeJSON(cmd.OutOrStdout(), r)
	}
	w := cmd.OutOrStdout()
	fmt.Fprintf(w, "paddock %s, %s, image %s\n\n", r.Version, r.At.Format(time.RFC3339), or(r.Image, "none"))
	if err := show(cmd, g, r.Host, findingColumns); err != nil {
		return err
	}
	fmt.Fprintln(w)
	if err := show(cmd, g, r.Steps, smokeColumns); err != nil {
		return err
	}
	for _, s := range r.Steps {
		if s.Advice != "" {
			fmt.Fprintf(w, "\n%s: %s\n  %s\n", s.Step, s.Detail, s.Advice)
		}
	}
	return nil
}

var smokeColumns = []column[smoke.Result]{
	{"STEP", false, func(r smoke.Result) string { return r.Step }},
	{"OUTCOME", false, func(r smoke.Result) string { return string(r.Outcome) }},
	{"SECONDS", false, func(r smoke.Result) string {
		if r.Seconds == 0 {
			return ""
		}
		return fmt.Sprintf("%.2f", r.Seconds)
	}},
	{"DETAIL", false, func(r smoke.Result) string { return r.Detail }},
}
