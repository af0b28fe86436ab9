package peer

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// A node keeps its certificate over restarts, for a year less a month; a file that is no
// good is replaced; and the key is for its owner only.
func TestIdentity(t *testing.T) {
	dir, now := t.TempDir(), time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	clock := func() time.Time { return now }
	open := func() *Identity {
		t.Helper()
		i, err := OpenIdentity(dir, "mac-1", clock)
		if err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(filepath.Join(dir, identityFile))
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("the file is %v (%v), want it for its owner only", info.Mode(), err)
		}
		return i
	}
	first := open()
	hash := first.Hash()
	if len(hash) != 64 || open().Hash() != hash {
		t.Errorf("hash %q, and %q after a restart", hash, open().Hash())
	}
	now = now.Add(identityLife - identityRenew - time.Hour)
	if open().Hash() != hash || first.Hash() != hash {
		t.Error("renewed too early")
	}
	now = now.Add(2 * time.Hour)
	renewed := first.Hash()
	if renewed == hash {
		t.Error("not renewed near its end")
	}
	if open().Hash() != renewed {
		t.Error("the renewed certificate was not kept")
	}
	now = now.Add(-400 * 24 * time.Hour) // the clock was wrong before: it is not valid yet
	if open().Hash() == renewed {
		t.Error("a certificate of the future is kept")
	}
	for _, text := range [][]byte{nil, []byte("no certificate"), bytes.Repeat([]byte("x"), 1<<20)} {
		if err := os.WriteFile(filepath.Join(dir, identityFile), text, 0o600); err != nil {
			t.Fatal(err)
		}
		if got := open().Hash(); len(got) != 64 {
			t.Errorf("over %.20q: hash %q", text, got)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "*")); len(left) != 1 {
		t.Errorf("left in the directory: %v", left)
	}
	if _, err := OpenIdentity(filepath.Join(dir, "none"), "mac-1", clock); err == nil {
		t.Error("made in a directory that is not there")
	}
}
