// Command darwincheck proves on any system what can be proven there of the code for
// Apple Silicon Macs: it checks the types of every package as it is built for
// darwin/arm64 with cgo, against the real sources of what they import, and runs those
// analysers over our own that find mistakes which compile.
//
// It needs no Apple SDK and no C compiler, and it is no proof that the framework takes
// what the code gives it: that needs a Mac. It fails as well when the driver is not in
// what it checked, because a tag that excludes all would pass everything.
//
// The Makefile calls it.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"time"

	"github.com/paddock-ci/paddock/tools/foreign"
)

// framework is the library whose users must be among what is checked.
const framework = "github.com/Code-Hex/vz/v3"

func main() {
	dir := flag.String("dir", ".", "the module's directory")
	flag.Parse()
	debug.SetGCPercent(200) // a short life: most of what is read is kept
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Stdout, foreign.Config{Dir: *dir, Patterns: flag.Args()}); err != nil {
		stop()
		fmt.Fprintln(os.Stderr, "darwincheck:", err)
		os.Exit(1)
	}
}

// run checks a module and prints what it found, or what it looked at.
func run(ctx context.Context, w io.Writer, c foreign.Config) error {
	start := time.Now()
	r, err := check(ctx, c)
	if err != nil {
		return err
	}
	for _, finding := range r.findings {
		fmt.Fprintln(w, finding)
	}
	if n := len(r.findings); n > 0 {
		return fmt.Errorf("%d findings; this is the code as it is built for darwin/arm64, go vet does the same on a Mac", n)
	}
	fmt.Fprintf(w, "darwincheck: %d packages of ours and %d that they import, %d files with %s, %d analysers: clean in %.1f s\n",
		r.own, r.others, r.drivers, framework, len(analysers), time.Since(start).Seconds())
	return nil
}

// result is what a check found, and how much it looked at.
type result struct {
	findings    []string // "file:line:column: what is wrong", sorted, each once
	own, others int      // packages
	drivers     int      // files of ours that import the framework
}

// check checks a module as it is built for a Mac, with its tests.
func check(ctx context.Context, c foreign.Config) (result, error) {
	c.OS, c.Arch, c.Tests = "darwin", "arm64", true
	packages, err := foreign.Load(ctx, c)
	if err != nil {
		return result{}, err
	}
	var r result
	for _, p := range packages {
		if p.Own {
			r.own++
		} else {
			r.others++
		}
		r.findings = append(r.findings, p.Errors...)
	}
	if len(r.findings) == 0 { // analysers want code that compiles
		if r.findings, err = analyse(packages); err != nil {
			return result{}, err
		}
	}
	missing, drivers, err := excluded(c, packages)
	if err != nil {
		return result{}, err
	}
	r.findings, r.drivers = append(r.findings, missing...), drivers
	slices.Sort(r.findings)
	r.findings = slices.Compact(r.findings) // a package and its test variant say the same
	return r, nil
}
