package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"
	"time"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/runner/guest"
	"github.com/paddock-ci/paddock/vm"
)

// What some bootstraps can do besides: agent all, ssh the first.
type (
	putter interface {
		Put(ctx context.Context, f guest.File, r io.Reader) error
	}
	execer interface {
		Exec(ctx context.Context, cmd guest.Command, output func(stream guest.Stream, p []byte)) (exit int, err error)
	}
)

// stagedArchive is where GitHub's runner lies in the guest until it is unpacked, in the
// runner's directory.
const stagedArchive = ".paddock-runner.tar.gz"

// startScript runs GitHub's runner; the archive is there only if the guest had no runner
// of that version.
const startScript = `if test -f ` + stagedArchive + `; then tar xzf ` + stagedArchive + ` && rm -f ` + stagedArchive + ` || exit 1; fi
test -x ./run.sh || { echo "this image has no GitHub runner in $PWD: bake one in, or give the pool a runner command"; exit 1; }
exec ./run.sh`

// prepare makes the guest ready for a runner and returns how to start it. A pool's own
// command gets the JIT config on its standard input, and so does what an image starts by
// itself (self). GitHub's runner takes it from files in its directory, which only its
// user may read: it would take it as an argument, too, where every process could see it.
func (a *Agent) prepare(ctx context.Context, l *life, order api.RunnerOrder) (guest.Run, error) {
	run := guest.Run{Name: order.Runner.Name, Argv: l.order.Runner, Env: l.order.Env}
	if len(run.Argv) > 0 || bootstrapOf(l.order) == fleet.BootstrapSelf {
		run.Input = []byte(order.JIT)
		return run, nil
	}
	to, ok := l.guest.(putter)
	if !ok {
		return run, fmt.Errorf("bootstrap %q cannot put GitHub's runner into a guest: give the pool a runner command", l.order.Bootstrap)
	}
	if archive, ok := a.archiveFor(l, order.Archives); ok {
		if err := a.stage(ctx, l, to, archive); err != nil {
			return run, err
		}
	}
	files, err := guest.JITFiles([]byte(order.JIT))
	if err != nil {
		return run, err
	}
	for _, f := range files {
		if err := to.Put(ctx, guest.File{Path: f.Name, Mode: 0o600, Size: int64(len(f.Content))}, bytes.NewReader(f.Content)); err != nil {
			return run, fmt.Errorf("putting the runner's file %s into the guest: %w", f.Name, err)
		}
	}
	run.Argv = []string{"sh", "-c", startScript}
	return run, nil
}

// archiveFor picks the runner that fits the guest, by the VM config in its clone.
func (a *Agent) archiveFor(l *life, offered []fleet.Archive) (fleet.Archive, bool) {
	if len(offered) == 0 {
		return fleet.Archive{}, false
	}
	guest, err := vm.ReadConfig(a.cloneDir(l.order.ID))
	if err != nil {
		a.log.Warn("the guest's own runner must serve: its VM config does not say which other would", "vm", l.order.ID, "error", err)
		return fleet.Archive{}, false
	}
	for _, archive := range offered {
		if archive.OS == guest.OS && archive.Arch == guest.Arch {
			return archive, true
		}
	}
	a.log.Warn("the guest's own runner must serve: GitHub offers none for it", "vm", l.order.ID, "os", guest.OS, "arch", guest.Arch)
	return fleet.Archive{}, false
}

// stage puts GitHub's runner into a guest that has none of that version. If it cannot be
// had, the guest's own serves, if it has one: GitHub updates it before its first job.
func (a *Agent) stage(ctx context.Context, l *life, to putter, archive fleet.Archive) error {
	if have := runnerVersion(ctx, l.guest); have != "" && have == archiveVersion(archive.Name) {
		return nil
	}
	f, err := a.archives.open(ctx, archive)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		a.log.Warn("the guest's own runner must serve", "vm", l.order.ID, "error", err)
		return nil
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("reading GitHub's runner: %w", err)
	}
	if err := to.Put(ctx, guest.File{Path: stagedArchive, Mode: 0o600, Size: info.Size()}, f); err != nil {
		return fmt.Errorf("putting GitHub's runner into the guest: %w", err)
	}
	return nil
}

// versionPattern finds the version in an archive's name, and in what a runner says.
var versionPattern = regexp.MustCompile(`[0-9]+\.[0-9]+\.[0-9]+`)

func archiveVersion(name string) string { return versionPattern.FindString(name) }

const (
	// versionTime bounds the question which runner a guest has; it takes half a second.
	versionTime = 10 * time.Second
	// maxVersion bounds the answer, in bytes.
	maxVersion = 256
)

// runnerVersion asks the guest for its GitHub runner's version; "": it has none, or
// cannot be asked, which costs a transfer.
func runnerVersion(ctx context.Context, b bootstrap) string {
	in, ok := b.(execer)
	if !ok {
		return ""
	}
	ctx, cancel := context.WithTimeout(ctx, versionTime)
	defer cancel()
	var said strings.Builder
	exit, err := in.Exec(ctx, guest.Command{Argv: []string{"sh", "-c", "test -x ./run.sh && ./bin/Runner.Listener --version"}},
		func(stream guest.Stream, p []byte) {
			if stream == guest.Stdout {
				said.Write(p[:min(len(p), maxVersion-said.Len())])
			}
		})
	if err != nil || exit != 0 {
		return ""
	}
	return versionPattern.FindString(said.String())
}

// startTries bounds how often a runner is started over a new connection.
const startTries = 5

// startRunner hands the JIT config over, which is kept nowhere on this host; a start that
// was already taken is a success.
func (a *Agent) startRunner(ctx context.Context, l *life, order api.RunnerOrder) error {
	awaitNetwork(ctx, l)
	for n := 1; ; n++ {
		run, err := a.prepare(ctx, l, order)
		if err == nil {
			err = l.guest.Start(ctx, run)
		}
		if err == nil || ctx.Err() != nil || n == startTries || !errors.Is(err, guest.ErrLost) {
			return err
		}
		if err := a.reach(ctx, l); err != nil {
			return err
		}
		if l.status.Name == order.Runner.Name {
			return nil // the guest took it, and only its answer was lost
		}
	}
}
