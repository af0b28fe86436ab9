package tart

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"strings"
	"unicode"

	"github.com/paddock-ci/paddock/image"
)

// Config is a VM config: what the guest is and what hardware it was made for. Keys that
// are not known here are kept when it is written again.
type Config struct {
	Version int    `json:"version"`        // 1
	OS      string `json:"os,omitempty"`   // darwin (default) or linux
	Arch    string `json:"arch,omitempty"` // arm64 (default) or amd64

	ECID          []byte `json:"ecid,omitempty"`          // machine identifier (darwin)
	HardwareModel []byte `json:"hardwareModel,omitempty"` // darwin

	CPUCountMin   int    `json:"cpuCountMin,omitempty"`
	CPUCount      int    `json:"cpuCount,omitempty"`
	MemorySizeMin int64  `json:"memorySizeMin,omitempty"` // bytes
	MemorySize    int64  `json:"memorySize,omitempty"`    // bytes
	MACAddress    string `json:"macAddress,omitempty"`    // of the VM it came from; never used twice

	Display    *Display `json:"display,omitempty"`
	DiskFormat string   `json:"diskFormat,omitempty"` // raw (default); asif is refused

	// Boot is Paddock's own key: a Linux guest that is booted without a boot loader; nil:
	// the disk has one.
	Boot *Boot `json:"paddockBoot,omitempty"`

	unknown map[string]json.RawMessage
}

// Display is the size of the guest's screen.
type Display struct {
	Width  int    `json:"width"`
	Height int    `json:"height"`
	Unit   string `json:"unit,omitempty"` // px or pt
}

// Boot names the parts of the disk that hold a Linux guest's kernel and initial RAM disk,
// outside of its file systems: so they are chunks like the rest, and need no layers of
// their own.
type Boot struct {
	Kernel      Extent `json:"kernel"`
	Initrd      Extent `json:"initrd,omitzero"` // zero: none
	CommandLine string `json:"commandLine,omitempty"`
}

// Extent is a part of the disk, in bytes.
type Extent struct {
	Offset int64 `json:"offset"`
	Size   int64 `json:"size"`
}

// Limits on what is read into a machine before its guest runs.
const (
	maxBootFile    = 512 << 20
	maxCommandLine = 2048 // what Linux takes on every architecture
)

func (e Extent) check(what string) error {
	if e.Offset < 0 || e.Size < 1 || e.Size > maxBootFile || e.Offset > image.MaxDiskBytes-e.Size {
		return fmt.Errorf("%s of %d bytes at %d, want 1 to %d bytes on the disk", what, e.Size, e.Offset, maxBootFile)
	}
	return nil
}

func (b *Boot) check(os string) error {
	switch {
	case os != "linux":
		return fmt.Errorf("a %s guest is not booted from a kernel of its own", os)
	case len(b.CommandLine) > maxCommandLine:
		return fmt.Errorf("a kernel command line of %d bytes, at most %d", len(b.CommandLine), maxCommandLine)
	case strings.ContainsFunc(b.CommandLine, unicode.IsControl):
		return errors.New("a control character in the kernel command line")
	}
	if b.Initrd != (Extent{}) {
		if err := b.Initrd.check("initrd"); err != nil {
			return err
		}
	}
	return b.Kernel.check("kernel")
}

// knownKeys are the keys of Config's fields.
var knownKeys = []string{
	"version", "os", "arch", "ecid", "hardwareModel", "cpuCountMin", "cpuCount",
	"memorySizeMin", "memorySize", "macAddress", "display", "diskFormat", "paddockBoot",
}

// ParseConfig reads a VM config and fills in the defaults. Errors are those of package
// image; a disk in asif format is image.ErrASIF.
func ParseConfig(raw []byte) (*Config, error) {
	if len(raw) > image.MaxConfigBytes {
		return nil, fmt.Errorf("VM config: %w: %d bytes, at most %d are read", image.ErrTooLarge, len(raw), image.MaxConfigBytes)
	}
	c := &Config{}
	if err := json.Unmarshal(raw, c); err != nil {
		return nil, fmt.Errorf("VM config: %w: %w", image.ErrMalformed, err)
	}
	if err := json.Unmarshal(raw, &c.unknown); err != nil {
		return nil, fmt.Errorf("VM config: %w: %w", image.ErrMalformed, err)
	}
	for _, key := range knownKeys {
		delete(c.unknown, key)
	}
	c.defaults()
	return c, c.check()
}

func (c *Config) defaults() {
	if c.OS == "" {
		c.OS = "darwin"
	}
	if c.Arch == "" {
		c.Arch = "arm64"
	}
	if c.DiskFormat == "" {
		c.DiskFormat = "raw"
	}
}

// macPattern is lax in leaving out zeros, as some tools of macOS do.
var macPattern = regexp.MustCompile(`^[0-9a-fA-F]{1,2}(:[0-9a-fA-F]{1,2}){5}$`)

// check refuses what no machine could be made from.
func (c *Config) check() error {
	malformed := func(format string, args ...any) error {
		return fmt.Errorf("VM config: %w: %s", image.ErrMalformed, fmt.Sprintf(format, args...))
	}
	switch {
	case c.Version != 1:
		return malformed("version %d, want 1", c.Version)
	case c.OS != "darwin" && c.OS != "linux":
		return malformed("os %.40q, want darwin or linux", c.OS)
	case c.Arch != "arm64" && c.Arch != "amd64":
		return malformed("arch %.40q, want arm64 or amd64", c.Arch)
	case c.DiskFormat == "asif":
		return fmt.Errorf("VM config: %w", image.ErrASIF)
	case c.DiskFormat != "raw":
		return malformed("diskFormat %.40q, want raw", c.DiskFormat)
	case c.OS == "darwin" && (len(c.ECID) == 0 || len(c.HardwareModel) == 0):
		return malformed("a darwin guest needs ecid and hardwareModel")
	case c.MACAddress != "" && !macPattern.MatchString(c.MACAddress):
		return malformed("macAddress %.40q, want six pairs of hex digits with colons", c.MACAddress)
	case c.CPUCount < 0 || c.CPUCountMin < 0:
		return malformed("negative cpuCount")
	case c.MemorySize < 0 || c.MemorySizeMin < 0:
		return malformed("negative memorySize")
	}
	if c.Boot != nil {
		if err := c.Boot.check(c.OS); err != nil {
			return malformed("paddockBoot: %v", err)
		}
	}
	return nil
}

// MarshalJSON writes the known keys over the unknown ones.
func (c *Config) MarshalJSON() ([]byte, error) {
	type plain Config // without this method
	known, err := json.Marshal((*plain)(c))
	if err != nil {
		return nil, err
	}
	all := maps.Clone(c.unknown)
	if all == nil {
		all = make(map[string]json.RawMessage)
	}
	// Into the same map: keys that occur in both are the known ones'.
	if err := json.NewDecoder(bytes.NewReader(known)).Decode(&all); err != nil {
		return nil, err
	}
	return json.Marshal(all)
}
