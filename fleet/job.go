package fleet

import (
	"math"
	"time"
)

// JobStatus is GitHub's word for where a job is in its life.
type JobStatus string

// The statuses Paddock keeps. REST also knows "requested" and "pending", which are
// read as waiting: neither may take a runner yet.
const (
	JobWaiting    JobStatus = "waiting"
	JobQueued     JobStatus = "queued"
	JobInProgress JobStatus = "in_progress"
	JobCompleted  JobStatus = "completed"
)

// Job is what Paddock keeps of one GitHub workflow job. Its life is GitHub's: only
// the feeds (webhook, sweep, poll) write it, and only through MergeJob.
type Job struct {
	ID         JobID  `json:"id"`
	RunID      int64  `json:"run_id"`
	RunAttempt int    `json:"run_attempt,omitempty"`
	Repository string `json:"repository"` // "owner/name"
	Public     bool   `json:"public,omitempty"`
	Name       string `json:"name"`
	Workflow   string `json:"workflow,omitempty"`
	Labels     Labels `json:"labels"`

	Status     JobStatus `json:"status"`
	Conclusion string    `json:"conclusion,omitempty"` // of a completed job: success, failure, cancelled, …
	RunnerName string    `json:"runner_name,omitempty"`

	// Gate is when GitHub last moved the job between waiting and queued (a deployment's
	// updated_at, else the time inside the delivery's id), in Unix milliseconds; 0: unknown.
	// A job that runs or has run keeps the one with which it was queued.
	Gate int64 `json:"gate,omitempty"`

	Installation int64     `json:"installation,omitempty"` // GitHub's word, at times wrong: a hint only
	CreatedAt    time.Time `json:"created_at"`
	StartedAt    time.Time `json:"started_at,omitzero"`
	CompletedAt  time.Time `json:"completed_at,omitzero"`

	// SeenAt is when Paddock first heard of the job, and Feed by which way.
	SeenAt time.Time `json:"seen_at,omitzero"`
	Feed   Feed      `json:"feed,omitempty"`
}

// Feed names a way by which news of jobs arrives.
type Feed string

// The feeds. Scale sets and run expansion will be further ones.
const (
	FeedWebhook Feed = "webhook"
	FeedSweep   Feed = "sweep" // the delivery log at GitHub
	FeedPoll    Feed = "poll"  // asked for by id
)

// StatusRank is one row of the lattice of job statuses.
type StatusRank struct {
	// Rank orders statuses; a job never goes down.
	Rank int `json:"rank"`
	// Gated statuses may follow each other in both directions while a deployment gate
	// opens and closes; between two of them the later Gate wins, not the rank.
	Gated bool `json:"gated"`
	// Late says where news with an unknown Gate stands among gated statuses: after all
	// known gates, else before them. An unknown "queued" is believed (at worst a VM waits
	// for nothing), an unknown "waiting" is not (a job would wait for nothing).
	Late bool `json:"late"`
	// Final statuses are never left, and leave a tombstone.
	Final bool `json:"final"`
}

// StatusRanks is the lattice, the one table from which MergeJob below and the store's
// script both work: waiting < queued < in_progress < completed.
var StatusRanks = map[JobStatus]StatusRank{
	JobWaiting:    {Rank: 1, Gated: true},
	JobQueued:     {Rank: 2, Gated: true, Late: true},
	JobInProgress: {Rank: 3},
	JobCompleted:  {Rank: 4, Final: true},
}

// MergeJob joins what is known of a job with news of it, in whatever order news
// arrives and however often. The winner is taken as a whole, with its Gate, except that
// news of a job that runs says nothing of gates; news of the same standing keeps the
// older record. So status and, among gated statuses, Gate
// come out the same for every order. A runner name once set stays until news of a
// higher rank names another; SeenAt and Feed stay those of the first news.
//
// Joined with itself, a job is brought into the form that the store keeps.
func MergeJob(known, news Job) Job {
	known, news = known.normal(), news.normal()
	if !supersedes(known, news) {
		if known.RunnerName == "" {
			known.RunnerName = news.RunnerName
		}
		return known
	}
	merged := news
	if merged.RunnerName == "" {
		merged.RunnerName = known.RunnerName
	}
	if !StatusRanks[news.Status].Gated {
		merged.Gate = known.Gate
	}
	merged.SeenAt, merged.Feed = known.SeenAt, known.Feed
	return merged
}

// normal drops what cannot be: a time before 1970, one that would equal the standing
// of an unknown gate, and the runner of a job that no runner has taken.
func (j Job) normal() Job {
	j.Gate = min(max(j.Gate, 0), math.MaxInt64-1)
	if StatusRanks[j.Status].Gated {
		j.RunnerName = ""
	}
	return j
}

// supersedes reports whether news moves the job.
func supersedes(known, news Job) bool {
	from, to := StatusRanks[known.Status], StatusRanks[news.Status]
	if from.Final {
		return false
	}
	if from.Gated && to.Gated {
		if a, b := standing(known, from), standing(news, to); a != b {
			return b > a
		}
	}
	return to.Rank > from.Rank
}

// standing is the gate that a job counts with among gated statuses.
func standing(j Job, r StatusRank) int64 {
	if j.Gate == 0 && r.Late {
		return math.MaxInt64
	}
	return j.Gate
}
