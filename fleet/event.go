package fleet

import "time"

// Event is one thing that happened, kept for people: the history of a job, a runner or
// a node, and with an Actor the audit trail. Events are capped and lost with the store;
// no decision rests on them.
type Event struct {
	At    time.Time `json:"at"`
	Kind  string    `json:"kind"` // job.queued, vm.placed, vm.done, node.unreachable, token.created, …
	Job   JobID     `json:"job,omitempty"`
	VM    VMID      `json:"vm,omitempty"`
	Node  NodeID    `json:"node,omitempty"`
	Image Digest    `json:"image,omitempty"`
	Actor string    `json:"actor,omitempty"` // who changed it: a token's name, a node, "leader", "github"
	Text  string    `json:"text,omitempty"`  // for people; never a secret
}
