package main

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestStrict(t *testing.T) {
	for ci, want := range map[string]bool{
		"": false, "0": false, "false": false, "False": false, " ": false,
		"true": true, "TRUE": true, "1": true, "yes": true, "woodpecker": true,
	} {
		if got := strict(ci); got != want {
			t.Errorf("CI=%q: strict %v, want %v", ci, got, want)
		}
	}
}

func TestOneMore(t *testing.T) {
	r := oneMore(" GOWORK=/a/b.work  X= -tags=x -race ./vm/... Y=1 ")
	if !slices.Equal(r.env, []string{"GOWORK=/a/b.work", "X="}) || !slices.Equal(r.args, []string{"-tags=x", "-race", "./vm/...", "Y=1"}) {
		t.Errorf("%+v", r)
	}
}

// A run of another build counts like the others: its environment reaches the tests, and
// their failures the verdict.
func TestAnotherBuildCounts(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"go.mod":    "module x\n\ngo 1.26\n",
		"x_test.go": "//go:build odd\n\npackage x\n\nimport (\n\t\"os\"\n\t\"testing\"\n)\n\nfunc TestX(t *testing.T) {\n\tif os.Getenv(\"ODD\") != \"yes\" {\n\t\tt.Fatal(\"even\")\n\t}\n}\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for odd, want := range map[string]string{"yes": "1 passed, 0 failed", "no": "0 passed, 1 failed"} {
		var out bytes.Buffer
		tally := newTally(&out)
		r := oneMore("ODD=" + odd + " -count=1 -tags odd ./...")
		r.dir = dir
		if err := run(t.Context(), tally, r); err != nil {
			t.Fatalf("%v\n%s", err, &out)
		}
		if ok := tally.close(true); ok != (odd == "yes") || !strings.Contains(out.String(), want) {
			t.Errorf("ODD=%s: %v\n%s", odd, ok, &out)
		}
	}
}

// Two runs side by side: each one's test waits for a sign of the other, and their package,
// which is the same by name, is told once for each.
func TestRunsSideBySide(t *testing.T) {
	signs, runs := t.TempDir(), []testRun{}
	for me, other := range map[string]string{"a": "b", "b": "a"} {
		dir := t.TempDir()
		for name, text := range map[string]string{
			"go.mod":    "module x\n\ngo 1.26\n",
			"x_test.go": "package x\n\nimport (\n\t\"os\"\n\t\"testing\"\n\t\"time\"\n)\n\nfunc TestX(t *testing.T) {\n\tdir := os.Getenv(\"SIGNS\")\n\tos.Create(dir + \"/\" + os.Getenv(\"ME\"))\n\tfor end := time.Now().Add(2 * time.Minute); time.Now().Before(end); time.Sleep(time.Millisecond) {\n\t\tif _, err := os.Stat(dir + \"/\" + os.Getenv(\"OTHER\")); err == nil {\n\t\t\treturn\n\t\t}\n\t}\n\tt.Fatal(\"alone\")\n}\n",
		} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		runs = append(runs, testRun{dir: dir, env: []string{"SIGNS=" + signs, "ME=" + me, "OTHER=" + other}, args: []string{"-count=1", "./..."}})
	}
	var out bytes.Buffer
	tally := newTally(&out)
	runAll(t.Context(), tally, runs, 2)
	if !tally.close(true) || strings.Count(out.String(), "ok  \tx\t") != 2 || !strings.Contains(out.String(), "2 passed, 0 failed") {
		t.Errorf("printed:\n%s", &out)
	}
}
