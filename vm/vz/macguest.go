//go:build (darwin && arm64 && cgo) || vzstandin

package vz

import (
	"bytes"
	"errors"
	"runtime"

	"github.com/Code-Hex/vz/v3"

	"github.com/paddock-ci/paddock/image/tart"
)

// macGuest makes the platform of a macOS guest: the Mac that its image was installed on,
// with an identity of its own.
func (h *hardware) macGuest(dir string, c *tart.Config) {
	model := take(h, "the hardware model", func() (*vz.MacHardwareModel, error) { return hardwareModel(c.HardwareModel) })
	machine := take(h, "the machine identifier", func() (*vz.MacMachineIdentifier, error) {
		return machineIdentifier(h.identity.Machine)
	})
	storage := take(h, "the auxiliary storage", func() (*vz.MacAuxiliaryStorage, error) {
		path, err := nvram(dir)
		if err != nil {
			return nil, err
		}
		return vz.NewMacAuxiliaryStorage(path)
	})
	h.macPlatform(model, machine, storage)
	// No entropy device and no sound: macOS needs neither, and machines with them cannot
	// be saved.
	h.display = c.Display
	h.shareTag = take(h, "the mounts", vz.MacOSGuestAutomountTag)
}

// macPlatform puts a Mac together.
func (h *hardware) macPlatform(model *vz.MacHardwareModel, machine *vz.MacMachineIdentifier, storage *vz.MacAuxiliaryStorage) {
	platform := take(h, "the platform", func() (*vz.MacPlatformConfiguration, error) {
		return vz.NewMacPlatformConfiguration(
			vz.WithMacHardwareModel(model), vz.WithMacMachineIdentifier(machine), vz.WithMacAuxiliaryStorage(storage))
	})
	boot := take(h, "the boot loader", vz.NewMacOSBootLoader)
	if h.err != nil {
		return
	}
	h.platform, h.boot, h.screen = platform, boot, true
	h.identity.Machine = foreign(machine.DataRepresentation())
	runtime.KeepAlive(machine)
}

// hardwareModel reads a hardware model. The bindings panic over empty bytes.
func hardwareModel(b []byte) (*vz.MacHardwareModel, error) {
	if len(b) == 0 {
		return nil, errors.New("the image has none: push it again")
	}
	model, err := vz.NewMacHardwareModelWithData(b)
	if err != nil {
		return nil, err
	}
	if !model.Supported() {
		return nil, errors.New("this host does not know it: the image is of a newer macOS than this Mac runs, or its config is broken; update the host, or use another")
	}
	return model, nil
}

// machineIdentifier is a fresh identifier, or the one of a saved state. The image's own
// is never used: two machines with it would be one to Apple's services.
func machineIdentifier(b []byte) (*vz.MacMachineIdentifier, error) {
	if len(b) == 0 {
		return vz.NewMacMachineIdentifier()
	}
	id, err := vz.NewMacMachineIdentifierWithData(b)
	if err != nil {
		return nil, err
	}
	if len(id.DataRepresentation()) == 0 { // the framework made nothing of it
		return nil, errors.New("it is no machine identifier")
	}
	return id, nil
}

// foreign copies bytes out of memory of the framework's, which is only there as long as
// an object that Go does not see.
func foreign(b []byte) []byte { return bytes.Clone(b) }
