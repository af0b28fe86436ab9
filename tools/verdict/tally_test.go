package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Three packages ran: one is fine, one has a failing and a skipped test, one does not
// compile. The lines are cut from real runs.
const stream = `{"Action":"start","Package":"m/fine"}
{"Action":"run","Package":"m/fine","Test":"TestA"}
{"Action":"output","Package":"m/fine","Test":"TestA","Output":"=== RUN   TestA\n"}
{"Action":"start","Package":"m/bad"}
{"Action":"output","Package":"m/fine","Test":"TestA","Output":"--- PASS: TestA (0.00s)\n"}
{"Action":"pass","Package":"m/fine","Test":"TestA","Elapsed":0}
{"Action":"output","Package":"m/bad","Test":"TestB","Output":"    b_test.go:7: the reason\n"}
{"Action":"fail","Package":"m/bad","Test":"TestB","Elapsed":0}
{"Action":"output","Package":"m/bad","Test":"TestC","Output":"    c_test.go:7: no such thing here\n"}
{"Action":"skip","Package":"m/bad","Test":"TestC","Elapsed":0}
{"Action":"output","Package":"m/fine","Output":"PASS\n"}
{"Action":"output","Package":"m/fine","Output":"ok  \tm/fine\t0.003s\n"}
{"Action":"pass","Package":"m/fine","Elapsed":0.003}
{"Action":"output","Package":"m/bad","Output":"FAIL\tm/bad\t0.002s\n"}
{"Action":"fail","Package":"m/bad","Elapsed":0.002}
{"ImportPath":"m/none [m/none.test]","Action":"build-output","Output":"none/n.go:3:1: syntax error\n"}
{"Action":"output","Package":"m/none","Output":"FAIL\tm/none [build failed]\n"}
{"Action":"fail","Package":"m/none","Elapsed":0,"FailedBuild":"m/none [m/none.test]"}
`

func TestTallyPrintsAndCounts(t *testing.T) {
	var out strings.Builder
	tally := newTally(&out)
	if _, err := tally.read(strings.NewReader(stream)); err != nil {
		t.Fatal(err)
	}
	if tally.close(false) {
		t.Error("a run with failures is called good")
	}
	want := `TestB (m/bad)
    b_test.go:7: the reason
TestC (m/bad)
    c_test.go:7: no such thing here
ok  	m/fine	0.003s
FAIL	m/bad	0.002s
none/n.go:3:1: syntax error
FAIL	m/none [build failed]
1 passed, 2 failed, 1 skipped
`
	if out.String() != want {
		t.Errorf("printed:\n%s\nwant:\n%s", out.String(), want)
	}
}

func TestTallyVerdicts(t *testing.T) {
	const (
		pass = `{"Action":"pass","Package":"m","Test":"T"}` + "\n"
		skip = `{"Action":"skip","Package":"m","Test":"S"}` + "\n"
		end  = `{"Action":"pass","Package":"m"}` + "\n"
	)
	tests := []struct {
		name   string
		stream string
		strict bool
		ok     bool
	}{
		{"all passed", pass + end, true, true},
		{"a skip on a developer's machine", pass + skip + end, false, true},
		{"a skip in CI", pass + skip + end, true, false},
		{"no test at all", end, false, false},
		{"nothing", "", false, false},
		{"cut off in the middle", pass, false, false},
		{"a package that died without a failing test", pass + `{"Action":"fail","Package":"m"}` + "\n", false, false},
		{"noise between events", "noise\n" + pass + end, true, true},
	}
	for _, test := range tests {
		tally := newTally(&strings.Builder{})
		if _, err := tally.read(strings.NewReader(test.stream)); err != nil {
			t.Fatal(err)
		}
		if ok := tally.close(test.strict); ok != test.ok {
			t.Errorf("%s: good is %t, want %t", test.name, ok, test.ok)
		}
	}
}

// What another build alone has is not missed by its absence: it is asked for by name.
func TestTallyNeeds(t *testing.T) {
	const end = `{"Action":"pass","Package":"m/vz"}` + "\n"
	for name, test := range map[string]struct {
		stream string
		ok     bool
	}{
		"it passed":           {`{"Action":"pass","Package":"m/vz","Test":"TestReal"}` + "\n" + end, true},
		"the stub's test ran": {`{"Action":"pass","Package":"m/vz","Test":"TestStub"}` + "\n" + end, false},
		"another package's":   {`{"Action":"pass","Package":"m/qemu","Test":"TestReal"}` + "\n" + `{"Action":"pass","Package":"m/qemu"}` + "\n", false},
		"it was skipped":      {`{"Action":"skip","Package":"m/vz","Test":"TestReal"}` + "\n" + end, false},
	} {
		var out strings.Builder
		tally := newTally(&out, "m/vz.TestReal")
		if _, err := tally.read(strings.NewReader(test.stream)); err != nil {
			t.Fatal(err)
		}
		if ok := tally.close(false); ok != test.ok || ok == strings.Contains(out.String(), "m/vz.TestReal: it must pass") {
			t.Errorf("%s: good is %t, want %t; printed:\n%s", name, ok, test.ok, &out)
		}
	}
}

// A module that cannot be read has no failing test, and must not pass for that.
func TestRunOfABrokenModule(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "go.mod"), []byte("this is no module file\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := run(t.Context(), newTally(&strings.Builder{}), testRun{dir: dir, args: []string{"./..."}}); err == nil {
		t.Error("want an error")
	}
}
