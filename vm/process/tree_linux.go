package process

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// inheritOrphans makes this process the parent of orphans below it, instead of init.
func inheritOrphans() error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("becoming the parent of orphans: %w", err)
	}
	return nil
}

// processes lists the host's processes from /proc. With a mark it also looks into the
// environment of those that we may look into: our own user's.
func processes(mark string) ([]proc, error) {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	defer func() { _ = dir.Close() }()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	var all []proc
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		stat, err := os.ReadFile(filepath.Join("/proc", name, "stat"))
		if err != nil {
			continue // ended since
		}
		p, err := parseStat(stat)
		if err != nil {
			return nil, fmt.Errorf("process %d: %w", pid, err)
		}
		p.pid = pid
		if mark != "" && !p.zombie {
			p.marked, p.dying = lookInside(name, mark)
		}
		all = append(all, p)
	}
	return all, nil
}

// parseStat reads /proc/PID/stat: "pid (name) state parent group session …", where the
// name may hold spaces and parentheses.
func parseStat(stat []byte) (proc, error) {
	end := bytes.LastIndexByte(stat, ')')
	if end < 0 {
		return proc{}, errors.New("stat without a name")
	}
	fields := bytes.Fields(stat[end+1:])
	if len(fields) < 4 {
		return proc{}, errors.New("stat is too short")
	}
	parent, err := strconv.Atoi(string(fields[1]))
	if err != nil {
		return proc{}, fmt.Errorf("parent in stat: %w", err)
	}
	session, err := strconv.Atoi(string(fields[3]))
	if err != nil {
		return proc{}, fmt.Errorf("session in stat: %w", err)
	}
	state := fields[0][0]
	return proc{parent: parent, session: session, zombie: state == 'Z' || state == 'X'}, nil
}

// lookInside reports whether a process has the mark in its environment, or none at all:
// one that is being killed loses its memory a moment before it is a zombie.
func lookInside(pid, mark string) (marked, dying bool) {
	env, err := os.ReadFile(filepath.Join("/proc", pid, "environ"))
	if err != nil {
		return false, false // another user's, or ended
	}
	return bytes.Contains(append([]byte{0}, env...), []byte("\x00"+mark+"\x00")), len(env) == 0
}

// parentOf is a process's parent, 0 if the process is gone.
func parentOf(pid int) int {
	stat, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return 0
	}
	p, err := parseStat(stat)
	if err != nil {
		return 0
	}
	return p.parent
}
