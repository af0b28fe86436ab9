package smoke

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/vm"
)

// trial is one run, and what its steps leave for later ones.
type trial struct {
	Config
	machines  map[string]vm.Machine // those that run, by the name of their directory
	before    []string              // what was on the host already
	said      string                // by the command
	skew      time.Duration         // of the first guest's clock
	addresses []string              // the guest's own word
}

// stateDir is the saved state's, beside the machines'.
const stateDir = "state"

func (t *trial) dir(name string) string { return filepath.Join(t.Dir, name) }

// clone makes a machine's directory of those files of another that a machine may need.
func (t *trial) clone(ctx context.Context, name, from string) (string, error) {
	if err := os.Mkdir(t.dir(name), 0o700); err != nil {
		return "", fmt.Errorf("making a clone's directory: %w", err)
	}
	for _, file := range vm.SavedFiles {
		if from == t.Image && file == vm.IdentityFile {
			continue // a cold clone gets an identity of its own
		}
		if _, err := os.Stat(filepath.Join(from, file)); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err := t.Clone(ctx, filepath.Join(from, file), filepath.Join(t.dir(name), file)); err != nil {
			return "", fmt.Errorf("cloning %s: %w", file, err)
		}
	}
	info, err := os.Stat(filepath.Join(t.dir(name), vm.DiskFile))
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("a disk of %.1f GB", float64(info.Size())/1e9), nil
}

// boot boots a machine of its clone, from a saved state unless that is "".
func (t *trial) boot(ctx context.Context, name, state string) error {
	m, err := t.Driver.Boot(ctx, vm.Spec{
		ID: fleet.VMID(name), Dir: t.dir(name), CPU: t.CPU, Memory: t.Memory, Agent: t.Agent, State: state,
	})
	if err != nil {
		return err
	}
	t.machines[name] = m
	return nil
}

// with calls f with the guest of a machine.
func (t *trial) with(ctx context.Context, name string, f func(Guest) error) error {
	g, err := t.Open(ctx, t.machines[name])
	if err != nil {
		return fmt.Errorf("reaching the guest: %w", err)
	}
	return errors.Join(f(g), closed(g))
}

// console is the end of what a machine printed, short enough for a row.
func (t *trial) console(name string) string {
	const most = 300 // bytes
	tail := vm.ConsoleTail(t.dir(name))
	return strings.ToValidUTF8(tail[max(0, len(tail)-most):], "")
}

// closed closes a guest. That its stream had ended before is no news.
func closed(g Guest) error {
	if err := g.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// destroy ends a machine, and looks whether its end is known and its directory clean.
func (t *trial) destroy(ctx context.Context, name string) (string, error) {
	m := t.machines[name]
	if err := m.Destroy(ctx); err != nil {
		return "", fmt.Errorf("destroying: %w", err)
	}
	exit, err := m.Wait(ctx)
	if err != nil && !errors.Is(err, vm.ErrUnknown) { // its helper has forgotten it by now
		return "", fmt.Errorf("asking how it ended: %w", err)
	}
	delete(t.machines, name)
	odd, err := sockets(t.dir(name))
	if err == nil && len(odd) > 0 {
		err = fmt.Errorf("it left %q in its directory", odd)
	}
	return exit.Reason, errors.Join(err, t.remove(name))
}

func (t *trial) remove(name string) error {
	if err := os.RemoveAll(t.dir(name)); err != nil {
		return fmt.Errorf("removing the clone: %w", err)
	}
	return nil
}

func (t *trial) left(ctx context.Context) ([]string, error) {
	if t.Left == nil {
		return nil, nil
	}
	return t.Left(ctx)
}

// clear ends what still runs and removes all files.
func (t *trial) clear(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute) // a helper is killed after half a minute
	defer cancel()
	var errs []error
	for name := range t.machines {
		_, err := t.destroy(ctx, name)
		errs = append(errs, err)
	}
	if err := os.RemoveAll(t.Dir); err != nil {
		errs = append(errs, fmt.Errorf("removing the machines' directory: %w", err))
	}
	return errors.Join(errs...)
}

func save(ctx context.Context, t *trial) (string, error) {
	m, ok := t.machines[first].(vm.Saver)
	if !ok {
		return "", skip{"this driver's machines cannot be saved"}
	}
	if err := os.Mkdir(t.dir(stateDir), 0o700); err != nil {
		return "", err
	}
	if err := m.Save(ctx, t.dir(stateDir)); err != nil {
		return "", err
	}
	var size int64
	entries, err := os.ReadDir(t.dir(stateDir))
	for _, e := range entries {
		if info, err := e.Info(); err == nil && e.Name() != vm.DiskFile { // the disk is a clone
			size += info.Size()
		}
	}
	return fmt.Sprintf("%.2f GB beside the disk", float64(size)/1e9), err
}

// resume starts the first machine's state; the figure that counts is until the answer.
func resume(ctx context.Context, t *trial) (string, error) {
	start := time.Now()
	if _, err := t.clone(ctx, resumed, t.dir(stateDir)); err != nil {
		return "", err
	}
	cloned := time.Since(start)
	if err := t.boot(ctx, resumed, t.dir(stateDir)); err != nil {
		return "", err
	}
	runs := time.Since(start)
	if _, err := answer(resumed)(ctx, t); err != nil {
		return "", err
	}
	return fmt.Sprintf("cloned after %.2f s, runs after %.2f s, answers after %.2f s", cloned.Seconds(), runs.Seconds(), time.Since(start).Seconds()), nil
}

// waker is a guest that can be told the time.
type waker interface {
	Wake(ctx context.Context, w guest.Wake) error
}

func wake(ctx context.Context, t *trial) (string, error) {
	return "", t.with(ctx, resumed, func(g Guest) error {
		w, ok := g.(waker)
		if !ok {
			return skip{"only Paddock's agent sets the clock"}
		}
		entropy := make([]byte, 64)
		_, _ = rand.Read(entropy) // never fails
		return w.Wake(ctx, guest.Wake{Now: time.Now(), Entropy: entropy})
	})
}

// skew is how far a clock that was read between two times is ahead; 0 within a second.
func skew(seconds string, from, to time.Time) (time.Duration, error) {
	n, err := strconv.ParseInt(seconds, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("the guest's clock: %w", err)
	}
	switch at := time.Unix(n, 0); {
	case at.After(to):
		return at.Sub(to).Round(time.Second), nil
	case at.Add(time.Second).Before(from):
		return at.Add(time.Second).Sub(from).Round(time.Second), nil
	}
	return 0, nil
}
