package process

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// markEnv marks the processes of a machine by its directory, in the environment that
// they inherit: the last means to find what has left both tree and session.
const markEnv = "PADDOCK_MACHINE"

// killLimit bounds the killing of one machine: beyond it something hangs in the kernel.
const killLimit = 15 * time.Second

// proc is one process of the host.
type proc struct {
	pid, parent, session int
	zombie               bool
	marked               bool
	dying                bool // it has no memory any more, and is no zombie yet
}

// tree is the processes of one machine.
type tree struct {
	root int          // the guest's pid and session; 0: not known, go by the mark alone
	mark string       // NAME=value in the environment
	seen map[int]bool // pids found so far, to be reaped if they became our children
}

// members picks the machine's processes out of all: the root, its session, the marked,
// and whatever descends from one of these. Neither we nor init are ever among them; we
// may be the root, and then all below us are.
func members(all []proc, root, self int) map[int]proc {
	children := map[int][]proc{}
	found := map[int]proc{}
	var open []int // pids whose children are still to be looked at
	add := func(p proc) {
		if _, known := found[p.pid]; !known && p.pid > 1 && p.pid != self {
			found[p.pid] = p
			open = append(open, p.pid)
		}
	}
	if root > 1 { // 0 is the parent and session of the kernel's own
		open = append(open, root)
	}
	for _, p := range all {
		children[p.parent] = append(children[p.parent], p)
		if p.marked || root > 1 && (p.pid == root || p.session == root) {
			add(p)
		}
	}
	for len(open) > 0 {
		pid := open[len(open)-1]
		open = open[:len(open)-1]
		for _, child := range children[pid] {
			add(child)
		}
	}
	return found
}

// endBelow kills everything but the root, as far as it can be seen without the mark.
func (t *tree) endBelow(ctx context.Context) {
	limit, cancel := context.WithTimeout(ctx, killLimit)
	defer cancel()
	_ = t.killAll(limit, false, t.root) // what is left over is left to end, which says so
}

// end kills everything that is found, also by the mark, and reaps what is ours to reap.
// The root must have been waited for by its parent. It is bounded by killLimit.
func (t *tree) end(ctx context.Context) error {
	limit, cancel := context.WithTimeout(ctx, killLimit)
	defer cancel()
	err := t.killAll(limit, true, 0)
	t.reapAll(limit)
	return err
}

// reapAll takes the exit statuses of what was killed and became our child, and waits for
// what is still on its way there: a process with threads looks dead before they all are,
// and its children become ours only then.
func (t *tree) reapAll(ctx context.Context) {
	open := maps.Clone(t.seen)
	delete(open, t.root) // os/exec waits for that one
	for pause := time.Millisecond; ; pause = min(2*pause, 20*time.Millisecond) {
		for pid := range open {
			if t.reaped(pid) {
				delete(open, pid)
			}
		}
		if len(open) == 0 {
			return
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return // it is dead, and nobody's but the kernel's
		}
	}
}

// reaped reports whether nothing is left to do for a dead process: it was our child and
// is no more, or it is that of a process which is none of the machine's.
func (t *tree) reaped(pid int) bool {
	for {
		switch n, err := unix.Wait4(pid, nil, unix.WNOHANG, nil); {
		case errors.Is(err, unix.EINTR):
		case err == nil:
			return n == pid // else it is our child, and its threads are still ending
		default:
			parent := parentOf(pid)
			return parent == 0 || !t.seen[parent] && parent != os.Getpid()
		}
	}
}

// killAll kills and looks again until nothing but spare lives. A process that forks
// while it is looked at is found in the next round.
func (t *tree) killAll(ctx context.Context, byMark bool, spare int) error {
	mark := ""
	if byMark {
		mark = t.mark
	}
	if t.seen == nil {
		t.seen = map[int]bool{}
	}
	for pause := time.Millisecond; ; pause = min(2*pause, 20*time.Millisecond) {
		all, err := processes(mark)
		if err != nil {
			return fmt.Errorf("listing processes: %w", err)
		}
		alive := 0
		for _, p := range all { // killed by somebody, and no longer to be told by its mark
			if p.dying && t.seen[p.pid] {
				alive++
			}
		}
		for pid, p := range members(all, t.root, os.Getpid()) {
			if pid == spare {
				continue
			}
			t.seen[pid] = true
			if !p.zombie {
				alive++
				_ = unix.Kill(pid, unix.SIGKILL) // gone already is fine
			}
		}
		if alive == 0 {
			return nil
		}
		select {
		case <-time.After(pause): // a killed process needs a moment to die
		case <-ctx.Done():
			return fmt.Errorf("%d processes of the machine do not die: %w", alive, ctx.Err())
		}
	}
}
