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
	// Replaces is the id of the credential that this one, which was not yet used, is to
	// take the place of; "": it does not renew one, or it was used.
	Replaces string `json:"replaces,omitempty"`
}

// JoinRecord is a one-time token with which a node may join, known by its hash only.
type JoinRecord struct {
	Hash      string       `json:"hash"` // lower-case hex SHA-256 of the token
	Node      fleet.NodeID `json:"node"`
	ExpiresAt time.Time    `json:"expires_at"`
	UsedAt    time.Time    `json:"used_at,omitzero"` // zero: not yet
}

// ledgerFile is this replica's copy of the ledger, in memory and on disk.
//
// One gap is known: if Redis is emptied while a replica is cut off that knows a later
// version, changes made meanwhile on an older one lose to the later version when the
// replica comes back.
type ledgerFile struct {
	path string // "": memory only

	updating chan struct{} // holds one token during an UpdateLedger

	mu     sync.Mutex // guards what follows, and the file
	body   []byte     // JSON of the last version known here; nil: version 0
	ledger Ledger     // the same, decoded
	behind bool       // the file could not be written and has an older version
}

// load reads the file, if there is one.
func (l *ledgerFile) load(path string) error {
	l.path, l.updating = path, make(chan struct{}, 1)
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
	if l.ledger, err = parseLedger(body); err != nil {
		return fmt.Errorf("read the ledger %s: %w (restore it from another replica's copy or a backup; without it tokens, cordons and revocations are unknown)", path, err)
	}
	l.body = body
	return nil
}

// newest returns the last version known here, decoded and as bytes.
func (l *ledgerFile) newest() (Ledger, []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.ledger, l.body
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

// keep takes a version into memory and onto the disk, unless a newer one is there. An
// error is the disk's: the version is in force all the same, and retry writes it later.
func (l *ledgerFile) keep(ledger Ledger, body []byte) error {
	return l.put(ledger, body, func() error { return writeFile(l.path, body) })
}

// stage writes a version that is not yet in force beside the file: what cannot be kept
// shall not come into force here. It returns what keeps it, which fails as keep does,
// and what throws it away if it did not come into force.
func (l *ledgerFile) stage(ledger Ledger, body []byte) (keep func() error, drop func(), err error) {
	if l.path == "" {
		return func() error { return l.keep(ledger, body) }, func() {}, nil
	}
	staged, err := stageFile(l.path, body)
	if err != nil {
		return nil, nil, fmt.Errorf("write the ledger: %w", err)
	}
	drop = func() { _ = os.Remove(staged) } // nothing is left to remove once it is put
	return func() error {
		return l.put(ledger, body, func() error { return putFile(staged, l.path) })
	}, drop, nil
}

// put takes a version that write brings onto the disk.
func (l *ledgerFile) put(ledger Ledger, body []byte, write func() error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if ledger.Version <= l.ledger.Version {
		return nil
	}
	l.ledger, l.body, l.behind = ledger, body, false
	if l.path == "" {
		return nil
	}
	if err := write(); err != nil {
		l.behind = true
		return fmt.Errorf("write the ledger: %w", err)
	}
	return nil
}

// retry writes the version in memory if the file is behind.
func (l *ledgerFile) retry() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.behind {
		return nil
	}
	if err := writeFile(l.path, l.body); err != nil {
		return fmt.Errorf("write the ledger: %w", err)
	}
	l.behind = false
	return nil
}

// ReadLedger returns the newest ledger that this replica or the store knows; the older
// of the two copies is replaced by the newer one. It is shared: do not modify it. One
// round trip, and nothing but a version number goes over the wire as long as both
// are equal.
func (s *Store) ReadLedger(ctx context.Context) (Ledger, error) {
	known, body := s.ledger.newest()
	version, found, err := s.compareLedger(ctx, known.Version, nil, false)
	if err == nil && version < known.Version {
		version, found, err = s.compareLedger(ctx, known.Version, body, false)
	}
	if err != nil {
		return Ledger{}, err
	}
	if version > known.Version {
		if err := s.takeLedger(version, found); err != nil {
			return Ledger{}, err
		}
	}
	known, _ = s.ledger.newest()
	return known, nil
}

// compareLedger shows the store a version. It answers the version it has afterwards,
// and the body if that is another one. A body replaces an older version there; if
// exactly is set, only the one just before.
func (s *Store) compareLedger(ctx context.Context, version int64, body []byte, exactly bool) (int64, string, error) {
	answer, err := s.run(ctx, "compare ledgers", ledgerScript, version, body, flag(exactly))
	if err != nil {
		return 0, "", err
	}
	return number(answer, 0), text(answer, 1), nil
}

// takeLedger keeps a version that came from the store.
func (s *Store) takeLedger(version int64, body string) error {
	ledger, err := parseLedger([]byte(body))
	if err == nil && ledger.Version != version {
		err = fmt.Errorf("its body is of version %d", ledger.Version)
	}
	if err != nil {
		return fmt.Errorf("the store's ledger of version %d is damaged: %w (delete the key %s in Redis; it is refilled from the file)", version, err, s.keys[keyLedger])
	}
	s.unkept(s.ledger.keep(ledger, []byte(body)))
	return nil
}

// unkept logs that a version in force is not on the disk: that must lock nobody out,
// and Run tries again.
func (s *Store) unkept(err error) {
	if err != nil {
		s.log.Error("the ledger is in force but not in its file; writing it is tried again", "error", err)
	}
}

// ledgerTries bounds how often a change is tried against other replicas' changes.
const ledgerTries = 16

// UpdateLedger changes the ledger: change gets a copy of the newest one and is called
// again if another replica was faster. The result is in the file when this returns,
// and must not be modified; if the file cannot be written, nothing is changed.
func (s *Store) UpdateLedger(ctx context.Context, change func(*Ledger) error) (Ledger, error) {
	// All in all as long as one call may take, the wait for other changes included.
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	select {
	case s.ledger.updating <- struct{}{}:
		defer func() { <-s.ledger.updating }()
	case <-ctx.Done():
		return Ledger{}, s.wrap(ctx, "update the ledger after another change", ctx.Err())
	}
	for range ledgerTries {
		if _, err := s.ReadLedger(ctx); err != nil {
			return Ledger{}, err
		}
		_, known := s.ledger.newest()
		next, err := parseLedger(known)
		if err != nil {
			return Ledger{}, err
		}
		version := next.Version + 1
		if err := change(&next); err != nil {
			return Ledger{}, err
		}
		next.Version = version
		body, err := json.MarshalIndent(next, "", "\t")
		if err != nil {
			return Ledger{}, fmt.Errorf("encode the ledger: %w", err)
		}
		keep, drop, err := s.ledger.stage(next, body)
		if err != nil {
			return Ledger{}, fmt.Errorf("update the ledger: %w", err)
		}
		defer drop() // a staged file of each try, at most
		now, other, err := s.compareLedger(ctx, version, body, true)
		if err != nil {
			return Ledger{}, err
		}
		if now == version && other == "" {
			s.unkept(keep())
			return next, nil
		}
		// Another replica was faster, or the store was emptied just now.
	}
	return Ledger{}, fmt.Errorf("update the ledger: %w: it changed %d times meanwhile", ErrConflict, ledgerTries)
}
