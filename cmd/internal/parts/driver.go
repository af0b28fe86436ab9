package parts

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/cmd/internal/config"
	"github.com/paddock-ci/paddock/vm"
	"github.com/paddock-ci/paddock/vm/helper"
	"github.com/paddock-ci/paddock/vm/process"
	"github.com/paddock-ci/paddock/vm/qemu"
	"github.com/paddock-ci/paddock/vm/vz"
)

// helperCommand is how this program starts itself as the helper of a VM: the driver is in
// its arguments, since each helper has one of its own, which is told what is to be found
// out about this host only once.
func helperCommand(ctx context.Context, c NodeConfig) ([]string, error) {
	accel := c.Node.QEMU.Accel
	if c.Node.Driver == config.DriverQEMU {
		driver, err := qemu.New(qemu.Config{Accel: accel, Network: c.Node.QEMU.Network, Log: c.Log})
		if err != nil {
			return nil, err
		}
		if accel, err = driver.Accel(ctx); err != nil {
			return nil, fmt.Errorf("find out what runs guests on this host: %w", err)
		}
	}
	return slices.Concat(c.Self, []string{HelperRole, "-driver", c.Node.Driver, "-accel", accel, "-network", c.Node.QEMU.Network}), nil
}

// Helper is the body of the hidden command that keeps one VM; args are what helperCommand
// puts after the role.
func Helper(ctx context.Context, args []string, stdin io.Reader) error {
	flags := flag.NewFlagSet(HelperRole, flag.ContinueOnError)
	flags.SetOutput(io.Discard) // an error says it
	name := flags.String("driver", config.DriverProcess, "")
	q := config.QEMU{}
	flags.StringVar(&q.Accel, "accel", "", "")
	flags.StringVar(&q.Network, "network", "", "")
	if err := flags.Parse(args); err != nil {
		return fmt.Errorf("vm helper: %w", err)
	}
	driver, err := Driver(*name, q, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	if err != nil {
		return err
	}
	return helper.Main(ctx, driver, stdin)
}

// Driver makes a driver by its name in the configuration.
func Driver(name string, q config.QEMU, log *slog.Logger) (vm.Driver, error) {
	switch name {
	case config.DriverQEMU:
		return qemu.New(qemu.Config{Accel: q.Accel, Network: q.Network, CloneFile: cache.CloneFile, Log: log})
	case config.DriverVZ:
		return vz.New(vz.Config{CloneFile: cache.CloneFile, Log: log})
	case config.DriverProcess:
		self, err := os.Executable()
		if err != nil {
			return nil, err
		}
		return process.New(process.Config{Command: []string{self, GuestRole}, Log: log})
	}
	return nil, fmt.Errorf("unknown driver %q", name)
}
