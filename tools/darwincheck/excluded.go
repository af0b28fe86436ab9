package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/paddock-ci/paddock/tools/foreign"
)

// excluded finds the files that use the framework and were not checked, because their
// tags or names exclude them from the build for a Mac, and counts those that were. Tests
// may be for the stand-in only.
func excluded(c foreign.Config, packages []*foreign.Package) (findings []string, drivers int, err error) {
	checked := map[string]bool{}
	for _, p := range packages {
		if !p.Own {
			continue
		}
		for i, name := range p.Files {
			if !checked[name] && uses(p.Syntax[i]) && !strings.HasSuffix(name, "_test.go") {
				drivers++
			}
			checked[name] = true
		}
	}
	there, err := sources(c)
	if err != nil {
		return nil, 0, err
	}
	for _, name := range there {
		if checked[name] || strings.HasSuffix(name, "_test.go") {
			continue
		}
		var text any
		if t, ok := c.Overlay[name]; ok {
			text = t
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, text, parser.ImportsOnly)
		if err != nil {
			return nil, 0, fmt.Errorf("reading a file that no build has: %w", err)
		}
		if uses(file) {
			findings = append(findings, name+": imports "+framework+", and its tags or its name exclude it from darwin/arm64: it was not checked")
		}
	}
	if drivers == 0 {
		findings = append(findings, "no file in the build for darwin/arm64 imports "+framework+": nothing of the driver was checked")
	}
	return findings, drivers, nil
}

func uses(file *ast.File) bool {
	return slices.ContainsFunc(file.Imports, func(i *ast.ImportSpec) bool {
		path, err := strconv.Unquote(i.Path.Value)
		return err == nil && path == framework
	})
}

// sources lists the Go files of a module, whatever their tags. Nested modules (the
// stand-in is one), testdata and hidden directories are not part of it.
func sources(c foreign.Config) ([]string, error) {
	root, err := filepath.Abs(c.Dir)
	if err != nil {
		return nil, fmt.Errorf("finding the module: %w", err)
	}
	names := map[string]bool{}
	for name := range c.Overlay {
		names[name] = true
	}
	err = filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && name != root:
			if _, err := os.Stat(filepath.Join(name, "go.mod")); err == nil || strings.HasPrefix(d.Name(), ".") || strings.HasPrefix(d.Name(), "_") || d.Name() == "testdata" {
				return fs.SkipDir
			}
		case strings.HasSuffix(name, ".go") && !d.IsDir():
			names[name] = true
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("looking for the module's files: %w", err)
	}
	return slices.Sorted(maps.Keys(names)), nil
}
