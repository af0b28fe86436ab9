package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
)

// event is one line of test2json (go doc test2json).
type event struct {
	Action     string // start, run, output, pass, fail, skip, build-output, build-fail, …
	Package    string
	ImportPath string // of build-output
	Test       string // "" for the package itself
	Output     string
}

// tally prints what is worth reading and counts, over all runs.
type tally struct {
	mu                      sync.Mutex // runs read side by side; held for one event
	out                     io.Writer
	passed, failed, skipped int
	cut                     []string        // packages whose run ended before they did
	needed                  map[string]bool // by package and name, whether it has passed
}

// reading is one run's events. A package may be in two runs, of different builds.
type reading struct {
	*tally
	packages map[string]*progress
	failures int // in this run
}

// progress is what is kept of a package until it is finished: packages run side by
// side, and their lines must not be mixed.
type progress struct {
	lines  strings.Builder             // of the package itself
	tests  map[string]*strings.Builder // output of each test, until it passes
	failed int
}

// newTally makes a tally that is good only if the tests of need have passed, each named
// by its package's import path, a dot and its own name.
func newTally(out io.Writer, need ...string) *tally {
	t := &tally{out: out, needed: map[string]bool{}}
	for _, name := range need {
		t.needed[name] = false
	}
	return t
}

// read takes one run's events until the end of the stream, and returns how many of its
// tests failed.
func (t *tally) read(r io.Reader) (failures int, err error) {
	one := &reading{tally: t, packages: map[string]*progress{}}
	err = one.all(r)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.cut = slices.AppendSeq(t.cut, maps.Keys(one.packages))
	return one.failures, err
}

func (t *reading) all(r io.Reader) error {
	lines := bufio.NewReader(r) // not a Scanner: a test may print a line of any length
	for {
		line, err := lines.ReadBytes('\n')
		if len(line) > 0 {
			t.line(line)
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("reading go test's events: %w", err)
		}
	}
}

func (t *reading) line(line []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var e event
	if json.Unmarshal(line, &e) == nil && e.Action != "" {
		t.add(e)
	} else {
		fmt.Fprintf(t.out, "%s", line) // not an event: somebody wrote past go test
	}
}

// add takes one event; t.mu is held.
func (t *reading) add(e event) {
	if e.Action == "build-output" {
		fmt.Fprint(t.out, e.Output)
		return
	}
	if e.Package == "" {
		return
	}
	p := t.packages[e.Package]
	if p == nil {
		p = &progress{tests: map[string]*strings.Builder{}}
		t.packages[e.Package] = p
	}
	if e.Test == "" {
		t.addPackage(p, e)
		return
	}
	output := p.tests[e.Test]
	if output == nil {
		output = &strings.Builder{}
		p.tests[e.Test] = output
	}
	switch e.Action {
	case "output":
		output.WriteString(e.Output)
	case "pass":
		t.passed++
		if name := e.Package + "." + e.Test; t.isNeeded(name) {
			t.needed[name] = true
		}
		delete(p.tests, e.Test)
	case "skip":
		t.skipped++
		fmt.Fprintf(t.out, "%s (%s)\n%s", e.Test, e.Package, trim(output.String()))
		delete(p.tests, e.Test)
	case "fail":
		t.failed++
		t.failures++
		p.failed++
		fmt.Fprintf(t.out, "%s (%s)\n%s", e.Test, e.Package, trim(output.String()))
		delete(p.tests, e.Test)
	}
}

// addPackage takes an event of a package as a whole; t.mu is held.
func (t *reading) addPackage(p *progress, e event) {
	switch e.Action {
	case "output":
		if e.Output != "PASS\n" && e.Output != "FAIL\n" {
			p.lines.WriteString(e.Output)
		}
		return
	case "pass", "skip", "fail":
	default:
		return
	}
	if e.Action == "fail" && p.failed == 0 {
		// It did not compile, panicked, ran out of time, or its TestMain failed: what was
		// running then is the best explanation.
		t.failed++
		t.failures++
		for name, output := range p.tests {
			fmt.Fprintf(t.out, "%s (%s) did not end\n%s", name, e.Package, trim(output.String()))
		}
	}
	fmt.Fprint(t.out, p.lines.String())
	delete(t.packages, e.Package)
}

// broken counts a run that could not be done at all.
func (t *tally) broken(dir string, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.failed++
	fmt.Fprintf(t.out, "FAIL\t%s: %v\n", dir, err)
}

// close prints the closing line and reports whether all is well.
func (t *tally) close(strict bool) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, name := range t.cut {
		t.failed++
		fmt.Fprintf(t.out, "FAIL\t%s: its run was cut off\n", name)
	}
	for _, name := range slices.Sorted(maps.Keys(t.needed)) {
		if !t.needed[name] {
			t.failed++
			fmt.Fprintf(t.out, "FAIL\t%s: it must pass, and did not\n", name)
		}
	}
	ok := t.failed == 0
	switch {
	case t.passed+t.failed+t.skipped == 0:
		ok = false
		fmt.Fprintln(t.out, "FAIL: no test ran")
	case strict && t.skipped > 0:
		ok = false
		fmt.Fprintln(t.out, "FAIL: with CI=true a skipped test is a failure")
	}
	fmt.Fprintf(t.out, "%d passed, %d failed, %d skipped\n", t.passed, t.failed, t.skipped)
	return ok
}

func (t *tally) isNeeded(name string) bool {
	_, needed := t.needed[name]
	return needed
}

// trim leaves out what go test prints around every test.
func trim(output string) string {
	var kept strings.Builder
	for line := range strings.Lines(output) {
		switch word := strings.TrimSpace(line); {
		case strings.HasPrefix(word, "=== "), word == "":
		default:
			kept.WriteString(line)
		}
	}
	return kept.String()
}
