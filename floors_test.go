package paddock_test

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// module is the import path of the tree that is checked.
const module = "github.com/paddock-ci/paddock"

// floors is the table of the architecture: a package imports packages of lower floors
// only. A child stands on its parent's floor and may import its parent besides.
var floors = map[string]int{
	"cmd": 5,

	"sim": 4,

	"webhook": 3, "feed": 3, "controller": 3, "server": 3, "node": 3, "web": 3,

	"store": 2, "github": 2, "cache": 2, "vm": 2, "api": 2,

	"runner": 1, "placement": 1, "demand": 1, "image": 1, "access": 1,

	"fleet": 0,
}

// demo is the one program that may carry the doubles: it brings its own GitHub.
const demo = "cmd/paddock-demo"

// keepers says which packages, with their children, a library may be named in.
var keepers = []struct {
	library string
	only    []string
	why     string
}{
	{"github.com/gin-gonic/gin", []string{"webhook", "server"}, "HTTP handlers live in two packages"},
	{"github.com/redis/go-redis", []string{"store"}, "what is stored, and how, is the store's own affair"},
	{"github.com/alicebob/miniredis", []string{"store"}, "the embedded Redis is the store's own affair"},
	{"github.com/google/go-github", []string{"github"}, "its traps are handled in one place"},
	{"github.com/bradleyfalzon/ghinstallation", []string{"github"}, "the App's key is used in one place"},
	{"github.com/Code-Hex/vz", []string{"vm/vz"}, "it builds on macOS only"},
	{"github.com/spf13/cobra", []string{"cmd"}, "a library does not know how it is called"},
}

// pureFloor is the highest floor that does no I/O and reads no clock.
const pureFloor = 1

// impure are the packages on pure floors that may do I/O nevertheless.
var impure = map[string]string{
	"runner/guest":      "it is the conversation with what runs inside a VM: streams, deadlines, files of the share",
	"runner/guest/ssh":  "the same conversation over SSH, with the file of pinned host keys",
	"runner/guest/self": "the same conversation by files of a share, which are looked at by time",
}

// outsideWorld are the imports by which a package reaches beyond its arguments; what is
// below them counts too.
var outsideWorld = []string{
	"net", "os", "syscall", "log", "io/ioutil", "database/sql", "plugin", "testing",
	"golang.org/x/sys", "golang.org/x/net", "google.golang.org/grpc",
}

// harmless are the exceptions below those: the first four only parse, and log/slog is
// where a secret says that it must not be logged (the linters see to it that nothing
// logs by the global logger).
var harmless = []string{"net/url", "net/netip", "net/textproto", "net/mail", "log/slog"}

// clock are the functions of package time that read it or wait for it.
var clock = []string{"Now", "Since", "Until", "Sleep", "After", "AfterFunc", "Tick", "NewTicker", "NewTimer"}

// maxDepth is the longest chain of imports inside the module, counted in imports.
const maxDepth = 6

// tree is the parsed module: every package that a build could contain, without tests.
type tree struct {
	fset  *token.FileSet
	packs []pack
}

// pack is one package.
type pack struct {
	dir   string // slash-separated, from the module's root, "." for the root
	name  string
	doc   string
	files []file
}

// file is one source file of a package, whatever its build constraints.
type file struct {
	path      string
	lines     int
	generated bool
	*ast.File
}

// parseTree reads the module in root. Nested modules, testdata and hidden directories
// are not part of it.
func parseTree(root fs.FS) (tree, error) {
	t := tree{fset: token.NewFileSet()}
	byDir := map[string]int{}
	err := fs.WalkDir(root, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if name != "." && (strings.HasPrefix(d.Name(), ".") || strings.HasPrefix(d.Name(), "_") || d.Name() == "testdata" || hasModule(root, name)) {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") {
			return nil
		}
		source, err := fs.ReadFile(root, name)
		if err != nil {
			return err
		}
		parsed, err := parser.ParseFile(t.fset, name, source, parser.ParseComments)
		if err != nil {
			return err
		}
		dir := path.Dir(name)
		at, known := byDir[dir]
		if !known {
			at = len(t.packs)
			byDir[dir] = at
			t.packs = append(t.packs, pack{dir: dir, name: parsed.Name.Name})
		}
		p := &t.packs[at]
		p.doc += parsed.Doc.Text()
		p.files = append(p.files, file{
			path:      name,
			lines:     strings.Count(string(source), "\n"),
			generated: ast.IsGenerated(parsed),
			File:      parsed,
		})
		return nil
	})
	return t, err
}

func hasModule(root fs.FS, dir string) bool {
	_, err := fs.Stat(root, path.Join(dir, "go.mod"))
	return err == nil
}

// imports lists what a package imports, sorted, each once.
func (p pack) imports() []string {
	var all []string
	for _, f := range p.files {
		for _, spec := range f.Imports {
			if name, err := strconv.Unquote(spec.Path.Value); err == nil {
				all = append(all, name)
			}
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// ours lists the directories of the module's own packages that p imports.
func (p pack) ours() []string {
	var dirs []string
	for _, name := range p.imports() {
		if name == module {
			dirs = append(dirs, ".")
		} else if dir, ok := strings.CutPrefix(name, module+"/"); ok {
			dirs = append(dirs, dir)
		}
	}
	return dirs
}

// isDouble: vmtest, storetest, githubtest and their like are there for tests, and may
// import what tests may.
func isDouble(dir string) bool { return strings.HasSuffix(path.Base(dir), "test") }

func under(name, dir string) bool { return name == dir || strings.HasPrefix(name, dir+"/") }

func underAny(name string, dirs []string) bool {
	return slices.ContainsFunc(dirs, func(dir string) bool { return under(name, dir) })
}

// floorOf is the floor of a directory: that of its first part.
func floorOf(dir string) (floor int, known bool) {
	top, _, _ := strings.Cut(dir, "/")
	floor, known = floors[top]
	return floor, known
}

// refusal says why a package must not import another of ours; "" if it may.
func refusal(from, to string) string {
	if isDouble(to) {
		if isDouble(from) || from == demo {
			return ""
		}
		return "a double is for tests, for other doubles and for " + demo
	}
	if owner, _, internal := strings.Cut(to+"/", "/internal/"); internal {
		if under(from, owner) {
			return "" // a package's own details
		}
		return "the details of " + owner + " are its own"
	}
	if to != "." && strings.HasPrefix(from, to+"/") {
		return "" // its own parent
	}
	low, known := floorOf(to)
	if !known {
		return "it stands on no floor"
	}
	high, _ := floorOf(from)
	if isDouble(from) {
		high = floors["cmd"] // everything but the programs
	}
	if low < high {
		return ""
	}
	return fmt.Sprintf("floor %d may not import floor %d", high, low)
}

func checkFloors(t tree) (bad []string) {
	for _, p := range t.packs {
		if _, known := floorOf(p.dir); !known && p.dir != "." {
			bad = append(bad, p.dir+": stands on no floor: give it one in the table, and in the design")
			continue
		}
		for _, to := range p.ours() {
			if p.dir == "." {
				bad = append(bad, fmt.Sprintf("the front page imports %s: it holds no code", to))
			} else if why := refusal(p.dir, to); why != "" {
				bad = append(bad, fmt.Sprintf("%s imports %s: %s", p.dir, to, why))
			}
		}
	}
	return bad
}

func checkKeepers(t tree) (bad []string) {
	for _, p := range t.packs {
		for _, name := range p.imports() {
			for _, k := range keepers {
				if under(name, k.library) && !isDouble(p.dir) && !underAny(p.dir, k.only) {
					bad = append(bad, fmt.Sprintf("%s imports %s, which belongs in %s only: %s", p.dir, name, strings.Join(k.only, " and "), k.why))
				}
			}
		}
	}
	return bad
}

// isPure reports whether a package must neither do I/O nor read the clock.
func isPure(dir string) bool {
	floor, known := floorOf(dir)
	return known && floor <= pureFloor && !isDouble(dir) && impure[dir] == ""
}

func checkPure(t tree) (bad []string) {
	for _, p := range t.packs {
		if !isPure(p.dir) {
			continue
		}
		for _, name := range p.imports() {
			if underAny(name, outsideWorld) && !underAny(name, harmless) {
				bad = append(bad, fmt.Sprintf("%s imports %s: floors 0 and 1 do no I/O", p.dir, name))
			}
		}
		for _, f := range p.files {
			for _, use := range uses(t, f, "time", clock) {
				bad = append(bad, use+": floors 0 and 1 read no clock: take now as an argument")
			}
		}
	}
	return bad
}

// uses finds the places where a file names one of the functions of a package, called or
// not, under whatever name it is imported.
func uses(t tree, f file, of string, functions []string) (places []string) {
	for _, spec := range f.Imports {
		if name, err := strconv.Unquote(spec.Path.Value); err != nil || name != of {
			continue
		}
		local := path.Base(of)
		if spec.Name != nil {
			local = spec.Name.Name
		}
		if local == "." {
			places = append(places, fmt.Sprintf("%s imports %s into its own names", t.fset.Position(spec.Pos()), of))
		}
		ast.Inspect(f.File, func(n ast.Node) bool {
			sel, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			if x, ok := sel.X.(*ast.Ident); ok && x.Name == local && !isLocal(x) && slices.Contains(functions, sel.Sel.Name) {
				places = append(places, fmt.Sprintf("%s uses %s.%s", t.fset.Position(sel.Pos()), of, sel.Sel.Name))
			}
			return true
		})
	}
	return places
}

// isLocal tells a variable from a package of the same name. The parser resolves
// variables inside one file, which is all that is needed here.
func isLocal(x *ast.Ident) bool {
	return x.Obj != nil
}

func checkDepth(t tree) (bad []string) {
	byDir := map[string]pack{}
	for _, p := range t.packs {
		byDir[p.dir] = p
	}
	chains := map[string][]string{}
	var chain func(dir string) []string
	chain = func(dir string) []string {
		if known, ok := chains[dir]; ok {
			return known
		}
		chains[dir] = []string{dir} // ends a cycle, which does not compile anyway
		var longest []string
		for _, to := range byDir[dir].ours() {
			if c := chain(to); len(c) > len(longest) {
				longest = c
			}
		}
		chains[dir] = append([]string{dir}, longest...)
		return chains[dir]
	}
	for _, p := range t.packs {
		if c := chain(p.dir); len(c)-1 > maxDepth {
			bad = append(bad, fmt.Sprintf("%d imports deep, at most %d: %s", len(c)-1, maxDepth, strings.Join(c, " → ")))
		}
	}
	return bad
}

// checks are all rules, by the name under which the test reports them.
var checks = map[string]func(tree) []string{
	"floors":    checkFloors,
	"keepers":   checkKeepers,
	"pure":      checkPure,
	"depth":     checkDepth,
	"comments":  checkComments,
	"names":     checkNames,
	"functions": checkFunctions,
	"files":     checkFiles,
	"contexts":  checkContexts,
}

func TestFloors(t *testing.T) {
	parsed, err := parseTree(os.DirFS("."))
	if err != nil {
		t.Fatal(err)
	}
	if len(parsed.packs) < 2 {
		t.Fatalf("found %d packages: the test looks into the wrong directory", len(parsed.packs))
	}
	for name, check := range checks {
		t.Run(name, func(t *testing.T) {
			for _, violation := range check(parsed) {
				t.Error(violation)
			}
		})
	}
}
