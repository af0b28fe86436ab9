// Package node is the agent on each Mac: it holds images and lives each virtual
// machine from its clone to its teardown, as the controller orders and its own
// deadlines say.
//
// It decides neither which job runs where nor which image belongs here (placement,
// in the controller) and knows nothing of GitHub. It dials out, by sync and what a pull
// asks, and has no port open but the peers'. It does not move bytes of images (cache) nor
// boot machines by itself (vm/helper); cmd builds it from those and calls Run. This is
// what Run does:
//
//  1. It takes the lock of its directory, so that two agents never share a journal.
//  2. It reads the journal, and each VM in it that was not done is lived on by live:
//     clone, boot (from a saved state where there is one), the guest's answer by the
//     pool's bootstrap, runner, end.
//  3. It removes clones, leases and saved states that no journal entry or image speaks
//     for, and leaves machines alone that none speaks for.
//  4. It syncs: the whole inventory goes out, a reply comes back and is applied. News
//     ends a parked call early; an error is tried again and stops no VM.
//  5. It pulls what the last reply asked to hold, most urgent first.
//  6. It serves other nodes what its image store has, at the peer port (cache/peer), by
//     the controller's time (Clock), and asks the controller for the store's pulls who has
//     what (Site).
//  7. When it is stopped it ends every VM, or leaves them for the next start (Keep).
package node

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"github.com/paddock-ci/paddock/api"
	"github.com/paddock-ci/paddock/cache"
	"github.com/paddock-ci/paddock/fleet"
	"github.com/paddock-ci/paddock/runner/guest/ssh"
	"github.com/paddock-ci/paddock/vm"
)

// Machines is what the agent needs of a driver: machines that outlive the agent.
// *helper.Driver is one.
type Machines interface {
	vm.Driver
	// Adopt finds a machine that an agent before this one booted. It fails with
	// vm.ErrUnknown if there is none; an ended one is a Machine whose Wait returns.
	Adopt(ctx context.Context, id fleet.VMID) (vm.Machine, error)
	// List names the machines of which something is left here.
	List() ([]fleet.VMID, error)
}

// Images is what the agent needs of the image store. *cache.Store is one.
type Images interface {
	// Pull returns when the image is ready here, or with an error. Concurrent calls for
	// one digest share the work; of several images, the store gives way to the one that
	// a job waits for.
	Pull(ctx context.Context, h fleet.Hold) error
	// Lease pins a ready image. The same holder's lease is the same lease, also after a
	// restart; release is idempotent.
	Lease(d fleet.Digest, holder string) (release func() error, err error)
	// Clone makes dir, which must not exist yet, from a leased image; with grow > 0 the
	// disk is enlarged to that many bytes.
	Clone(ctx context.Context, d fleet.Digest, dir string, grow int64) error
	// List is every image here, also those being pulled and those that failed.
	List() []fleet.NodeImage
	// Evict removes an image; it refuses a leased one.
	Evict(d fleet.Digest) error
}

// Sweeper is an Images that can drop the leases of holders that are no more.
type Sweeper interface {
	Sweep(holders []string) error
}

// Changer is an Images that says when its list has changed: the channel is closed then.
type Changer interface {
	Changed() <-chan struct{}
}

// Peer is this node's port for other nodes of its site. *peer.Server is one.
type Peer interface {
	// Run serves until ctx ends, and returns when no transfer is left.
	Run(ctx context.Context)
	// Where is how others reach it, and the certificate by which they know it.
	Where() fleet.NodePeer
	// Trust has it check tokens with this key; before the first it refuses all.
	Trust(key string) error
}

// Config is what an Agent is made of.
type Config struct {
	ID      fleet.NodeID      // required: the name the node joined under
	Tags    map[string]string // none: no selector by tag picks this node
	Slots   int               // VMs at once; 0: 2, what macOS allows a Mac
	CPU     int               // cores offered; 0: those of this host
	Memory  int64             // bytes offered; 0: not said
	Dir     string            // required: holds journal and clones, on the file system of the images
	Driver  string            // the driver's name, for people and selectors; may be empty
	Version string            // of this program; may be empty

	Machines Machines // required
	Images   Images   // required
	// Sync makes one exchange with the controller; required. *api.Client's Sync.
	Sync func(ctx context.Context, r api.SyncRequest) (api.SyncReply, error)
	// Sessions answers people who want to be connected with a VM here; nil: nobody is.
	// *api.Client has it.
	Sessions Sessions
	// Renewed is given a renewed credential to keep; nil: it is dropped.
	Renewed func(credential string) error

	// Keep is asked when the agent is stopped: true leaves VMs running, for its next start
	// to adopt; false, or nil, has them destroyed.
	Keep func() bool

	// SaveStates has VMs start from saved states of machines of their image, which the
	// first VMs make; false: each boots cold, and states of before are removed.
	SaveStates bool
	// CloneFile makes dst, which must not exist, a copy of src of its own, sharing blocks
	// where it can; nil: no states are saved. cache.CloneFile.
	CloneFile func(ctx context.Context, src, dst string) error
	// CanShare reports whether CloneFile's copies share blocks in Dir, so that a state costs
	// no second disk; nil: they do not.
	CanShare func() (bool, error)
	// StateMargin is what must stay free on disk for a state to be saved, in bytes;
	// 0: for each slot what a clone may grow by, as the VMs' pools say.
	StateMargin int64

	// Site is where the node is; "": the one site of a fleet that names none.
	Site string
	// Peer serves other nodes while the agent runs; nil: none are.
	Peer Peer
	// Clock is measured while the agent runs; nil: none is.
	Clock *Clock
	// Limit is told what pulls may move, at each change; nil: nobody is. *cache.Store's.
	Limit func(cache.Limits)
	// Bandwidth is what pulls may move in bytes per second, from anywhere, and BandwidthBusy
	// the same while a VM runs a job; 0: no limit, and the same.
	Bandwidth, BandwidthBusy int64
	// Streams is what the image store has, of which a job leaves half; 0: 8.
	Streams int

	Rate func() int64          // measured bytes per second of pulls; nil: not measured
	Free func() (int64, error) // bytes the images' file system has left; nil: not said
	Wait time.Duration         // how long a sync may be parked; 0: 20 s, the most a controller parks
	Now  func() time.Time      // nil: time.Now
	Log  *slog.Logger          // nil: nothing is logged
}

// Agent is the agent of one node.
type Agent struct {
	c        Config
	log      *slog.Logger
	journal  *journal
	pulls    *puller
	starts   *starts
	states   *states
	saving   sync.Mutex // held while a machine's state is written
	archives *archives
	hostKeys ssh.HostKeys
	session  string
	news     chan struct{} // holds one value while something waits to be reported
	limits   cache.Limits  // told to the store; of the goroutine that syncs, as peerKey
	peerKey  string        // that the peer port trusts

	stopping chan struct{}  // closed when Run is asked to end
	lives    sync.WaitGroup // one per VM that is lived
	short    sync.WaitGroup // evictions and sessions under way

	mu       sync.Mutex
	vms      map[fleet.VMID]*life     // lived ones and those whose end nobody acknowledged
	past     map[fleet.VMID]time.Time // acknowledged as done, and when: never lived again
	waiting  map[fleet.VMID]bool      // ordered beyond the slots, and said so in the log
	will     api.SyncReply            // the last reply
	applied  chan struct{}            // closed and replaced with each reply
	sequence int64
	people   connector
	evicting map[fleet.Digest]bool
	kept     map[fleet.Digest]time.Time // what could not be evicted, and when that was
	names    map[string]fleet.Digest    // what the leader last meant by a reference
	heard    time.Time                  // the last reply, or the start
	free     int64                      // the last good answer of Free
}

// New checks the configuration and makes the agent's directories; nothing runs yet.
func New(c Config) (*Agent, error) {
	if err := fleet.CheckName("node", string(c.ID)); err != nil {
		return nil, err
	}
	switch {
	case c.Dir == "":
		return nil, errors.New("node: no directory: set Dir to one on the images' file system")
	case c.Machines == nil || c.Images == nil || c.Sync == nil:
		return nil, errors.New("node: Machines, Images and Sync are all needed")
	case c.Slots < 0:
		return nil, fmt.Errorf("node: %d slots: use 1 or 2 on a Mac", c.Slots)
	}
	var err error
	if c.Dir, err = filepath.Abs(c.Dir); err != nil { // guests' shares lie in it, which others mount
		return nil, fmt.Errorf("node: %w", err)
	}
	c = withDefaults(c)
	a := &Agent{
		c:        c,
		log:      c.Log.With("node", c.ID),
		session:  rand.Text(),
		news:     make(chan struct{}, 1),
		stopping: make(chan struct{}),
		vms:      map[fleet.VMID]*life{},
		past:     map[fleet.VMID]time.Time{},
		waiting:  map[fleet.VMID]bool{},
		evicting: map[fleet.Digest]bool{},
		kept:     map[fleet.Digest]time.Time{},
		names:    map[string]fleet.Digest{},
		heard:    c.Now(),
		applied:  make(chan struct{}),
		starts:   newStarts(filepath.Join(c.Dir, "starts.json"), c.Log),
	}
	seats := c.Slots
	if !c.SaveStates || c.CloneFile == nil {
		seats = 0
	}
	a.states = newStates(filepath.Join(c.Dir, "states"), seats, c.Now, a.log)
	a.archives = newArchives(filepath.Join(c.Dir, "runners"), c.Now, a.log)
	if err := os.MkdirAll(a.clones(), 0o700); err != nil {
		return nil, fmt.Errorf("making the clones' directory: %w", err)
	}
	if a.journal, err = openJournal(filepath.Join(c.Dir, "journal"), c.ID); err != nil {
		return nil, err
	}
	if a.hostKeys, err = ssh.OpenHostKeys(filepath.Join(c.Dir, "hostkeys")); err != nil {
		return nil, err
	}
	a.pulls = newPuller(c.Images, c.Now, a.tell, a.log)
	return a, nil
}

func withDefaults(c Config) Config {
	if c.Slots == 0 {
		c.Slots = 2
	}
	if c.CPU == 0 {
		c.CPU = runtime.NumCPU()
	}
	if c.Wait == 0 {
		c.Wait = 20 * time.Second
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return c
}

// Run runs the agent until ctx ends, once. It returns an error only if it cannot
// begin: another agent has the directory, or the journal cannot be read.
func (a *Agent) Run(ctx context.Context) error {
	unlock, err := lock(ctx, filepath.Join(a.c.Dir, "lock"))
	if err != nil {
		return err
	}
	defer unlock()

	// The VMs' context ends with a cause of ours, which says whether they are kept.
	lives, end := context.WithCancelCause(context.WithoutCancel(ctx))
	defer end(nil)
	if err := a.resume(lives); err != nil {
		return err
	}

	var parts sync.WaitGroup
	parts.Go(func() { a.pulls.run(ctx) })
	parts.Go(func() { a.watchImages(ctx) })
	if a.c.Peer != nil {
		parts.Go(func() { a.c.Peer.Run(ctx) })
	}
	if a.c.Clock != nil {
		parts.Go(func() { a.c.Clock.Run(ctx) })
	}
	parts.Go(func() { a.sync(ctx, lives) })
	<-ctx.Done()
	parts.Wait()

	close(a.stopping)
	keep := a.c.Keep != nil && a.c.Keep()
	if keep {
		end(errKept)
	} else {
		end(&ending{Reason: "the node's agent was stopped"})
	}
	a.lives.Wait()
	a.short.Wait()
	if !keep {
		a.farewell(ctx)
	}
	return nil
}

// clones is the directory that holds one clone per VM.
func (a *Agent) clones() string { return filepath.Join(a.c.Dir, "clones") }

// tell says that there is something to report, and never blocks.
func (a *Agent) tell() {
	select {
	case a.news <- struct{}{}:
	default:
	}
}
