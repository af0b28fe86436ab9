// Package qemutest makes guests that boot in vm/qemu, of Debian's cloud kernel, a static
// busybox and Paddock's own guest agent.
//
//  1. The script .ci/guest fetches the packages' files into .cache/guest, once.
//  2. Build makes an initial RAM disk with the agent as its init and a disk that holds
//     kernel and RAM disk as tart.Config.Boot says, and keeps it under a name made of
//     all that is in it.
//  3. Image.Clone makes a machine's directory of it, Image.Source an image to push.
//
// It is no image builder for users: what it makes has no package manager and no runner.
// It does not import testing, so that a program may use it: called by the tests of
// vm/qemu, by the end-to-end tests and by the demo.
package qemutest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/paddock-ci/paddock/image/tart"
	"github.com/paddock-ci/paddock/vm"
)

// Guest says what an image is made of.
type Guest struct {
	Arch string // arm64 or amd64; "": arm64, which is the faster one to emulate
	// Files are more files for the initial RAM disk, by path without a leading slash
	// ("bin/tool"): they cost the guest memory. A file "init" takes the agent's place, as
	// in images that are not Paddock's. Nil: none.
	Files map[string]File
	// Root is a directory of this host that becomes an ext4 file system at the start of
	// the disk, which the agent makes the guest's root; needs mkfs.ext4. "": the guest
	// lives in its RAM disk, and /dev/vda is free from its first byte.
	Root string
	// RootSize is that file system's size in bytes, or without one the free room at the
	// start of the disk; 0: 64 MiB with Root, else 1 MiB.
	RootSize int64
	// CommandLine is added to the kernel's.
	CommandLine string
}

// File is one file of the RAM disk: Data, or a copy of the host's file From.
type File struct {
	Mode os.FileMode // permissions; 0: 0755
	Data []byte
	From string
}

// Image is a bootable guest in the cache. Its files are shared: clone, do not write.
type Image struct {
	Arch   string
	Dir    string // holds disk.img, config.json and nvram.bin
	Kernel string // the files that lie on the disk, for a QEMU by hand
	Initrd string
	Config *tart.Config
}

// Memory that the guests are comfortable with, in bytes. The arm64 kernel itself takes
// 40 MB, and the RAM disk is in memory twice while it is unpacked.
const Memory = 128 << 20

// nvram is what stands for firmware variables: a guest with a kernel of its own has none.
var nvram = []byte("no firmware")

// Build makes a guest or finds it in the cache. The agent is built anew with the go
// command, which is quick when nothing has changed.
func Build(ctx context.Context, g Guest) (*Image, error) {
	if g.Arch == "" {
		g.Arch = "arm64"
	}
	if _, err := Parts(ctx, g.Arch); err != nil {
		return nil, err
	}
	root, err := Tree()
	if err != nil {
		return nil, err
	}
	b := &builder{Guest: g, tree: root, cache: filepath.Join(root, ".cache", "guest")}
	unlock, err := lock(ctx, filepath.Join(b.cache, "build.lock"))
	if err != nil {
		return nil, err
	}
	defer unlock()
	i, err := b.build(ctx)
	if err != nil {
		return nil, fmt.Errorf("building a guest for %s: %w", g.Arch, err)
	}
	return i, nil
}

// Parts is the directory with what guests of an architecture are made of, which
// .ci/guest fetches the first time. Its files are shared: copy, do not write.
func Parts(ctx context.Context, arch string) (dir string, err error) {
	root, err := Tree()
	if err != nil {
		return "", err
	}
	if err := run(ctx, root, nil, filepath.Join(root, ".ci", "guest"), arch); err != nil {
		return "", fmt.Errorf("fetching what the guest is made of: %w", err)
	}
	return filepath.Join(root, ".cache", "guest", arch), nil
}

// Tree is the root of the source tree that the current directory is in.
func Tree() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, ".ci", "guest")); err == nil {
			return dir, nil
		}
		up := filepath.Dir(dir)
		if up == dir {
			return "", errors.New("no .ci/guest above the current directory: guests are built inside Paddock's source tree")
		}
		dir = up
	}
}

// Clone makes the directory of a machine: copies of disk, NVRAM and config. edit may
// change the config of this clone; nil: it stays.
func (i *Image) Clone(dir string, edit func(*tart.Config)) error {
	for _, name := range []string{vm.DiskFile, vm.NVRAMFile} {
		if err := copyFile(filepath.Join(dir, name), filepath.Join(i.Dir, name)); err != nil {
			return fmt.Errorf("cloning the guest: %w", err)
		}
	}
	c, boot := *i.Config, *i.Config.Boot
	c.Boot = &boot
	if edit != nil {
		edit(&c)
	}
	return writeConfig(dir, &c)
}

// Source is the guest as an image to push; close it afterwards.
func (i *Image) Source() (tart.Source, io.Closer, error) {
	disk, err := os.Open(filepath.Join(i.Dir, vm.DiskFile))
	if err != nil {
		return tart.Source{}, nil, fmt.Errorf("opening the guest's disk: %w", err)
	}
	info, err := disk.Stat()
	if err != nil {
		_ = disk.Close()
		return tart.Source{}, nil, fmt.Errorf("opening the guest's disk: %w", err)
	}
	content := io.NewSectionReader(disk, 0, info.Size())
	// 8 MiB: several chunks, so that a pull has something to do at once.
	return tart.Source{Config: i.Config, NVRAM: nvram, Disk: content, ChunkSize: 8 << 20}, disk, nil
}

func writeConfig(dir string, c *tart.Config) error {
	raw, err := json.Marshal(c)
	if err != nil {
		return fmt.Errorf("writing the VM config: %w", err)
	}
	return os.WriteFile(filepath.Join(dir, vm.ConfigFile), raw, 0o600)
}

func copyFile(dst, src string) (err error) {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }()
	out, err := os.OpenFile(dst, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	_, err = io.Copy(out, in)
	return err
}

// run runs a program of the host and puts what it said into the error.
func run(ctx context.Context, dir string, env []string, argv ...string) error {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", filepath.Base(argv[0]), err, out)
	}
	return nil
}

// lock keeps two test binaries from building the same at once.
func lock(ctx context.Context, path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { _ = f.Close() }, nil
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			_ = f.Close()
			return nil, fmt.Errorf("waiting for another build of a guest: %w", errors.Join(ctx.Err(), err))
		}
	}
}
