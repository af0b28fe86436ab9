package fleet

import "time"

// Node is a Mac (or a Linux host) that runs VMs, as it last reported itself.
type Node struct {
	ID      NodeID            `json:"id"`
	Tags    map[string]string `json:"tags,omitempty"`
	Arch    string            `json:"arch"` // arm64 or amd64
	OS      string            `json:"os"`   // darwin or linux
	Driver  string            `json:"driver"`
	Version string            `json:"version"`

	Slots  int   `json:"slots"`  // VMs at once; at most two macOS guests per Mac
	CPU    int   `json:"cpu"`    // cores
	Memory int64 `json:"memory"` // bytes
	// DiskFree is what the file system of the image store has left, in bytes.
	DiskFree int64 `json:"disk_free"`
	// PullRate is the measured rate of recent pulls in bytes per second; 0: not measured.
	PullRate int64 `json:"pull_rate,omitempty"`

	Images []NodeImage `json:"images,omitempty"`

	// Site is where the node is: nodes of one site fetch from each other. Empty: the one
	// site of a fleet that names none.
	Site string `json:"site,omitempty"`
	// Peer is where other nodes of the site reach it; zero: it serves nobody.
	Peer NodePeer `json:"peer,omitzero"`

	// Session is random for each start of the agent; (Session, Sequence) orders reports.
	Session  string `json:"session"`
	Sequence int64  `json:"sequence"`

	// Cordoned nodes get nothing new; set by an operator and kept in the ledger.
	Cordoned bool `json:"cordoned,omitempty"`

	// JoinedAt is the first report in this incarnation, SeenAt the last one.
	JoinedAt time.Time `json:"joined_at,omitzero"`
	SeenAt   time.Time `json:"seen_at,omitzero"`

	Rev int64 `json:"-"`
}

// NodePeer is a node's port for other nodes.
type NodePeer struct {
	Address     string `json:"address"`     // host:port
	Certificate string `json:"certificate"` // hex SHA-256 of the certificate it shows
}

// Image returns the node's word on an image; ok is false if it has none.
func (n *Node) Image(d Digest) (NodeImage, bool) {
	for _, i := range n.Images {
		if i.Digest == d {
			return i, true
		}
	}
	return NodeImage{}, false
}

// ImageState is where an image is in its life on one node.
type ImageState string

// The states that a node reports.
const (
	ImageQueued    ImageState = "queued"
	ImageCaching   ImageState = "caching"
	ImagePaused    ImageState = "paused"
	ImageVerifying ImageState = "verifying"
	ImageReady     ImageState = "ready"
	ImageEvicting  ImageState = "evicting"
	ImageFailed    ImageState = "failed"
)

// NodeImage is an image on a node.
type NodeImage struct {
	Digest Digest     `json:"digest"`
	Ref    string     `json:"ref"` // as it was ordered, for people
	State  ImageState `json:"state"`
	// Done and Total are bytes on the wire of the pull under way.
	Done  int64 `json:"done,omitempty"`
	Total int64 `json:"total,omitempty"`
	// DiskBytes is what the image occupies on the node's disk.
	DiskBytes int64 `json:"disk_bytes,omitempty"`
	// Leases counts the VMs and transfers that hold it; a leased image is not evicted.
	Leases int `json:"leases,omitempty"`
	// UsedAt is the last lease, for eviction by recency.
	UsedAt time.Time `json:"used_at,omitzero"`
	// ReadyAt is when it became ready, by the node's clock, for how long it stays at least.
	ReadyAt time.Time `json:"ready_at,omitzero"`
	// Class and Error say why a pull failed; RetryAt when it is tried again.
	Class   string    `json:"class,omitempty"` // auth, not-found, network, disk, digest
	Error   string    `json:"error,omitempty"`
	RetryAt time.Time `json:"retry_at,omitzero"`
	// Start is what the node measured of starting VMs from it; the node's agent adds it.
	Start ImageStart `json:"start,omitzero"`
}

// ImageStart is how soon a VM of an image answers on one node, by the way it starts.
type ImageStart struct {
	// Cold and Saved are running means from clone to the guest's answer, of cold boots and
	// of starts from a saved state; 0: not measured.
	Cold  time.Duration `json:"cold,omitempty"`
	Saved time.Duration `json:"saved,omitempty"`
	// States counts the saved states of the image that no VM uses now.
	States int `json:"states,omitempty"`
}

// Image is an image as the registry describes it: a tag resolved once, centrally.
type Image struct {
	Ref        string    `json:"ref"` // host/repository:tag as configured
	Digest     Digest    `json:"digest"`
	Bytes      int64     `json:"bytes"`      // compressed bytes of its distinct non-zero chunks: one full pull
	DiskBytes  int64     `json:"disk_bytes"` // of the decoded disk
	ResolvedAt time.Time `json:"resolved_at"`
}

// Orders is what the leader wants a node's cache to hold and to let go. Orders about
// VMs are not in it: they follow from the VM records.
type Orders struct {
	Node  NodeID   `json:"node"`
	Hold  []Hold   `json:"hold,omitempty"`  // most urgent first
	Evict []Digest `json:"evict,omitempty"` // may go; the node refuses what is leased
	// Recalled were in Evict and shall stay after all. An answer that still names them may be
	// on its way to the node, so they count as gone until it reports again. Nodes are not
	// told of them.
	Recalled []Digest `json:"recalled,omitempty"`
	Rev      int64    `json:"-"`
}

// Hold asks a node to have an image.
type Hold struct {
	Digest   Digest `json:"digest"`
	Ref      string `json:"ref"` // host/repository:tag; the pull is by Digest
	Priority int    `json:"priority,omitempty"`
	// Demand: a job waits for it; others are pre-warms and wait while it is pulled.
	Demand bool `json:"demand,omitempty"`
	// Why, in words, for events and explain.
	Why string `json:"why,omitempty"`
}
