package main

import (
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/paddock-ci/paddock/fleet"
)

func TestProcessesOf(t *testing.T) {
	dir := t.TempDir()
	elsewhere := t.TempDir()
	want := []int{
		stray(t, "/", "PADDOCK_MACHINE="+filepath.Join(dir, "mac-1", "clones", "x")),
		stray(t, dir),
	}
	stray(t, elsewhere, "PADDOCK_MACHINE="+elsewhere)
	found, err := processesOf(t.Context(), dir)
	slices.Sort(found)
	slices.Sort(want)
	if err != nil || !slices.Equal(found, want) {
		t.Errorf("found %v, %v; want %v", found, err, want)
	}
}

func TestReadPS(t *testing.T) {
	const list = "    1 /sbin/launchd\n   70 paddock-demo TMPDIR=/tmp/d1\n   71 sleep 600 PADDOCK_MACHINE=/tmp/d1/mac-1/clones/x\n   72 sh -c a\nb /tmp/d1\n   73 vim HOME=/root\n"
	if found, err := readPS(list, "/tmp/d1", 70); err != nil || !slices.Equal(found, []int{71}) {
		t.Errorf("found %v, %v", found, err)
	}
	if found, err := readPS("", "/tmp/d1", 70); err == nil {
		t.Errorf("an empty list proves that %v are left", found)
	}
}

// FuzzReadPS: processes choose what stands in their command lines.
func FuzzReadPS(f *testing.F) {
	f.Add("sleep 600\n")
	f.Add("1\n70 x\n-")
	f.Fuzz(func(t *testing.T, said string) {
		found, err := readPS("70 paddock-demo\n71 "+said, "/tmp/d1", 70)
		first, _, _ := strings.Cut(said, "\n")
		if err != nil || strings.Contains(first, "/tmp/d1") != slices.Contains(found, 71) && !strings.Contains(said, "\n") {
			t.Errorf("found %v, %v", found, err)
		}
	})
}

// TestVerdict: a good result, and each thing by itself that makes it a bad one.
func TestVerdict(t *testing.T) {
	good := result{Jobs: 1, Succeeded: 1, Rows: []row{{Status: fleet.JobCompleted, Conclusion: "success"}}}
	if !good.Good() || good.verdict() != "and a clean house" {
		t.Errorf("%q", good.verdict())
	}
	for says, spoil := range map[string]func(*result){
		"1 did not succeed":                               func(r *result) { r.Succeeded = 0 },
		"1 succeeded after the table was last drawn":      func(r *result) { r.Rows = nil },
		"1 ran more than once":                            func(r *result) { r.Twice = 1 },
		"1 requests went against GitHub's API":            func(r *result) { r.Violations = []string{"x"} },
		"something was left behind":                       func(r *result) { r.Left.Leases = 1 },
		"what is left could not be looked at: no such ps": func(r *result) { r.Left.Unseen = errors.New("no such ps").Error() },
	} {
		r := good
		spoil(&r)
		if r.Good() || !strings.HasPrefix(r.verdict(), "but "+says) {
			t.Errorf("want %q, it says %q", says, r.verdict())
		}
	}
}

// TestQuantile: by the nearest rank, the p95 of twelve values is the greatest.
func TestQuantile(t *testing.T) {
	twelve := []float64{12, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}
	for q, want := range map[float64]float64{0: 1, 0.5: 6, 0.95: 12, 1: 12, 0.25: 3} {
		if got := quantile(twelve, q); got != want {
			t.Errorf("quantile %v is %v, want %v", q, got, want)
		}
	}
	if got := quantile(nil, 0.5); got != 0 {
		t.Errorf("quantile of nothing is %v", got)
	}
}
