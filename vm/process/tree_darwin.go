package process

import (
	"bytes"

	"golang.org/x/sys/unix"
)

// zombieState is SZOMB of sys/proc.h.
const zombieState = 5

// inheritOrphans does nothing: on darwin orphans go to launchd, which reaps them. They
// are found by session and mark instead.
func inheritOrphans() error { return nil }

// processes lists the host's processes by sysctl. With a mark it also looks into the
// environment of those that we may look into: our own user's.
func processes(mark string) ([]proc, error) {
	list, err := unix.SysctlKinfoProcSlice("kern.proc.all")
	if err != nil {
		return nil, err
	}
	all := make([]proc, 0, len(list))
	for i := range list {
		p := proc{
			pid:    int(list[i].Proc.P_pid),
			parent: int(list[i].Eproc.Ppid),
			zombie: list[i].Proc.P_stat == zombieState,
		}
		if session, err := unix.Getsid(p.pid); err == nil {
			p.session = session
		}
		p.marked = mark != "" && !p.zombie && hasEnv(p.pid, mark)
		all = append(all, p)
	}
	return all, nil
}

// hasEnv looks for the mark in the argument area, which holds count, path, arguments
// and environment, each ended by a zero byte.
func hasEnv(pid int, mark string) bool {
	area, err := unix.SysctlRaw("kern.procargs2", pid)
	if err != nil {
		return false // another user's, or ended
	}
	return bytes.Contains(area, []byte("\x00"+mark+"\x00"))
}

// parentOf is not asked here: orphans are init's on darwin, never ours.
func parentOf(int) int { return 0 }
