package parts

import "golang.org/x/sys/unix"

// darwinMemory asks the kernel.
func darwinMemory() int64 {
	bytes, err := unix.SysctlUint64("hw.memsize")
	if err != nil {
		return 0
	}
	return int64(bytes)
}
