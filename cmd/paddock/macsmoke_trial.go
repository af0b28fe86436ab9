package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/cmd/internal/smoke"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/image/tart"
	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/runner/guest/ssh"
	"github.com/paddock-ci/paddock/vm"
)

// trial is the trial that the flags ask for; remove takes away what was made for it.
func (f *smokeFlags) trial(p smokeParts) (c smoke.Config, remove func() error, err error) {
	dir, err := os.MkdirTemp(f.parent(), "paddock-smoke-")
	if err != nil {
		return c, nil, fmt.Errorf("make a directory for clones: %w", err)
	}
	remove = func() error { return os.RemoveAll(dir) }
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}()
	c = smoke.Config{
		Driver: p.driver, Image: f.image, Dir: filepath.Join(dir, "m"), Clone: cache.CloneFile, Open: openAgent,
		Agent: f.bootstrap == string(fleet.BootstrapAgent), CPU: f.cpu, Memory: int64(f.memory), Left: p.left,
	}
	if f.linux != "" {
		c.Image = filepath.Join(dir, "image")
		if err := linuxImage(c.Image, f.linux); err != nil {
			return c, nil, fmt.Errorf("make an image of %s: %w", f.linux, err)
		}
	}
	guestIs, err := vm.ReadConfig(c.Image)
	if err != nil {
		return c, nil, err
	}
	if guestIs.OS == "darwin" {
		c.Slots = macGuests
	}
	if !c.Agent {
		c.Open, err = f.openSSH(filepath.Join(p.dir, "host_keys"))
	}
	return c, remove, err
}

// openAgent reaches Paddock's agent.
func openAgent(ctx context.Context, m vm.Machine) (smoke.Guest, error) {
	conn, err := m.Dial(ctx)
	if err != nil {
		return nil, err
	}
	return guest.New(conn), nil
}

// openSSH reaches a guest by SSH, as pools with that bootstrap do.
func (f *smokeFlags) openSSH(keys string) (func(context.Context, vm.Machine) (smoke.Guest, error), error) {
	login := fleet.Login{User: f.user, Password: fleet.StockLogin.Password}
	if f.password != "" {
		raw, err := os.ReadFile(f.password)
		if err != nil {
			return nil, fmt.Errorf("read the password: %w", err)
		}
		login.Password = strings.TrimRight(string(raw), "\r\n")
	}
	pins, err := ssh.OpenHostKeys(keys)
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context, m vm.Machine) (smoke.Guest, error) {
		ports, ok := m.(vm.PortDialer)
		if !ok {
			return nil, vm.ErrUnsupported
		}
		for { // sshd listens before it is ready to let somebody in
			conn, err := ports.DialPort(ctx, 22)
			if err != nil {
				return nil, err
			}
			client, err := ssh.Dial(ctx, conn, ssh.Config{Login: login, HostKey: pins, Key: "macsmoke"})
			if err == nil {
				return client, nil
			}
			if !errors.Is(err, ssh.ErrNoAnswer) || ctx.Err() != nil {
				return nil, err
			}
		}
	}, nil
}

// linuxImage makes the directory of an image of a kernel and an initial RAM disk, which
// lie on its disk.
func linuxImage(dir, files string) (err error) {
	kernel, initrd, _ := strings.Cut(files, ",")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	disk, err := os.Create(filepath.Join(dir, vm.DiskFile))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, disk.Close()) }()
	const align = 1 << 20 // room for a partition table, should one be wanted
	boot, at := &tart.Boot{CommandLine: "console=hvc0"}, int64(align)
	for _, part := range []struct {
		path   string
		extent *tart.Extent
	}{{kernel, &boot.Kernel}, {initrd, &boot.Initrd}} {
		n, err := copyAt(disk, at, part.path)
		if err != nil {
			return err
		}
		*part.extent = tart.Extent{Offset: at, Size: n}
		at += (n + align - 1) / align * align
	}
	if err := disk.Truncate(at); err != nil {
		return err
	}
	const memory = 512 << 20
	raw, err := json.Marshal(&tart.Config{Version: 1, OS: "linux", Arch: "arm64", CPUCount: 2, MemorySize: memory, Boot: boot})
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, vm.ConfigFile), raw, 0o600)
}

// copyAt copies a file into another, at an offset.
func copyAt(to *os.File, at int64, path string) (int64, error) {
	from, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer func() { _ = from.Close() }()
	return io.Copy(io.NewOffsetWriter(to, at), from)
}
