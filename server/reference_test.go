package server

import (
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/paddock-ci/paddock/access"
)

var update = flag.Bool("update", false, "write docs/api.md instead of comparing")

// TestReference holds docs/api.md to the routes that are served, the roles that are
// checked and the comments in api/routes.go that say what goes in and out.
func TestReference(t *testing.T) {
	const path = "../docs/api.md"
	want := reference(t)
	if *update {
		if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != want {
		t.Errorf("%s is not what the routes say; write it again with: go test ./server -run Reference -update", path)
	}
}

func reference(t *testing.T) string {
	said := routeComments(t)
	var b strings.Builder
	b.WriteString(`# The controller's HTTP interface

Generated from the routes by ` + "`go test ./server -run Reference -update`" + `; the types are those of package ` + "`api`" + `.
Every call but join and the probes wants ` + "`Authorization: Bearer pdk_…`" + `. A refusal is
` + "`{\"error\": …, \"hint\": …}`" + ` with the status 400 (malformed), 401 (who are you), 403 (not yours), 404, 409 (older
than what is known, or not now), 413, 421 (another replica's), 426 (another version of sync, or no Upgrade), 429,
502 (the node cannot), 503 (the store or the node is away) or 504 (the node does not answer).

| method | path | for | in and out |
|---|---|---|---|
`)
	for _, r := range table {
		who := "anyone"
		if r.needs != "" {
			who = strings.Join(access.WhoMay(r.needs), ", ")
		}
		comment, found := said[r.path]
		if !found {
			t.Errorf("api/routes.go says nothing of %s", r.path)
		}
		fmt.Fprintf(&b, "| %s | `%s` | %s | %s |\n", r.method, r.path, who, commentFor(r.method, comment))
	}
	fmt.Fprintf(&b, "| GET | `/metrics` | anyone | %s |\n| POST | `/webhook` | GitHub, by signature | a delivery; 202 when it is durable |\n", said["/metrics"])
	return b.String()
}

// commentFor is the part of a comment about one method, without the method.
func commentFor(method, comment string) string {
	for _, part := range strings.Split(comment, "; ") {
		if rest, found := strings.CutPrefix(part, method+" "); found {
			return strings.TrimSpace(strings.TrimPrefix(rest, "→ "))
		}
	}
	return comment
}

// routeComments are the comments behind the constants of api/routes.go, by path.
func routeComments(t *testing.T) map[string]string {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "../api/routes.go", nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	comments := map[string]string{}
	for _, decl := range file.Decls {
		group, ok := decl.(*ast.GenDecl)
		if !ok || group.Tok != token.CONST {
			continue
		}
		for _, spec := range group.Specs {
			constant := spec.(*ast.ValueSpec)
			path, err := strconv.Unquote(constant.Values[0].(*ast.BasicLit).Value)
			if err != nil {
				t.Fatal(err)
			}
			comments[path] = strings.TrimSpace(constant.Comment.Text())
		}
	}
	return comments
}
