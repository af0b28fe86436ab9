package qemutest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/paddock-ci/paddock/image/tart"
	"github.com/paddock-ci/paddock/vm"
)

// agentPackage is the program that becomes the guest's init.
const agentPackage = "./cmd/paddock-guest"

// modules are loaded in this order: each stands on those before it. The kernel of the
// cloud images has the rest built in.
var modules = []string{
	"virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci",
	"virtio_console", "failover", "net_failover", "virtio_net", "virtio_blk", "virtio-rng",
	"fuse", "virtiofs",
}

// applets are the names by which busybox is found in the guest.
var applets = []string{
	"awk", "basename", "cat", "chmod", "chown", "cp", "cut", "date", "dd", "df", "dirname", "dmesg", "echo",
	"env", "expr", "false", "find", "free", "grep", "gunzip", "gzip", "head", "hostname", "id", "ifconfig",
	"ip", "kill", "ln", "ls", "md5sum", "mkdir", "mkfifo", "mktemp", "mount", "mv", "nc", "nslookup",
	"od", "ping", "poweroff", "printf", "ps", "pwd", "readlink", "reboot", "rm", "rmdir", "route", "sed",
	"seq", "sh", "sha256sum", "sleep", "sort", "stat", "stty", "sync", "tail", "tar", "tee", "test",
	"timeout", "top", "touch", "tr", "true", "udhcpc", "umount", "uname", "uniq", "uptime", "vi", "wc",
	"wget", "which", "whoami", "xargs", "yes",
}

const (
	align       = 1 << 20  // where parts of the disk begin, in bytes: whole clusters of any host
	rootRoom    = 64 << 20 // Guest.RootSize's default with a file system
	keepUnused  = 24 * time.Hour
	rootOnDisk  = "paddock.root=/dev/vda"
	formatOfOur = "guest 1" // changes when what is built of the same parts changes

	// Every guest's kernel is quiet, sets no memory aside for devices that are not there
	// (cma), and leaves its own ciphers untested and new pages uncleared: these two are
	// a third of the time that an emulated CPU takes to boot.
	kernelLine = "quiet cma=0 cryptomgr.notests init_on_alloc=0"
)

// builder builds one guest.
type builder struct {
	Guest
	tree, cache string
}

// parts is the directory with the packages' files.
func (b *builder) parts(name string) string { return filepath.Join(b.cache, b.Arch, name) }

func (b *builder) build(ctx context.Context) (*Image, error) {
	agent := b.parts("paddock-guest")
	// Into the same place each time: the go command then sees that nothing has changed.
	if err := run(ctx, b.tree, []string{"GOOS=linux", "GOARCH=" + b.Arch, "CGO_ENABLED=0"},
		"go", "build", "-buildvcs=false", "-trimpath", "-ldflags", "-s -w -X main.version=test", "-o", agent, agentPackage); err != nil {
		return nil, fmt.Errorf("building the guest agent: %w", err)
	}
	initrd, err := b.initrd(agent)
	if err != nil {
		return nil, err
	}
	key, err := b.key(initrd)
	if err != nil {
		return nil, err
	}
	images := filepath.Join(b.cache, "images")
	dir := filepath.Join(images, key)
	i := &Image{
		Arch: b.Arch, Dir: dir, Kernel: filepath.Join(dir, "vmlinuz"), Initrd: filepath.Join(dir, "initrd"),
	}
	now := time.Now()
	if err := os.Chtimes(dir, now, now); err != nil { // used now; not there: made now
		if err := b.make(ctx, images, dir, initrd); err != nil {
			return nil, err
		}
		prune(images, now)
	}
	i.Config, err = vm.ReadConfig(dir)
	return i, err
}

// key names an image by what is in it.
func (b *builder) key(initrd []byte) (string, error) {
	sum := sha256.New()
	_, _ = fmt.Fprintln(sum, formatOfOur, b.Arch, b.RootSize, kernelLine, b.CommandLine)
	_, _ = sum.Write(initrd)
	if err := hashFile(sum, b.parts("vmlinuz")); err != nil {
		return "", err
	}
	if b.Root != "" {
		if err := filepath.WalkDir(b.Root, func(name string, d os.DirEntry, err error) error {
			if err != nil {
				return err
			}
			_, _ = fmt.Fprintln(sum, strings.TrimPrefix(name, b.Root), d.Type())
			if !d.Type().IsRegular() {
				return nil
			}
			return hashFile(sum, name)
		}); err != nil {
			return "", fmt.Errorf("reading the root file system: %w", err)
		}
	}
	return fmt.Sprintf("%s-%x", b.Arch, sum.Sum(nil)[:8]), nil
}

func hashFile(w io.Writer, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	_, _ = fmt.Fprintln(w, info.Mode(), info.Size())
	_, err = io.Copy(w, f)
	return err
}

// initrd packs the agent, busybox, modules and the extra files. It is not compressed:
// an emulated CPU would take longer to unpack than the host to copy.
func (b *builder) initrd(agent string) ([]byte, error) {
	var a archive
	files := map[string]File{
		"init":        {From: agent},
		"bin/busybox": {From: b.parts("busybox")},
		// What a resolver needs; slirp's own name server.
		"etc/resolv.conf": {Mode: 0o644, Data: []byte("nameserver 10.0.2.3\n")},
		"etc/hosts":       {Mode: 0o644, Data: []byte("127.0.0.1 localhost\n")},
		"etc/passwd":      {Mode: 0o644, Data: []byte("root:x:0:0:root:/root:/bin/sh\n")},
		"etc/group":       {Mode: 0o644, Data: []byte("root:x:0:\n")},
	}
	for _, name := range modules {
		files["modules/"+name+".ko"] = File{Mode: 0o644, From: b.parts("modules/" + name + ".ko")}
	}
	files["modules/order"] = File{Mode: 0o644, Data: []byte(strings.Join(modules, ".ko\n") + ".ko\n")}
	maps.Copy(files, b.Files)
	directories := map[string]bool{"dev": true, "proc": true, "root": true, "run": true, "sys": true, "tmp": true, "var": true, "mnt": true}
	for name := range files {
		for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
			directories[dir] = true
		}
	}
	for _, name := range slices.Sorted(maps.Keys(directories)) { // parents first
		a.directory(name)
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		f := files[name]
		if f.From != "" {
			data, err := os.ReadFile(f.From)
			if err != nil {
				return nil, fmt.Errorf("a file for the guest: %w", err)
			}
			f.Data = data
		}
		if f.Mode == 0 {
			f.Mode = 0o755
		}
		a.file(name, f.Mode, f.Data)
	}
	for _, name := range applets {
		if _, taken := b.Files["bin/"+name]; !taken {
			a.link("bin/"+name, "busybox")
		}
	}
	return a.bytes(), nil
}

// make writes a new image beside its place and moves it there.
func (b *builder) make(ctx context.Context, images, dir string, initrd []byte) (err error) {
	if err := os.MkdirAll(images, 0o755); err != nil {
		return err
	}
	work, err := os.MkdirTemp(images, "new-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	kernel, err := os.ReadFile(b.parts("vmlinuz"))
	if err != nil {
		return err
	}
	for name, data := range map[string][]byte{"vmlinuz": kernel, "initrd": initrd, vm.NVRAMFile: nvram} {
		if err := os.WriteFile(filepath.Join(work, name), data, 0o600); err != nil {
			return err
		}
	}
	config, err := b.disk(ctx, filepath.Join(work, vm.DiskFile), kernel, initrd)
	if err != nil {
		return err
	}
	if err := writeConfig(work, config); err != nil {
		return err
	}
	return os.Rename(work, dir)
}

// disk writes the disk: file system or free room, kernel, RAM disk.
func (b *builder) disk(ctx context.Context, path string, kernel, initrd []byte) (*tart.Config, error) {
	room, line := b.RootSize, kernelLine
	switch {
	case room == 0 && b.Root != "":
		room = rootRoom
	case room == 0:
		room = align
	}
	room = (room + align - 1) / align * align
	kernelAt := room
	initrdAt := (kernelAt + int64(len(kernel)) + align - 1) / align * align
	end := (initrdAt + int64(len(initrd)) + align - 1) / align * align
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return nil, err
	}
	if b.Root != "" {
		line += " " + rootOnDisk
		// Without a journal: the disk is thrown away with the machine.
		if err := run(ctx, b.tree, nil, "mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-E", "root_owner=0:0", "-d", b.Root,
			path, fmt.Sprintf("%dk", room>>10)); err != nil {
			return nil, fmt.Errorf("making the root file system (Debian: e2fsprogs): %w", err)
		}
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return nil, err
	}
	_, err = f.WriteAt(kernel, kernelAt)
	if err == nil {
		_, err = f.WriteAt(initrd, initrdAt)
	}
	if err := errors.Join(err, f.Truncate(end), f.Close()); err != nil {
		return nil, fmt.Errorf("writing the disk: %w", err)
	}
	return &tart.Config{
		Version: 1, OS: "linux", Arch: b.Arch, DiskFormat: "raw", CPUCount: 1, MemorySize: Memory,
		Boot: &tart.Boot{
			Kernel:      tart.Extent{Offset: kernelAt, Size: int64(len(kernel))},
			Initrd:      tart.Extent{Offset: initrdAt, Size: int64(len(initrd))},
			CommandLine: strings.TrimSpace(line + " " + b.CommandLine),
		},
	}, nil
}

// prune removes images that nobody used for a day: each change of the agent makes a new
// one, of some 40 MB.
func prune(images string, now time.Time) {
	entries, err := os.ReadDir(images)
	if err != nil {
		return // the next build tries again
	}
	for _, e := range entries {
		if info, err := e.Info(); err == nil && now.Sub(info.ModTime()) > keepUnused {
			_ = os.RemoveAll(filepath.Join(images, e.Name()))
		}
	}
}

// archive writes a cpio archive in the "newc" format, as the kernel unpacks it: a header
// of hexadecimal fields, the name, the data, each padded to four bytes.
type archive struct {
	out  bytes.Buffer
	last int // inode number of the last entry
}

const (
	modeDir  = 0o040755
	modeFile = 0o100000
	modeLink = 0o120777
)

func (a *archive) directory(name string) { a.entry(name, modeDir, nil) }
func (a *archive) file(name string, mode os.FileMode, data []byte) {
	a.entry(name, modeFile|int(mode.Perm()), data)
}
func (a *archive) link(name, target string) { a.entry(name, modeLink, []byte(target)) }
func (a *archive) entry(name string, mode int, data []byte) {
	a.last++
	// inode, mode, uid, gid, links, mtime, size, device and its node (major, minor), name's length, no checksum
	_, _ = fmt.Fprintf(&a.out, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		a.last, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0)
	a.out.WriteString(name + "\x00")
	a.pad()
	a.out.Write(data)
	a.pad()
}

func (a *archive) pad() {
	for a.out.Len()%4 != 0 {
		a.out.WriteByte(0)
	}
}

func (a *archive) bytes() []byte {
	a.entry("TRAILER!!!", 0, nil)
	return a.out.Bytes()
}
