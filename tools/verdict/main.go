// Command verdict runs "go test -json" in one or more modules and prints what a person
// and a CI system want to read of it: go test's own line per package, the full output
// of what failed, the reason of what was skipped, and at the end, alone on a line,
// "N passed, N failed, N skipped".
//
// It is not a test runner: what is tested and how is said in the arguments after "--",
// which go to go test unchanged, and in those of -also, for packages that are tested in
// another build, too. With CI in the environment (any value but 0 and
// false) a skipped test is a failure, because there nothing may be missing. A test that
// -need names must have passed: a build that is left out would fail nothing else.
//
// The Makefile calls it.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"sync"
	"syscall"
)

func main() {
	var dirs, also, need list
	flag.Var(&dirs, "dir", "a module's directory; may be repeated (default: the working directory)")
	flag.Var(&also, "also", "one more run in the working directory: `NAME=value… arguments` of go test; may be repeated")
	flag.Var(&need, "need", "a `PACKAGE.Test` that must have passed in one of the runs; may be repeated")
	atOnce := flag.Int("at-once", 1, "runs at once, begun in the order of the modules; lines are never mixed within a package")
	flag.Parse()
	if len(dirs) == 0 {
		dirs = list{"."}
	}
	runs := make([]testRun, 0, len(dirs)+len(also))
	for _, dir := range dirs {
		runs = append(runs, testRun{dir: dir, args: flag.Args()})
	}
	for _, words := range also {
		runs = append(runs, oneMore(words))
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()

	t := newTally(os.Stdout, need...)
	runAll(ctx, t, runs, *atOnce)
	if !t.close(strict(os.Getenv("CI"))) {
		stop()
		os.Exit(1)
	}
}

// strict says whether the variable CI, which systems set to true, 1, yes or their own
// name, means that a skip is a failure.
func strict(ci string) bool {
	switch strings.ToLower(strings.TrimSpace(ci)) {
	case "", "0", "false":
		return false
	}
	return true
}

// testRun is one run of go test.
type testRun struct {
	dir  string
	env  []string // beside ours
	args []string
}

func (r testRun) String() string {
	return strings.Join(append(append([]string{r.dir}, r.env...), r.args...), " ")
}

// oneMore reads a run as a shell would, without its quotes: assignments come first.
func oneMore(line string) testRun {
	r := testRun{dir: ".", args: strings.Fields(line)}
	for len(r.args) > 0 && !strings.HasPrefix(r.args[0], "-") && strings.Contains(r.args[0], "=") {
		r.env, r.args = append(r.env, r.args[0]), r.args[1:]
	}
	return r
}

// runAll does the runs, some at once: one that mostly waits leaves its time to another.
func runAll(ctx context.Context, t *tally, runs []testRun, atOnce int) {
	next := make(chan testRun)
	var lanes sync.WaitGroup
	for range max(1, atOnce) {
		lanes.Go(func() {
			for r := range next {
				if err := run(ctx, t, r); err != nil {
					t.broken(r.String(), err)
				}
			}
		})
	}
	for _, r := range runs {
		next <- r
	}
	close(next)
	lanes.Wait()
}

// run tests one module. Failing tests are the tally's affair; an error means that go
// test itself could not do its work.
func run(ctx context.Context, t *tally, r testRun) error {
	c := exec.CommandContext(ctx, "go", append([]string{"test", "-json"}, r.args...)...)
	c.Dir = r.dir
	c.Env = append(os.Environ(), r.env...)
	c.Stderr = os.Stderr
	// An interrupt lets go test stop its children; killed, it would leave them.
	c.Cancel = func() error { return c.Process.Signal(os.Interrupt) }
	out, err := c.StdoutPipe()
	if err != nil {
		return fmt.Errorf("connecting to go test: %w", err)
	}
	if err := c.Start(); err != nil {
		return fmt.Errorf("starting go test: %w", err)
	}
	failures, readErr := t.read(out)
	_, _ = io.Copy(io.Discard, out) // or go test would wait for a reader
	waitErr := c.Wait()
	if readErr != nil {
		return readErr
	}
	if waitErr != nil && failures == 0 {
		return fmt.Errorf("go test: %w, and no test failed", waitErr)
	}
	return nil
}

// list is a flag that may be repeated.
type list []string

func (l *list) String() string { return strings.Join(*l, ",") }

func (l *list) Set(value string) error {
	*l = append(*l, value)
	return nil
}
