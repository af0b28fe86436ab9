package qemu_test

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/image/tart"
	"github.com/paddock-ci/paddock/vm"
	"github.com/paddock-ci/paddock/vm/qemu"
	"github.com/paddock-ci/paddock/vm/qemu/qemutest"
)

// The geometry of efiDisk, in sectors of 512 bytes.
const (
	sector      = 512
	partition   = 2048 // where it begins: the first MiB is everybody's
	sectors     = 96 << 20 / sector
	cluster     = 8
	rootEntries = 512
	tableLength = 96 // 2 bytes for each cluster
	rootStart   = 1 + tableLength
	dataStart   = rootStart + rootEntries*32/sector
)

// efiDisk is a disk with one FAT16 partition, on which firmware finds a program where it
// looks first.
func efiDisk(program []byte) []byte {
	disk := make([]byte, (partition+sectors)*sector)
	put16, put32 := binary.LittleEndian.PutUint16, binary.LittleEndian.PutUint32
	entry := disk[446:] // of the first partition: an EFI system partition
	entry[4] = 0xEF
	put32(entry[8:], partition)
	put32(entry[12:], sectors)
	put16(disk[510:], 0xAA55)

	fat := disk[partition*sector:]
	copy(fat, "\xEB\x3C\x90MSDOS5.0")
	put16(fat[11:], sector)
	fat[13], fat[16], fat[21] = cluster, 1, 0xF8 // one table, a hard disk
	put16(fat[14:], 1)                           // the sector of these lines
	put16(fat[17:], rootEntries)
	put16(fat[22:], tableLength)
	put32(fat[28:], partition)
	put32(fat[32:], sectors)
	fat[38] = 0x29
	copy(fat[43:], "NO NAME    FAT16   ")
	put16(fat[510:], 0xAA55)

	const end = 0xFFFF
	table := fat[sector:]
	put16(table, 0xFFF8)
	put16(table[2:], end)
	at := func(number int) []byte { return fat[(dataStart+(number-2)*cluster)*sector:] }
	name := func(where []byte, name string, kind byte, number, size int) {
		copy(where, name)
		where[11] = kind
		put16(where[26:], uint16(number))
		put32(where[28:], uint32(size))
	}
	const folder, file = 0x10, 0x20
	name(fat[rootStart*sector:], "EFI        ", folder, 2, 0)
	name(at(2), ".          ", folder, 2, 0)
	name(at(2)[32:], "..         ", folder, 0, 0)
	name(at(2)[64:], "BOOT       ", folder, 3, 0)
	name(at(3), ".          ", folder, 3, 0)
	name(at(3)[32:], "..         ", folder, 2, 0)
	name(at(3)[64:], "BOOTAA64EFI", file, 4, len(program))
	put16(table[4:], end)
	put16(table[6:], end)
	copy(at(4), program)
	count := (len(program) + cluster*sector - 1) / (cluster * sector)
	for i := range count {
		put16(table[2*(4+i):], uint16(4+i+1))
	}
	put16(table[2*(4+count-1):], end)
	return disk
}

// A disk with a boot loader is booted by firmware, which is given variables of its own
// where the image has none. The loader here is a kernel, which is an EFI program, too.
func TestBootByFirmware(t *testing.T) {
	t.Parallel()
	s := good(t)
	s.Agent, s.Memory = false, 256<<20
	parts, err := qemutest.Parts(t.Context(), "arm64")
	if err != nil {
		t.Fatal(err)
	}
	kernel, err := os.ReadFile(filepath.Join(parts, "vmlinuz"))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(
		image(t, "arm64").Clone(s.Dir, func(c *tart.Config) { c.Boot = nil }),
		os.Remove(filepath.Join(s.Dir, vm.NVRAMFile)),
		os.WriteFile(filepath.Join(s.Dir, vm.DiskFile), efiDisk(kernel), 0o600),
	); err != nil {
		t.Fatal(err)
	}
	m := boot(t, newDriver(t, qemu.Config{}), s)
	path := filepath.Join(s.Dir, vm.ConsoleFile)
	for deadline := time.Now().Add(3 * time.Minute); ; time.Sleep(50 * time.Millisecond) { // alone it takes 10 s
		raw, err := os.ReadFile(path)
		said := string(raw)
		if err == nil && strings.Contains(said, "EFI stub: Booting Linux Kernel") && strings.Contains(said, "Linux version") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("no kernel was booted from the disk: %q", vm.ConsoleTail(s.Dir))
		}
	}
	if err := m.Destroy(t.Context()); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(filepath.Join(s.Dir, vm.NVRAMFile)); err != nil || info.Size() < 1<<20 {
		t.Errorf("the firmware's variables: %v, %v", info, err)
	}
	nothingLeft(t, s)
}
