package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// isInit reports whether process 1 is this program, too.
func isInit() bool {
	ours, err := os.Readlink("/proc/self/exe")
	first, firstErr := os.Readlink("/proc/1/exe")
	return err == nil && firstErr == nil && ours == first
}

// Shutdown powers off by process 1: ourselves, or whatever the image has.
func (s *system) Shutdown(ctx context.Context) error {
	if isInit() {
		powerOff()
		return nil
	}
	return tryCommands(ctx, []string{"systemctl", "poweroff"}, []string{"sudo", "-n", "systemctl", "poweroff"},
		[]string{"shutdown", "-h", "now"}, []string{"sudo", "-n", "shutdown", "-h", "now"}, []string{"poweroff"})
}

// wake sets the clock and stirs the kernel's random pool, which is reseeded at once: a
// second machine from the same state must not draw the same numbers.
func wake(now time.Time, entropy []byte) error {
	tv := unix.NsecToTimeval(now.UnixNano())
	if err := unix.Settimeofday(&tv); err != nil {
		return fmt.Errorf("setting the clock: %w", err)
	}
	if len(entropy) == 0 {
		return nil
	}
	pool, err := os.OpenFile("/dev/random", os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("stirring the random pool: %w", err)
	}
	defer func() { _ = pool.Close() }()
	// struct rand_pool_info: entropy in bits, size in bytes, and as many bytes.
	info := binary.NativeEndian.AppendUint32(nil, uint32(8*len(entropy)))
	info = binary.NativeEndian.AppendUint32(info, uint32(len(entropy)))
	info = append(info, entropy...)
	defer clear(info)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, pool.Fd(), unix.RNDADDENTROPY, uintptr(unsafe.Pointer(&info[0]))); errno != 0 {
		return fmt.Errorf("stirring the random pool: %w", errno)
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, pool.Fd(), unix.RNDRESEEDCRNG, 0); errno != 0 && !errors.Is(errno, unix.EINVAL) {
		return fmt.Errorf("reseeding the random pool: %w", errno) // EINVAL: a kernel before 4.17
	}
	return nil
}

// install has nothing to do here.
func install() error {
	return errors.New("install is for macOS; on Linux let a systemd unit of the image start paddock-guest, with Restart=always")
}
