package vz

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"os"

	"github.com/Code-Hex/vz/v3/internal/objc"
)

// MacHardwareModel is a kind of Mac.
type MacHardwareModel struct {
	*pointer
	data []byte
}

// NewMacHardwareModelWithData reads one. Empty data is a panic, as in the real package;
// data that is none gives a model that is not supported.
func NewMacHardwareModelWithData(b []byte) (*MacHardwareModel, error) {
	_ = b[0]
	if !bytes.HasPrefix(b, []byte(modelPrefix)) {
		b = nil
	}
	return &MacHardwareModel{pointer: &pointer{}, data: b}, available(12)
}

// Supported says whether this host can run it.
func (m *MacHardwareModel) Supported() bool { return bytes.HasPrefix(m.data, []byte(modelPrefix+"1")) }

// DataRepresentation is memory of the framework's: it changes when the test says that it
// was released.
func (m *MacHardwareModel) DataRepresentation() []byte { return hooks().lend(m.data) }

// MacMachineIdentifier tells Macs apart.
type MacMachineIdentifier struct {
	*pointer
	data []byte
}

// NewMacMachineIdentifierWithData reads one.
func NewMacMachineIdentifierWithData(b []byte) (*MacMachineIdentifier, error) {
	_ = b[0]
	if !bytes.HasPrefix(b, []byte(identifierPrefix)) {
		b = nil
	}
	return &MacMachineIdentifier{pointer: &pointer{}, data: b}, available(12)
}

// NewMacMachineIdentifier makes a fresh one.
func NewMacMachineIdentifier() (*MacMachineIdentifier, error) {
	return &MacMachineIdentifier{pointer: &pointer{}, data: []byte(identifierPrefix + hex.EncodeToString(random(8)))}, available(12)
}

// DataRepresentation is memory of the framework's, like that of a model.
func (m *MacMachineIdentifier) DataRepresentation() []byte { return hooks().lend(m.data) }

func random(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return b
}

// MacAuxiliaryStorage is a Mac's NVRAM.
type MacAuxiliaryStorage struct {
	*pointer
	path string
}

// NewMacAuxiliaryStorageOption changes one.
type NewMacAuxiliaryStorageOption func(*MacAuxiliaryStorage) error

// WithCreatingMacAuxiliaryStorage makes the file anew.
func WithCreatingMacAuxiliaryStorage(hardwareModel *MacHardwareModel) NewMacAuxiliaryStorageOption {
	return func(s *MacAuxiliaryStorage) error {
		return os.WriteFile(s.path, []byte(NVRAM(hardwareModel.data)), 0o600)
	}
}

// NewMacAuxiliaryStorage opens one, without looking into it.
func NewMacAuxiliaryStorage(storagePath string, opts ...NewMacAuxiliaryStorageOption) (*MacAuxiliaryStorage, error) {
	s := &MacAuxiliaryStorage{pointer: &pointer{}, path: storagePath}
	for _, opt := range opts {
		if err := opt(s); err != nil {
			return nil, err
		}
	}
	return s, available(12)
}

// PlatformConfiguration is a kind of machine.
type PlatformConfiguration interface {
	objc.NSObject
	platformConfiguration()
}

type basePlatformConfiguration struct{}

func (*basePlatformConfiguration) platformConfiguration() {}

// MacPlatformConfiguration is a Mac.
type MacPlatformConfiguration struct {
	*pointer
	*basePlatformConfiguration
	model   *MacHardwareModel
	machine *MacMachineIdentifier
	storage *MacAuxiliaryStorage
}

// MacPlatformConfigurationOption changes one.
type MacPlatformConfigurationOption func(*MacPlatformConfiguration)

// WithMacHardwareModel sets the model.
func WithMacHardwareModel(m *MacHardwareModel) MacPlatformConfigurationOption {
	return func(p *MacPlatformConfiguration) { p.model = m }
}

// WithMacMachineIdentifier sets the identifier.
func WithMacMachineIdentifier(m *MacMachineIdentifier) MacPlatformConfigurationOption {
	return func(p *MacPlatformConfiguration) { p.machine = m }
}

// WithMacAuxiliaryStorage sets the NVRAM.
func WithMacAuxiliaryStorage(m *MacAuxiliaryStorage) MacPlatformConfigurationOption {
	return func(p *MacPlatformConfiguration) { p.storage = m }
}

// NewMacPlatformConfiguration makes a Mac; a part that the framework made nothing of is an
// exception.
func NewMacPlatformConfiguration(opts ...MacPlatformConfigurationOption) (*MacPlatformConfiguration, error) {
	p := &MacPlatformConfiguration{pointer: &pointer{}}
	for _, opt := range opts {
		opt(p)
	}
	if p.model != nil && p.model.data == nil || p.machine != nil && p.machine.data == nil {
		raise("a Mac of nothing")
	}
	return p, available(12)
}

// invalid says why no Mac can be made of it.
func (p *MacPlatformConfiguration) invalid() error {
	if p == nil || p.model == nil || p.machine == nil || p.storage == nil {
		return failure(ErrorInvalidVirtualMachineConfiguration, "a Mac needs a model, an identifier and auxiliary storage")
	}
	if raw, err := os.ReadFile(p.storage.path); err != nil || string(raw) != NVRAM(p.model.data) {
		return failure(ErrorInvalidVirtualMachineConfiguration, "the auxiliary storage is not one of this hardware model")
	}
	return nil
}
