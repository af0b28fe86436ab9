// Command apicheck holds a stand-in to what it stands in for: every exported name of the
// stand-in must be one of the real package, of the same kind, with the same signature,
// the same methods and fields, and the same value. So code that is tested with the
// stand-in is code for the real one.
//
// It says nothing of how either behaves, and the stand-in may lack what nobody uses.
// What tests need to play with is exempt: whatever is declared in files called
// standin_hooks.go or standin_*_hooks.go.
//
// The Makefile calls it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"time"

	"github.com/paddock-ci/paddock/tools/foreign"
)

func main() {
	dir := flag.String("dir", ".", "the module that requires the real package")
	path := flag.String("package", "github.com/Code-Hex/vz/v3", "the real package")
	standin := flag.String("standin", "vm/vz/standin", "the stand-in's module")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Stdout, *dir, *path, *standin); err != nil {
		stop()
		fmt.Fprintln(os.Stderr, "apicheck:", err)
		os.Exit(1)
	}
}

// run compares the package at path, as the module in dir requires it for a Mac, with the
// stand-in as it is built for this host.
func run(ctx context.Context, w io.Writer, dir, path, standin string) error {
	start := time.Now()
	genuine, err := load(ctx, foreign.Config{Dir: dir, Patterns: []string{path}, OS: "darwin", Arch: "arm64"}, path)
	if err != nil {
		return fmt.Errorf("loading the real package: %w", err)
	}
	d, err := against(ctx, genuine, standin)
	for _, drift := range d.drifts {
		fmt.Fprintln(w, drift)
	}
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "apicheck: %d exported names of the stand-in with %d methods and fields are those of %s (%.1f s)\n",
		d.names, d.members, path, time.Since(start).Seconds())
	return nil
}

// against compares the stand-in in a directory with the real package.
func against(ctx context.Context, genuine *foreign.Package, standin string) (diff, error) {
	double, err := load(ctx, foreign.Config{Dir: standin, Patterns: []string{"."}}, genuine.Path)
	if err != nil {
		return diff{}, fmt.Errorf("loading the stand-in: %w", err)
	}
	d := compare(genuine, double)
	switch {
	case len(d.drifts) > 0:
		return d, fmt.Errorf("the stand-in differs from %s in %d places", genuine.Path, len(d.drifts))
	case d.names == 0:
		return d, errors.New("the stand-in has no exported name outside its hooks: nothing was compared")
	}
	return d, nil
}

// load loads one package with what it imports.
func load(ctx context.Context, c foreign.Config, path string) (*foreign.Package, error) {
	packages, err := foreign.Load(ctx, c)
	if err != nil {
		return nil, err
	}
	var found *foreign.Package
	for _, p := range packages {
		if len(p.Errors) > 0 {
			return nil, fmt.Errorf("it does not compile: %s", p.Errors[0])
		}
		if p.Path == path {
			found = p
		}
	}
	if found == nil {
		return nil, fmt.Errorf("there is no package %s in %s", path, c.Dir)
	}
	return found, nil
}
