package store

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/paddock-ci/paddock/fleet"
)

// keepGone is how many deleted records leave a mark for mirrors that have not yet seen
// the deletion, about 100 bytes each; a mirror that is further behind reloads.
const keepGone = 10_000

// Txn is what Commit writes, all or nothing. The zero Txn writes nothing.
type Txn struct {
	// Term fences the write: incarnation and epoch must be the current ones and the
	// lease unexpired, else ErrFenced; nil: not fenced by a term.
	Term *Term
	// Report orders the reports of one node; nil: the write is not a report.
	Report *Report
	// Incarnation, if set, must be the store's, else ErrFenced: for writers without a
	// term that decided on a View.
	Incarnation string

	// VMs, Nodes and Orders are each written only if the stored revision is still the
	// record's Rev (0: there must be none), else ErrConflict.
	VMs    []fleet.VM
	Nodes  []fleet.Node
	Orders []fleet.Orders
	// Images are written by Ref; the last writer wins.
	Images []fleet.Image

	DropVMs   []fleet.VMID
	DropNodes []fleet.NodeID // with their orders
	// DropJobs removes records of completed jobs; their tombstones stay.
	DropJobs []fleet.JobID

	// Queued jobs must still be queued, else ErrConflict. If one of VMs carries a claim
	// for such a job, the claim takes the job's unit of demand: another VM that holds a
	// claim for the same job is an ErrConflict, too.
	Queued []fleet.JobID

	Events []fleet.Event
	// Quiet writes wake nobody: heartbeats.
	Quiet bool
}

// Report names a node's report: Session is random for each start of the agent,
// Sequence counts within it. A report that is not newer than the last one taken, or of
// a session that another one superseded, is refused with ErrStale.
type Report struct {
	Node     fleet.NodeID
	Session  string
	Sequence int64
}

// Commit checks and writes a transaction in one script. Its errors are ErrFenced,
// ErrStale, ErrConflict (nothing was written) and ErrDown, after which it is unknown
// whether it was written: read a View before deciding again.
func (s *Store) Commit(ctx context.Context, t Txn) error {
	args, err := t.encode(keepGone)
	if err != nil {
		return fmt.Errorf("commit: %w", err)
	}
	answer, err := s.run(ctx, "commit", commitScript, args...)
	if err != nil {
		return err
	}
	return refusal("commit", answer)
}

// encode lays a transaction out in the order in which commit.lua takes it.
func (t *Txn) encode(keepGone int) ([]any, error) {
	args := []any{keepEvents, keepGone, t.message(), flag(t.Quiet)}
	if t.Term != nil {
		args = append(args, "1", t.Term.Incarnation, t.Term.Epoch)
	} else {
		args = append(args, "0", t.Incarnation, 0)
	}
	if r := t.Report; r != nil {
		args = append(args, string(r.Node), url.QueryEscape(r.Session), r.Sequence)
	} else {
		args = append(args, "", "", 0)
	}
	args = append(args, len(t.Queued))
	for _, id := range t.Queued {
		args = append(args, jobKey(id))
	}
	puts, err := t.puts()
	if err != nil {
		return nil, err
	}
	args = append(args, len(puts)/5)
	args = append(args, puts...)
	args = append(args, len(t.DropVMs)+len(t.DropNodes)+len(t.DropJobs))
	for _, id := range t.DropVMs {
		args = append(args, "v", string(id))
	}
	for _, id := range t.DropNodes {
		args = append(args, "n", string(id))
	}
	for _, id := range t.DropJobs {
		args = append(args, "j", jobKey(id))
	}
	args = append(args, len(t.Events))
	for _, e := range t.Events {
		line, err := json.Marshal(e)
		if err != nil {
			return nil, fmt.Errorf("encode event: %w", err)
		}
		args = append(args, line)
	}
	return args, nil
}

// puts is the records to write, five arguments each: kind, id, revision, unit, JSON.
func (t *Txn) puts() ([]any, error) {
	var args []any
	var failed error
	put := func(kind, id string, rev any, unit string, record any) {
		line, err := json.Marshal(record)
		if err != nil && failed == nil {
			failed = fmt.Errorf("encode %s: %w", id, err)
		}
		args = append(args, kind, id, rev, unit, line)
	}
	for i := range t.VMs {
		put("v", string(t.VMs[i].ID), t.VMs[i].Rev, unit(&t.VMs[i]), &t.VMs[i])
	}
	for i := range t.Nodes {
		put("n", string(t.Nodes[i].ID), t.Nodes[i].Rev, "", &t.Nodes[i])
	}
	for i := range t.Orders {
		put("o", string(t.Orders[i].Node), t.Orders[i].Rev, "", &t.Orders[i])
	}
	for i := range t.Images {
		put("i", t.Images[i].Ref, "", "", &t.Images[i])
	}
	return args, failed
}

// unit is the job whose unit of demand a VM holds: the one it is claimed for.
func unit(vm *fleet.VM) string {
	if vm.Claim == nil || vm.Job == 0 || vm.State.Final() {
		return ""
	}
	return jobKey(vm.Job)
}

// message names the topics to wake besides Anything. A node that reports is not woken
// by its own report: it gets the answer.
func (t *Txn) message() string {
	var topics []string
	add := func(n fleet.NodeID) {
		if t.Report == nil || t.Report.Node != n {
			topics = append(topics, string(NodeTopic(n)))
		}
	}
	for i := range t.VMs {
		add(t.VMs[i].Node)
	}
	for i := range t.Nodes {
		add(t.Nodes[i].ID)
	}
	for i := range t.Orders {
		add(t.Orders[i].Node)
	}
	for _, n := range t.DropNodes {
		add(n)
	}
	slices.Sort(topics)
	return strings.Join(slices.Compact(topics), " ")
}

func jobKey(id fleet.JobID) string { return strconv.FormatInt(int64(id), 10) }

func flag(set bool) string {
	if set {
		return "1"
	}
	return "0"
}
