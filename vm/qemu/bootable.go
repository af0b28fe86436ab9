package qemu

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
)

// cutInit splits a kernel command line where the arguments of init begin.
func cutInit(line string) (kernel, init string, found bool) {
	return strings.Cut(line, " -- ")
}

// hasBootLoader looks for what firmware looks for: a partition table. A disk without one
// would be searched for a boot loader until somebody loses patience.
func hasBootLoader(disk string) error {
	head, err := readHead(disk, 1024)
	if err != nil {
		return err
	}
	// The signature of a boot record, also on a GPT disk, and that of the GPT itself.
	if len(head) >= 512 && binary.LittleEndian.Uint16(head[510:]) == 0xAA55 {
		return nil
	}
	if len(head) >= 520 && string(head[512:520]) == "EFI PART" {
		return nil
	}
	return errors.New("the disk has no partition table, so no boot loader, and the VM config names no kernel on it (paddockBoot): is this the image of a bootable Linux guest?")
}

// isKernel looks for the marks of what QEMU boots.
func isKernel(path, guestArch string) error {
	head, err := readHead(path, 4096)
	if err != nil {
		return err
	}
	if len(head) >= 4096 {
		switch guestArch {
		case "arm64": // the image's own magic number; compressed; or an EFI program with the kernel in it
			if string(head[56:60]) == "ARM\x64" || bytes.HasPrefix(head, []byte{0x1f, 0x8b}) || string(head[4:8]) == "zimg" {
				return nil
			}
		case "amd64": // the boot protocol's header
			if string(head[0x202:0x206]) == "HdrS" {
				return nil
			}
		}
	}
	return fmt.Errorf("what lies on the disk where the VM config says is no Linux kernel for %s", guestArch)
}

func readHead(path string, size int) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	head := make([]byte, size)
	n, err := io.ReadFull(f, head)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, err
	}
	return head[:n], nil
}
