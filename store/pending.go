package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// Pending is a person's session with a VM that the VM's node has not answered yet. It is
// noted here so that whichever replica holds the node's sync can order it; the session
// itself is the replica's that noted it.
//
// Its deadline is compared with the store's clock by Pend and Unpend, which forget what
// is past it. A View may still show one whose replica has died: the node's answer to it
// is an Unpend.
type Pending struct {
	ID    string       `json:"id"` // random
	Node  fleet.NodeID `json:"node"`
	VM    fleet.VMID   `json:"vm"`
	Kind  string       `json:"kind"`
	Port  int          `json:"port,omitempty"`
	Once  bool         `json:"once,omitempty"` // what there is now, and no more
	Actor string       `json:"actor"`          // who asked for it
}

// PendingLimits bound how many sessions may wait at once.
type PendingLimits struct {
	Node  int // of one node
	Actor int // of one actor
}

// Pend notes a session for as long as life, which must be over a millisecond, and wakes
// its node. It fails with ErrFull at a limit.
func (s *Store) Pend(ctx context.Context, p Pending, life time.Duration, limits PendingLimits) error {
	body, err := json.Marshal(p)
	if err != nil {
		return fmt.Errorf("note a session: %w", err)
	}
	answer, err := s.run(ctx, "note a session", pendScript, p.ID, string(p.Node), url.QueryEscape(p.Actor),
		life.Milliseconds(), limits.Node, limits.Actor, body)
	if err != nil {
		return err
	}
	return refusal("note a session", answer)
}

// Unpend ends a session's waiting and reports whether it still waited: of several calls
// for one session, one gets true. One past its deadline does not wait.
func (s *Store) Unpend(ctx context.Context, id string) (waited bool, err error) {
	answer, err := s.run(ctx, "end a session's waiting", unpendScript, id)
	if err != nil {
		return false, err
	}
	return number(answer, 0) == 1, nil
}

// SweepPending forgets the sessions that are past their deadline.
func (s *Store) SweepPending(ctx context.Context) error {
	_, err := s.Unpend(ctx, "") // forgets them before it looks for one, and none is named so
	return err
}

// splitPending reads a record as pend.lua writes it.
func splitPending(record string) (*Pending, error) {
	parts := strings.SplitN(record, "\n", 4)
	if len(parts) != 4 {
		return nil, errors.New("a pending session has four parts")
	}
	return decode[Pending](parts[3])
}
