package main

import (
	"fmt"
	"slices"

	"golang.org/x/tools/go/analysis"
	"golang.org/x/tools/go/analysis/checker"
	"golang.org/x/tools/go/analysis/passes/appends"
	"golang.org/x/tools/go/analysis/passes/assign"
	"golang.org/x/tools/go/analysis/passes/atomic"
	"golang.org/x/tools/go/analysis/passes/bools"
	"golang.org/x/tools/go/analysis/passes/copylock"
	"golang.org/x/tools/go/analysis/passes/defers"
	"golang.org/x/tools/go/analysis/passes/errorsas"
	"golang.org/x/tools/go/analysis/passes/httpresponse"
	"golang.org/x/tools/go/analysis/passes/ifaceassert"
	"golang.org/x/tools/go/analysis/passes/lostcancel"
	"golang.org/x/tools/go/analysis/passes/nilfunc"
	"golang.org/x/tools/go/analysis/passes/nilness"
	"golang.org/x/tools/go/analysis/passes/printf"
	"golang.org/x/tools/go/analysis/passes/sigchanyzer"
	"golang.org/x/tools/go/analysis/passes/stringintconv"
	"golang.org/x/tools/go/analysis/passes/unmarshal"
	"golang.org/x/tools/go/analysis/passes/unreachable"
	"golang.org/x/tools/go/analysis/passes/unusedresult"
	"golang.org/x/tools/go/analysis/passes/waitgroup"
	"golang.org/x/tools/go/packages"

	"github.com/paddock-ci/paddock/tools/foreign"
)

// analysers find mistakes that compile. They are those of go vet, which cannot run here
// because it wants the C code compiled, and nilness, which go vet leaves out.
var analysers = []*analysis.Analyzer{
	appends.Analyzer, assign.Analyzer, atomic.Analyzer, bools.Analyzer, copylock.Analyzer, defers.Analyzer, errorsas.Analyzer,
	httpresponse.Analyzer, ifaceassert.Analyzer, lostcancel.Analyzer, nilfunc.Analyzer, nilness.Analyzer, printf.Analyzer,
	sigchanyzer.Analyzer, stringintconv.Analyzer, unmarshal.Analyzer, unreachable.Analyzer, unusedresult.Analyzer, waitgroup.Analyzer,
}

// analyse runs the analysers over our packages. What they learn of one (that a function
// is like Printf) serves those that import it; of others' functions they know only what
// is built into them.
func analyse(loaded []*foreign.Package) (findings []string, err error) {
	own := map[string]*packages.Package{}
	var list []*packages.Package
	for _, p := range loaded {
		if !p.Own {
			continue
		}
		q := &packages.Package{
			ID: p.Path, Name: p.Types.Name(), PkgPath: p.Types.Path(), GoFiles: p.Files, CompiledGoFiles: p.Files,
			Fset: p.Fset, Syntax: p.Syntax, Types: p.Types, TypesInfo: p.Info, TypesSizes: p.Sizes,
			Module: &packages.Module{Path: p.Module}, Imports: map[string]*packages.Package{},
		}
		for _, path := range p.Imports {
			if dep := own[path]; dep != nil {
				q.Imports[path] = dep
			}
		}
		own[p.Path] = q
		list = append(list, q)
	}
	// With its tests a package is all that it is without: as such it only lends others
	// what was learned of it.
	list = slices.DeleteFunc(list, func(p *packages.Package) bool { return own[p.ID+" ["+p.ID+".test]"] != nil })
	graph, err := checker.Analyze(analysers, list, nil)
	if err != nil {
		return nil, fmt.Errorf("running the analysers: %w", err)
	}
	for action := range graph.All() {
		if action.Err != nil {
			return nil, fmt.Errorf("analyser %s, package %s: %w", action.Analyzer, action.Package, action.Err)
		}
		for _, d := range action.Diagnostics {
			at := action.Package.Fset.Position(d.Pos)
			findings = append(findings, fmt.Sprintf("%s: %s: %s", at, action.Analyzer, d.Message))
		}
	}
	return findings, nil
}
