package store_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/store"
)

// FuzzDeliveryLog feeds the reader of the log any bytes, behind two good lines and
// before a third: those are read whatever the bytes are, as long as they end a line.
func FuzzDeliveryLog(f *testing.F) {
	var good [3]string
	for i := range good {
		line, err := store.EncodeLine(job(fleet.JobID(i+1), fleet.JobQueued, 1))
		if err != nil {
			f.Fatal(err)
		}
		good[i] = string(line)
	}
	f.Add([]byte(good[0][:20]))
	f.Add([]byte(strings.Replace(good[0], "build", "bui1d", 1)))
	f.Add([]byte("\n\n00000000 \nffffffff {}\n"))
	f.Add([]byte{0, 0, 0})
	f.Fuzz(func(t *testing.T, middle []byte) {
		var seen []fleet.JobID
		each := func(d store.Delivery) error {
			seen = append(seen, d.Job.ID)
			return nil
		}
		quiet := slog.New(slog.DiscardHandler)
		text := good[0] + good[1] + string(middle) + "\n" + good[2]
		if err := store.ScanLog(text, quiet, each); err != nil {
			t.Fatal(err)
		}
		if len(seen) < 3 || seen[0] != 1 || seen[1] != 2 || seen[len(seen)-1] != 3 {
			t.Fatalf("read %v out of 1, 2, …, 3", seen)
		}
		// Torn anywhere, the file gives the whole lines before the tear.
		for _, cut := range []int{1, len(good[2]) / 2, len(good[2]) - 1} {
			seen = nil
			if err := store.ScanLog(good[0]+good[1]+good[2][:cut], quiet, each); err != nil || len(seen) != 2 {
				t.Fatalf("torn after %d bytes: read %v, %v", cut, seen, err)
			}
		}
	})
}

// TestLinesRoundTrip: a delivery read from the log is the one that was accepted.
func TestLinesRoundTrip(t *testing.T) {
	d := job(1<<62+1, fleet.JobInProgress, 1<<61+1)
	d.Job.RunnerName, d.Job.Name = "a|b\nc", "line\nbreak \u2028 and \"quotes\""
	line, err := store.EncodeLine(d)
	if err != nil || bytes.Count(line, []byte("\n")) != 1 {
		t.Fatalf("%q, %v", line, err)
	}
	got, err := store.DecodeLine(bytes.TrimSuffix(line, []byte("\n")))
	if err != nil || !got.At.Equal(d.At) || got.ID != d.ID || got.Job.ID != d.Job.ID || got.Job.RunnerName != d.Job.RunnerName || got.Job.Name != d.Job.Name || got.Job.Gate != d.Job.Gate {
		t.Errorf("%+v, %v, want %+v", got, err, d)
	}
}

// FuzzSnapshot: any bytes are a snapshot or damaged, never a panic or half a one.
func FuzzSnapshot(f *testing.F) {
	dir := f.TempDir()
	s := openEmbedded(f, store.EmbeddedConfig{Dir: dir})
	for id := range fleet.JobID(3) {
		if _, err := s.MergeJob(f.Context(), job(1+id, fleet.JobCompleted, 1)); err != nil {
			f.Fatal(err)
		}
	}
	if err := s.SetCursor(f.Context(), "sweep", "far"); err != nil {
		f.Fatal(err)
	}
	if err := s.Snapshot(f.Context()); err != nil {
		f.Fatal(err)
	}
	body, err := os.ReadFile(filepath.Join(dir, "snapshot.json"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(body)
	f.Add(body[:len(body)/2])
	f.Add(bytes.Replace(body, []byte("far"), []byte("fat"), 1))
	f.Add([]byte(`{"format":1,"crc32":0,"records":null}`))
	f.Add([]byte(`{"format":2}`))
	f.Add([]byte(`{"jobs":{"7":"queued|0||||\n{}"},"tombs":{"7":"1"},"cursors":null}`))
	f.Fuzz(func(t *testing.T, in []byte) {
		// As records with the right sum, too: few mutations would get past it.
		sum := fmt.Appendf(nil, `{"format":1,"crc32":%d,"records":%s}`, crc32.ChecksumIEEE(in), in)
		if triples, err := store.DecodeSnapshot(sum); err == nil && len(triples)%3 != 0 {
			t.Fatalf("%d values, want triples", len(triples))
		}
		triples, err := store.DecodeSnapshot(in)
		if err != nil {
			if triples != nil {
				t.Fatal("half a snapshot with an error")
			}
			return
		}
		if len(triples)%3 != 0 {
			t.Fatalf("%d values, want triples", len(triples))
		}
		if bytes.Equal(in, body) && len(triples) != 3*7 { // 3 jobs, 3 tombstones, 1 cursor
			t.Fatalf("%d values out of a good snapshot", len(triples))
		}
	})
}

// FuzzLedger: any bytes are a ledger of a version or an error.
func FuzzLedger(f *testing.F) {
	f.Add([]byte(`{"version":3,"cordons":{"mac-1":"ann"},"nodes":{"mac-1":"2026-03-01T12:00:00Z"},"policies":[{"name":"p"}]}`))
	f.Add([]byte(`{"version":0}`))
	f.Add([]byte(`{}`))
	f.Add([]byte(``))
	f.Fuzz(func(t *testing.T, body []byte) {
		l, err := store.ParseLedger(body)
		if err != nil || len(body) == 0 {
			return
		}
		again, err := json.Marshal(l)
		if err != nil {
			return // a year beyond 9999
		}
		if l.Version < 1 {
			t.Fatalf("version %d", l.Version)
		}
		if _, err := store.ParseLedger(again); err != nil {
			t.Fatalf("%s cannot be read again: %v", again, err)
		}
	})
}

// Two replicas, of which one cannot write its file: a full disk there must lock nobody
// out, neither from what the other one changed nor from what was before. What it is
// asked to change itself is refused, and comes into force nowhere.
func TestUnwritableLedgerLocksEverybodyOut(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "dir")
	path := filepath.Join(dir, "ledger.json")
	redisURL, _ := startRedis(t)
	good := open(t, store.Config{URL: redisURL, Ledger: filepath.Join(t.TempDir(), "ledger.json")})
	poor := open(t, store.Config{URL: redisURL, Ledger: path})
	revoke := func(s *store.Store, id string) error {
		_, err := s.UpdateLedger(t.Context(), func(l *store.Ledger) error {
			l.Revoked = map[string]time.Time{id: time.Unix(1, 0).UTC()}
			return nil
		})
		return err
	}
	revoked := func(s *store.Store, id string) {
		t.Helper()
		l, err := s.ReadLedger(t.Context())
		if _, found := l.Revoked[id]; err != nil || !found || len(l.Revoked) != 1 {
			t.Errorf("%v, revoked %v, want %s", err, l.Revoked, id)
		}
	}
	if err := revoke(poor, "a"); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.RemoveAll(dir), os.WriteFile(dir, nil, 0o600)); err != nil { // no directory: root cannot write either
		t.Fatal(err)
	}
	revoked(poor, "a")
	if err := revoke(good, "b"); err != nil {
		t.Fatal(err)
	}
	revoked(poor, "b")
	revoked(poor, "b")
	if err := revoke(poor, "c"); err == nil {
		t.Error("a change that cannot be kept was taken")
	}
	revoked(good, "b")
	revoked(poor, "b")

	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- poor.Run(ctx) }()
	defer func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	deadline := time.After(10 * time.Second)
	for {
		if body, err := os.ReadFile(path); err == nil && bytes.Contains(body, []byte(`"b"`)) {
			return
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-deadline:
			t.Fatal("the file was not written once it could be")
		}
	}
}
