package api

import (
	"time"

	"github.com/paddock-ci/paddock/fleet"
)

// Protocol is the version of the sync exchange; a controller refuses others by 426.
const Protocol = 1

// SyncRequest is a node's whole word about itself: what it is, what it holds and what
// lives on it. It is always complete (a few kilobytes), so there is no delta to lose
// and no special first message. (Session, Sequence) orders requests; an older one is
// ignored. Everything in it is applied in one script before the reply is written.
type SyncRequest struct {
	Protocol int    `json:"protocol"`
	Session  string `json:"session"`  // random, new at each start of the agent
	Sequence int64  `json:"sequence"` // counts up within the session, from 1

	// Node carries all fields of fleet.Node that the node knows; ID, Cordoned and the
	// times are the controller's and ignored.
	Node fleet.Node `json:"node"`
	// VMs is the journal: every VM that the node has or had and that no reply has
	// acknowledged as done yet.
	VMs []VMReport `json:"vms"`

	// Have is the Revision of the reply that the node last applied. The controller
	// parks the call while its orders are still that revision, at most Wait.
	Have string `json:"have,omitempty"`
	// Wait is how long the call may be parked; 0: answer at once. At most 20 s.
	Wait time.Duration `json:"wait,omitempty"`
}

// VMReport is a node's word on one of its VMs. Its state moves only forward.
type VMReport struct {
	ID    fleet.VMID    `json:"id"`
	State fleet.VMState `json:"state"` // booting, warm, registered, busy or done
	// Order is enough of the order to make the record again after the store was emptied.
	Order VMOrder `json:"order"`
	// Runner is the name of the runner whose JIT config the node has; once it is
	// reported, the controller erases the config.
	Runner *RunnerReport `json:"runner,omitempty"`
	// Reason says why it is done: "runner exited 0", "boot: …", "destroyed: …".
	Reason string `json:"reason,omitempty"`
	// Failed: it is done because this node could not boot or serve it.
	Failed bool `json:"failed,omitempty"`
	// Tier is how the machine started; Address is the guest's, without a port.
	Tier    fleet.StartTier `json:"tier,omitempty"`
	Address string          `json:"address,omitempty"`

	BootingAt    time.Time `json:"booting_at,omitzero"`
	WarmAt       time.Time `json:"warm_at,omitzero"`
	RegisteredAt time.Time `json:"registered_at,omitzero"`
	BusyAt       time.Time `json:"busy_at,omitzero"`
	DoneAt       time.Time `json:"done_at,omitzero"`
}

// RunnerReport is what a node knows of the runner in a VM: enough to find it at
// GitHub after the store was emptied. The JIT config is never in it.
type RunnerReport struct {
	Name     string       `json:"name"`
	RunnerID int64        `json:"runner_id"`
	Scope    fleet.Scope  `json:"scope"`
	Group    int64        `json:"group"`
	Labels   fleet.Labels `json:"labels"`
	Attempt  int          `json:"attempt"`
	Job      fleet.JobID  `json:"job,omitempty"`
}

// SyncReply is the controller's whole will for one node; the node does what is new in
// it and nothing by omission: what a reply no longer names goes on as it was.
type SyncReply struct {
	// Revision names these orders; see SyncRequest.Have.
	Revision string `json:"revision"`
	// Incarnation changes when the store was found empty.
	Incarnation string `json:"incarnation"`
	// Applied is the Sequence that is now applied: VMs reported done in it may leave
	// the journal.
	Applied int64 `json:"applied"`

	Hold    []fleet.Hold   `json:"hold,omitempty"`    // images to have, most urgent first
	Run     []VMOrder      `json:"run,omitempty"`     // VMs to bring up
	Start   []RunnerOrder  `json:"start,omitempty"`   // runners to start in warm VMs
	Destroy []DestroyOrder `json:"destroy,omitempty"` // VMs to tear down now
	Evict   []fleet.Digest `json:"evict,omitempty"`   // images that may go

	// Logins are for the pools with the ssh bootstrap that have VMs here. They are held in
	// memory only, and stand in no journal.
	Logins []PoolLogin `json:"logins,omitempty"`
	// Sessions are people who wait to be connected to a VM here.
	Sessions []SessionOrder `json:"sessions,omitempty"`

	// PeerKey checks the tokens that other nodes show at this node's peer port: base64 of
	// an Ed25519 public key.
	PeerKey string `json:"peer_key,omitempty"`
	// Bandwidth is this node's share of what the fleet may move from outside, in bytes per
	// second; 0: no limit.
	Bandwidth int64 `json:"bandwidth,omitempty"`

	// Credential is a renewed one, to be kept instead of the node's own; mostly empty. Its
	// first use ends the old one.
	Credential string `json:"credential,omitempty"`
}

// VMOrder asks a node to bring up one VM.
type VMOrder struct {
	ID        fleet.VMID        `json:"id"`
	Pool      fleet.PoolName    `json:"pool"`
	Image     fleet.Digest      `json:"image"`
	Ref       string            `json:"ref"`
	CPU       int               `json:"cpu,omitempty"`
	Memory    int64             `json:"memory,omitempty"`
	Disk      int64             `json:"disk,omitempty"`
	Growth    int64             `json:"growth,omitempty"` // bytes a clone may write; 0: 40 GB
	Mounts    []fleet.Mount     `json:"mounts,omitempty"`
	Env       map[string]string `json:"env,omitempty"`
	Bootstrap fleet.Bootstrap   `json:"bootstrap"`
	Runner    []string          `json:"runner,omitempty"`
	Deadlines fleet.Deadlines   `json:"deadlines"`
	PlacedAt  time.Time         `json:"placed_at"`
	Job       fleet.JobID       `json:"job,omitempty"` // what it was placed for; a hint
}

// RunnerOrder hands a JIT config to a warm VM, once; it is repeated until the node
// reports the runner.
type RunnerOrder struct {
	VM     fleet.VMID   `json:"vm"`
	Runner RunnerReport `json:"runner"`
	JIT    string       `json:"jit"` // secret: base64 as GitHub gave it
	// Archives are GitHub's runner applications, one of which fits the guest; none if the
	// pool names a command of its own, or GitHub's list could not be read.
	Archives []fleet.Archive `json:"archives,omitempty"`
}

// PoolLogin is how the ssh bootstrap logs into the VMs of a pool.
type PoolLogin struct {
	Pool     fleet.PoolName `json:"pool"`
	User     string         `json:"user"`
	Password string         `json:"password,omitempty"` // secret
	Key      string         `json:"key,omitempty"`      // secret
}

// SessionKind is what a person wants of a VM.
type SessionKind string

// The kinds.
const (
	SessionPort    SessionKind = "port"    // a stream to a TCP port of the guest
	SessionConsole SessionKind = "console" // what the machine prints, from its beginning, followed
	SessionLogs    SessionKind = "logs"    // what the runner prints, from what is kept of it, followed
)

// SessionOrder asks a node to connect one of its VMs with somebody: it calls
// RouteNodeSession with the id, which becomes a raw stream (HTTP Upgrade).
type SessionOrder struct {
	ID   string      `json:"id"` // random
	VM   fleet.VMID  `json:"vm"`
	Kind SessionKind `json:"kind"`
	Port int         `json:"port,omitempty"` // of SessionPort
	// Once: console and logs end with what there is now, instead of being followed.
	Once bool `json:"once,omitempty"`
}

// DestroyOrder names a VM to tear down.
type DestroyOrder struct {
	VM     fleet.VMID `json:"vm"`
	Reason string     `json:"reason"`
}
