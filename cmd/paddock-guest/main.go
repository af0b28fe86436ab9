// Command paddock-guest is the agent inside a machine: it finds the machine's one stream
// to its host and serves the protocol of runner/guest on it.
//
//	paddock-guest            serve on the virtio-serial port "org.paddock.agent", or
//	                         else on vsock port 7233
//	paddock-guest install    (macOS) write the property list that starts it at login
//
// It is built for machines, not for hosts: a host runs it in tests only, with --socket,
// where each connection is a raw stream like vsock's. It knows nothing of jobs, images or
// the controller; what it does it is told by the node's host over the stream, which it
// trusts, and it opens no port of the network.
//
// As process 1 of a Linux machine (it is the initramfs's /init, statically linked) it
// makes the machine ready by itself: it mounts /proc, /sys, /dev, /tmp and /run, loads
// the kernel modules that /modules/order lists (paths below /modules), mounts the root
// file system that the kernel's command line names (paddock.root=/dev/vda) and goes
// there, brings the loopback up, starts itself once more as the agent, and reaps what is
// orphaned. When the agent ends, the machine is powered off.
//
// In a macOS image it is to be started in the session of the user whose jobs it runs, who
// is logged in automatically: run "sudo paddock-guest install" when the image is built.
// To set the clock after a start from a saved state and to shut down, it needs to be
// root, or a user with sudo that asks for no password.
//
// Called by launchd, systemd or the kernel of a guest, never by Paddock's own processes.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/paddock-ci/paddock/runner/guest"
)

// version is set when it is built for a release.
var version = ""

func main() {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	if os.Getpid() == 1 {
		beInit(log) // does not return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], log); err != nil {
		fmt.Fprintln(os.Stderr, "paddock-guest:", err)
		os.Exit(1)
	}
}

// options are the flags.
type options struct {
	socket string
	dir    string
}

func run(ctx context.Context, args []string, log *slog.Logger) error {
	var o options
	flags := flag.NewFlagSet("paddock-guest", flag.ContinueOnError)
	flags.StringVar(&o.socket, "socket", "", "serve on this unix socket, for tests; \"\": find the machine's stream")
	flags.StringVar(&o.dir, "dir", "", "the runner's directory, made if it is not there; \"\": actions-runner in the home directory")
	say := flags.Bool("version", false, "print the version")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil
		}
		return err
	}
	switch {
	case *say:
		fmt.Println("paddock-guest", versionText())
		return nil
	case flags.NArg() == 0:
		return serve(ctx, o, log)
	case flags.NArg() == 1 && flags.Arg(0) == "install":
		return install()
	case flags.NArg() == 2 && flags.Arg(0) == wakeCommand:
		return wakeByHand(flags.Arg(1), os.Stdin)
	}
	return fmt.Errorf("unknown arguments %q: see paddock-guest --help", flags.Args())
}

func versionText() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" && info.Main.Version != "(devel)" {
		return info.Main.Version
	}
	return "devel"
}

// serve serves on the machine's stream until ctx ends. One agent outlives all streams.
func serve(ctx context.Context, o options, log *slog.Logger) error {
	dir, err := runnerDir(o.dir)
	if err != nil {
		return err
	}
	t, err := findTransport(ctx, o.socket)
	if err != nil {
		return err
	}
	log.Info("serving", "on", t.name, "version", versionText())
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	gate := guest.NewGate()
	var wg sync.WaitGroup
	var failed error
	wg.Go(func() {
		defer cancel()
		failed = t.serve(ctx, gate, log)
	})
	system := newSystem(log)
	wg.Go(func() { system.run(ctx) })
	err = guest.Serve(ctx, gate, guest.AgentConfig{Dir: dir, Version: versionText(), System: system, Log: log})
	cancel()
	wg.Wait()
	return errors.Join(err, failed)
}

// runnerDir is where the runner lives.
func runnerDir(dir string) (string, error) {
	if dir == "" {
		home, err := os.UserHomeDir()
		if err != nil || home == "/" { // the kernel's own idea of process 1's home
			home = "/root"
		}
		dir = filepath.Join(home, "actions-runner")
	}
	dir, err := filepath.Abs(dir)
	if err == nil {
		err = os.MkdirAll(dir, 0o755)
	}
	if err != nil {
		return "", fmt.Errorf("making the runner's directory: %w", err)
	}
	return dir, nil
}

// wakeCommand is this program once more, as root, for an agent that is not.
const wakeCommand = "wake"

// wakeByHand sets the clock and stirs the pool by what comes on standard input.
func wakeByHand(nanoseconds string, entropy io.Reader) error {
	now, err := strconv.ParseInt(nanoseconds, 10, 64)
	if err != nil {
		return fmt.Errorf("wake: nanoseconds since 1970, not %q", nanoseconds)
	}
	stir, err := io.ReadAll(io.LimitReader(entropy, 4<<10))
	if err != nil {
		return fmt.Errorf("wake: reading standard input: %w", err)
	}
	return wake(time.Unix(0, now), stir)
}
