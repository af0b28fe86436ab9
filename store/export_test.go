package store

import (
	"context"
	"log/slog"
	"strings"
)

// What the tests of package store_test reach inside for.

// FlushEmbedded empties an embedded store as FLUSHALL would.
func (s *Store) FlushEmbedded() { s.embedded.FlushAll() }

// Snapshot writes one now.
func (s *Store) Snapshot(ctx context.Context) error { return s.snapshot(ctx) }

// Crash ends an embedded store as kill -9 would: nothing is written any more.
func (s *Store) Crash() error {
	s.finish = nil
	s.embedded.Close()
	return s.rdb.Close()
}

// Unlock gives a crashed store's directory free, as its process's end would.
func (s *Store) Unlock() error { return s.unlock() }

// CommitKeeping is Commit with another number of marks of deleted records.
func (s *Store) CommitKeeping(ctx context.Context, t Txn, keepGone int) error {
	args, err := t.encode(keepGone)
	if err != nil {
		return err
	}
	answer, err := s.run(ctx, "commit", commitScript, args...)
	if err != nil {
		return err
	}
	return refusal("commit", answer)
}

// Marks is the number of change marks in the store.
func (s *Store) Marks(ctx context.Context) (int64, error) {
	return s.rdb.ZCard(ctx, s.keys[7]).Result()
}

// Plant puts bytes under a job's key and marks them changed, as foreign software might.
func (s *Store) Plant(ctx context.Context, id, record string) error {
	_, err := s.run(ctx, "plant", restoreScript, "j", id, record)
	return err
}

// ScanLog reads deliveries from a string.
func ScanLog(text string, log *slog.Logger, each func(Delivery) error) error {
	return scanLog(strings.NewReader(text), log, each)
}

// What fuzz tests hold to their inverses.
var (
	EncodeLine     = encodeLine
	DecodeLine     = decodeLine
	DecodeSnapshot = decodeSnapshot
	ParseLedger    = parseLedger
	JoinJob        = joinJob
	SplitJob       = splitJob
	EncodeRanks    = encodeRanks
)

// EmbeddedAddr is where the embedded store listens.
func (s *Store) EmbeddedAddr() string { return s.embedded.Addr() }
