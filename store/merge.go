package store

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// keepEvents is how many events are kept, about 2 MB of them.
const keepEvents = 10_000

// Delivery is one piece of news about a job.
type Delivery struct {
	ID  string    `json:"id,omitempty"` // the delivery's GUID; "" for polls
	At  time.Time `json:"at"`           // when Paddock got it
	Job fleet.Job `json:"job"`
}

// Merged says what became of a delivery.
type Merged struct {
	Was, Now fleet.JobStatus // Was is "" for a job that was not known
	Changed  bool            // the record is another one now
	Ghost    bool            // late news of a job that ended and was dropped; ignored
}

// MergeJob joins news into its job's record: one script and one round trip, whatever
// the number of jobs. It may be repeated, doubled and reordered at will. The embedded
// store has the delivery on disk before this returns without an error.
func (s *Store) MergeJob(ctx context.Context, d Delivery) (Merged, error) {
	if err := checkDelivery(&d); err != nil {
		return Merged{}, err
	}
	if s.deliveries == nil {
		return s.merge(ctx, d)
	}
	release, err := s.deliveries.append(d)
	if err != nil {
		return Merged{}, fmt.Errorf("keep delivery of job %d: %w: %w", d.Job.ID, ErrDown, err)
	}
	defer release()
	return s.merge(ctx, d)
}

// checkDelivery refuses what the lattice has no place for and brings the rest into
// normal form.
func checkDelivery(d *Delivery) error {
	if d.Job.ID <= 0 {
		return fmt.Errorf("merge job %d: the id must be positive", d.Job.ID)
	}
	if _, known := fleet.StatusRanks[d.Job.Status]; !known {
		return fmt.Errorf("merge job %d: unknown status %q", d.Job.ID, d.Job.Status)
	}
	d.Job = fleet.MergeJob(d.Job, d.Job)
	if d.Job.SeenAt.IsZero() {
		d.Job.SeenAt = d.At
	}
	return nil
}

// merge runs the script; the delivery is in normal form.
func (s *Store) merge(ctx context.Context, d Delivery) (Merged, error) {
	head, body, err := splitJob(d.Job)
	if err != nil {
		return Merged{}, err
	}
	event, err := json.Marshal(fleet.Event{
		At: d.At, Kind: "job." + string(d.Job.Status), Job: d.Job.ID, Actor: "github",
		Text: strings.TrimSpace(string(d.Job.Feed) + " " + d.ID),
	})
	if err != nil {
		return Merged{}, fmt.Errorf("encode event of job %d: %w", d.Job.ID, err)
	}
	id := strconv.FormatInt(int64(d.Job.ID), 10)
	answer, err := s.run(ctx, "merge job "+id, mergeScript,
		rankTable, id, event, keepEvents, head[0], head[1], head[2], head[3], head[4], body)
	if err != nil {
		return Merged{}, err
	}
	return Merged{
		Was: fleet.JobStatus(text(answer, 0)), Now: fleet.JobStatus(text(answer, 1)),
		Changed: number(answer, 2) == 1, Ghost: number(answer, 3) == 1,
	}, nil
}

// rankTable is fleet.StatusRanks as the merge script reads it, such as
// " completed=4f in_progress=3 queued=2gl waiting=1g".
var rankTable = encodeRanks(fleet.StatusRanks)

func encodeRanks(ranks map[fleet.JobStatus]fleet.StatusRank) string {
	var rows []string
	for status, r := range ranks {
		row := fmt.Sprintf(" %s=%d", status, r.Rank)
		for flag, set := range map[string]bool{"g": r.Gated, "f": r.Final, "l": r.Late} {
			if set {
				row += flag
			}
		}
		rows = append(rows, row)
	}
	slices.Sort(rows)
	return strings.Join(rows, "")
}

// splitJob parts a job into the five fields that merging looks at and the JSON of the
// rest: status, gate, runner, seen (RFC 3339), feed, escaped so that none of them can
// hold a separator.
func splitJob(j fleet.Job) (head [5]string, body []byte, err error) {
	seen := ""
	if !j.SeenAt.IsZero() {
		seen = j.SeenAt.UTC().Format(time.RFC3339Nano)
	}
	head = [5]string{
		string(j.Status), strconv.FormatInt(j.Gate, 10), url.QueryEscape(j.RunnerName), seen, url.QueryEscape(string(j.Feed)),
	}
	j.Status, j.Gate, j.RunnerName, j.SeenAt, j.Feed = "", 0, "", time.Time{}, ""
	if body, err = json.Marshal(j); err != nil {
		return head, nil, fmt.Errorf("encode job %d: %w", j.ID, err)
	}
	return head, body, nil
}

// joinJob is the inverse of splitJob on a record as the script stores it.
func joinJob(record string) (*fleet.Job, error) {
	line, body, found := strings.Cut(record, "\n")
	head := strings.Split(line, "|")
	if !found || len(head) != 5 {
		return nil, fmt.Errorf("decode job: head line has %d fields, want 5", len(head))
	}
	j := new(fleet.Job)
	if err := json.Unmarshal([]byte(body), j); err != nil {
		return nil, fmt.Errorf("decode job: %w", err)
	}
	gate, err := strconv.ParseInt(head[1], 10, 64)
	if err != nil || gate < 0 {
		return nil, fmt.Errorf("decode job %d: gate %q", j.ID, head[1])
	}
	runner, err := url.QueryUnescape(head[2])
	if err != nil {
		return nil, fmt.Errorf("decode job %d: runner: %w", j.ID, err)
	}
	feed, err := url.QueryUnescape(head[4])
	if err != nil {
		return nil, fmt.Errorf("decode job %d: feed: %w", j.ID, err)
	}
	if head[3] != "" {
		if j.SeenAt, err = time.Parse(time.RFC3339Nano, head[3]); err != nil {
			return nil, fmt.Errorf("decode job %d: seen: %w", j.ID, err)
		}
	}
	j.Status, j.Gate, j.RunnerName, j.Feed = fleet.JobStatus(head[0]), gate, runner, fleet.Feed(feed)
	return j, nil
}
