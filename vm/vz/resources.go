//go:build (darwin && arm64 && cgo) || vzstandin

package vz

import (
	"fmt"

	"github.com/Code-Hex/vz/v3"

	"github.com/paddock-ci/paddock/image/tart"
)

// What a machine gets if neither its order nor its image says.
const (
	defaultCPU    = 4
	defaultMemory = 8 << 30 // bytes
)

// unit is what memory is counted in: the framework refuses broken ones.
const unit = 1 << 20

// resources are the cores and the memory of a machine: what was ordered, else what the
// image says, within what the image needs and this host can give.
func resources(cpu int, memory int64, c *tart.Config) (uint, uint64, error) {
	if cpu == 0 {
		cpu = c.CPUCount
	}
	if cpu == 0 {
		cpu = max(c.CPUCountMin, min(defaultCPU, int(vz.VirtualMachineConfigurationMaximumAllowedCPUCount())))
	}
	if memory == 0 {
		memory = c.MemorySize
	}
	if memory == 0 {
		memory = max(c.MemorySizeMin, min(defaultMemory, int64(vz.VirtualMachineConfigurationMaximumAllowedMemorySize()/2)))
	}
	least := max(c.CPUCountMin, int(vz.VirtualMachineConfigurationMinimumAllowedCPUCount()))
	most := int(vz.VirtualMachineConfigurationMaximumAllowedCPUCount())
	if cpu < least || cpu > most {
		return 0, 0, fmt.Errorf("%d CPUs for a machine of this image on this host: %d to %d are possible", cpu, least, most)
	}
	lowest := max(c.MemorySizeMin, int64(vz.VirtualMachineConfigurationMinimumAllowedMemorySize()))
	highest := int64(vz.VirtualMachineConfigurationMaximumAllowedMemorySize())
	if memory < lowest || memory > highest {
		return 0, 0, fmt.Errorf("%d MiB of memory for a machine of this image on this host: %d to %d MiB are possible", memory/unit, lowest/unit, highest/unit)
	}
	return uint(cpu), uint64(memory / unit * unit), nil
}
