//go:build (darwin && arm64 && cgo) || vzstandin

package vz

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/Code-Hex/vz/v3"

	"github.com/paddock-ci/paddock/image/tart"
	"github.com/paddock-ci/paddock/vm"
)

// Sizes of a new image's disk, in bytes.
const (
	defaultDisk = 64_000_000_000
	leastDisk   = 32_000_000_000 // macOS takes about 25 GB, and needs room to finish
)

// ipswFile is where a restore image is fetched to, in the image's directory.
const ipswFile = "restore.ipsw"

// Install makes the directory of a macOS image of an IPSW. After an error nothing of it
// is left, unless the framework does not let go of it, which the error says.
func Install(ctx context.Context, c InstallConfig) (err error) {
	if c.DiskSize == 0 {
		c.DiskSize = defaultDisk
	}
	if c.DiskSize < leastDisk {
		return fmt.Errorf("a disk of %d GB is too small for macOS: give at least %d", c.DiskSize/1e9, leastDisk/int64(1e9))
	}
	if err := os.Mkdir(c.Dir, 0o700); errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s exists already: an image is made in a new directory", c.Dir)
	} else if err != nil {
		return fmt.Errorf("making the image's directory: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(c.Dir))
		}
	}()
	i := &installation{InstallConfig: c}
	i.tell(0, 1, 0)
	if err := i.fetch(ctx); err != nil {
		return fmt.Errorf("getting the restore image: %w", err)
	}
	config, err := i.prepare(ctx)
	if err != nil {
		return err
	}
	if err := i.install(ctx); err != nil {
		return fmt.Errorf("installing macOS: %w", err)
	}
	return i.complete(config)
}

// installation is one run of Install.
type installation struct {
	InstallConfig
	fetched  bool // the IPSW is ours
	hardware hardware
}

func (i *installation) path(name string) string { return filepath.Join(i.Dir, name) }

// tell reports progress of the part that begins at from and ends at to.
func (i *installation) tell(from, to, fraction float64) {
	if i.Progress != nil {
		i.Progress(from + (to-from)*min(max(fraction, 0), 1)) // a length that was not told makes an odd fraction
	}
}

// follow waits for done and tells the progress meanwhile.
func (i *installation) follow(ctx context.Context, from, to float64, fraction func() float64, done <-chan struct{}) error {
	const every = time.Second
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	for {
		i.tell(from, to, fraction())
		select {
		case <-done:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
	}
}

// fetch gets the newest restore image, if none is at hand.
func (i *installation) fetch(ctx context.Context) error {
	if i.IPSW != "" {
		return nil
	}
	i.IPSW, i.fetched = i.path(ipswFile), true
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // ends a download that nobody waits for
	type transfer interface {
		Finished() <-chan struct{}
		FractionCompleted() float64
		Err() error
	}
	t, err := wait(ctx, func() (transfer, error) { return vz.FetchLatestSupportedMacOSRestoreImage(ctx, i.IPSW) })
	if err != nil {
		return err
	}
	if err := i.follow(ctx, 0, 0.5, t.FractionCompleted, t.Finished()); err != nil {
		return err
	}
	return t.Err()
}

// wait is one call to the framework that may outlive ctx; it then goes on as a goroutine
// until it answers.
func wait[T any](ctx context.Context, call func() (T, error)) (T, error) {
	type answer struct {
		value T
		err   error
	}
	answers := make(chan answer, 1)
	go func() {
		value, err := call()
		answers <- answer{value, err}
	}()
	select {
	case a := <-answers:
		return a.value, a.err
	case <-ctx.Done():
		var none T
		return none, ctx.Err()
	}
}

// prepare makes the files of a Mac that the IPSW can be installed on, and says what its
// config will be.
func (i *installation) prepare(ctx context.Context) (*tart.Config, error) {
	restore, err := wait(ctx, func() (*vz.MacOSRestoreImage, error) { return vz.LoadMacOSRestoreImageFromPath(i.IPSW) })
	if err != nil {
		return nil, fmt.Errorf("reading the restore image: %w", err)
	}
	// Where nothing is supported these are objects of nothing, which answer with zeros.
	needs := restore.MostFeaturefulSupportedConfiguration()
	model := needs.HardwareModel()
	if !model.Supported() {
		return nil, fmt.Errorf("this Mac cannot run what the restore image holds (macOS %s, build %s): update this Mac, or take an older restore image",
			restore.OperatingSystemVersion(), restore.BuildVersion())
	}
	config := &tart.Config{
		Version: 1, OS: "darwin", Arch: "arm64", DiskFormat: "raw",
		HardwareModel: foreign(model.DataRepresentation()),
		CPUCountMin:   int(needs.MinimumSupportedCPUCount()), MemorySizeMin: int64(needs.MinimumSupportedMemorySize()),
	}
	runtime.KeepAlive(model)
	if err := i.size(config); err != nil {
		return nil, err
	}
	if err := sparse(i.path(vm.DiskFile), i.DiskSize); err != nil {
		return nil, fmt.Errorf("making the disk: %w", err)
	}
	return config, i.assemble(model, config)
}

// size settles the machine's cores and memory.
func (i *installation) size(c *tart.Config) error {
	cpu, memory, err := resources(i.CPU, i.Memory, c)
	if err != nil {
		return err
	}
	c.CPUCount, c.MemorySize = int(cpu), int64(memory)
	i.hardware.cpu, i.hardware.memory = cpu, memory
	return nil
}

// assemble configures the Mac.
func (i *installation) assemble(model *vz.MacHardwareModel, c *tart.Config) error {
	h := &i.hardware
	h.disk = i.path(vm.DiskFile)
	machine := take(h, "the machine identifier", vz.NewMacMachineIdentifier)
	storage := take(h, "the auxiliary storage", func() (*vz.MacAuxiliaryStorage, error) {
		return vz.NewMacAuxiliaryStorage(i.path(vm.NVRAMFile), vz.WithCreatingMacAuxiliaryStorage(model))
	})
	h.macPlatform(model, machine, storage)
	if err := h.assemble(); err != nil {
		return err
	}
	c.ECID, c.MACAddress = h.identity.Machine, h.identity.MAC
	return nil
}

// sparse makes a file of size bytes that occupies none.
func sparse(path string, size int64) (err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	return f.Truncate(size)
}

// install runs the installer. A machine whose installation is going on must not be
// stopped: a cancelled one is waited for.
func (i *installation) install(ctx context.Context) error {
	framework, err := vz.NewVirtualMachine(i.hardware.config)
	if err != nil {
		return err
	}
	installer, err := vz.NewMacOSInstaller(framework, i.IPSW)
	if err != nil {
		return err
	}
	defer runtime.KeepAlive(i.hardware.held)
	// Install itself minds ctx; it runs beside the one who tells its progress.
	result := make(chan error, 1)
	go func() { result <- installer.Install(ctx) }()
	from := 0.0
	if i.fetched {
		from = 0.5
	}
	_ = i.follow(ctx, from, 1, installer.FractionCompleted, installer.Done()) // Install says the same
	err = <-result                                                            // it minds ctx
	if err != nil && ctx.Err() != nil {
		err = errors.Join(err, settled(ctx, installer))
	}
	if hasCode(err, vz.ErrorVirtualMachineLimitExceeded) {
		err = fmt.Errorf("%w: %s: %w", vm.ErrAtCapacity, fullHost, err)
	}
	return errors.Join(err, switchOff(ctx, framework))
}

// settled waits until a cancelled installer has let go of the disk.
func settled(ctx context.Context, installer *vz.MacOSInstaller) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endTime)
	defer cancel()
	select {
	case <-installer.Done():
		return nil
	case <-ctx.Done():
		return errors.New("the framework does not end the installation; it ends with this process")
	}
}

// switchOff stops the machine that was installed, which runs on.
func switchOff(ctx context.Context, framework *vz.VirtualMachine) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endTime)
	defer cancel()
	_, err := wait(ctx, func() (struct{}, error) {
		if over(framework.State()) || !framework.CanStop() {
			return struct{}{}, nil
		}
		return struct{}{}, framework.Stop()
	})
	if err != nil {
		return fmt.Errorf("switching the machine off: %w", err)
	}
	return nil
}

// complete writes the image's config, and leaves nothing else.
func (i *installation) complete(c *tart.Config) error {
	if i.fetched {
		if err := os.Remove(i.IPSW); err != nil {
			return fmt.Errorf("removing the restore image: %w", err)
		}
	}
	// Last: a directory without a config is no image, whatever interrupted us.
	raw, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return fmt.Errorf("writing the image's config: %w", err)
	}
	if err := os.WriteFile(i.path(vm.ConfigFile), append(raw, '\n'), 0o600); err != nil {
		return fmt.Errorf("writing the image's config: %w", err)
	}
	i.tell(0, 1, 1)
	return nil
}
