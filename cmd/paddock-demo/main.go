// Command paddock-demo shows the whole way of a job on one machine, with nothing
// installed: a simulated GitHub and a registry, a controller with the embedded store, and
// three nodes whose VMs are child processes, or with -driver qemu real machines. It queues twelve jobs by signed webhooks,
// shows each on its way, and proves that nothing is left when they are done.
//
// It is not the product: the simulated GitHub and the registry are in this binary so
// that they are not in the other. Run it by "make demo".
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/paddock-ci/paddock/cmd/internal/config"
	"github.com/paddock-ci/paddock/cmd/internal/parts"
	"github.com/paddock-ci/paddock/github/githubtest/testrunner"
)

func main() {
	// The demo's own process plays all roles: it is started again as the helper of a VM,
	// as the guest in it, and as the runner in that.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if len(os.Args) > 1 {
		if role := roles[os.Args[1]]; role != nil {
			os.Exit(role(ctx, os.Args[2:]))
		}
	}
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

var roles = map[string]func(ctx context.Context, args []string) int{
	parts.HelperRole: func(ctx context.Context, args []string) int {
		return failed(os.Stderr, parts.Helper(ctx, args, os.Stdin))
	},
	parts.GuestRole: func(ctx context.Context, _ []string) int { return failed(os.Stderr, parts.Guest(ctx)) },
	"runner": func(ctx context.Context, _ []string) int {
		code, err := testrunner.Run(ctx, os.Stdin, os.Stdout)
		if err != nil {
			return failed(os.Stderr, err)
		}
		return code
	},
}

func failed(errOut io.Writer, err error) int {
	if err == nil {
		return 0
	}
	fmt.Fprintln(errOut, "paddock-demo:", err)
	return 1
}

// run is the demo from flags to exit status: 0 only if every job succeeded and the
// house is clean.
func run(ctx context.Context, args []string, out, errOut io.Writer) int {
	flags := flag.NewFlagSet("paddock-demo", flag.ContinueOnError)
	flags.SetOutput(errOut)
	asJSON := flags.Bool("json", false, "print the result as JSON, for machines")
	driver := flags.String("driver", config.DriverProcess, "what VMs are: process (child processes) or qemu (real machines; Linux, with Go and QEMU installed)")
	verbose := flags.Bool("v", false, "log what the parts do, on standard error")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return 0
		}
		return 2
	}
	machines := kinds[*driver]
	if machines == nil {
		fmt.Fprintf(errOut, "paddock-demo: no driver %q here: process or qemu\n", *driver)
		return 2
	}
	d := &demo{out: out, errOut: errOut, json: *asJSON, verbose: *verbose, kind: machines}
	result, err := d.play(ctx)
	if err != nil && result == nil {
		return failed(errOut, err)
	}
	if d.json {
		err = errors.Join(err, result.writeJSON(out))
	} else {
		result.write(out)
	}
	if err != nil {
		return failed(errOut, err)
	}
	if !result.Good() {
		return 1
	}
	return 0
}
