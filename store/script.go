package store

import (
	"context"
	"crypto/rand"
	_ "embed"
	"fmt"
	"strconv"

	"github.com/redis/go-redis/v9"
)

// keys are the names of all keys, in the order in which prelude.lua reads them. The
// braces make them one slot of a Redis Cluster.
func keys(prefix string) []string {
	names := []string{
		"meta",     // hash: incarnation, born, rev, floor, epoch, leader, until
		"jobs",     // hash: id → record (see merge.lua)
		"vms",      // hash: id → JSON
		"nodes",    // hash: id → JSON
		"images",   // hash: ref → JSON
		"orders",   // hash: node → JSON
		"tombs",    // sorted set: ids of completed jobs by time in ms
		"changes",  // sorted set: kind and id of every record by revision
		"gone",     // sorted set: those of deleted records, until trimmed
		"events",   // list of JSON, newest first
		"sessions", // hash: node → session, sequence, superseded sessions
		"units",    // hash: job → VM whose claim took its unit of demand
		"held",     // hash: VM → job, the inverse of units
		"cursors",  // hash: name → value
		"ledger",   // hash: version, body
		"pending",  // hash: id of a person's session that no node has answered → record (see pend.lua)

		// Of images that are pulled; each has three keys more at each site (see swarm.lua).
		"swarms",    // sorted set: site, image and its number of pieces by the last word on it in ms
		"claimants", // sorted set: site, image and node by the end of its last claim in ms
		"askers",    // sorted set: node by its last word on any of them in ms; one key more for each node
	}
	for i, name := range names {
		names[i] = "{" + prefix + "}:" + name
	}
	return names
}

// Positions in keys of those that Go names, too.
const (
	keyEvents    = 9
	keyLedger    = 14
	keySwarms    = 16
	keyClaimants = 17
	keyAskers    = 18
)

//go:embed lua/prelude.lua
var prelude string

var (
	//go:embed lua/merge.lua
	mergeSource string
	//go:embed lua/commit.lua
	commitSource string
	//go:embed lua/view.lua
	viewSource string
	//go:embed lua/lead.lua
	leadSource string
	//go:embed lua/resign.lua
	resignSource string
	//go:embed lua/sweep.lua
	sweepSource string
	//go:embed lua/cursor.lua
	cursorSource string
	//go:embed lua/setcursor.lua
	setCursorSource string
	//go:embed lua/ledger.lua
	ledgerSource string
	//go:embed lua/waiting.lua
	waitingSource string
	//go:embed lua/pend.lua
	pendSource string
	//go:embed lua/unpend.lua
	unpendSource string
	//go:embed lua/swarm.lua
	swarmSource string
	//go:embed lua/chunks.lua
	chunksSource string
	//go:embed lua/drop.lua
	dropSource string
	//go:embed lua/sweepswarm.lua
	sweepSwarmSource string
	//go:embed lua/snapshot.lua
	snapshotSource string
	//go:embed lua/restore.lua
	restoreSource string
)

// The scripts; Redis keeps them by hash after the first use.
var (
	mergeScript      = redis.NewScript(prelude + mergeSource)
	commitScript     = redis.NewScript(prelude + commitSource)
	viewScript       = redis.NewScript(prelude + viewSource)
	leadScript       = redis.NewScript(prelude + leadSource)
	resignScript     = redis.NewScript(prelude + resignSource)
	sweepScript      = redis.NewScript(prelude + sweepSource)
	cursorScript     = redis.NewScript(prelude + cursorSource)
	setCursorScript  = redis.NewScript(prelude + setCursorSource)
	ledgerScript     = redis.NewScript(prelude + ledgerSource)
	pendScript       = redis.NewScript(prelude + waitingSource + pendSource)
	unpendScript     = redis.NewScript(prelude + waitingSource + unpendSource)
	chunksScript     = redis.NewScript(prelude + swarmSource + chunksSource)
	dropScript       = redis.NewScript(prelude + swarmSource + dropSource)
	sweepSwarmScript = redis.NewScript(prelude + swarmSource + sweepSwarmSource)
	snapshotScript   = redis.NewScript(prelude + snapshotSource)
	restoreScript    = redis.NewScript(prelude + restoreSource)
)

// run calls a script and returns its answer as an array.
func (s *Store) run(ctx context.Context, doing string, script *redis.Script, args ...any) ([]any, error) {
	return s.runOn(ctx, doing, s.keys, script, args...)
}

// runOn is run for a script that has further keys than those of all.
func (s *Store) runOn(ctx context.Context, doing string, keys []string, script *redis.Script, args ...any) ([]any, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	all := append([]any{rand.Text(), s.channel}, args...)
	answer, err := script.Run(ctx, s.rdb, keys, all...).Result()
	if err != nil {
		return nil, s.wrap(ctx, doing, err)
	}
	list, ok := answer.([]any)
	if !ok {
		list = []any{answer}
	}
	return list, nil
}

// text reads element i of an answer as a string; numbers are printed.
func text(answer []any, i int) string {
	if i >= len(answer) {
		return ""
	}
	switch v := answer[i].(type) {
	case string:
		return v
	case int64:
		return strconv.FormatInt(v, 10)
	default:
		return ""
	}
}

// number reads element i of an answer as a whole number, 0 if it is none.
func number(answer []any, i int) int64 {
	n, _ := strconv.ParseInt(text(answer, i), 10, 64)
	return n
}

// refusal turns the {kind, detail} that a script answers into an error, nil if it wrote.
func refusal(doing string, answer []any) error {
	sentinel := map[string]error{"fenced": ErrFenced, "stale": ErrStale, "conflict": ErrConflict, "full": ErrFull}[text(answer, 0)]
	if sentinel == nil {
		return nil
	}
	return fmt.Errorf("%s: %w: %s", doing, sentinel, text(answer, 1))
}
