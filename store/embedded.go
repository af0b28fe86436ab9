package store

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"
	"golang.org/x/sys/unix"
)

// EmbeddedConfig says where the store inside this process keeps its files.
type EmbeddedConfig struct {
	// Dir holds the log of deliveries and the snapshot; made if missing; "": memory only.
	Dir string
	// Ledger is the path of the ledger's file; "": in memory only.
	Ledger string
	// Log gets what no caller can be told; nil: discarded.
	Log *slog.Logger
}

// OpenEmbedded starts a miniredis in this process, on a loopback port and with a
// random password, and fills it from Dir: jobs, tombstones and cursors from the
// snapshot, then every delivery since. It is always a new incarnation: VMs, nodes and
// orders are reported and decided again.
func OpenEmbedded(ctx context.Context, c EmbeddedConfig) (*Store, error) {
	server := miniredis.NewMiniRedis()
	password := rand.Text()
	server.RequireAuth(password)
	if err := server.StartAddr("127.0.0.1:0"); err != nil {
		return nil, fmt.Errorf("start the embedded store: %w", err)
	}
	s, err := connect(&redis.Options{Addr: server.Addr(), Password: password}, Config{Ledger: c.Ledger, Log: c.Log})
	if err != nil {
		server.Close()
		return nil, err
	}
	s.embedded = server
	if c.Dir == "" {
		return s, nil
	}
	if s.unlock, err = lockDir(c.Dir); err == nil {
		if err = s.restore(ctx, c.Dir); err != nil {
			err = errors.Join(err, s.unlock())
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open the embedded store in %s: %w", c.Dir, err), s.Close())
	}
	// Set last: a store that could not be read must not be snapshot at Close. The last
	// snapshot is written even if whoever opened the store was cancelled since.
	s.finish = func() error {
		return errors.Join(s.snapshot(context.WithoutCancel(ctx)), s.deliveries.close(), s.unlock())
	}
	return s, nil
}

// lockDir makes the directory this process's own until unlock: two processes on one
// log of deliveries would each remove the other's.
func lockDir(dir string) (unlock func() error, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	file, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("another process uses it (%w); stop that one, or choose another directory", err), file.Close())
	}
	return file.Close, nil // the kernel unlocks with the last close, and when we are killed
}

// SetTime sets the clock of an embedded store, which leases are compared with, for
// tests that drive time. Until the first call the clock is the machine's. It reports
// whether the store has a clock to be set: a real Redis has its own.
func (s *Store) SetTime(t time.Time) bool {
	if s.embedded == nil {
		return false
	}
	s.embedded.SetTime(t)
	return true
}

// snapshotPeriod bounds the log of deliveries to what arrives in a minute.
const snapshotPeriod = time.Minute

// snapshots writes one every minute.
func (s *Store) snapshots(ctx context.Context) error {
	tick := time.NewTicker(snapshotPeriod)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
			if err := s.snapshot(ctx); err != nil && ctx.Err() == nil {
				s.log.Error("no snapshot; the log of deliveries grows instead", "error", err)
			}
		}
	}
}

// snapshot writes the state to disk and lets go of the deliveries it contains.
func (s *Store) snapshot(ctx context.Context) error {
	// From here on deliveries go into a new file. Those in older files are all merged
	// (rotate waited for them), so the script below sees them.
	kept, err := s.deliveries.rotate()
	if err != nil {
		return err
	}
	answer, err := s.run(ctx, "read the snapshot", snapshotScript)
	if err != nil {
		return err
	}
	body, err := encodeSnapshot(answer)
	if err != nil {
		return err
	}
	if err := writeFile(snapshotPath(s.dir), body); err != nil {
		return fmt.Errorf("write the snapshot: %w", err)
	}
	return removeLogs(s.dir, kept)
}

// restore fills an empty store from its directory.
func (s *Store) restore(ctx context.Context, dir string) error {
	s.dir = dir
	if err := s.restoreSnapshot(ctx); err != nil {
		return err
	}
	logs, err := findLogs(dir)
	if err != nil {
		return err
	}
	next := 1
	for _, number := range logs {
		if err := s.replay(ctx, logPath(dir, number)); err != nil {
			return err
		}
		next = number + 1
	}
	s.deliveries = newDeliveryLog(dir, next)
	return s.snapshot(ctx)
}

// restoreBatch is the number of records restored by one call.
const restoreBatch = 500

// restoreSnapshot reads the snapshot. A damaged one is put aside: the jobs in it are
// found again at GitHub, since the feeds' cursors are gone with it.
func (s *Store) restoreSnapshot(ctx context.Context) error {
	path := snapshotPath(s.dir)
	body, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	records, err := decodeSnapshot(body)
	if err != nil {
		s.log.Error("the snapshot is damaged and put aside; jobs are asked for at GitHub", "file", path+".damaged", "error", err)
		return os.Rename(path, path+".damaged")
	}
	for len(records) > 0 {
		n := min(len(records), 3*restoreBatch)
		if _, err := s.run(ctx, "restore the snapshot", restoreScript, records[:n]...); err != nil {
			return err
		}
		records = records[n:]
	}
	return nil
}

// replay merges the deliveries of one log file again.
func (s *Store) replay(ctx context.Context, path string) error {
	return readLog(path, s.log, func(d Delivery) error {
		if err := checkDelivery(&d); err != nil {
			s.log.Warn("a logged delivery is skipped", "delivery", d.ID, "error", err)
			return nil
		}
		_, err := s.merge(ctx, d)
		return err
	})
}
