// Package helper keeps each machine, of every driver, in a process of its own:
//
//  1. Boot starts a helper in its own session, hands it the spec by standard input, and
//     waits for its word on a unix socket in the machine's folder.
//  2. The helper boots the machine by the driver, and stays with it. Streams to the
//     guest are carried over its socket, which takes only peers of its own user.
//  3. When the machine ends, the helper leaves the result in the folder and goes.
//  4. Destroy ends the machine and, once that is acknowledged, removes the folder.
//
// So machines survive the agent's crash and upgrade: a new agent Lists the folders and
// Adopts. A crash of the driver (a framework's abort, a panic) takes one machine, not
// the agent: the machine ends when its helper is killed, and what might be left of it is
// reaped by another helper. No state is kept in the agent; every call connects anew.
//
// It is a vm.Driver that adds nothing to the contract but Adopt and List, and knows no
// driver in particular. Called by node (the Driver) and by cmd's hidden vm-helper
// command (Main).
package helper

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/vm"
)

// Config makes a driver.
type Config struct {
	// Command is the helper's argv, e.g. {"/path/paddock", "vm-helper"}; it calls Main.
	// Needed.
	Command []string
	// Dir holds a folder for each machine. It is made with mode 0700 and must be ours
	// alone; its path is short, since those of sockets are (about 80 bytes). Needed.
	Dir string
	// Patience is how long a helper may take to answer Destroy before it is killed;
	// 0: 30 s, more than a driver needs to destroy a machine.
	Patience time.Duration
	// Env is added to the helper's environment, see vm.ChildEnv. Nil: nothing.
	Env []string
	Log *slog.Logger // nil: no log
}

// Driver starts helpers and finds them again.
type Driver struct {
	config Config
	log    *slog.Logger
}

var _ vm.Driver = (*Driver)(nil)

// New makes a driver and its directory.
func New(c Config) (*Driver, error) {
	if len(c.Command) == 0 || c.Dir == "" {
		return nil, errors.New("vm helper: needs a command and a directory")
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Patience == 0 {
		c.Patience = 30 * time.Second
	}
	program, err := exec.LookPath(c.Command[0])
	if err != nil {
		return nil, fmt.Errorf("vm helper: %w", err)
	}
	if program, err = filepath.Abs(program); err != nil {
		return nil, fmt.Errorf("vm helper: %w", err)
	}
	c.Command = append([]string{program}, c.Command[1:]...)
	if c.Dir, err = filepath.Abs(c.Dir); err != nil {
		return nil, fmt.Errorf("vm helper: %w", err)
	}
	if err := privateDir(c.Dir); err != nil {
		return nil, fmt.Errorf("vm helper: %w", err)
	}
	return &Driver{config: c, log: c.Log}, nil
}

// privateDir makes dir, or checks that what is there is ours alone.
func privateDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("making the runtime directory: %w", err)
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return fmt.Errorf("looking at the runtime directory: %w", err)
	}
	owner, ok := info.Sys().(*syscall.Stat_t)
	if !info.IsDir() || !ok || int(owner.Uid) != os.Geteuid() || info.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("runtime directory %s is open to others or not ours: chmod 700 it, or use another", dir)
	}
	return nil
}

// Boot starts a helper with the machine and returns when the machine runs.
func (d *Driver) Boot(ctx context.Context, spec vm.Spec) (vm.Machine, error) {
	m, err := d.boot(ctx, spec)
	if err != nil {
		return nil, err // which machine it is says the caller
	}
	return m, nil
}

func (d *Driver) boot(ctx context.Context, spec vm.Spec) (*machine, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	f, err := d.folder(spec.ID)
	if err != nil {
		return nil, err
	}
	if spec.Dir, err = filepath.Abs(spec.Dir); err != nil {
		return nil, err
	}
	if spec.State != "" { // the helper has another working directory
		if spec.State, err = filepath.Abs(spec.State); err != nil {
			return nil, err
		}
	}
	if err := os.Mkdir(string(f), 0o700); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return nil, errors.New("a machine of this id is known here: adopt it or destroy it first")
		}
		return nil, fmt.Errorf("making the machine's folder: %w", err)
	}
	m, err := d.start(ctx, f, spec)
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(string(f)))
	}
	r, err := m.watch(ctx, func(r report) bool { return r.State != booting })
	if err == nil && r.State == running {
		return m, nil
	}
	// Our context may be why it failed; what is left is removed all the same, in the
	// time that Destroy allows itself.
	if cleaning := m.Destroy(context.WithoutCancel(ctx)); cleaning != nil {
		d.log.Error("failed machine not removed", "vm", spec.ID, "error", cleaning)
	}
	switch {
	case err != nil:
		return nil, err
	case r.State == failed:
		return nil, r.Error.asError()
	}
	return nil, fmt.Errorf("the machine ended at once: %s", r.Exit.Reason)
}

// start starts the helper. From then on its socket can be dialled, even before it
// listens, because it inherits the socket from us.
func (d *Driver) start(ctx context.Context, f folder, spec vm.Spec) (*machine, error) {
	if err := f.put(specName, spec); err != nil {
		return nil, fmt.Errorf("writing the spec: %w", err)
	}
	input, err := encode(order{Op: orderBoot, Folder: string(f), Spec: spec})
	if err != nil {
		return nil, err
	}
	socket, err := listen(ctx, f)
	if err != nil {
		return nil, err
	}
	defer func() { _ = socket.Close() }() // the helper has its own
	log, err := os.OpenFile(f.path(logName), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the helper's log: %w", err)
	}
	defer func() { _ = log.Close() }()
	cmd := d.command(context.WithoutCancel(ctx), input)
	cmd.Stderr = log
	cmd.ExtraFiles = []*os.File{socket} // socketFD in the helper
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting the helper: %w", err)
	}
	reaped := make(chan struct{})
	go func() {
		_ = cmd.Wait() // how it ended is in the folder
		close(reaped)
	}()
	m := newMachine(d, f)
	m.reaped = reaped
	if err := f.put(pidName, cmd.Process.Pid); err != nil {
		_ = cmd.Process.Kill()
		<-reaped
		return nil, errors.Join(fmt.Errorf("writing the helper's pid: %w", err), d.reap(context.WithoutCancel(ctx), f, spec))
	}
	return m, nil
}

// command is a helper process with its order on standard input.
func (d *Driver) command(ctx context.Context, input []byte) *exec.Cmd {
	cmd := exec.CommandContext(ctx, d.config.Command[0], d.config.Command[1:]...)
	cmd.Dir = "/" // it must not hold on to a directory of ours
	cmd.Env = vm.ChildEnv(d.config.Env...)
	cmd.Stdin = bytes.NewReader(input)
	return cmd
}

// listen makes the helper's socket, as a file to be inherited.
func listen(ctx context.Context, f folder) (*os.File, error) {
	l, err := (&net.ListenConfig{}).Listen(ctx, "unix", f.path(socketName))
	if err != nil {
		return nil, fmt.Errorf("making the helper's socket: %w", err)
	}
	unix, ok := l.(*net.UnixListener)
	if !ok {
		_ = l.Close()
		return nil, fmt.Errorf("making the helper's socket: got a %T", l)
	}
	unix.SetUnlinkOnClose(false) // closing our copy must leave the path to the helper
	file, err := unix.File()
	_ = unix.Close()
	if err != nil {
		return nil, fmt.Errorf("making the helper's socket: %w", err)
	}
	return file, nil
}

// reap ends what a killed helper left of a machine, in a helper of its own: the driver
// may be one that only helpers can load.
func (d *Driver) reap(ctx context.Context, f folder, spec vm.Spec) error {
	const limit = 60 * time.Second // a helper starts in a second, even on a host at its limit
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	input, err := encode(order{Op: orderReap, Folder: string(f), Spec: spec})
	if err != nil {
		return err
	}
	cmd := d.command(ctx, input)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("reaping what is left of %s: %w: %s", spec.ID, err, bytes.TrimSpace(out[:min(len(out), 500)]))
	}
	return nil
}

// Adopt finds a machine again, also one that is still booting (it waits for that) or
// has ended since: its Wait returns the kept result. vm.ErrUnknown: it was never ours,
// or was destroyed.
func (d *Driver) Adopt(ctx context.Context, id fleet.VMID) (vm.Machine, error) {
	f, err := d.folder(id)
	if err != nil {
		return nil, fmt.Errorf("adopting %s: %w", id, err)
	}
	known, err := f.exists()
	if err != nil {
		return nil, fmt.Errorf("adopting %s: %w", id, err)
	}
	if !known {
		return nil, fmt.Errorf("adopting %s: %w", id, vm.ErrUnknown)
	}
	m := newMachine(d, f)
	if _, err := m.watch(ctx, func(r report) bool { return r.State != booting }); err != nil {
		return nil, fmt.Errorf("adopting %s: %w", id, err)
	}
	return m, nil
}

// List returns the machines that have a folder, sorted: running, or ended and not yet
// destroyed.
func (d *Driver) List() ([]fleet.VMID, error) {
	entries, err := os.ReadDir(d.config.Dir)
	if err != nil {
		return nil, fmt.Errorf("listing machines: %w", err)
	}
	var ids []fleet.VMID
	for _, entry := range entries {
		if id := fleet.VMID(entry.Name()); entry.IsDir() && checkID(id) == nil {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids, nil
}

// pid is the helper's, 0 if it is not known.
func (f folder) pid() int {
	b, err := os.ReadFile(f.path(pidName))
	if err != nil {
		return 0
	}
	pid, err := strconv.Atoi(string(b))
	if err != nil {
		return 0
	}
	return pid
}
