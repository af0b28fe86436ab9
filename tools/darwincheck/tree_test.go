package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/paddock-ci/paddock/tools/foreign"
)

// The driver and its neighbours as they are, for a Mac; make lint checks the whole product,
// which with the race detector would take a minute.
func TestTree(t *testing.T) {
	t.Parallel()
	var out strings.Builder
	if err := run(t.Context(), &out, foreign.Config{Dir: root, Patterns: []string{"./vm/..."}}); err != nil {
		t.Errorf("%v\n%s", err, &out)
	}
	t.Log(&out)
}

// Each name of the framework that the driver uses is misspelt, in all its files at once:
// each place must be found. So there is none in the driver that is not looked at.
func TestEveryUseIsChecked(t *testing.T) {
	t.Parallel()
	r, places := misspelt(t, func(x *ast.Ident) string { return x.Name + "Misspelt" }, nil)
	if len(places) < 50 { // it takes that many to make a Mac
		t.Errorf("the driver uses the framework in %d places only: does the test find them?", len(places))
	}
	found := map[string]bool{}
	for _, f := range r.findings {
		path, rest, _ := strings.Cut(f, ":")
		line, _, _ := strings.Cut(rest, ":")
		found[path+":"+line] = true
	}
	for _, place := range places {
		if !found[place] {
			t.Errorf("%s: misspelt, and not found", place)
		}
	}
}

// The driver's own files, with a tag that excludes them.
func TestExcludedDriver(t *testing.T) {
	t.Parallel()
	r, _ := misspelt(t, func(x *ast.Ident) string { return x.Name }, func(text string) string {
		return strings.Replace(text, "arm64", "s390x", 1)
	})
	if all := strings.Join(r.findings, "\n"); !strings.Contains(all, "nothing of the driver was checked") || !strings.Contains(all, "exclude it from darwin/arm64") {
		t.Errorf("it says %s", all)
	}
}

// misspelt checks the driver with each name of the framework changed in it, and then each
// file that uses it. It returns the lines of the names, one for each.
func misspelt(t *testing.T, name func(*ast.Ident) string, change func(string) string) (result, []string) {
	t.Helper()
	dir, err := filepath.Abs(filepath.Join(root, "vm", "vz"))
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	var places []string
	overlay := map[string]string{}
	for _, path := range files {
		raw, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		fset := token.NewFileSet()
		file, err := parser.ParseFile(fset, path, raw, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		if !uses(file) {
			continue
		}
		var text strings.Builder
		last := 0
		ast.Inspect(file, func(n ast.Node) bool {
			s, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			if x, ok := s.X.(*ast.Ident); ok && x.Name == "vz" {
				at := fset.Position(s.Sel.Pos())
				text.Write(raw[last:at.Offset])
				text.WriteString(name(s.Sel))
				last = at.Offset + len(s.Sel.Name)
				places = append(places, fmt.Sprintf("%s:%d", path, at.Line))
			}
			return true
		})
		text.Write(raw[last:])
		overlay[path] = text.String()
		if change != nil {
			overlay[path] = change(overlay[path])
		}
	}
	r, err := check(t.Context(), foreign.Config{Dir: root, Patterns: []string{"./vm/vz"}, Overlay: overlay})
	if err != nil {
		t.Fatal(err)
	}
	return r, places
}
