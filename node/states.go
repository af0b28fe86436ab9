package node

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/fleet"
)

const (
	// stateMark is the file of a state that is written last: without it, it is none.
	stateMark = "seat.json" // a driver may have a state.json of its own there
	// stateFormat is part of every key, so that a new meaning of states meets no old one.
	stateFormat = 1
	// stateAge is how long a state is kept that no VM starts from: one that nobody asks
	// for any more (a pool's memory was changed) has the size of a machine's memory.
	stateAge = 7 * 24 * time.Hour
	// stateTries is how often, in one life of the agent, states of a key may fail before
	// its VMs boot cold for good: a start that fails costs more than it can gain.
	stateTries = 3
	// maxSeat bounds a seat's number as it is read from outside.
	maxSeat = 1000
)

// seat names one saved state of an image. What a machine was saved with (its MAC address,
// its machine identifier) it has again when it is started from, so two machines from one
// state, or one from it and the one that was saved, would collide on the network and at
// Apple's services: a seat belongs to one living VM at most, and there are as many seats
// as VMs at once.
type seat struct {
	Image  fleet.Digest `json:"image"`
	Key    string       `json:"key"` // of all that a state must have in common with a VM
	Number int          `json:"number"`
}

var keyPattern = regexp.MustCompile(`^[0-9a-f]{16}$`)

// check refuses a seat that would lead out of the states' directory.
func (s seat) check() error {
	if err := fleet.CheckDigest(s.Image); err != nil {
		return fmt.Errorf("seat of a saved state: %w", err)
	}
	if !keyPattern.MatchString(s.Key) || s.Number < 0 || s.Number > maxSeat {
		return fmt.Errorf("seat of a saved state: %q, number %d", s.Key, s.Number)
	}
	return nil
}

func (s seat) String() string { return s.Key + "-" + strconv.Itoa(s.Number) }

// stateKey changes with all that a machine must have in common with a state to start
// from it. A driver has its own conditions besides (vm.ErrState).
func stateKey(o api.VMOrder, driver string) (string, error) {
	data, err := json.Marshal(struct {
		Format      int
		Driver      string
		Image       fleet.Digest
		CPU         int
		Memory, Got int64
		Mounts      []fleet.Mount
	}{stateFormat, driver, o.Image, o.CPU, o.Memory, o.Disk, o.Mounts})
	if err != nil {
		return "", fmt.Errorf("the key of a saved state: %w", err)
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:8]), nil
}

// mark is what stateMark holds.
type mark struct {
	Format int              `json:"format"`
	Seat   seat             `json:"seat"`
	Files  map[string]int64 `json:"files"` // their sizes in bytes
}

// states knows the saved states of this host, and which VM has which seat. Files are
// removed without its lock, under a seat that nobody can take meanwhile.
type states struct {
	dir   string
	seats int
	now   func() time.Time
	log   *slog.Logger

	mu     sync.Mutex
	ready  map[seat]bool
	taken  map[seat]fleet.VMID // "": its files are being removed
	failed map[string]int      // by key; stateTries: no more of it
	barred bool                // a machine of nobody's runs here, of which state is unknown
}

func newStates(dir string, seats int, now func() time.Time, log *slog.Logger) *states {
	return &states{
		dir: dir, seats: seats, now: now, log: log,
		ready: map[seat]bool{}, taken: map[seat]fleet.VMID{}, failed: map[string]int{},
	}
}

func (s *states) path(p seat) string {
	return filepath.Join(s.dir, strings.TrimPrefix(string(p.Image), "sha256:"), p.String())
}

// take gives a VM a seat: one with a state to start from, else, if save allows it, one
// without, to save the first. ok is false if there is neither.
func (s *states) take(id fleet.VMID, image fleet.Digest, key string, save bool) (p seat, saved, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.barred || s.failed[key] >= stateTries {
		return seat{}, false, false
	}
	empty := -1
	for n := range s.seats {
		p := seat{Image: image, Key: key, Number: n}
		switch _, taken := s.taken[p]; {
		case taken:
		case s.ready[p]:
			s.taken[p] = id
			return p, true, true
		case empty < 0:
			empty = n
		}
	}
	if empty < 0 || !save {
		return seat{}, false, false
	}
	p = seat{Image: image, Key: key, Number: empty}
	s.taken[p] = id
	return p, false, true
}

// hold gives a VM of the journal the seat that it had; saved says whether it has a state.
func (s *states) hold(id fleet.VMID, p seat) (saved bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.taken[p] = id
	return s.ready[p]
}

// bar ends the use of states until the next start.
func (s *states) bar() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.barred = true
}

// release frees a VM's seat once nothing of its machine is left.
func (s *states) release(id fleet.VMID, p seat) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.taken[p] == id {
		delete(s.taken, p)
	}
}

// used notes that a VM came up from a state, for prune.
func (s *states) used(p seat) {
	now := s.now()
	if err := os.Chtimes(filepath.Join(s.path(p), stateMark), now, now); err != nil {
		s.log.Debug("the use of a saved state was not noted", "image", p.Image.Short(), "error", err)
	}
}

// fail counts against a key; final ends the use of it at once.
func (s *states) fail(p seat, final bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failed[p.Key]++
	if final {
		s.failed[p.Key] = stateTries
	}
}

// free counts the states of each image that a VM could start from now.
func (s *states) free() map[fleet.Digest]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	count := map[fleet.Digest]int{}
	if s.barred {
		return count
	}
	for p := range s.ready {
		if _, taken := s.taken[p]; !taken && s.failed[p.Key] < stateTries {
			count[p.Image]++
		}
	}
	return count
}

// begin makes the empty directory of a seat whose VM is about to be saved.
func (s *states) begin(p seat) (string, error) {
	dir := s.path(p)
	if err := removeTree(dir); err != nil {
		return "", fmt.Errorf("making room for a saved state: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil { // a memory is nobody else's to read
		return "", fmt.Errorf("making a saved state's directory: %w", err)
	}
	return dir, nil
}

// finish makes a saved state one to start from, once all of it is on disk.
func (s *states) finish(p seat) error {
	dir := s.path(p)
	m := mark{Format: stateFormat, Seat: p, Files: map[string]int64{}}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		m.Files[name], err = syncFile(path)
		return err
	})
	if err != nil {
		return fmt.Errorf("bringing a saved state to disk: %w", err)
	}
	data, err := json.Marshal(m)
	if err != nil {
		return fmt.Errorf("marking a saved state: %w", err)
	}
	if err := errors.Join(syncDir(dir), writeSynced(filepath.Join(dir, stateMark), data), syncDir(dir), syncDir(filepath.Dir(dir))); err != nil {
		return fmt.Errorf("marking a saved state: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ready[p] = true
	return nil
}

// syncFile brings a file to disk and returns its size in bytes.
func syncFile(path string) (size int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), f.Sync()
}

// drop removes the state of a seat that the caller's VM has; the seat stays taken.
func (s *states) drop(p seat) {
	s.mu.Lock()
	delete(s.ready, p)
	s.mu.Unlock()
	s.remove(s.path(p))
}

// remove takes the mark away first, so that a crash in between leaves no state. What
// cannot be removed goes when the seat is used again, or at the next start.
func (s *states) remove(dir string) {
	if err := errors.Join(removeIfThere(filepath.Join(dir, stateMark)), removeTree(dir)); err != nil {
		s.log.Warn("a saved state was not removed", "error", err)
	}
}
