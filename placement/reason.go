package placement

import (
	"fmt"
	"strings"

	"github.com/paddock-ci/paddock/fleet"
)

// Reason says why a job, or a node for a job, was refused. The word is stable: it is
// shown, counted in metrics and compared in tests.
type Reason string

// Reasons that concern a job.
const (
	ReasonNoPool        Reason = "no-pool"        // no pool has all its labels
	ReasonHosted        Reason = "hosted"         // it does not ask for self-hosted: GitHub's own runners take it
	ReasonNotAllowed    Reason = "not-allowed"    // the pool with its labels is not for its repository
	ReasonPublic        Reason = "public"         // the pool takes no jobs of public repositories
	ReasonUnresolved    Reason = "unresolved"     // the pool's image is not known yet at the registry
	ReasonPoolMax       Reason = "pool-max"       // the pool runs as many VMs as it may
	ReasonRepositoryMax Reason = "repository-max" // the repository runs as many as the pool lets one have
)

// Reasons that concern a node.
const (
	ReasonUnreachable Reason = "unreachable"     // silent for too long
	ReasonCordoned    Reason = "cordoned"        // an operator wants nothing new there
	ReasonSelector    Reason = "selector"        // the pool does not want this node
	ReasonNoSlots     Reason = "no-slots"        // it runs no VMs at all
	ReasonTooSmall    Reason = "too-small"       // fewer cores or less memory than one VM needs
	ReasonFailing     Reason = "failing"         // the pool's VMs failed there; tried again a little later each time
	ReasonDisk        Reason = "disk"            // too little disk left for the image or for clones to grow
	ReasonLeaving     Reason = "leaving"         // the image is there and about to be let go
	ReasonImageSize   Reason = "image-too-large" // the image would not fit on an empty disk
)

// words are the reasons for people.
var words = map[Reason]string{
	ReasonNoPool:        "no pool has all its labels",
	ReasonHosted:        "it does not ask for self-hosted",
	ReasonNotAllowed:    "repository not allowed",
	ReasonPublic:        "public repository",
	ReasonUnresolved:    "the pool's image is not resolved yet",
	ReasonPoolMax:       "the pool is at its maximum",
	ReasonRepositoryMax: "the repository is at its maximum in the pool",
	ReasonUnreachable:   "node unreachable",
	ReasonCordoned:      "node cordoned",
	ReasonSelector:      "not selected by the pool",
	ReasonNoSlots:       "node without slots",
	ReasonTooSmall:      "node too small for the pool's VMs",
	ReasonFailing:       "the pool's VMs failed there, and the next try is not due",
	ReasonDisk:          "too little disk left",
	ReasonLeaving:       "its image is being let go",
	ReasonImageSize:     "image larger than the disk",
}

// Words is the reason as a person reads it.
func (r Reason) Words() string { return words[r] }

// Refusal is why a job got no pool, or why its pool cannot have another VM.
// The zero value means that it was not refused.
type Refusal struct {
	Reason Reason `json:"reason,omitempty"`
	// Pool is the pool that refused, or the nearest one; empty: there is none at all.
	Pool fleet.PoolName `json:"pool,omitempty"`
	// Missing are the job's labels that the nearest pool lacks.
	Missing fleet.Labels `json:"missing,omitempty"`
}

// Refused reports whether there is a reason.
func (r Refusal) Refused() bool { return r.Reason != "" }

// String is one line for people, with the pool and, for a missing label, the label.
func (r Refusal) String() string {
	switch {
	case r.Reason == "":
		return "not refused"
	case r.Pool == "":
		return r.Reason.Words()
	case r.Reason == ReasonNoPool:
		return fmt.Sprintf("%s: nearest is %s, which lacks %s", r.Reason.Words(), r.Pool, strings.Join(r.Missing, ", "))
	default:
		return fmt.Sprintf("%s (pool %s)", r.Reason.Words(), r.Pool)
	}
}
