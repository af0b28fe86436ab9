// Package process is a driver whose machine is a child process: for tests, the demo
// and hosts where no virtual machine can run.
//
//  1. Boot checks the clone, takes a slot, and starts the guest's command in a session
//     and directory of its own; the guest says when it listens.
//  2. Dial connects to the guest's unix socket.
//  3. Destroy, or the guest's own end, kills everything that descends from the guest,
//     also what made a session of its own, and reaps it.
//
// The guest is bound to the process that booted it by a pipe: when that one is killed,
// the guest ends with all that runs in it.
//
// It is no isolation: what runs in such a machine runs as the user who started it and
// sees the host's files. CPU, memory and mounts of a Spec are ignored. On Linux nothing
// escapes Destroy; if the guest is killed by a job, a process that left its session and
// wiped its environment does. On darwin, which has no inheriting of orphans, that holds
// for Destroy as well.
//
// Called by cmd, inside the vm-helper process, and by tests; GuestMain is what the
// hidden guest-agent command calls.
package process

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/paddock-ci/paddock/vm"
)

// Config makes a driver.
type Config struct {
	// Command is the guest's argv, e.g. {"/path/paddock", "guest-agent"}; it calls
	// GuestMain, which finds the rest in its environment. Needed.
	Command []string
	// Slots is how many machines may run at once; 0: no limit.
	Slots int
	// SlotDir is a directory of lock files by which drivers in several processes share
	// the slots (each vm-helper has a driver of its own); "": counted in this one only.
	SlotDir string
	// Env is added to the guest's environment, which else holds a few names from ours
	// (PATH, HOME, TMPDIR and the like), since ours may hold secrets. Nil: nothing.
	Env []string
	Log *slog.Logger // nil: no log
}

// Driver boots child processes.
type Driver struct {
	config Config
	slots  *slots
	log    *slog.Logger
}

var (
	_ vm.Driver = (*Driver)(nil)
	_ vm.Reaper = (*Driver)(nil)
)

// New makes a driver. On Linux it makes this process the one that inherits orphans
// (PR_SET_CHILD_SUBREAPER), so that what a machine leaves can be found and reaped.
func New(c Config) (*Driver, error) {
	if len(c.Command) == 0 {
		return nil, errors.New("process driver: no guest command; give the path of paddock and guest-agent")
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if err := inheritOrphans(); err != nil {
		return nil, fmt.Errorf("process driver: %w", err)
	}
	return &Driver{config: c, slots: &slots{limit: c.Slots, dir: c.SlotDir}, log: c.Log}, nil
}

// Boot starts the guest and returns when it listens.
func (d *Driver) Boot(ctx context.Context, spec vm.Spec) (vm.Machine, error) {
	var err error
	if spec.Dir, err = filepath.Abs(spec.Dir); err != nil {
		return nil, err
	}
	if err := vm.CheckDisk(spec.Dir); err != nil {
		return nil, &vm.BootError{Err: err}
	}
	release, err := d.slots.take()
	if err != nil {
		return nil, err
	}
	m, host, err := d.start(ctx, spec, release)
	if err != nil {
		release()
		return nil, err
	}
	if err := awaitReady(ctx, m, host); err != nil {
		return nil, d.failed(ctx, m, spec, err)
	}
	return m, nil
}

// start starts the guest. The caller releases the slot if it fails; otherwise the
// machine does when it has ended.
func (d *Driver) start(ctx context.Context, spec vm.Spec, release func()) (*machine, net.Conn, error) {
	socket, err := socketPath(spec.Dir)
	if err != nil {
		return nil, nil, err
	}
	console, err := os.OpenFile(filepath.Join(spec.Dir, vm.ConsoleFile), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, nil, fmt.Errorf("opening the console: %w", err)
	}
	defer func() { _ = console.Close() }() // the child has its own
	host, theirs, err := socketPair()
	if err != nil {
		return nil, nil, err
	}
	defer func() { _ = theirs.Close() }()

	life := context.WithoutCancel(ctx) // the machine outlives the call
	cmd := exec.CommandContext(life, d.config.Command[0], d.config.Command[1:]...)
	cmd.Dir = spec.Dir
	cmd.Env = vm.ChildEnv(d.config.Env...)
	cmd.Env = append(cmd.Env, socketEnv+"="+socket, markEnv+"="+spec.Dir)
	cmd.Stdout, cmd.Stderr = console, console
	cmd.ExtraFiles = []*os.File{theirs} // hostFD in the child
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		_ = host.Close()
		return nil, nil, errors.Join(fmt.Errorf("starting the guest's command: %w", err), removeSocket(spec.Dir))
	}
	m := newMachine(socket)
	go func() {
		m.live(life, cmd, tree{root: cmd.Process.Pid, mark: markEnv + "=" + spec.Dir})
		_ = host.Close()
		m.leftover = errors.Join(m.leftover, removeSocket(spec.Dir))
		release()
		if m.leftover != nil {
			d.log.Error("machine not fully destroyed", "vm", spec.ID, "error", m.leftover)
		}
		close(m.done)
	}()
	return m, host, nil
}

// awaitReady waits for the byte by which the guest says that it listens.
func awaitReady(ctx context.Context, m *machine, host net.Conn) error {
	ready := make(chan error, 1)
	go func() {
		_, err := io.ReadFull(host, make([]byte, 1))
		ready <- err // ends at the latest when the machine closes host
	}()
	select {
	case err := <-ready:
		if err != nil {
			return errors.New("the guest's command ended before it listened")
		}
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// failed cleans up after a boot that failed with cause, and says how.
func (d *Driver) failed(ctx context.Context, m *machine, spec vm.Spec, cause error) error {
	cancelled := ctx.Err() != nil && errors.Is(cause, ctx.Err())
	if !cancelled {
		// The pipe closes a moment before the process ends: wait for its own reason.
		select {
		case <-m.done:
			cause = fmt.Errorf("%w: %s", cause, m.exit.Reason)
		case <-ctx.Done():
		}
	}
	// The kill is bounded by itself, so the cleaning goes on when ctx has ended.
	leftover := m.Destroy(context.WithoutCancel(ctx))
	if cancelled || leftover != nil {
		return errors.Join(cause, leftover)
	}
	return &vm.BootError{Console: vm.ConsoleTail(spec.Dir), Err: cause}
}

// Reap ends what a killed process of ours left of the machine in spec.Dir.
func (d *Driver) Reap(ctx context.Context, spec vm.Spec) error {
	dir, err := filepath.Abs(spec.Dir)
	if err != nil {
		return fmt.Errorf("reaping %s: %w", spec.ID, err)
	}
	t := tree{mark: markEnv + "=" + dir}
	if err := t.end(ctx); err != nil {
		return fmt.Errorf("reaping %s: %w", spec.ID, err)
	}
	if err := removeSocket(dir); err != nil {
		return fmt.Errorf("reaping %s: %w", spec.ID, err)
	}
	return nil
}

// socketFile is the guest's socket in the machine's directory, where its path fits.
const socketFile = "guest.sock"

// maxSocketPath is what fits into sun_path with its final zero: 104 bytes on darwin,
// 108 on Linux.
const maxSocketPath = 103

// socketPath makes room for the socket of the machine in dir: there, where its path is
// short enough, or else in a directory made for it.
func socketPath(dir string) (string, error) {
	path := filepath.Join(dir, socketFile)
	if len(path) > maxSocketPath {
		path = shortPath(dir)
	}
	if err := removeSocket(dir); err != nil {
		return "", err
	}
	if len(filepath.Join(dir, socketFile)) > maxSocketPath {
		if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
			return "", fmt.Errorf("making a directory for the guest's socket: %w", err)
		}
	}
	return path, nil
}

// removeSocket removes what socketPath, now or in a process that was killed, made. A job
// may have taken the right to write from its own directory: the socket then goes with
// the clone, whose owner gives it back.
func removeSocket(dir string) error {
	err := os.Remove(filepath.Join(dir, socketFile))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission) || errors.Is(err, syscall.ENAMETOOLONG) {
		err = nil
	}
	if err = errors.Join(err, os.RemoveAll(filepath.Dir(shortPath(dir)))); err != nil {
		return fmt.Errorf("removing the guest's socket: %w", err)
	}
	return nil
}

// shortPath derives a path from dir, so that a later process finds what is left of it.
func shortPath(dir string) string {
	sum := sha256.Sum256([]byte(dir))
	return filepath.Join(shortTemp(), fmt.Sprintf("pdk%x", sum[:6]), "s")
}

// shortTemp is the directory for temporary files, unless it is itself too long.
func shortTemp() string {
	if dir := os.TempDir(); len(dir) <= maxSocketPath-len("/pdk012345678901/s") {
		return dir
	}
	return "/tmp"
}

// socketPair makes two connected streams: ours, and the one that the guest inherits.
func socketPair() (net.Conn, *os.File, error) {
	syscall.ForkLock.RLock() // no fork between the making and the close-on-exec
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err == nil {
		unix.CloseOnExec(fds[0])
		unix.CloseOnExec(fds[1])
	}
	syscall.ForkLock.RUnlock()
	if err != nil {
		return nil, nil, fmt.Errorf("making the guest's lifeline: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "lifeline"), os.NewFile(uintptr(fds[1]), "lifeline")
	conn, err := net.FileConn(ours)
	_ = ours.Close() // FileConn has its own
	if err != nil {
		_ = theirs.Close()
		return nil, nil, fmt.Errorf("making the guest's lifeline: %w", err)
	}
	return conn, theirs, nil
}
