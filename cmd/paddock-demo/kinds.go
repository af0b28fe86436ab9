package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/paddock-ci/paddock/cmd/internal/config"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image/tart"
	"github.com/paddock-ci/paddock/vm/qemu/qemutest"
)

// kind is a kind of machines that the demo can show.
type kind struct {
	driver  string
	qemu    config.QEMU
	timeout time.Duration // for all jobs
	// outside is the URL by which guests reach a listener of this host; "": the listener's.
	outside func(net.Addr) string
	// prepare returns what the pools have in common; it runs before image.
	prepare func(ctx context.Context) (config.Pool, error)
	// image is one of the two images, by its name and number.
	image func(ctx context.Context, name string, seed uint64) (tart.Source, error)
}

var kinds = map[string]*kind{
	// The jobs take a few seconds.
	config.DriverProcess: {
		driver: config.DriverProcess, timeout: 2 * time.Minute, outside: func(net.Addr) string { return "" }, prepare: processPool, image: noise,
	},
	// Six emulated machines share this host's processors while they boot.
	config.DriverQEMU: {
		driver: config.DriverQEMU, qemu: config.QEMU{Accel: "tcg", Network: "user"}, timeout: 8 * time.Minute,
		outside: behindQEMU, prepare: guestPool, image: guestImage,
	},
}

// pool is what every pool of the demo says.
func pool(runner ...string) config.Pool {
	return config.Pool{
		Scopes: []string{"acme"}, Bootstrap: string(fleet.BootstrapAgent), Runner: runner,
		// A clone of these images grows by nothing to speak of.
		Growth: 1 << 20,
	}
}

func processPool(context.Context) (config.Pool, error) {
	self, err := os.Executable()
	return pool(self, "runner"), err
}

// behindQEMU is a loopback address of this host as QEMU's user network shows it to guests.
func behindQEMU(a net.Addr) string {
	_, port, _ := net.SplitHostPort(a.String()) // a listener's address has a port
	return "http://" + net.JoinHostPort("10.0.2.2", port)
}

// guestRunner is where the runner is in a guest.
const guestRunner = "usr/bin/guestrunner"

func guestPool(context.Context) (config.Pool, error) {
	p := pool("/" + guestRunner)
	p.CPU, p.Memory = 1, qemutest.Memory
	return p, nil
}

// guestImage is a Linux guest that boots, with the agent and the runner in it.
func guestImage(ctx context.Context, name string, _ uint64) (tart.Source, error) {
	dir, err := os.MkdirTemp("", "paddock-guest-")
	if err != nil {
		return tart.Source{}, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	runner := filepath.Join(dir, "guestrunner")
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", runner, "./cmd/paddock-demo/guestrunner")
	if build.Dir, err = qemutest.Tree(); err != nil {
		return tart.Source{}, err
	}
	build.Env = append(os.Environ(), "GOOS=linux", "GOARCH=arm64", "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return tart.Source{}, fmt.Errorf("build the guests' runner: %w: %s", err, out)
	}
	image, err := qemutest.Build(ctx, qemutest.Guest{Files: map[string]qemutest.File{
		guestRunner: {From: runner},
		"etc/image": {Mode: 0o644, Data: []byte(name + "\n")},
	}})
	if err != nil {
		return tart.Source{}, err
	}
	source, disk, err := image.Source()
	if err != nil {
		return tart.Source{}, err
	}
	defer func() { _ = disk.Close() }()
	content := make([]byte, source.Disk.Size()) // about 40 MB
	if _, err := source.Disk.ReadAt(content, 0); err != nil && !errors.Is(err, io.EOF) {
		return tart.Source{}, fmt.Errorf("reading the guest's disk: %w", err)
	}
	source.Disk = bytes.NewReader(content)
	return source, nil
}
