package store_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
)

// bound is what every call promises when the store is away.
const bound = 5 * time.Second

func job(id fleet.JobID, status fleet.JobStatus, gate int64) store.Delivery {
	return store.Delivery{ID: fmt.Sprint("guid-", id, status), At: time.Now(), Job: fleet.Job{
		ID: id, RunID: 1, Repository: "octo/app", Name: "build", Labels: fleet.NewLabels("self-hosted", "macos"),
		Status: status, Gate: gate, CreatedAt: time.Unix(int64(id%1_000_000), 0), Feed: fleet.FeedWebhook,
	}}
}

func merge(t testing.TB, s *store.Store, d store.Delivery) store.Merged {
	t.Helper()
	m, err := s.MergeJob(t.Context(), d)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func view(t testing.TB, s *store.Store) *store.View {
	t.Helper()
	v, err := s.View(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// calls is every way of asking the store for something.
func calls(s *store.Store) map[string]func(context.Context) error {
	return map[string]func(context.Context) error{
		"MergeJob": func(ctx context.Context) error { _, err := s.MergeJob(ctx, job(1, fleet.JobQueued, 1)); return err },
		"View":     func(ctx context.Context) error { _, err := s.View(ctx); return err },
		"Commit":   func(ctx context.Context) error { return s.Commit(ctx, store.Txn{}) },
		"Lead":     func(ctx context.Context) error { _, _, err := s.Lead(ctx, "a", time.Minute); return err },
		"Resign":   func(ctx context.Context) error { return s.Resign(ctx, "a") },
		"Ready":    s.Ready,
		"Cursor":   func(ctx context.Context) error { _, err := s.Cursor(ctx, "c"); return err },
		"SetCursor": func(ctx context.Context) error {
			if _, err := s.Cursor(ctx, "c"); err != nil {
				return err
			}
			return s.SetCursor(ctx, "c", "v")
		},
		"Events":     func(ctx context.Context) error { _, err := s.Events(ctx, store.EventFilter{}); return err },
		"ReadLedger": func(ctx context.Context) error { _, err := s.ReadLedger(ctx); return err },
		"UpdateLedger": func(ctx context.Context) error {
			_, err := s.UpdateLedger(ctx, func(*store.Ledger) error { return nil })
			return err
		},
		"Chunks": func(ctx context.Context) error { _, err := s.Chunks(ctx, chunkWord("mac-1"), chunkLimits); return err },
		"DropChunks": func(ctx context.Context) error {
			return s.DropChunks(ctx, "lab", chunkWord("").Image, 94, []fleet.NodeID{"a"})
		},
		"Claimants":   func(ctx context.Context) error { _, err := s.Claimants(ctx); return err },
		"Askers":      func(ctx context.Context) error { _, err := s.Askers(ctx, time.Minute); return err },
		"SweepChunks": func(ctx context.Context) error { _, err := s.SweepChunks(ctx, chunkLimits); return err },
	}
}

// away expects every call, all at once and four times each, to say ErrDown in time,
// and returns what they said.
func away(t *testing.T, s *store.Store) string {
	t.Helper()
	var group sync.WaitGroup
	var mu sync.Mutex
	var said strings.Builder
	for name, call := range calls(s) {
		for range 4 {
			group.Go(func() {
				begin := time.Now()
				err := call(t.Context())
				if took := time.Since(begin); !errors.Is(err, store.ErrDown) || took > bound {
					t.Errorf("%s of a store that is away: %v after %s, want ErrDown within %s", name, err, took, bound)
				}
				mu.Lock()
				defer mu.Unlock()
				fmt.Fprintln(&said, err)
			})
		}
	}
	group.Wait()
	return said.String()
}

// eventually polls for what another goroutine or process brings about.
func eventually(t *testing.T, what string, met func() bool) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	for tick := time.NewTicker(5 * time.Millisecond); !met(); {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("%s: it never came to be", what)
		}
	}
}

func TestRedisStopsAndStarts(t *testing.T) {
	var logged safeBuffer
	s, ctl := openRedis(t, store.Config{Log: slog.New(slog.NewTextHandler(&logged, nil))})
	done := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	woken := s.Notify(store.Anything)
	go func() { done <- s.Run(ctx) }()
	<-woken
	merge(t, s, job(1, fleet.JobQueued, 1))
	before := view(t, s)

	ctl.Stop(t)
	said := away(t, s)
	eventually(t, "the broken subscription is reported", func() bool { return strings.Contains(logged.String(), "subscription") })

	woken = s.Notify(store.Anything)
	ctl.Start(t)
	<-woken // everyone is woken once when the subscription stands again
	for name, call := range calls(s) {
		if err := call(t.Context()); err != nil {
			t.Errorf("%s after the store came back: %v", name, err)
		}
	}
	if v := view(t, s); v.Incarnation != before.Incarnation || v.Jobs[1] == nil {
		t.Errorf("after a restart with its data: incarnation %s with %d jobs, was %s", v.Incarnation, len(v.Jobs), before.Incarnation)
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Run: %v", err)
	}
	if password := ctl.Password(); strings.Contains(said+logged.String(), password) {
		t.Error("the password is in an error or a log line")
	}
}

func TestRedisHangs(t *testing.T) {
	s, ctl := openRedis(t, store.Config{})
	merge(t, s, job(1, fleet.JobQueued, 1))
	ctl.Pause(t)
	said := away(t, s)
	ctl.Continue(t)
	if strings.Contains(said, ctl.Password()) {
		t.Error("the password is in an error")
	}
	if m := merge(t, s, job(2, fleet.JobQueued, 1)); m.Was != "" {
		t.Errorf("after the pause: %+v", m)
	}
}

// TestURLIsNotQuoted: whatever is wrong with a URL, its password is not repeated.
func TestURLIsNotQuoted(t *testing.T) {
	const password = "s3cret-w0rd"
	for _, bad := range []string{
		"redis://user:" + password + "@127.0.0.1:1/0", "http://user:" + password + "@host", "redis://user:" + password + " x@host:port:",
		"redis://:" + password + "@no.such.host.invalid:6379", "unix://:" + password + "@/no/such/socket", password,
		"redis://user:" + password + "@host/not-a-number", "redis://user:" + password + "@host:6379?bogus=" + password,
	} {
		_, err := store.Open(t.Context(), store.Config{URL: bad})
		if err == nil || strings.Contains(err.Error(), password) {
			t.Errorf("Open: %v", err)
		}
	}
	// A wrong password is an answer, and must not be quoted either.
	_, ctl := openRedis(t, store.Config{})
	wrong := url.URL{Scheme: "unix", User: url.UserPassword("", password), Path: ctl.Socket()}
	if _, err := store.Open(t.Context(), store.Config{URL: wrong.String()}); err == nil || strings.Contains(err.Error(), password) || errors.Is(err, store.ErrDown) {
		t.Errorf("Open with a wrong password: %v", err)
	}
}

func TestCancelledCallsAreNotDown(t *testing.T) {
	s := openEmbedded(t, store.EmbeddedConfig{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for name, call := range calls(s) {
		if err := call(ctx); !errors.Is(err, context.Canceled) || errors.Is(err, store.ErrDown) {
			t.Errorf("%s with a cancelled context: %v", name, err)
		}
	}
}

// TestFlushAll empties both kinds of store in mid-use: what was decided before is
// fenced off, mirrors start anew, and only the ledger is still there.
func TestFlushAll(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ledger.json")
	s, ctl := openRedis(t, store.Config{Ledger: path})
	t.Run("redis", func(t *testing.T) { flushed(t, s, func() { ctl.Flush(t) }, path) })
	path = filepath.Join(t.TempDir(), "ledger.json")
	e := openEmbedded(t, store.EmbeddedConfig{Ledger: path})
	t.Run("embedded", func(t *testing.T) { flushed(t, e, e.FlushEmbedded, path) })
}

func flushed(t *testing.T, s *store.Store, flush func(), path string) {
	merge(t, s, job(1, fleet.JobQueued, 1))
	merge(t, s, job(2, fleet.JobCompleted, 1))
	term, _, err := s.Lead(t.Context(), "a", time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	vm := fleet.VM{ID: "vm000001", Node: "mac-1", State: fleet.VMPlaced}
	if err := s.Commit(t.Context(), store.Txn{Term: &term, VMs: []fleet.VM{vm}}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Cursor(t.Context(), "sweep"); err != nil {
		t.Fatal(err)
	}
	if err := s.SetCursor(t.Context(), "sweep", "far"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.UpdateLedger(t.Context(), func(l *store.Ledger) error {
		l.Cordons = map[fleet.NodeID]string{"mac-1": "ann"}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	before := view(t, s)
	flush()

	after := view(t, s)
	if after.Incarnation == before.Incarnation || len(after.Jobs)+len(after.VMs) != 0 || after.Revision <= before.Revision {
		t.Errorf("after FLUSHALL: %+v, before: %+v", after, before)
	}
	for name, txn := range map[string]store.Txn{"a term": {Term: &term}, "a view": {Incarnation: before.Incarnation}} {
		if err := s.Commit(t.Context(), txn); !errors.Is(err, store.ErrFenced) {
			t.Errorf("a write that was decided on %s of before: %v, want ErrFenced", name, err)
		}
	}
	if err := s.SetCursor(t.Context(), "sweep", "farther"); !errors.Is(err, store.ErrFenced) {
		t.Errorf("a cursor of before: %v, want ErrFenced", err)
	}
	if c, err := s.Cursor(t.Context(), "sweep"); c != "" || err != nil {
		t.Errorf("the cursor is %q, %v: what was swept is lost and must be swept again", c, err)
	}
	again, leader, err := s.Lead(t.Context(), "b", time.Minute)
	if err != nil || !leader || again.Incarnation != after.Incarnation {
		t.Errorf("b after FLUSHALL: %+v, %v, %v", again, leader, err)
	}
	merge(t, s, job(1, fleet.JobQueued, 1))
	if v := view(t, s); v.Incarnation != after.Incarnation || v.Jobs[1] == nil {
		t.Errorf("refilled: %+v", v)
	}
	if l, err := s.ReadLedger(t.Context()); err != nil || l.Cordons["mac-1"] != "ann" {
		t.Errorf("the ledger after FLUSHALL: %+v, %v", l, err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the ledger's file: %v, %v, want mode 0600", info, err)
	}
}

// TestFlushWhileMerging empties Redis under load: no call fails for it, and once all
// news came again nothing is missing.
func TestFlushWhileMerging(t *testing.T) {
	s, ctl := openRedis(t, store.Config{})
	feed := func() {
		var group sync.WaitGroup
		for w := range 8 {
			group.Go(func() {
				for i := range 60 {
					if _, err := s.MergeJob(t.Context(), job(fleet.JobID(1+60*w+i), fleet.JobQueued, 1)); err != nil {
						t.Error(err)
					}
					if _, err := s.View(t.Context()); err != nil {
						t.Error(err)
					}
				}
			})
		}
		group.Go(func() {
			for range 5 {
				ctl.Flush(t)
			}
		})
		group.Wait()
	}
	feed()
	for id := range fleet.JobID(480) {
		merge(t, s, job(1+id, fleet.JobQueued, 1))
	}
	if n := len(view(t, s).Jobs); n != 480 {
		t.Errorf("%d jobs after all news came again, want 480", n)
	}
}

// TestLedgerReplicas: two replicas with a file each on one Redis.
func TestLedgerReplicas(t *testing.T) {
	redisURL, ctl := startRedis(t)
	dir := t.TempDir()
	config := func(name string) store.Config {
		return store.Config{URL: redisURL, Ledger: filepath.Join(dir, name, "ledger.json")}
	}
	a, b := open(t, config("a")), open(t, config("b"))
	cordon := func(s *store.Store, n fleet.NodeID) store.Ledger {
		t.Helper()
		l, err := s.UpdateLedger(t.Context(), func(l *store.Ledger) error {
			if l.Cordons == nil {
				l.Cordons = map[fleet.NodeID]string{}
			}
			l.Cordons[n] = "ann"
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	cordon(a, "mac-1")
	want := cordon(b, "mac-2") // on top of a's
	if len(want.Cordons) != 2 {
		t.Fatalf("b lost a's change: %+v", want)
	}
	// Run writes the other's news into a's own file.
	woken := a.Notify(store.Anything)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	<-woken
	want = cordon(b, "mac-3")
	eventually(t, "a's file follows", func() bool {
		body, err := os.ReadFile(filepath.Join(dir, "a", "ledger.json"))
		return err == nil && strings.Contains(string(body), "mac-3")
	})
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	// Emptied, and asked by a replica without a file first, Redis gets the highest version
	// as soon as one that has it asks.
	ctl.Flush(t)
	c := open(t, config("c"))
	if l, err := c.ReadLedger(t.Context()); err != nil || l.Version != 0 {
		t.Errorf("a replica without a file: %+v, %v", l, err)
	}
	for _, s := range []*store.Store{open(t, config("a")), c, b} {
		got, err := s.ReadLedger(t.Context())
		if diff := cmp.Diff(want, got); diff != "" || err != nil {
			t.Errorf("%v -want +got:\n%s", err, diff)
		}
	}
	// A damaged file is an error with a hint, not an empty ledger.
	damaged := config("d")
	if err := os.MkdirAll(filepath.Dir(damaged.Ledger), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(damaged.Ledger, []byte(`{"version": 3, "tok`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := store.Open(t.Context(), damaged); err == nil || !strings.Contains(err.Error(), "restore it") {
		t.Errorf("a damaged ledger: %v", err)
	}
}

// TestForeignBytes: what is not ours under our keys is left out and reported.
func TestForeignBytes(t *testing.T) {
	var logged safeBuffer
	s := openEmbeddedLogged(t, &logged)
	merge(t, s, job(1, fleet.JobQueued, 1))
	for id, record := range map[string]string{"7": "garbage", "8": "queued|x||||\n{}", "x": "queued|1||||\n{}"} {
		if err := s.Plant(t.Context(), id, record); err != nil {
			t.Fatal(err)
		}
	}
	if v := view(t, s); len(v.Jobs) != 1 || v.Jobs[1] == nil {
		t.Errorf("the view: %v", v.Jobs)
	}
	if n := strings.Count(logged.String(), "cannot be read"); n != 3 {
		t.Errorf("%d lines about it, want 3:\n%s", n, logged.String())
	}
}

// TestMarksAreTrimmed: a mirror that missed a trim reloads instead of keeping the dead.
func TestMarksAreTrimmed(t *testing.T) {
	redisURL, _ := startRedis(t)
	s, far := open(t, store.Config{URL: redisURL}), open(t, store.Config{URL: redisURL})
	var vms []fleet.VM
	for i := range 20 {
		vms = append(vms, fleet.VM{ID: fleet.VMID(fmt.Sprintf("vm%06d", i)), Node: "mac-1"})
	}
	if err := s.Commit(t.Context(), store.Txn{VMs: vms}); err != nil {
		t.Fatal(err)
	}
	near := view(t, s)
	view(t, far)
	for i := range 18 {
		if err := s.CommitKeeping(t.Context(), store.Txn{DropVMs: []fleet.VMID{vms[i].ID}}, 4); err != nil {
			t.Fatal(err)
		}
		if n := len(view(t, s).VMs); n != 19-i {
			t.Fatalf("%d VMs after %d were dropped", n, i+1)
		}
	}
	if marks, err := s.Marks(t.Context()); err != nil || marks > 2+5 {
		t.Errorf("%d marks for 2 records and at most 4 deleted ones (%v)", marks, err)
	}
	if v := view(t, far); len(v.VMs) != 2 || v.Incarnation != near.Incarnation {
		t.Errorf("a mirror that missed the trim has %d VMs", len(v.VMs))
	}
}

// safeBuffer is a log's end that a test may read meanwhile.
type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *safeBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}
