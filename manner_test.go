package paddock_test

import (
	"fmt"
	"go/ast"
	"regexp"
	"slices"
	"strings"
)

// The limits of the house: what a reader can hold in the head at once.
const (
	maxFunction  = 100 // lines, outside wiring, which is package main
	mostFunction = 40  // lines, which nine of ten functions keep to
	maxFile      = 500 // lines
	minSentences = 3   // of a package comment: what it is, what it is not, who calls it
)

// emptyNames say nothing about what a package holds.
var emptyNames = []string{"util", "utils", "common", "types", "helpers", "pkg", "misc", "shared", "lib"}

// sentenceEnd is a full stop before a space or the end; abbreviations are taken out first.
var (
	sentenceEnd   = regexp.MustCompile(`[.!?]["')\]]*(\s|$)`)
	abbreviations = regexp.MustCompile(`\b(e\.g|i\.e|etc|cf|vs)\.`)
)

func sentences(doc string) int {
	return len(sentenceEnd.FindAllString(abbreviations.ReplaceAllString(doc, ""), -1))
}

func checkComments(t tree) (bad []string) {
	for _, p := range t.packs {
		if n := sentences(p.doc); n < minSentences {
			bad = append(bad, fmt.Sprintf("%s: its package comment has %d sentences, at least %d: what it is, what it is not, who calls it", p.dir, n, minSentences))
		}
	}
	return bad
}

func checkNames(t tree) (bad []string) {
	for _, p := range t.packs {
		for _, part := range append(strings.Split(p.dir, "/"), p.name) {
			if slices.Contains(emptyNames, part) {
				bad = append(bad, fmt.Sprintf("%s: %q says nothing about what is in it", p.dir, part))
				break
			}
		}
	}
	return bad
}

func checkFunctions(t tree) (bad []string) {
	var lengths []int
	for _, p := range t.packs {
		if p.name == "main" {
			continue
		}
		for _, f := range p.files {
			if f.generated {
				continue
			}
			for _, d := range f.Decls {
				function, ok := d.(*ast.FuncDecl)
				if !ok {
					continue
				}
				n := t.fset.Position(function.End()).Line - t.fset.Position(function.Pos()).Line + 1
				lengths = append(lengths, n)
				if n > maxFunction {
					bad = append(bad, fmt.Sprintf("%s: %s has %d lines, at most %d", t.fset.Position(function.Pos()), function.Name.Name, n, maxFunction))
				}
			}
		}
	}
	slices.Sort(lengths)
	if n := len(lengths); n >= 10 && lengths[n*9/10] > mostFunction {
		bad = append(bad, fmt.Sprintf("one function in ten has %d lines or more, at most %d", lengths[n*9/10], mostFunction))
	}
	return bad
}

func checkFiles(t tree) (bad []string) {
	for _, p := range t.packs {
		for _, f := range p.files {
			if f.lines > maxFile && !f.generated {
				bad = append(bad, fmt.Sprintf("%s has %d lines, at most %d: would a reader know its rooms?", f.path, f.lines, maxFile))
			}
		}
	}
	return bad
}

// checkContexts keeps contexts with the callers: a library that makes its own cannot be
// stopped. Teardown uses context.WithoutCancel with a timeout.
func checkContexts(t tree) (bad []string) {
	for _, p := range t.packs {
		if p.name == "main" || isDouble(p.dir) {
			continue
		}
		for _, f := range p.files {
			for _, use := range uses(t, f, "context", []string{"Background", "TODO"}) {
				bad = append(bad, use+": take the caller's context")
			}
		}
	}
	return bad
}
