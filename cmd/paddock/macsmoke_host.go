package main

import (
	"context"
	"errors"
	"fmt"
	"os/user"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/paddock-ci/paddock/cmd/internal/smoke"
	"github.com/paddock-ci/paddock/vm"
	"github.com/paddock-ci/paddock/vm/helper"
)

const (
	// entitlement is what a program's signature must say for the framework to serve it.
	entitlement = "com.apple.security.virtualization"
	// vmService is the process in which the framework runs one machine.
	vmService = "com.apple.Virtualization.VirtualMachine"
	// leastSmokeDisk is what clones write in a trial, in bytes: three boots and a state.
	leastSmokeDisk = 20e9
)

// runner runs a program of the host and returns what it prints.
type runner func(ctx context.Context, name string, args ...string) (string, error)

// fact is one thing about the host. Its error is what is wrong, and advice what to do.
type fact struct {
	name, advice string
	look         func(ctx context.Context, run runner, self, dir string) (string, error)
}

// macFacts are what decides whether machines can run here, as far as it can be asked.
var macFacts = []fact{
	{"model", "Paddock's machines need Apple Silicon", func(ctx context.Context, run runner, _, _ string) (string, error) {
		model, err := run(ctx, "sysctl", "-n", "hw.model", "machdep.cpu.brand_string", "hw.ncpu")
		return strings.Join(strings.Split(model, "\n"), ", ") + " cores", err
	}},
	{"virtualization", "this system has no hypervisor: is it a machine itself?", func(ctx context.Context, run runner, _, _ string) (string, error) {
		has, err := run(ctx, "sysctl", "-n", "kern.hv_support")
		if err == nil && has != "1" {
			err = fmt.Errorf("kern.hv_support is %q", has)
		}
		return "the hypervisor is there", err
	}},
	{"macOS", "update to macOS 13 or newer; saved states need 14", macVersion},
	{"memory", "", func(ctx context.Context, run runner, _, _ string) (string, error) {
		text, err := run(ctx, "sysctl", "-n", "hw.memsize")
		if err != nil {
			return text, err
		}
		bytes, err := strconv.ParseInt(text, 10, 64)
		return size(bytes), err
	}},
	{"free disk", "make room, or name a directory on another volume with --dir", func(_ context.Context, _ runner, _, dir string) (string, error) {
		var stat unix.Statfs_t
		if err := unix.Statfs(dir, &stat); err != nil {
			return "", fmt.Errorf("asking for the free space of %s: %w", dir, err)
		}
		free := int64(stat.Bavail) * int64(stat.Bsize)
		if free < leastSmokeDisk {
			return "", fmt.Errorf("%s free where clones are put, less than %s", or(size(free), "nothing"), size(leastSmokeDisk))
		}
		return size(free), nil
	}},
	{"entitlement", "sign the program: make sign; then try again", func(ctx context.Context, run runner, self, _ string) (string, error) {
		said, err := run(ctx, "codesign", "-d", "--entitlements", "-", "--xml", self)
		if err == nil && !strings.Contains(said, entitlement) {
			err = fmt.Errorf("%s is not signed with %s", self, entitlement)
		}
		return entitlement, err
	}},
	{"login keychain", "log in at the screen, or: security unlock-keychain; a node runs as a logged-in user's agent for the same reason", func(ctx context.Context, run runner, _, _ string) (string, error) {
		said, err := run(ctx, "security", "show-keychain-info")
		if err != nil {
			err = fmt.Errorf("locked, or there is none: %s", or(oneLine(said), err.Error()))
		}
		return "unlocked", err
	}},
	{"session", "log in at the screen (automatic login is usual on such hosts), as the user who runs this", macSession},
	{"local network", "", func(context.Context, runner, string, string) (string, error) {
		return "macOS 15 and newer ask once, at the screen, whether this program may use it: say yes", nil
	}},
	{"other machines", "stop them, also a node's: macOS runs two guests at once, and those of this trial are two", func(ctx context.Context, run runner, _, _ string) (string, error) {
		running, err := services(ctx, run)
		if err == nil && len(running) > 0 {
			err = fmt.Errorf("%s run already", count(len(running), "machine"))
		}
		return "none", err
	}},
}

func macVersion(ctx context.Context, run runner, _, _ string) (string, error) {
	const least = 13
	version, err := run(ctx, "sw_vers", "-productVersion")
	if err != nil {
		return version, err
	}
	build, err := run(ctx, "sw_vers", "-buildVersion")
	if err != nil {
		return build, err
	}
	major, _, _ := strings.Cut(version, ".")
	if n, err := strconv.Atoi(major); err != nil || n < least {
		return "", fmt.Errorf("macOS %s", version)
	}
	return version + " (" + build + ")", nil
}

// macSession: the framework wants a session with a screen of the same user.
func macSession(ctx context.Context, run runner, _, _ string) (string, error) {
	me, err := user.Current()
	if err != nil {
		return "", err
	}
	owner, err := run(ctx, "stat", "-f", "%Su", "/dev/console")
	if err != nil {
		return owner, err
	}
	if owner != me.Username {
		return "", fmt.Errorf("the screen is %s's, this runs as %s", owner, me.Username)
	}
	manager, err := run(ctx, "launchctl", "managername")
	if err != nil {
		return manager, err
	}
	return owner + ", " + manager, nil
}

// macHost asks for all facts.
func macHost(ctx context.Context, run runner, self, dir string) []smoke.Result {
	rows := make([]smoke.Result, 0, len(macFacts))
	for _, f := range macFacts {
		start := time.Now()
		said, err := f.look(ctx, run, self, dir)
		row := smoke.Result{Step: f.name, Outcome: smoke.OK, Detail: oneLine(said), Seconds: time.Since(start).Round(time.Millisecond).Seconds()}
		if err != nil {
			row.Outcome, row.Detail, row.Advice = smoke.Failed, oneLine(err.Error()), f.advice
		}
		rows = append(rows, row)
	}
	return rows
}

func oneLine(text string) string { return strings.Join(strings.Fields(text), " ") }

// services lists the processes of the framework that run machines, by their pids.
func services(ctx context.Context, run runner) (found []string, err error) {
	said, err := run(ctx, "ps", "-axww", "-o", "pid=,command=")
	if err != nil {
		return nil, fmt.Errorf("listing processes: %w", err)
	}
	for line := range strings.Lines(said) {
		if fields := strings.Fields(line); len(fields) > 1 && strings.Contains(fields[1], vmService) {
			found = append(found, "process "+fields[0]+" "+vmService)
		}
	}
	return found, nil
}

// machinesHere lists what there is of machines: the framework's processes, our helpers'
// folders.
func machinesHere(ctx context.Context, run runner, driver vm.Driver) ([]string, error) {
	all, err := services(ctx, run)
	if err != nil {
		return nil, err
	}
	helpers, ok := driver.(*helper.Driver)
	if !ok {
		return nil, errors.New("these machines have no helpers")
	}
	ids, err := helpers.List()
	for _, id := range ids {
		all = append(all, "the helper's folder of "+string(id))
	}
	return all, err
}
