package fleet

import (
	"slices"
	"strings"
	"testing"
)

func TestLabels(t *testing.T) {
	l := NewLabels(" macOS", "self-hosted", "MACOS", "", "  ", "Sequoia")
	if want := (Labels{"macos", "self-hosted", "sequoia"}); !slices.Equal(l, want) {
		t.Fatalf("%v, want %v", l, want)
	}
	if l.Key() != "macos,self-hosted,sequoia" || NewLabels().Key() != "" {
		t.Errorf("keys %q and %q", l.Key(), NewLabels().Key())
	}
	for _, c := range []struct {
		want    Labels
		missing Labels
	}{
		{nil, nil},
		{NewLabels("MacOS", "self-hosted"), nil},
		{NewLabels("macos", "x64", "arm64"), Labels{"arm64", "x64"}},
	} {
		if got := l.Missing(c.want); !slices.Equal(got, c.missing) || l.ContainsAll(c.want) != (len(c.missing) == 0) {
			t.Errorf("%v lacks %v of %v, want %v", l, got, c.want, c.missing)
		}
	}
}

func FuzzNewLabels(f *testing.F) {
	f.Add("macOS,self-hosted,,macos")
	f.Add("\x00,é,É, ")
	f.Fuzz(func(t *testing.T, text string) {
		l := NewLabels(strings.Split(text, ",")...)
		if !slices.IsSorted(l) || slices.Contains(l, "") || len(slices.Compact(slices.Clone(l))) != len(l) || !l.ContainsAll(l) {
			t.Fatalf("%q became %q", text, l)
		}
		if again := NewLabels(l...); !slices.Equal(again, l) {
			t.Fatalf("%q became %q became %q", text, l, again)
		}
	})
}

func TestScopes(t *testing.T) {
	for _, c := range []struct {
		scope      Scope
		repository string
		want       bool
	}{
		{"octo", "octo/app", true}, {"octo", "Octo/App", true}, {"octo", "octopus/app", false},
		{"octo/app", "octo/app", true}, {"octo/app", "OCTO/APP", true}, {"octo/app", "octo/application", false},
	} {
		if got := c.scope.Contains(c.repository); got != c.want {
			t.Errorf("%s contains %s: %v", c.scope, c.repository, got)
		}
	}
	pool := Pool{Scopes: []Scope{"octo", "octo/app", "other"}}
	if s, ok := pool.ScopeOf("octo/app"); s != "octo/app" || !ok {
		t.Errorf("a repository's own scope goes first: %s", s)
	}
	if s, ok := pool.ScopeOf("octo/site"); s != "octo" || !ok {
		t.Errorf("then its organization's: %s", s)
	}
	if s, ok := pool.ScopeOf("foreign/app"); ok {
		t.Errorf("a foreign repository has scope %s", s)
	}
}

func TestNames(t *testing.T) {
	for name, good := range map[string]bool{
		"mac-1": true, "a": true, "0": true, strings.Repeat("x", 63): true,
		"": false, "-a": false, "a-": false, "Mac": false, "a_b": false, "a b": false, "a\n": false, strings.Repeat("x", 64): false,
	} {
		if err := CheckName("node", name); (err == nil) != good {
			t.Errorf("CheckName(%q): %v", name, err)
		}
	}
	digest := Digest("sha256:" + strings.Repeat("0a", 32))
	if err := CheckDigest(digest); err != nil || digest.Short() != "0a0a0a0a0a0a" {
		t.Errorf("%v, %s", err, digest.Short())
	}
	for _, bad := range []Digest{"", "sha256:", digest + "0", Digest(strings.ToUpper(string(digest))), "sha512:" + digest[7:], digest + "\n"} {
		if CheckDigest(bad) == nil {
			t.Errorf("digest %q passed", bad)
		}
	}
	seen := map[VMID]bool{}
	for range 1000 {
		id := NewVMID()
		if seen[id] || len(id) != 8 || CheckName("vm", string(id)) != nil {
			t.Fatalf("VM id %q", id)
		}
		seen[id] = true
	}
}

func TestRunnerNames(t *testing.T) {
	id := NewVMID()
	for _, fleetName := range []string{"main", "a-b", "paddock"} {
		name := RunnerName(fleetName, id, 12)
		if vm, n, ok := ParseRunnerName(fleetName, name); vm != id || n != 12 || !ok {
			t.Errorf("%s parses as %s, %d, %v", name, vm, n, ok)
		}
	}
	for _, foreign := range []string{
		"", "runner", "paddock-main", "paddock-main-abcdefgh", "paddock-main-abcdefgh-0", "paddock-main-abcdefgh-01",
		"paddock-main-abcdefgh-1x", "paddock-main-abcdefgh--1", "paddock-main-abcdefg-1", "paddock-other-abcdefgh-1", "xpaddock-main-abcdefgh-1",
	} {
		if vm, n, ok := ParseRunnerName("main", foreign); ok {
			t.Errorf("%q was taken for ours: %s, %d", foreign, vm, n)
		}
	}
}

// FuzzParseRunnerName: a name that is ours is exactly the one that we would give.
func FuzzParseRunnerName(f *testing.F) {
	f.Add("main", "paddock-main-abcdefgh-3")
	f.Add("a-b", "paddock-a-b-abcdefgh-3")
	f.Fuzz(func(t *testing.T, fleetName, name string) {
		if vm, n, ok := ParseRunnerName(fleetName, name); ok && RunnerName(fleetName, vm, n) != name {
			t.Fatalf("%q of fleet %q was read as %s, %d", name, fleetName, vm, n)
		}
	})
}

func FuzzCheckName(f *testing.F) {
	f.Add("mac-1")
	f.Add("a\n")
	f.Fuzz(func(t *testing.T, name string) {
		if CheckName("node", name) == nil && (len(name) > 63 || strings.ContainsAny(name, " /:|\n\t.{}") || name == "") {
			t.Fatalf("%q passed", name)
		}
	})
}
