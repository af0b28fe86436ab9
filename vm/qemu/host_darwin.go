package qemu

import (
	"bytes"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// sandbox is Linux's.
var sandbox []string

// attributes are those of QEMU's process: not in our process group, so that a terminal's
// interrupt leaves it to us. Nothing binds its life to ours on darwin: Reap finds it.
func attributes() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }

// hostMemory is this host's memory in bytes.
func hostMemory() (int64, error) {
	n, err := unix.SysctlUint64("hw.memsize")
	return int64(n), err
}

// marked lists the processes with the mark in their environment, which lies behind the
// arguments in what kern.procargs2 tells.
func marked(mark string) ([]int, error) {
	list, err := unix.SysctlKinfoProcSlice("kern.proc.all")
	if err != nil {
		return nil, fmt.Errorf("listing processes: %w", err)
	}
	var pids []int
	for i := range list {
		pid := int(list[i].Proc.P_pid)
		area, err := unix.SysctlRaw("kern.procargs2", pid)
		if err == nil && pid != os.Getpid() && bytes.Contains(area, []byte("\x00"+mark+"\x00")) {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// closeOnExec: darwin has no such flag; there are no shares on darwin.
const closeOnExec = 0
