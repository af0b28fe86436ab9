package store

import (
	"context"
	"encoding/json"

	"github.com/paddock-ci/paddock/fleet"
)

// EventFilter picks events; zero fields pick all.
type EventFilter struct {
	Job   fleet.JobID
	VM    fleet.VMID
	Node  fleet.NodeID
	Limit int // 0: 100
}

func (f *EventFilter) matches(e *fleet.Event) bool {
	return (f.Job == 0 || f.Job == e.Job) && (f.VM == "" || f.VM == e.VM) && (f.Node == "" || f.Node == e.Node)
}

// Events returns the newest events that the filter picks, newest first. The last
// 10,000 are kept; an emptied store has none.
func (s *Store) Events(ctx context.Context, f EventFilter) ([]fleet.Event, error) {
	limit := f.Limit
	if limit <= 0 {
		limit = 100
	}
	last := int64(-1)
	if f == (EventFilter{Limit: f.Limit}) {
		last = int64(limit) - 1
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	lines, err := s.rdb.LRange(ctx, s.keys[keyEvents], 0, last).Result()
	if err != nil {
		return nil, s.wrap(ctx, "read events", err)
	}
	var events []fleet.Event
	for _, line := range lines {
		var e fleet.Event
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			s.log.Warn("an event in the store cannot be read", "error", err)
			continue
		}
		if f.matches(&e) {
			if events = append(events, e); len(events) == limit {
				break
			}
		}
	}
	return events, nil
}
