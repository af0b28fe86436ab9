package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// Ledger is what only people said, and what therefore no node and no GitHub can tell
// again after the store was emptied.
type Ledger struct {
	Version  int64                      `json:"version"`
	Nodes    map[fleet.NodeID]time.Time `json:"nodes,omitempty"`   // joined nodes, and when
	Cordons  map[fleet.NodeID]string    `json:"cordons,omitempty"` // cordoned nodes, and by whom
	Tokens   []TokenRecord              `json:"tokens,omitempty"`
	Joins    []JoinRecord               `json:"joins,omitempty"`
	Revoked  map[string]time.Time       `json:"revoked,omitempty"` // credential id → when it would have expired anyway
	Policies []fleet.Policy             `json:"policies,omitempty"`
}

// TokenRecord is a service token, without the token itself.
type TokenRecord struct {
	ID        string    `json:"id"`
	Name      string    `json:"name"`
	Role      string    `json:"role"`
	CreatedAt time.Time `json:"created_at"`
	ExpiresAt time.Time `json:"expires_at,omitzero"` // zero: never
	CreatedBy string    `json:"created_by,omitempty"`
}

// JoinRecord is a one-time token with which a node may join, known by its hash only.
type JoinRecord struct {
	Hash      string       `json:"hash"` // lower-case hex SHA-256 of the token
	Node      fleet.NodeID `json:"node"`
	ExpiresAt time.Time    `json:"expires_at"`
	UsedAt    time.Time    `json:"used_at,omitzero"` // zero: not yet
}

// ledgerFile is this replica's copy of the ledger, in memory and on disk.
type ledgerFile struct {
	mu   sync.Mutex
	path string // "": memory only
	body []byte // JSON of the last version known here; nil: version 0
	now  int64  // its version
}

// load reads the file, if there is one.
func (l *ledgerFile) load(path string) error {
	l.path = path
	if path == "" {
		return nil
	}
	body, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read the ledger: %w", err)
	}
	ledger, err := parseLedger(body)
	if err != nil {
		return fmt.Errorf("read the ledger %s: %w (restore it from another replica's copy or a backup; without it tokens, cordons and revocations are unknown)", path, err)
	}
	l.body, l.now = body, ledger.Version
	return nil
}

// parseLedger decodes a ledger; nil is the empty one.
func parseLedger(body []byte) (Ledger, error) {
	var l Ledger
	if len(body) == 0 {
		return l, nil
	}
	if err := json.Unmarshal(body, &l); err != nil {
		return Ledger{}, err
	}
	if l.Version < 1 {
		return Ledger{}, fmt.Errorf("version %d: want at least 1", l.Version)
	}
	return l, nil
}

// keep takes a newer version into memory and onto the disk. The caller holds mu.
func (l *ledgerFile) keep(version int64, body []byte) error {
	if version <= l.now {
		return nil
	}
	if l.path != "" {
		if err := writeFile(l.path, body); err != nil {
			return fmt.Errorf("write the ledger: %w", err)
		}
	}
	l.now, l.body = version, body
	return nil
}

// ReadLedger returns the newest ledger that this replica or the store knows; the older
// of the two copies is replaced by the newer one. One round trip.
func (s *Store) ReadLedger(ctx context.Context) (Ledger, error) {
	s.ledger.mu.Lock()
	defer s.ledger.mu.Unlock()
	if err := s.syncLedger(ctx); err != nil {
		return Ledger{}, err
	}
	return parseLedger(s.ledger.body)
}

// syncLedger makes the file and the store agree on the higher version. The caller
// holds mu.
func (s *Store) syncLedger(ctx context.Context) error {
	answer, err := s.run(ctx, "compare ledgers", ledgerScript, s.ledger.now, s.ledger.body, "0")
	if err != nil {
		return err
	}
	if version := number(answer, 0); version > s.ledger.now {
		return s.takeLedger(version, text(answer, 1))
	}
	return nil
}

// takeLedger keeps a version that came from the store.
func (s *Store) takeLedger(version int64, body string) error {
	ledger, err := parseLedger([]byte(body))
	if err != nil || ledger.Version != version {
		return fmt.Errorf("the store's ledger of version %d cannot be read: %w", version, errors.Join(err, errBadLedger))
	}
	return s.ledger.keep(version, []byte(body))
}

var errBadLedger = errors.New("its body is damaged; delete the ledger key in Redis and it is refilled from the file")

// ledgerTries bounds how often a change is tried against other replicas' changes.
const ledgerTries = 16

// UpdateLedger changes the ledger: change gets the newest one and may be called again
// if another replica was faster. It is in the file when this returns.
func (s *Store) UpdateLedger(ctx context.Context, change func(*Ledger) error) (Ledger, error) {
	s.ledger.mu.Lock()
	defer s.ledger.mu.Unlock()
	for range ledgerTries {
		if err := s.syncLedger(ctx); err != nil {
			return Ledger{}, err
		}
		next, err := parseLedger(s.ledger.body)
		if err != nil {
			return Ledger{}, err
		}
		if err := change(&next); err != nil {
			return Ledger{}, err
		}
		next.Version = s.ledger.now + 1
		body, err := json.MarshalIndent(next, "", "\t")
		if err != nil {
			return Ledger{}, fmt.Errorf("encode the ledger: %w", err)
		}
		answer, err := s.run(ctx, "update the ledger", ledgerScript, next.Version, body, "1")
		if err != nil {
			return Ledger{}, err
		}
		if number(answer, 0) != next.Version || text(answer, 1) != "" {
			continue // another replica was faster, or the store was emptied just now
		}
		return next, s.ledger.keep(next.Version, body)
	}
	return Ledger{}, fmt.Errorf("update the ledger: %w: it changed %d times meanwhile", ErrConflict, ledgerTries)
}
