package store_test

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
)

func openEmbeddedLogged(t *testing.T, w io.Writer) *store.Store {
	t.Helper()
	return openEmbedded(t, store.EmbeddedConfig{Log: slog.New(slog.NewTextHandler(w, nil))})
}

// restart is a second life in a directory whose first one crashed.
func restart(t *testing.T, s *store.Store, c store.EmbeddedConfig) *store.Store {
	t.Helper()
	if err := errors.Join(s.Crash(), s.Unlock()); err != nil {
		t.Fatal(err)
	}
	return openEmbedded(t, c)
}

// crashing opens a store that the test will crash instead of close.
func crashing(t *testing.T, c store.EmbeddedConfig) *store.Store {
	t.Helper()
	s, err := store.OpenEmbedded(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestCrash: every delivery that was accepted is there after kill -9, with and without
// a snapshot in between, in a new incarnation.
func TestCrash(t *testing.T) {
	c := store.EmbeddedConfig{Dir: filepath.Join(t.TempDir(), "made")}
	s := crashing(t, c)
	var group sync.WaitGroup
	for w := range 8 {
		group.Go(func() {
			for i := range 40 {
				d := job(fleet.JobID(1+40*w+i), fleet.JobQueued, 1)
				if _, err := s.MergeJob(t.Context(), d); err != nil {
					t.Error(err)
				}
				if w == 3 && i%10 == 5 {
					if err := s.Snapshot(t.Context()); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	group.Wait()
	merge(t, s, job(1, fleet.JobCompleted, 2))
	if err := s.SetCursor(t.Context(), "sweep", "far"); err != nil {
		t.Fatal(err)
	}
	if err := s.Commit(t.Context(), store.Txn{
		VMs: []fleet.VM{{ID: "vm000001", Node: "mac-1"}}, Nodes: []fleet.Node{{ID: "mac-1"}}, DropJobs: []fleet.JobID{1},
	}); err != nil {
		t.Fatal(err)
	}
	if err := s.Snapshot(t.Context()); err != nil {
		t.Fatal(err)
	}
	merge(t, s, job(1000, fleet.JobQueued, 1))
	before := view(t, s)

	s = restart(t, s, c)
	after := view(t, s)
	if len(after.Jobs) != 320 || after.Jobs[1000] == nil {
		t.Errorf("%d jobs after the crash, want 320", len(after.Jobs))
	}
	if after.Incarnation == before.Incarnation || len(after.VMs)+len(after.Nodes) != 0 {
		t.Errorf("nodes must report again in a new incarnation: %+v", after)
	}
	if m := merge(t, s, job(1, fleet.JobQueued, 3)); !m.Ghost {
		t.Errorf("the tombstone is gone: %+v", m)
	}
	if cursor, err := s.Cursor(t.Context(), "sweep"); cursor != "far" || err != nil {
		t.Errorf("cursor %q, %v", cursor, err)
	}
	for _, f := range files(t, c.Dir) {
		if info, err := os.Stat(f); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v, want mode 0600", f, info, err)
		}
	}
}

func files(t *testing.T, dir string) []string {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	return paths
}

// TestTornAndDamagedLog: a crash tears the last line; a bad disk damages another.
func TestTornAndDamagedLog(t *testing.T) {
	var logged safeBuffer
	c := store.EmbeddedConfig{Dir: t.TempDir(), Log: slog.New(slog.NewTextHandler(&logged, nil))}
	s := crashing(t, c)
	for id := range fleet.JobID(5) {
		merge(t, s, job(1+id, fleet.JobQueued, 1))
	}
	if err := errors.Join(s.Crash(), s.Unlock()); err != nil {
		t.Fatal(err)
	}
	logs, err := filepath.Glob(filepath.Join(c.Dir, "*.log"))
	if err != nil || len(logs) != 1 {
		t.Fatalf("logs: %v, %v", logs, err)
	}
	body, err := os.ReadFile(logs[0])
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.SplitAfter(string(body), "\n")
	lines[1] = strings.Replace(lines[1], "build", "bui1d", 1)
	body = []byte(strings.Join(lines, ""))
	if err := os.WriteFile(logs[0], body[:len(body)-20], 0o600); err != nil {
		t.Fatal(err)
	}
	s = openEmbedded(t, c)
	v := view(t, s)
	if len(v.Jobs) != 3 || v.Jobs[2] != nil || v.Jobs[5] != nil {
		t.Errorf("jobs after the damage: %v, want 1, 3 and 4", v.Jobs)
	}
	if text := logged.String(); !strings.Contains(text, "damaged and skipped") || !strings.Contains(text, "line=2") || !strings.Contains(text, "torn") {
		t.Errorf("the damage is not reported:\n%s", text)
	}
}

func TestDamagedSnapshot(t *testing.T) {
	var logged safeBuffer
	c := store.EmbeddedConfig{Dir: t.TempDir(), Log: slog.New(slog.NewTextHandler(&logged, nil))}
	s := crashing(t, c)
	merge(t, s, job(1, fleet.JobQueued, 1))
	if err := s.Snapshot(t.Context()); err != nil {
		t.Fatal(err)
	}
	merge(t, s, job(2, fleet.JobQueued, 1))
	path := filepath.Join(c.Dir, "snapshot.json")
	body, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(strings.Replace(string(body), "build", "bui1d", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	s = restart(t, s, c)
	if v := view(t, s); len(v.Jobs) != 1 || v.Jobs[2] == nil {
		t.Errorf("jobs: %v, want the logged one", v.Jobs)
	}
	if _, err := os.Stat(path + ".damaged"); err != nil || !strings.Contains(logged.String(), "put aside") {
		t.Errorf("the damaged snapshot is not kept (%v) or not reported:\n%s", err, logged.String())
	}
}

func TestClosePreserves(t *testing.T) {
	c := store.EmbeddedConfig{Dir: t.TempDir()}
	s := crashing(t, c)
	merge(t, s, job(1, fleet.JobQueued, 1))
	if _, err := store.OpenEmbedded(t.Context(), c); err == nil || !strings.Contains(err.Error(), "another process uses it") {
		t.Errorf("a second store in one directory: %v", err)
	}
	closeStore(t, s)
	logs, err := filepath.Glob(filepath.Join(c.Dir, "*.log"))
	if err != nil || len(logs) != 0 {
		t.Errorf("logs after Close: %v, %v", logs, err)
	}
	if v := view(t, openEmbedded(t, c)); v.Jobs[1] == nil {
		t.Error("the job did not outlive Close")
	}
}

// TestDiskGone: a delivery that cannot be kept is not accepted, and the log works
// again as soon as the disk does.
func TestDiskGone(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "d")
	s := crashing(t, store.EmbeddedConfig{Dir: dir})
	defer func() { _ = s.Crash() }()
	if err := os.Rename(dir, dir+".away"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.MergeJob(t.Context(), job(1, fleet.JobQueued, 1)); !errors.Is(err, store.ErrDown) {
		t.Errorf("MergeJob without a disk: %v, want ErrDown", err)
	}
	if n := len(view(t, s).Jobs); n != 0 {
		t.Errorf("a refused delivery made %d jobs", n)
	}
	if err := os.Rename(dir+".away", dir); err != nil {
		t.Fatal(err)
	}
	merge(t, s, job(1, fleet.JobQueued, 1))
}

// TestClockIsDriven: leases end by the embedded store's clock, not by the machine's.
func TestClockIsDriven(t *testing.T) {
	s := openEmbedded(t, store.EmbeddedConfig{})
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	if !s.SetTime(now) {
		t.Fatal("an embedded store has no clock")
	}
	term, leader, err := s.Lead(t.Context(), "a", 20*time.Second)
	if err != nil || !leader {
		t.Fatal(leader, err)
	}
	for _, step := range []struct {
		after time.Duration
		want  error
	}{{0, nil}, {19999 * time.Millisecond, nil}, {20 * time.Second, store.ErrFenced}} {
		s.SetTime(now.Add(step.after))
		if err := s.Commit(t.Context(), store.Txn{Term: &term}); !errors.Is(err, step.want) {
			t.Errorf("after %s: %v, want %v", step.after, err, step.want)
		}
	}
	next, leader, err := s.Lead(t.Context(), "b", 20*time.Second)
	if err != nil || !leader || next.Epoch != term.Epoch+1 {
		t.Errorf("b: %+v, %v, %v", next, leader, err)
	}
	if v := view(t, s); !v.Born.Equal(now) {
		t.Errorf("born %s, want %s", v.Born, now)
	}
	other, _ := openRedis(t, store.Config{})
	if other.SetTime(now) {
		t.Error("a real Redis has a clock of its own")
	}
}

// TestEmbeddedNeedsPassword: the embedded store asks for its password.
func TestEmbeddedNeedsPassword(t *testing.T) {
	s := openEmbedded(t, store.EmbeddedConfig{})
	host, port, _ := strings.Cut(s.EmbeddedAddr(), ":")
	if host != "127.0.0.1" {
		t.Errorf("it listens on %s", host)
	}
	_, err := store.Open(t.Context(), store.Config{URL: fmt.Sprintf("redis://%s:%s", host, port)})
	if err == nil || !strings.Contains(err.Error(), "NOAUTH") {
		t.Errorf("without a password: %v", err)
	}
}
