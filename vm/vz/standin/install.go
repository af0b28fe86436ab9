package vz

import (
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/Code-Hex/vz/v3/internal/progress"
)

// MacOSRestoreImage is an IPSW. Here it is a file that begins with "ipsw " and goes on
// with the data of a hardware model.
type MacOSRestoreImage struct{ model []byte }

// BuildVersion is the build in it.
func (m *MacOSRestoreImage) BuildVersion() string { return "24A335" }

// OperatingSystemVersion is the version in it.
func (m *MacOSRestoreImage) OperatingSystemVersion() OperatingSystemVersion {
	return OperatingSystemVersion{MajorVersion: 15}
}

// OperatingSystemVersion is a version of macOS.
type OperatingSystemVersion struct {
	MajorVersion int64
	MinorVersion int64
	PatchVersion int64
}

func (osv OperatingSystemVersion) String() string {
	return fmt.Sprintf("%d.%d.%d", osv.MajorVersion, osv.MinorVersion, osv.PatchVersion)
}

// MostFeaturefulSupportedConfiguration is what a machine for it must have; nothing, but
// not nil, if this host cannot run it.
func (m *MacOSRestoreImage) MostFeaturefulSupportedConfiguration() *MacOSConfigurationRequirements {
	model := &MacHardwareModel{pointer: &pointer{}, data: m.model}
	if !model.Supported() {
		return &MacOSConfigurationRequirements{model: &MacHardwareModel{pointer: &pointer{}}}
	}
	return &MacOSConfigurationRequirements{model: model, cpu: 2, memory: 4 << 30}
}

// MacOSConfigurationRequirements is what a machine must have.
type MacOSConfigurationRequirements struct {
	model       *MacHardwareModel
	cpu, memory uint64
}

// HardwareModel is the kind of Mac.
func (m *MacOSConfigurationRequirements) HardwareModel() *MacHardwareModel { return m.model }

// MinimumSupportedCPUCount is in cores.
func (m *MacOSConfigurationRequirements) MinimumSupportedCPUCount() uint64 { return m.cpu }

// MinimumSupportedMemorySize is in bytes.
func (m *MacOSConfigurationRequirements) MinimumSupportedMemorySize() uint64 { return m.memory }

// LoadMacOSRestoreImageFromPath reads an IPSW.
func LoadMacOSRestoreImageFromPath(imagePath string) (retImage *MacOSRestoreImage, retErr error) {
	raw, err := os.ReadFile(imagePath)
	if err != nil {
		return nil, err
	}
	model, ok := strings.CutPrefix(string(raw), ipswPrefix)
	if !ok {
		// The real package gives an image with its errors.
		return &MacOSRestoreImage{}, failure(ErrorInstallationFailed, "the restore image is invalid")
	}
	return &MacOSRestoreImage{model: []byte(model)}, nil
}

// FetchLatestSupportedMacOSRestoreImage downloads an IPSW.
func FetchLatestSupportedMacOSRestoreImage(ctx context.Context, destPath string) (*progress.Reader, error) {
	hook := hooks().Fetch
	if hook == nil {
		hook = func(context.Context) (string, error) { return IPSW(Model), nil }
	}
	f, err := os.OpenFile(destPath, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o666)
	if err != nil {
		return nil, err
	}
	r := progress.NewReader(-1)
	go func() {
		defer func() { _ = f.Close() }()
		content, err := hook(ctx)
		if err == nil {
			_, err = f.WriteString(content)
		}
		r.Add(len(content))
		r.Finish(err)
	}()
	return r, nil
}

// MacOSInstaller installs an IPSW on a machine.
type MacOSInstaller struct {
	*pointer
	machine   *VirtualMachine
	progress  atomic.Value
	once      sync.Once
	cancel    sync.Once
	cancelled chan struct{}
	done      chan struct{}
	err       error
}

// NewMacOSInstaller makes one.
func NewMacOSInstaller(vm *VirtualMachine, restoreImageIpsw string) (*MacOSInstaller, error) {
	if _, err := os.Stat(restoreImageIpsw); err != nil {
		return nil, err
	}
	if !vm.config.isMac() {
		raise("macOS on a machine that is no Mac")
	}
	m := &MacOSInstaller{pointer: &pointer{}, machine: vm, cancelled: make(chan struct{}), done: make(chan struct{})}
	m.progress.Store(0.0)
	return m, nil
}

// Install installs. When ctx ends it returns at once, and the installation a moment later.
func (m *MacOSInstaller) Install(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	m.once.Do(func() { go m.install() })
	select {
	case <-ctx.Done():
		m.cancel.Do(func() { close(m.cancelled) })
		return ctx.Err()
	case <-m.done:
		return m.err
	}
}

func (m *MacOSInstaller) install() {
	defer close(m.done)
	m.busy(true)
	defer m.busy(false)
	m.err = m.machine.start(func(g *Guest) error {
		if hook := hooks().Install; hook != nil {
			return hook(g, func(f float64) { m.progress.Store(f) }, m.cancelled)
		}
		return nil
	})
	if m.err == nil {
		m.progress.Store(1.0)
	}
}

func (m *MacOSInstaller) busy(yes bool) {
	m.machine.mu.Lock()
	defer m.machine.mu.Unlock()
	m.machine.installing = yes
}

// FractionCompleted is how much is done.
func (m *MacOSInstaller) FractionCompleted() float64 { return m.progress.Load().(float64) }

// Done is closed when the installation has ended.
func (m *MacOSInstaller) Done() <-chan struct{} { return m.done }
