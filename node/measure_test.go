package node

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// TestStarts: means move by a quarter of what is new, survive a restart, are reported in
// coarse steps, and end with their image; a file that is none is no matter.
func TestStarts(t *testing.T) {
	path, log := filepath.Join(t.TempDir(), "starts.json"), newStand(t).log
	report := func(s *starts, d fleet.Digest, free int) fleet.ImageStart {
		images := []fleet.NodeImage{{Digest: d}}
		s.report(images, map[fleet.Digest]int{d: free})
		return images[0].Start
	}
	s := newStarts(path, log)
	s.open()
	if got := report(s, base, 1); got != (fleet.ImageStart{States: 1}) {
		t.Errorf("nothing measured: %+v", got)
	}
	s.add(base, fleet.TierCold, 8*time.Second)
	s.add(base, fleet.TierCold, 4*time.Second)
	s.add(base, fleet.TierSaved, 310*time.Millisecond)
	s = newStarts(path, log)
	s.open()
	want := fleet.ImageStart{Cold: 7 * time.Second, Saved: 400 * time.Millisecond, States: 2}
	if got := report(s, base, 2); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	s.add(base, fleet.TierSaved, 305*time.Millisecond) // is no news
	if got := report(s, base, 2); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	report(s, digest("2"), 0)
	if got := report(s, base, 0); got != (fleet.ImageStart{}) {
		t.Errorf("of an image that had gone: %+v", got)
	}
	for _, bytes := range []string{"{", `{"x":{"cold":-1}}`, `{"x":{"saved":9000000000000000000}}`, `[]`} {
		must(t, os.WriteFile(path, []byte(bytes), 0o600))
		s = newStarts(path, log)
		if s.open(); len(s.by) > 0 {
			t.Errorf("%s was taken: %v", bytes, s.by)
		}
	}
}
