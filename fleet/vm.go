package fleet

import "time"

// VMState is where a virtual machine is in its life. The moves between states are
// one table in package runner.
type VMState string

// The states, in the order of a good life; the last two are final.
const (
	VMPlaced     VMState = "placed"     // the leader wrote it; the node has not begun
	VMBooting    VMState = "booting"    // cloned or cloning, starting, guest not answering
	VMWarm       VMState = "warm"       // guest answers, no runner registered
	VMRegistered VMState = "registered" // the guest runs a runner that waits for a job
	VMBusy       VMState = "busy"       // the runner has a job
	VMDone       VMState = "done"       // torn down by its node
	VMLost       VMState = "lost"       // given up by the leader; destroyed if it shows up
)

// Final states are never left.
func (s VMState) Final() bool { return s == VMDone || s == VMLost }

// VM is one ephemeral virtual machine and the runner in it. The leader places it,
// claims it for a job and loses it; its node does the rest.
type VM struct {
	ID    VMID     `json:"id"`
	Node  NodeID   `json:"node"`
	Pool  PoolName `json:"pool"`
	Image Digest   `json:"image"`
	State VMState  `json:"state"`
	// Reason says in words why the VM is done, lost, retiring or to be destroyed.
	Reason string `json:"reason,omitempty"`
	// Failed: it is done because its node could not boot or serve it.
	Failed bool `json:"failed,omitempty"`
	// Cold: at placing, the image was not yet ready on the node when the job came.
	Cold bool `json:"cold,omitempty"`
	// Tier is how its machine started, and Address the guest's IP address, by its node's
	// word; "" until they are known.
	Tier    StartTier `json:"tier,omitempty"`
	Address string    `json:"address,omitempty"`

	// Job is the job this VM is matched with: provisional until GitHub says
	// in_progress, which names the runner. 0: none.
	Job JobID `json:"job,omitempty"`
	// Claim is the intent to register a runner, written before GitHub is asked.
	Claim *Claim `json:"claim,omitempty"`
	// Attempt counts claims, and so runner names.
	Attempt int `json:"attempt,omitempty"`
	// Retire asks the leader to DELETE the runner at GitHub first and destroy or lose the
	// VM only when GitHub says that it was not busy.
	Retire RetireKind `json:"retire,omitempty"`
	// Destroy asks the node to tear the VM down now.
	Destroy bool `json:"destroy,omitempty"`

	PlacedAt     time.Time `json:"placed_at"`
	BootingAt    time.Time `json:"booting_at,omitzero"`
	WarmAt       time.Time `json:"warm_at,omitzero"`
	RegisteredAt time.Time `json:"registered_at,omitzero"`
	BusyAt       time.Time `json:"busy_at,omitzero"`
	DoneAt       time.Time `json:"done_at,omitzero"`

	// Rev is the record's revision in the store; a write on an older one is refused.
	Rev int64 `json:"-"`
}

// StartTier is how a VM's machine came up.
type StartTier string

// The tiers; a VM that was warm before its job came is faster than both.
const (
	TierSaved StartTier = "saved" // from a state saved on this host
	TierCold  StartTier = "cold"  // clone and boot
)

// RetireKind is what becomes of a VM whose runner GitHub has deleted.
type RetireKind string

// The kinds.
const (
	RetireNone    RetireKind = ""
	RetireDestroy RetireKind = "destroy" // surplus or over its deadline: the node tears it down
	RetireLose    RetireKind = "lose"    // its node is silent for too long: lost
)

// Claim is a runner's registration from intent to acknowledgement.
type Claim struct {
	Scope  Scope  `json:"scope"`
	Group  int64  `json:"group"`
	Labels Labels `json:"labels"`
	Runner string `json:"runner"` // the name at GitHub, from RunnerName
	// RunnerID is GitHub's id, 0 until minted; unique only within the scope.
	RunnerID int64 `json:"runner_id,omitempty"`
	// Epoch is the leader's term that wrote the intent; another term settles it by name.
	Epoch int64     `json:"epoch"`
	At    time.Time `json:"at"`
	// Sealed is the JIT config encrypted with the fleet key, kept until the node
	// acknowledges it, then erased.
	Sealed string `json:"sealed,omitempty"`
	// Started: the node has the JIT config and started the runner.
	Started bool `json:"started,omitempty"`
}
