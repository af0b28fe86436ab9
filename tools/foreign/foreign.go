// Package foreign loads Go packages as they are built for another system, without that
// system's compiler: "go list" says which files a build would have, and go/types checks
// them in dependency order. Of cgo it takes every C name on trust (FakeImportC), so what
// is checked is Go's side of such a package.
//
// It is not a build: assembly, linking and the C code are not looked at, and the bodies
// of functions only in the packages that were asked for. It uses the standard library
// only, since it is what the other checks stand on.
//
// Called by darwincheck and apicheck.
package foreign

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
)

// Config says what is loaded.
type Config struct {
	Dir      string            // of the module; "": the working directory
	Patterns []string          // of packages; nil: "./..."
	OS, Arch string            // GOOS and GOARCH; "": this host's
	Tags     string            // build tags, by commas; "": none
	Tests    bool              // their test files too
	Overlay  map[string]string // contents by absolute path, in place of what is there; nil: none
}

// Package is one package as the other system would build it.
type Package struct {
	Path    string   // as it is imported; test variants have a " [p.test]" behind it
	Module  string   // path of its module; "" for the standard library
	Own     bool     // it belongs to the module in Config.Dir
	Files   []string // absolute paths
	Imports []string // paths of what it imports, of the variants that it is built with

	Fset   *token.FileSet
	Sizes  types.Sizes
	Syntax []*ast.File
	Types  *types.Package
	Info   *types.Info // nil unless Own
	Errors []string    // "file:line:column: what is wrong", as a compiler would
}

// listed is what is asked of "go list", and nothing that would need a compiler.
type listed struct {
	ImportPath, Dir, Name string
	GoFiles, CgoFiles     []string
	Imports               []string
	ImportMap             map[string]string
	Standard              bool
	Module                *struct {
		Path, GoVersion string
		Main            bool
	}
	Error *struct{ Err string }
}

// fields names them for -json.
const fields = "ImportPath,Dir,Name,GoFiles,CgoFiles,Imports,ImportMap,Standard,Module,Error"

// Load returns the packages and all that they import, dependencies first. An error means
// that nothing was checked; what is wrong with the code is in Package.Errors.
func Load(ctx context.Context, c Config) ([]*Package, error) {
	list, err := golist(ctx, c)
	if err != nil {
		return nil, err
	}
	arch := c.Arch
	if arch == "" {
		if arch, err = goenv(ctx, "GOARCH"); err != nil {
			return nil, err
		}
	}
	l := &loader{overlay: c.Overlay, fset: token.NewFileSet(), sizes: types.SizesFor("gc", arch), byPath: map[string]*types.Package{"unsafe": types.Unsafe}}
	if l.sizes == nil {
		return nil, fmt.Errorf("no such architecture: %s", arch)
	}
	parsed := l.parseAll(list)
	packages := make([]*Package, 0, len(list))
	for i, p := range list {
		if p.ImportPath != "unsafe" {
			packages = append(packages, l.check(p, parsed[i]))
		}
	}
	return packages, nil
}

// golist asks the go command, in dependency order.
func golist(ctx context.Context, c Config) ([]listed, error) {
	args := []string{"list", "-deps", "-json=" + fields}
	if c.Tests {
		args = append(args, "-test")
	}
	if c.Tags != "" {
		args = append(args, "-tags", c.Tags)
	}
	if len(c.Overlay) > 0 {
		path, remove, err := writeOverlay(c.Overlay)
		if err != nil {
			return nil, err
		}
		defer remove()
		args = append(args, "-overlay", path)
	}
	if len(c.Patterns) == 0 {
		c.Patterns = []string{"./..."}
	}
	cmd := exec.CommandContext(ctx, "go", append(append(args, "--"), c.Patterns...)...)
	cmd.Dir = c.Dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=1") // the files of cgo are what we want to see
	if c.OS != "" {
		cmd.Env = append(cmd.Env, "GOOS="+c.OS, "GOARCH="+c.Arch)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w: %s", err, bytes.TrimSpace(stderr.Bytes()))
	}
	var all []listed
	for decoder := json.NewDecoder(bytes.NewReader(out)); ; {
		var p listed
		switch err := decoder.Decode(&p); {
		case errors.Is(err, io.EOF):
			return all, nil
		case err != nil:
			return nil, fmt.Errorf("reading what go list says: %w", err)
		case p.Error != nil:
			return nil, fmt.Errorf("go list: %s: %s", p.ImportPath, p.Error.Err)
		}
		if !strings.HasSuffix(p.ImportPath, ".test") { // their main is generated, and not there
			all = append(all, p)
		}
	}
}

// writeOverlay writes the overlay as the go command wants it; remove takes it away.
func writeOverlay(overlay map[string]string) (path string, remove func(), err error) {
	dir, err := os.MkdirTemp("", "overlay")
	if err != nil {
		return "", nil, fmt.Errorf("making a directory for the overlay: %w", err)
	}
	remove = func() { _ = os.RemoveAll(dir) }
	replace := map[string]string{}
	for name, content := range overlay {
		replace[name] = filepath.Join(dir, fmt.Sprintf("%d.go", len(replace)))
		if err := os.WriteFile(replace[name], []byte(content), 0o600); err != nil {
			remove()
			return "", nil, fmt.Errorf("writing the overlay: %w", err)
		}
	}
	b, err := json.Marshal(map[string]any{"Replace": replace})
	if err == nil {
		path = filepath.Join(dir, "overlay.json")
		err = os.WriteFile(path, b, 0o600)
	}
	if err != nil {
		remove()
		return "", nil, fmt.Errorf("writing the overlay: %w", err)
	}
	return path, remove, nil
}

func goenv(ctx context.Context, name string) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "env", name).Output()
	if err != nil {
		return "", fmt.Errorf("go env %s: %w", name, err)
	}
	return strings.TrimSpace(string(out)), nil
}

// loader checks one list.
type loader struct {
	overlay map[string]string
	fset    *token.FileSet
	sizes   types.Sizes
	byPath  map[string]*types.Package
}

// source is the parsed files of one package.
type source struct {
	names  []string
	files  []*ast.File
	errors []string
}

// parseAll parses all packages, one per processor at a time: it is most of the work.
func (l *loader) parseAll(list []listed) []source {
	parsed := make([]source, len(list))
	var wg sync.WaitGroup
	slots := make(chan struct{}, 8)
	for i, p := range list {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			parsed[i] = l.parse(p)
		})
	}
	wg.Wait()
	return parsed
}

func (l *loader) parse(p listed) (s source) {
	mode := parser.SkipObjectResolution
	if p.own() {
		mode |= parser.ParseComments // analysers read them
	}
	for _, name := range slices.Concat(p.GoFiles, p.CgoFiles) {
		if !filepath.IsAbs(name) {
			name = filepath.Join(p.Dir, name)
		}
		var text any // nil: what is in the file
		if t, ok := l.overlay[name]; ok {
			text = t
		}
		file, err := parser.ParseFile(l.fset, name, text, mode)
		if err != nil {
			s.errors = append(s.errors, err.Error())
		}
		if file != nil {
			if !p.own() {
				dropBodies(file)
			}
			s.names, s.files = append(s.names, name), append(s.files, file)
		}
	}
	return s
}

// dropBodies empties functions that are not looked at: most of what a tree holds.
func dropBodies(file *ast.File) {
	for _, d := range file.Decls {
		if f, ok := d.(*ast.FuncDecl); ok && f.Body != nil {
			f.Body = &ast.BlockStmt{Lbrace: f.Body.Lbrace, Rbrace: f.Body.Rbrace}
		}
	}
}

func (p listed) own() bool { return p.Module != nil && p.Module.Main }

// check checks one package, whose imports are checked already.
func (l *loader) check(p listed, s source) *Package {
	out := &Package{
		Path: p.ImportPath, Own: p.own(), Files: s.names, Fset: l.fset, Sizes: l.sizes, Syntax: s.files, Errors: s.errors,
	}
	config := types.Config{
		FakeImportC: true, IgnoreFuncBodies: !out.Own, Sizes: l.sizes, Importer: importer{l, p.ImportMap},
		Error: func(err error) { out.Errors = append(out.Errors, err.Error()) },
	}
	if p.Module != nil {
		out.Module = p.Module.Path
		if p.Module.GoVersion != "" {
			config.GoVersion = "go" + p.Module.GoVersion
		}
	}
	for _, path := range p.Imports {
		if path != "C" {
			out.Imports = append(out.Imports, path)
		}
	}
	if out.Own {
		out.Info = &types.Info{
			Types: map[ast.Expr]types.TypeAndValue{}, Instances: map[*ast.Ident]types.Instance{},
			Defs: map[*ast.Ident]types.Object{}, Uses: map[*ast.Ident]types.Object{}, Implicits: map[ast.Node]types.Object{},
			Selections: map[*ast.SelectorExpr]*types.Selection{}, Scopes: map[ast.Node]*types.Scope{}, FileVersions: map[*ast.File]string{},
		}
	}
	path, _, _ := strings.Cut(p.ImportPath, " ")
	checked, err := config.Check(path, l.fset, s.files, out.Info)
	if err != nil && len(out.Errors) == 0 {
		out.Errors = append(out.Errors, err.Error())
	}
	out.Types = checked
	l.byPath[p.ImportPath] = checked
	return out
}

// importer finds what is checked already.
type importer struct {
	*loader
	names map[string]string // import path → the variant, or vendored copy, that is meant
}

func (i importer) Import(path string) (*types.Package, error) {
	if other, ok := i.names[path]; ok {
		path = other
	}
	if p := i.byPath[path]; p != nil {
		return p, nil
	}
	return nil, fmt.Errorf("package %s is not among those that go list named", path)
}
