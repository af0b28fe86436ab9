package api

import (
	"time"

	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/placement"
)

// NodeStatus is a node's state in a word.
type NodeStatus string

// The statuses. A cordoned node that is silent is unreachable first of all.
const (
	NodeReady       NodeStatus = "ready"
	NodeCordoned    NodeStatus = "cordoned"
	NodeUnreachable NodeStatus = "unreachable" // silent for 45 s
)

// NodeRow is a node in a list. Sizes are in bytes, rates in bytes per second.
type NodeRow struct {
	ID       fleet.NodeID      `json:"id"`
	Status   NodeStatus        `json:"status"`
	Tags     map[string]string `json:"tags,omitempty"`
	Arch     string            `json:"arch"`
	OS       string            `json:"os"`
	Driver   string            `json:"driver"`
	Version  string            `json:"version"`
	Slots    int               `json:"slots"`
	Used     int               `json:"used"` // slots that a live VM has
	CPU      int               `json:"cpu"`
	Memory   int64             `json:"memory"`
	DiskFree int64             `json:"disk_free"`
	PullRate int64             `json:"pull_rate,omitempty"`
	Images   int               `json:"images"` // ready ones
	Site     string            `json:"site,omitempty"`
	Peer     string            `json:"peer,omitempty"` // host:port for other nodes of the site; "": it serves none
	JoinedAt time.Time         `json:"joined_at,omitzero"`
	SeenAt   time.Time         `json:"seen_at,omitzero"`
}

// VMRow is a VM in a list.
type VMRow struct {
	ID      fleet.VMID     `json:"id"`
	Node    fleet.NodeID   `json:"node"`
	Pool    fleet.PoolName `json:"pool"`
	State   fleet.VMState  `json:"state"`
	Since   time.Time      `json:"since,omitzero"` // when it came into this state
	Image   fleet.Digest   `json:"image"`
	Cold    bool           `json:"cold,omitempty"`
	Job     fleet.JobID    `json:"job,omitempty"`
	JobName string         `json:"job_name,omitempty"` // "owner/repository: job"
	Runner  string         `json:"runner,omitempty"`
	Reason  string         `json:"reason,omitempty"`
	// Tier is how the machine started: saved or cold; Address is the guest's.
	Tier    fleet.StartTier `json:"tier,omitempty"`
	Address string          `json:"address,omitempty"`
	// Ending: it is being retired or destroyed.
	Ending bool `json:"ending,omitempty"`

	PlacedAt     time.Time `json:"placed_at"`
	BootingAt    time.Time `json:"booting_at,omitzero"`
	WarmAt       time.Time `json:"warm_at,omitzero"`
	RegisteredAt time.Time `json:"registered_at,omitzero"`
	BusyAt       time.Time `json:"busy_at,omitzero"`
	DoneAt       time.Time `json:"done_at,omitzero"`
}

// ImageRow is one image (one digest under one name) in a list, over all nodes.
type ImageRow struct {
	Name   string       `json:"name"`          // host/repository
	Tag    string       `json:"tag,omitempty"` // as it was ordered; "" if by digest
	Digest fleet.Digest `json:"digest"`
	// SpaceUsed is what it occupies on all nodes together, in bytes.
	SpaceUsed int64 `json:"space_used"`
	// NodesCount counts the nodes on which it is ready.
	NodesCount int           `json:"nodes_count"`
	Nodes      []ImageOnNode `json:"nodes"` // sorted by node
	// Bytes is one full pull, 0 if the tag was not resolved here.
	Bytes int64 `json:"bytes,omitempty"`
	// Current: the tag means this digest now.
	Current bool `json:"current"`
}

// ImageOnNode is a node's word on an image.
type ImageOnNode struct {
	Node fleet.NodeID `json:"node"`
	fleet.NodeImage
}

// JobRow is a job in a list, with the VM that serves or served it, if it is known.
type JobRow struct {
	fleet.Job
	Pool fleet.PoolName `json:"pool,omitempty"`
	VM   fleet.VMID     `json:"vm,omitempty"`
	Node fleet.NodeID   `json:"node,omitempty"`
	// Start is "warm" or "cold" (it waited for its image) once a VM is there.
	Start string `json:"start,omitempty"`
	// Phases split the start; nil until the VM is busy with it.
	Phases *Phases `json:"phases,omitempty"`
}

// Phases are the parts of a job's start delay, in nanoseconds; they add up to the time
// from its being queued to its runner being busy.
type Phases struct {
	// Queue is the wait for a slot, or Pull for the image: placement binds a job when
	// both are there, so the wait until then is booked on the one that was missing.
	Queue time.Duration `json:"queue"`
	Pull  time.Duration `json:"pull"`
	// Boot is from placing to the guest's answer, 0 if the VM was warm already.
	Boot time.Duration `json:"boot"`
	// Register is from there to the runner having the job.
	Register time.Duration `json:"register"`
}

// Total is the whole start delay.
func (p Phases) Total() time.Duration { return p.Queue + p.Pull + p.Boot + p.Register }

// Explanation says why a job waits, or what serves it.
type Explanation = placement.Explanation

// Event is one thing that happened; see fleet.Event.
type Event = fleet.Event

// EventFilter picks events; zero fields pick all.
type EventFilter struct {
	Job   fleet.JobID
	VM    fleet.VMID
	Node  fleet.NodeID
	Limit int // 0: 100; at most 1,000
}

// TokenRow is a token in a list: never the token itself.
type TokenRow struct {
	ID        string    `json:"id"`
	Name      string    `json:"name"` // who it speaks for; a node's id for role node
	Role      string    `json:"role"`
	CreatedAt time.Time `json:"created_at"`
	ExpiresAt time.Time `json:"expires_at"`
	CreatedBy string    `json:"created_by,omitempty"`
}

// TokenRequest asks for a token: a service token with Name and Role, or a one-time
// join token with Node alone.
type TokenRequest struct {
	Name string        `json:"name,omitempty"`
	Role string        `json:"role,omitempty"` // viewer, operator, admin or pipeline
	Life time.Duration `json:"life,omitempty"` // 0: 90 days; at most a year
	Node fleet.NodeID  `json:"node,omitempty"`
}

// TokenReply shows a new token, once.
type TokenReply struct {
	TokenRow
	Token string `json:"token"` // secret
}

// JoinRequest makes a node of whoever has a join token.
type JoinRequest struct {
	Token string `json:"token"` // secret
}

// JoinReply is a node's credential.
type JoinReply struct {
	Node       fleet.NodeID `json:"node"`
	Credential string       `json:"credential"` // secret
	ExpiresAt  time.Time    `json:"expires_at"`
	Fleet      string       `json:"fleet"`
}
